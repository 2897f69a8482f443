"""Whatever the orientation, a mask written is the mask read, at the same place in the world."""

from __future__ import annotations

import tempfile
from itertools import permutations, product
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from samunet.core.geometry import AxisOperation, Geometry
from samunet.core.volume import Volume
from samunet.imageio import read_geometry, read_labels, read_volume, write_image, write_labels

SHAPE = (3, 4, 5)
ORIENTATIONS = [AxisOperation(p, f) for p in permutations(range(3)) for f in product((False, True), repeat=3)]
LPS_TO_RAS = np.array([-1.0, -1.0, 1.0])

geometries = st.builds(
    lambda angles, spacing, origin: Geometry.from_spacing(
        SHAPE, spacing, directions=np.eye(3)[::-1] @ Rotation.from_euler("xyz", angles).as_matrix().T, origin=origin
    ),
    st.tuples(*[st.floats(-0.7, 0.7)] * 3),
    st.tuples(*[st.floats(0.05, 12)] * 3),
    st.tuples(*[st.floats(-500, 500)] * 3),
)
codes = st.sampled_from([(1, 1), (0, 1), (1, 0), (2, 4), (0, 0), (1, 2)])


def labels_of(geometry: Geometry) -> NDArray[np.uint8]:
    """Labels in which every voxel differs from its neighbours."""
    return np.arange(np.prod(geometry.shape), dtype=np.uint8).reshape(geometry.shape)


def single_precision(geometry: Geometry) -> Geometry:
    """The grid as a NIfTI sform can hold it."""
    return Geometry(geometry.shape, geometry.affine.astype(np.float32).astype(np.float64))


@given(geometry=geometries, forms=codes)
@settings(max_examples=6, deadline=None)
def test_nifti_masks_keep_both_matrices_and_codes_of_the_image(geometry: Geometry, forms: tuple[int, int]) -> None:
    """In all 48 orientations a mask has the image's qform, sform, codes and zooms bit for bit."""
    with tempfile.TemporaryDirectory() as folder:
        for operation in ORIENTATIONS:
            grid = operation.apply_geometry(geometry)
            image = nibabel.Nifti1Image(labels_of(grid).transpose(2, 1, 0).astype(np.float32), grid.affine)
            image.set_qform(grid.affine, code=forms[0])
            image.set_sform(grid.affine, code=forms[1])
            source, target = Path(folder, "image.nii"), Path(folder, "mask.nii")
            nibabel.save(image, source)

            volume = read_volume([source])
            write_labels(target, volume.data[0].astype(np.int64), like=volume)

            before, after = nibabel.load(source), nibabel.load(target)
            for field in ("qform_code", "sform_code", "pixdim", "srow_x", "srow_y", "srow_z", "quatern_b", "qoffset_x"):
                np.testing.assert_array_equal(before.header[field], after.header[field], err_msg=field)
            np.testing.assert_array_equal(before.affine, after.affine)
            np.testing.assert_array_equal(np.asanyarray(after.dataobj).transpose(2, 1, 0), labels_of(grid))
            np.testing.assert_array_equal(read_labels(target).geometry.affine, volume.geometry.affine)


@given(geometry=geometries)
@settings(max_examples=6, deadline=None)
def test_a_new_nifti_holds_the_grid_exactly(geometry: Geometry) -> None:
    """In all 48 orientations, array and sform come back exactly, and no qform disagrees with the sform."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "mask.nii.gz")
        for operation in ORIENTATIONS:
            grid = single_precision(operation.apply_geometry(geometry))
            write_labels(file, labels_of(grid), geometry=grid)
            back = read_labels(file)
            np.testing.assert_array_equal(back.data[0], labels_of(grid))
            np.testing.assert_array_equal(back.geometry.affine, grid.affine)
            assert back.header is not None
            assert back.header.notes == ()
            header = nibabel.load(file).header
            assert int(header["sform_code"]) == 1


@pytest.mark.parametrize("ending", [".nrrd", ".mha"])
@given(geometry=geometries)
@settings(max_examples=4, deadline=None)
def test_simpleitk_formats_keep_array_and_grid(ending: str, geometry: Geometry) -> None:
    """Array exactly and affine to a millionth of a voxel, in all 48 orientations."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, f"mask{ending}")
        for operation in ORIENTATIONS:
            grid = operation.apply_geometry(geometry)
            write_labels(file, labels_of(grid), geometry=grid)
            back = read_labels(file)
            np.testing.assert_array_equal(back.data[0], labels_of(grid))
            assert grid.corner_distance_vox(back.geometry) < 1e-6
            np.testing.assert_array_equal(read_geometry(file).affine, back.geometry.affine)


@pytest.mark.parametrize("ending", [".nii.gz", ".nrrd", ".mha"])
@given(geometry=geometries, voxel=st.tuples(*[st.integers(0, n - 1) for n in SHAPE]))
@settings(max_examples=25, deadline=None)
def test_simpleitk_sees_every_voxel_at_the_same_place(
    ending: str, geometry: Geometry, voxel: tuple[int, int, int]
) -> None:
    """SimpleITK, as an oracle, finds a marked voxel where our geometry says it lies, in every format."""
    data = np.zeros((1, *SHAPE), dtype=np.float32)
    data[(0, *voxel)] = 7
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, f"image{ending}")
        write_image(file, Volume(data, geometry))
        image = SimpleITK.ReadImage(str(file))
    place = np.argwhere(SimpleITK.GetArrayFromImage(image) == 7)
    assert place.tolist() == [list(voxel)]
    lps = np.array(image.TransformIndexToPhysicalPoint([int(n) for n in place[0][::-1]]))
    gap = np.linalg.norm(lps * LPS_TO_RAS - geometry.to_world(voxel))
    assert gap < 1e-3 * min(geometry.spacing) + 1e-4
