"""Surface distances against hand-computed cases and against brute force."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.ndimage import distance_transform_edt

from samunet.evaluation.surface import (
    SurfaceDistances,
    average_distance,
    hausdorff,
    hausdorff_95,
    surface_dice,
    surface_distances,
    surface_voxels,
)

SPACING = (3.0, 0.5, 0.8)


def box(start: tuple[int, int, int], size: tuple[int, int, int], shape: tuple[int, int, int]) -> np.ndarray:
    mask = np.zeros(shape, dtype=bool)
    mask[tuple(slice(a, a + n) for a, n in zip(start, size, strict=True))] = True
    return mask


def brute_force_surface(mask: np.ndarray) -> np.ndarray:
    """Points of the surface by looking at every face neighbour of every voxel."""
    points = []
    for point in np.argwhere(mask):
        for axis in range(3):
            if mask.shape[axis] == 1:
                continue
            for step in (-1, 1):
                near = point.copy()
                near[axis] += step
                outside = not 0 <= near[axis] < mask.shape[axis]
                if outside or not mask[tuple(near)]:
                    points.append(tuple(point))
    return np.array(sorted(set(points)))


def brute_force_distances(a: np.ndarray, b: np.ndarray, spacing: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray]:
    """All pairs of surface points."""
    first, second = (brute_force_surface(m) * np.array(spacing) for m in (a, b))
    table = np.linalg.norm(first[:, None] - second[None], axis=2)
    return table.min(axis=1), table.min(axis=0)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("shift", [1, 2])
def test_shifted_boxes(axis: int, shift: int) -> None:
    """A box shifted by n voxels along one axis has HD and HD95 of n spacings, whatever the axis."""
    start = [4, 4, 4]
    start[axis] += shift
    a, b = box((4, 4, 4), (5, 5, 5), (16, 16, 16)), box(tuple(start), (5, 5, 5), (16, 16, 16))
    distances = surface_distances(a, b, SPACING)
    assert hausdorff(distances) == pytest.approx(shift * SPACING[axis])
    assert hausdorff_95(distances) == pytest.approx(shift * SPACING[axis])
    assert 0 < average_distance(distances) < shift * SPACING[axis]
    assert surface_dice(distances, shift * SPACING[axis]) == 1.0
    assert surface_dice(distances, 1e-3) < 1.0


def test_single_voxels_by_hand() -> None:
    """Two single voxels two slices and one column apart."""
    a, b = box((1, 1, 1), (1, 1, 1), (6, 6, 6)), box((3, 1, 2), (1, 1, 1), (6, 6, 6))
    distances = surface_distances(a, b, SPACING)
    expected = np.hypot(6.0, 0.8)
    assert distances.from_reference.tolist() == pytest.approx([expected])
    assert [f(distances) for f in (hausdorff, hausdorff_95, average_distance)] == pytest.approx([expected] * 3)


def test_scores_of_given_distances() -> None:
    """HD is the largest, HD95 the larger directed percentile, ASSD the pooled mean, NSD the pooled fraction."""
    distances = SurfaceDistances(np.arange(101, dtype=float), np.zeros(99))
    assert hausdorff(distances) == 100
    assert hausdorff_95(distances) == 95
    assert average_distance(distances) == pytest.approx(5050 / 200)
    assert surface_dice(distances, 10) == pytest.approx((11 + 99) / 200)


def test_tolerance_equal_to_a_distance_counts_despite_float32_spacing() -> None:
    """A spacing that went through float32 does not push a distance out of the tolerance."""
    a, b = box((1, 1, 1), (1, 1, 1), (4, 4, 4)), box((1, 1, 2), (1, 1, 1), (4, 4, 4))
    assert surface_dice(surface_distances(a, b, (1.0, 1.0, 0.7 + 3e-8)), 0.7) == 1.0


@pytest.mark.parametrize("far", [False, True])
def test_against_the_distance_transform(far: bool) -> None:
    """Equal to looking the distance transform of the whole image up at the surface, stray voxels included."""
    z, y, x = np.ogrid[:20, :40, :36]
    a = ((z - 9) / 6) ** 2 + ((y - 20) / 15) ** 2 + ((x - 17) / 12) ** 2 < 1
    b = np.roll(a, (1, 3), axis=(0, 1)) & (x != 20)
    b[0, 0, 0] = b[-1, -1, -1] = far
    distances = surface_distances(a, b, SPACING)
    first, second = surface_voxels(a), surface_voxels(b)
    to_b, to_a = (distance_transform_edt(~s, sampling=SPACING) for s in (second, first))
    np.testing.assert_allclose(distances.from_reference, to_b[first], atol=1e-9)
    np.testing.assert_allclose(distances.from_prediction, to_a[second], atol=1e-9)


@pytest.mark.parametrize("seed", range(6))
def test_against_brute_force(seed: int) -> None:
    """Cropping and the search tree change nothing: equal to all pairs of points, also at the border."""
    generator = np.random.default_rng(seed)
    shape = tuple(int(n) for n in generator.integers(3, 9, size=3))
    spacing = tuple(float(s) for s in generator.uniform(0.3, 4.0, size=3))
    a, b = (generator.random(shape) < density for density in (0.5, 0.15))
    a[0, 0, 0] = b[-1, -1, -1] = True
    distances = surface_distances(a, b, spacing)
    first, second = brute_force_distances(a, b, spacing)
    np.testing.assert_allclose(distances.from_reference, first, atol=1e-9)
    np.testing.assert_allclose(distances.from_prediction, second, atol=1e-9)


def test_small_objects_in_a_large_image_against_brute_force() -> None:
    """The crop around both masks gives what the whole image gives."""
    a, b = box((5, 9, 3), (2, 3, 4), (30, 30, 30)), box((7, 8, 6), (3, 3, 3), (30, 30, 30))
    distances = surface_distances(a, b, SPACING)
    first, second = brute_force_distances(a, b, SPACING)
    np.testing.assert_allclose(distances.from_reference, first, atol=1e-9)
    np.testing.assert_allclose(distances.from_prediction, second, atol=1e-9)


def test_surface_of_a_cube_is_its_shell() -> None:
    """5^3 voxels have a 3^3 inside; at the image border too, where beyond counts as outside."""
    assert surface_voxels(box((2, 2, 2), (5, 5, 5), (9, 9, 9))).sum() == 125 - 27
    assert surface_voxels(np.ones((5, 5, 5), dtype=bool)).sum() == 125 - 27


def test_surface_in_one_slice_is_the_contour() -> None:
    """In a 2D image a mask's inside is no surface; in one slice of a volume every voxel is."""
    square = box((0, 2, 2), (1, 5, 5), (1, 9, 9))
    assert surface_voxels(square).sum() == 16
    assert surface_voxels(np.concatenate([square, np.zeros_like(square)])).sum() == 25


def test_an_image_of_one_voxel() -> None:
    """Where no voxel has a neighbour, the mask is its own surface."""
    one = np.ones((1, 1, 1), dtype=bool)
    assert hausdorff(surface_distances(one, one, SPACING)) == 0.0


def test_empty_masks_are_refused() -> None:
    """Policy, not this function, decides about empty masks."""
    with pytest.raises(ValueError, match="not empty"):
        surface_distances(np.zeros((2, 2, 2), bool), np.ones((2, 2, 2), bool), SPACING)
