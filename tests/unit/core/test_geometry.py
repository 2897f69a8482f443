"""Voxel grids in the world and the axis operations between them."""

from __future__ import annotations

from itertools import permutations, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from samunet.core.errors import GeometryError
from samunet.core.geometry import AxisOperation, Geometry, canonical_operation, code_directions

OPERATIONS = [AxisOperation(p, f) for p in permutations(range(3)) for f in product((False, True), repeat=3)]


def oblique(seed: int, shape=(4, 5, 6), spacing=(3.0, 1.5, 1.0)) -> Geometry:
    """A grid with random directions and origin."""
    rng = np.random.default_rng(seed)
    turn = Rotation.random(random_state=seed).as_matrix()
    return Geometry.from_spacing(shape, spacing, directions=turn, origin=rng.uniform(-50, 50, 3).tolist())


@given(st.sampled_from(OPERATIONS), st.integers(0, 1000))
def test_an_operation_moves_array_and_grid_together(operation: AxisOperation, seed: int):
    """Every voxel keeps its value and its place in the world, and the inverse restores the array."""
    geometry = oblique(seed)
    array = np.random.default_rng(seed).normal(size=(2, *geometry.shape))
    moved, grid = operation.apply(array), operation.apply_geometry(geometry)
    assert moved.shape[1:] == grid.shape
    assert np.array_equal(operation.invert(moved), array)
    indices = np.argwhere(np.ones(grid.shape, bool))
    sources = np.rint(geometry.to_voxel(grid.to_world(indices))).astype(int)
    assert np.array_equal(moved[0][tuple(indices.T)], array[0][tuple(sources.T)])
    assert operation.inverse().apply_geometry(grid).matches(geometry)


@given(st.integers(0, 1000))
def test_world_and_voxel_are_inverse(seed: int):
    """Points survive the way to the world and back."""
    geometry = oblique(seed)
    points = np.random.default_rng(seed).uniform(-5, 20, (7, 3))
    assert np.allclose(geometry.to_voxel(geometry.to_world(points)), points)
    assert geometry.spacing == pytest.approx((3.0, 1.5, 1.0))


def test_codes_and_axes_are_named_per_array_axis():
    """X to the right, Y to the front, Z up reads S, A, R in array order; flips change letters."""
    geometry = Geometry.from_spacing((2, 3, 4), (1, 1, 1))
    assert geometry.codes == ("S", "A", "R")
    assert geometry.anatomical_axes == ("superior-inferior", "anterior-posterior", "left-right")
    flipped = AxisOperation((2, 0, 1), (True, False, False)).apply_geometry(geometry)
    assert flipped.codes == ("L", "S", "A")
    assert np.array_equal(code_directions(("L", "S", "A")), flipped.directions)


@given(st.sampled_from(OPERATIONS), st.integers(0, 2), st.floats(-12, 12))
def test_every_storage_of_a_scan_reaches_the_same_frame(operation: AxisOperation, slice_axis: int, tilt: float):
    """However a scan is stored, the canonical operation gives the same grid."""
    turn = Rotation.from_euler("xyz", [tilt, -tilt, tilt], degrees=True).as_matrix()
    scan = Geometry.from_spacing((4, 6, 8), (3.0, 1.0, 1.0), directions=code_directions(("S", "A", "R")) @ turn.T)
    stored = operation.apply_geometry(scan)

    def canonical(geometry: Geometry) -> Geometry:
        found = canonical_operation(
            geometry, reference_codes=("S", "A", "R"), reference_spacing=(3.0, 1.0, 1.0), slice_axis=slice_axis
        )
        return found.apply_geometry(geometry)

    assert canonical(stored).matches(canonical(scan))


def test_thick_slices_never_become_in_plane():
    """A scan acquired across another anatomical axis keeps its own thick slices first."""
    coronal = Geometry.from_spacing((9, 20, 20), (8.0, 1.3, 1.3), directions=code_directions(("A", "I", "L")))
    sagittal = Geometry.from_spacing((9, 20, 20), (8.0, 1.3, 1.3), directions=code_directions(("L", "I", "P")))
    operation = canonical_operation(
        sagittal, reference_codes=coronal.codes, reference_spacing=coronal.spacing, slice_axis=0
    )
    assert operation.apply_geometry(sagittal).spacing == pytest.approx((8.0, 1.3, 1.3))


@pytest.mark.parametrize(
    ("affine", "words"),
    [
        (np.full((4, 4), np.nan), "finite"),
        (np.diag([1.0, 1.0, 0.0, 1.0]), "singular"),
        (np.diag([0.0, 0.0, 0.0, 1.0]), "singular"),
        (np.array([[5.0, 5.0, 0, 0], [5, 5, 0, 0], [0, 0, 999, 0], [0, 0, 0, 1]]), "singular"),
        (np.vstack([np.eye(4)[:3], [0, 0, 1, 1]]), "last row"),
    ],
)
def test_impossible_affines_are_refused(affine: np.ndarray, words: str):
    """Construction validates, so no stage meets a bad affine later."""
    with pytest.raises(GeometryError, match=words):
        Geometry((2, 2, 2), affine)


def test_cropping_keeps_voxels_in_place():
    """The grid of a crop starts where its first voxel was."""
    geometry = oblique(3)
    cropped = geometry.crop((1, 2, 3), (4, 5, 5))
    assert cropped.shape == (3, 3, 2)
    assert np.allclose(cropped.to_world((0, 0, 0)), geometry.to_world((1, 2, 3)))


def test_voxels_of_any_size_are_a_grid():
    """Only the angles between the axes decide whether an affine is singular: microscopes have voxels of nanometres."""
    grid = oblique(5, spacing=(4e-5, 4e-6, 4e-6))
    assert grid.spacing == pytest.approx((4e-5, 4e-6, 4e-6))
    assert np.allclose(grid.to_voxel(grid.to_world((1, 2, 3))), (1, 2, 3))
    skewed = np.diag([4e-6, 4e-6, 4e-6, 1.0])
    skewed[:3, 1] = skewed[:3, 0]
    with pytest.raises(GeometryError, match="singular"):
        Geometry((2, 2, 2), skewed)
