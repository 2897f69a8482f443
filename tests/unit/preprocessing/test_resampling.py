"""Resampling against the library calls it is defined by, and against known fields."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.ndimage import map_coordinates
from skimage.transform import resize

from samunet.preprocessing.resampling import (
    resample_image,
    resample_labels,
    resampled_shape,
    separate_axis,
    target_spacing,
)


@pytest.fixture
def image() -> np.ndarray:
    return np.random.default_rng(2).normal(size=(2, 7, 12, 10)).astype(np.float32)


def test_shape_rounds_the_extent_half_to_even() -> None:
    """Sizes are round(old spacing / new spacing * size), and None keeps an axis."""
    assert resampled_shape((10, 20, 30), (3.0, 1.0, 1.0), (None, 0.5, 2.0)) == (10, 40, 15)
    assert resampled_shape((5, 5, 7), (1.0, 1.0, 1.0), (2.0, 2.0, 2.0)) == (2, 2, 4)
    assert resampled_shape((1, 1, 1), (1.0, 1.0, 1.0), (9.0, 9.0, 9.0)) == (1, 1, 1)
    assert target_spacing((3, 1, 1), (None, 0.5, 2)) == (3.0, 0.5, 2.0)


@pytest.mark.parametrize(
    ("before", "after", "axis"),
    [
        ((1.0, 1.0, 1.0), (1.0, 1.0, 1.0), None),
        ((3.0, 1.0, 1.0), (3.0, 1.0, 1.0), None),
        ((3.1, 1.0, 1.0), (1.0, 1.0, 1.0), 0),
        ((1.0, 1.0, 1.0), (1.0, 5.0, 1.0), 1),
        ((1.0, 1.0, 4.0), (9.0, 1.0, 1.0), 2),
        ((0.2, 1.2, 1.2), (9.0, 1.0, 1.0), None),
        ((999.0, 1.0, 1.0), (None, 0.5, 0.5), 0),
    ],
)
def test_axis_kept_separate(before: tuple[float, ...], after: tuple[float | None, ...], axis: int | None) -> None:
    """More than threefold anisotropy separates the coarsest axis, the grid before deciding first."""
    assert separate_axis(before, after) == axis


def test_isotropic_images_are_resized_with_cubic_splines(image: np.ndarray) -> None:
    """Each channel equals one cubic resize of the volume in float64."""
    result = resample_image(image, (9, 8, 15), (1.0, 1.0, 1.0), (0.8, 1.5, 0.7))
    assert result.dtype == np.float32
    for channel in range(2):
        wanted = resize(image[channel].astype(float), (9, 8, 15), order=3, mode="edge", anti_aliasing=False)
        np.testing.assert_allclose(result[channel], wanted, atol=1e-6)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("size", [3, 5, 7, 13, 14])
def test_thick_slices_are_resized_in_plane_and_picked_across(image: np.ndarray, axis: int, size: int) -> None:
    """Equals a cubic resize of every plane, then nearest neighbours along the coarse axis, for every axis."""
    spacing = [1.0, 1.0, 1.0]
    spacing[axis] = 5.0
    source = np.moveaxis(image[0], 0, axis)
    shape = [9, 9, 9]
    shape[axis] = size
    result = np.moveaxis(resample_image(source[np.newaxis], shape, spacing, (1.0, 1.0, 1.0))[0], axis, 0)

    planes = [resize(plane.astype(float), (9, 9), order=3, mode="edge", anti_aliasing=False) for plane in image[0]]
    grid = np.mgrid[:size, :9, :9].astype(float)
    grid[0] = 7 / size * (grid[0] + 0.5) - 0.5
    wanted = map_coordinates(np.stack(planes), grid, order=0, mode="nearest")
    np.testing.assert_allclose(result, wanted, atol=1e-6)


def test_same_shape_is_an_exact_copy(image: np.ndarray) -> None:
    """Nothing is interpolated where the shape stays, and the result is independent of the input."""
    result = resample_image(image, image.shape[1:], (5.0, 1.0, 1.0), (None, 1.0, 1.0))
    np.testing.assert_array_equal(result, image)
    labels = np.arange(8).reshape(2, 2, 2)
    copied = resample_labels(labels, (2, 2, 2), (1, 1, 1), (1, 1, 1))
    copied[:] = 0
    assert labels.max() == 7


def test_integer_images_are_resampled_in_floating_point() -> None:
    """An int16 ramp becomes the finer ramp, not a staircase."""
    ramp = np.broadcast_to(np.arange(40, dtype=np.int16) * 10, (1, 4, 4, 40))
    result = resample_image(ramp, (4, 4, 80), (1.0, 1.0, 1.0), (1.0, 1.0, 0.5))
    wanted = ((np.arange(80) + 0.5) / 2 - 0.5) * 10
    np.testing.assert_allclose(result[0, 0, 0, 10:-10], wanted[10:-10], atol=0.05)


def test_labels_keep_their_values_and_never_mix() -> None:
    """Upsampling labels 0 and 7 never makes a label in between, and keeps type and half-voxel alignment."""
    labels = np.zeros((6, 6, 6), np.int16)
    labels[2:4, 2:4, 2:4] = 7
    result = resample_labels(labels, (12, 12, 12), (1.0, 1.0, 1.0), (0.5, 0.5, 0.5))
    assert result.dtype == np.int16
    assert set(np.unique(result)) == {0, 7}
    centre = np.argwhere(result == 7).mean(axis=0)
    np.testing.assert_allclose(centre, (2.5 + 0.5) * 2 - 0.5)


def test_labels_are_blended_linearly_before_they_are_decided() -> None:
    """A voxel takes the label whose linear blend is largest there, which is not always the nearest voxel's."""
    labels = np.random.default_rng(3).choice(np.array([0, 1, 2, 3], np.int16), size=(4, 5, 6))
    result = resample_labels(labels, (7, 8, 9), (1.0, 1.0, 1.0), (0.6, 0.6, 0.6))
    parts = [
        resize((labels == value).astype(float), (7, 8, 9), order=1, mode="edge", anti_aliasing=False)
        for value in range(4)
    ]
    _, second, first = np.sort(parts, axis=0)[-3:]
    clear = first - second > 1e-6
    assert clear.mean() > 0.8
    np.testing.assert_array_equal(result[clear], np.argmax(parts, axis=0)[clear])
    nearest = resize(labels.astype(float), (7, 8, 9), order=0, mode="edge", anti_aliasing=False)
    assert (result != nearest)[clear].any()


def test_labels_of_thick_slices_stay_in_their_slice() -> None:
    """With one coarse axis, a structure of one slice is picked, not blended away."""
    labels = np.zeros((4, 8, 8), np.int16)
    labels[1] = 3
    result = resample_labels(labels, (8, 16, 16), (6.0, 1.0, 1.0), (3.0, 0.5, 0.5))
    np.testing.assert_array_equal(np.unique(np.nonzero(result)[0]), [2, 3])
    assert (result[2:4] == 3).all()
