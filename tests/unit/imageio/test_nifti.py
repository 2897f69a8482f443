"""NIfTI: which matrix counts, what a mask inherits, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

from samunet.core.errors import DataError
from samunet.core.geometry import Geometry
from samunet.imageio import read_geometry, read_labels, read_volume, write_labels

AFFINE = np.diag([1.5, 1.2, 3.0, 1.0])


def save(file: Path, data: np.ndarray[Any, Any], **header: Any) -> Path:
    """Write a NIfTI file with header fields set by name."""
    image = nibabel.Nifti1Image(data, AFFINE)
    for name, value in header.items():
        image.header[name] = value
    nibabel.save(image, file)
    return file


def test_arrays_are_z_y_x(tmp_path: Path) -> None:
    """Voxel (i, j, k) of the file is voxel [0, k, j, i] in memory, and spacing follows."""
    data = np.zeros((5, 4, 3), dtype=np.int16)
    data[4, 2, 1] = 9
    volume = read_volume([save(tmp_path / "a.nii", data)])
    assert volume.data.shape == (1, 3, 4, 5)
    assert volume.data[0, 1, 2, 4] == 9
    assert volume.data.dtype == np.float32
    assert volume.geometry.spacing == pytest.approx((3.0, 1.2, 1.5))


def test_scaled_intensities_are_applied(tmp_path: Path) -> None:
    """Slope and intercept of the header change what is read, and are gone from a mask."""
    file = tmp_path / "a.nii"
    image = nibabel.Nifti1Image(np.full((5, 4, 3), 10, dtype=np.int16), AFFINE)
    image.header.set_slope_inter(0.5, -3)
    image.header["cal_max"] = 77
    image.header.set_intent("estimate", (), "heat")
    nibabel.save(image, file)
    volume = read_volume([file])
    assert float(volume.data.max()) == pytest.approx(2.0)
    write_labels(tmp_path / "m.nii", np.full((3, 4, 5), 3), like=volume)
    mask = nibabel.load(tmp_path / "m.nii")
    assert mask.get_data_dtype() == np.uint8
    assert np.unique(np.asanyarray(mask.dataobj)).tolist() == [3]
    assert mask.header["cal_max"] == 0
    assert mask.header.get_intent()[0] == "none"
    assert mask.dataobj.slope == 1
    assert mask.dataobj.inter == 0


@pytest.mark.parametrize(("top", "kind"), [(255, np.uint8), (256, np.uint16), (70_000, np.uint32)])
def test_masks_take_the_smallest_type(tmp_path: Path, top: int, kind: type) -> None:
    """The largest label decides on the stored type and survives."""
    labels = np.zeros((3, 4, 5), dtype=np.int64)
    labels[0, 0, 0] = top
    write_labels(tmp_path / "m.nii.gz", labels, geometry=Geometry((3, 4, 5), AFFINE))
    assert nibabel.load(tmp_path / "m.nii.gz").get_data_dtype() == kind
    assert int(read_labels(tmp_path / "m.nii.gz").data.max()) == top


def test_forms_that_disagree_are_noted(tmp_path: Path) -> None:
    """Verification hears about it when qform and sform differ by more than 0.1 voxel; the sform counts."""
    image = nibabel.Nifti1Image(np.zeros((5, 4, 3), dtype=np.int16), AFFINE)
    moved = AFFINE.copy()
    moved[0, 3] = 0.5
    image.set_sform(AFFINE, code=1)
    image.set_qform(moved, code=1)
    nibabel.save(image, tmp_path / "a.nii")
    volume = read_volume([tmp_path / "a.nii"])
    assert volume.header is not None
    assert "qform and sform differ" in volume.header.notes[0]
    np.testing.assert_allclose(volume.geometry.affine, AFFINE, atol=1e-6)

    moved[0, 3] = 0.05
    image.set_qform(moved, code=1)
    nibabel.save(image, tmp_path / "b.nii")
    near = read_volume([tmp_path / "b.nii"])
    assert near.header is not None
    assert near.header.notes == ()


def test_lengths_in_other_units_are_noted(tmp_path: Path) -> None:
    """A header that says microns is read as millimetres, and says so."""
    volume = read_volume([save(tmp_path / "a.nii", np.zeros((5, 4, 3), dtype=np.int16), xyzt_units=3)])
    assert volume.header is not None
    assert any("micron" in note for note in volume.header.notes)


def test_four_axes_are_refused_unless_the_last_is_single(tmp_path: Path) -> None:
    """A time series is no volume; a single time point is, and its mask has three axes."""
    with pytest.raises(DataError, match="more than three axes"):
        read_volume([save(tmp_path / "t.nii", np.zeros((5, 4, 3, 2), dtype=np.int16))])
    with pytest.raises(DataError, match="more than three axes"):
        read_geometry(tmp_path / "t.nii")
    volume = read_volume([save(tmp_path / "s.nii", np.zeros((5, 4, 3, 1), dtype=np.int16))])
    assert volume.data.shape == (1, 3, 4, 5)
    write_labels(tmp_path / "m.nii", np.ones((3, 4, 5), dtype=np.uint8), like=volume)
    assert nibabel.load(tmp_path / "m.nii").shape == (5, 4, 3)


def test_complex_and_colour_voxels_are_refused(tmp_path: Path) -> None:
    """They would silently lose a part."""
    with pytest.raises(DataError, match="real numbers"):
        read_volume([save(tmp_path / "c.nii", np.zeros((5, 4, 3), dtype=np.complex64))])


def test_sheared_grids_are_written_without_a_wrong_qform(tmp_path: Path) -> None:
    """A qform cannot shear: it is left unset instead of disagreeing with the sform."""
    affine = AFFINE.copy()
    affine[0, 1] = 0.4
    write_labels(tmp_path / "m.nii", np.zeros((3, 4, 5), dtype=np.uint8), geometry=Geometry((3, 4, 5), affine))
    back = read_labels(tmp_path / "m.nii")
    assert back.header is not None
    assert back.header.notes == ()
    np.testing.assert_allclose(back.geometry.affine, affine, rtol=1e-6)


def test_a_moved_volume_does_not_keep_its_old_header(tmp_path: Path) -> None:
    """The volume's geometry counts where the header it carries says something else."""
    volume = read_volume([save(tmp_path / "a.nii", np.zeros((5, 4, 3), dtype=np.int16))])
    moved = type(volume)(volume.data[:, 1:], volume.geometry.crop((1, 0, 0), (3, 4, 5)), volume.header)
    write_labels(tmp_path / "m.nii", np.zeros((2, 4, 5), dtype=np.uint8), like=moved)
    np.testing.assert_allclose(read_geometry(tmp_path / "m.nii").affine, moved.geometry.affine, atol=1e-6)


def test_nifti_2_stays_nifti_2(tmp_path: Path) -> None:
    """A NIfTI-2 image is read, and its mask is NIfTI-2 with the same grid."""
    nibabel.save(nibabel.Nifti2Image(np.zeros((5, 4, 3), dtype=np.int16), AFFINE), tmp_path / "a.nii.gz")
    volume = read_volume([tmp_path / "a.nii.gz"])
    write_labels(tmp_path / "m.nii.gz", np.zeros((3, 4, 5), dtype=np.uint8), like=volume)
    assert isinstance(nibabel.load(tmp_path / "m.nii.gz"), nibabel.Nifti2Image)
    np.testing.assert_array_equal(read_geometry(tmp_path / "m.nii.gz").affine, volume.geometry.affine)
