"""Volumes of several files, label maps, and conversions between formats."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK

from samunet.core.errors import DataError, UsageError
from samunet.core.geometry import Geometry
from samunet.core.volume import Volume
from samunet.imageio import read_geometry, read_labels, read_volume, write_image, write_labels

GRID = Geometry.from_spacing((3, 4, 5), (3.0, 1.0, 1.0), origin=(5.0, 6.0, 7.0))


def write(file: Path, value: float, *, shift_mm: float = 0.0) -> Path:
    """A constant image, moved along x."""
    affine = GRID.affine.copy()
    affine[0, 3] += shift_mm
    write_image(file, Volume(np.full((1, *GRID.shape), value, np.float32), Geometry(GRID.shape, affine)))
    return file


def test_channels_are_stacked_in_order(tmp_path: Path) -> None:
    """One file per channel becomes (C, Z, Y, X), across formats."""
    volume = read_volume([write(tmp_path / "a.nii.gz", 1), write(tmp_path / "b.mha", 2), write(tmp_path / "c.nrrd", 3)])
    assert volume.data.shape == (3, 3, 4, 5)
    assert volume.data[:, 0, 0, 0].tolist() == [1, 2, 3]
    assert volume.header is not None
    assert volume.header.format == "nifti"


def test_channels_on_other_grids_are_refused(tmp_path: Path) -> None:
    """More than a tenth of a voxel is an error, rounding noise is nothing, and in between is a note."""
    first = write(tmp_path / "a.nii", 1)
    with pytest.raises(DataError, match="different places") as caught:
        read_volume([first, write(tmp_path / "b.nii", 1, shift_mm=0.3)], case="case_1")
    assert caught.value.case == "case_1"
    noted = read_volume([first, write(tmp_path / "c.nii", 1, shift_mm=0.05)])
    assert noted.header is not None
    assert "c.nii" in noted.header.notes[0]
    silent = read_volume([first, write(tmp_path / "d.nii", 1, shift_mm=0.001)])
    assert silent.header is not None
    assert silent.header.notes == ()


def test_channels_of_other_shapes_are_refused(tmp_path: Path) -> None:
    """The message names both shapes."""
    other = Geometry.from_spacing((3, 4, 6), (3.0, 1.0, 1.0), origin=(5.0, 6.0, 7.0))
    write_image(tmp_path / "b.nii", Volume(np.zeros((1, *other.shape), np.float32), other))
    with pytest.raises(DataError) as caught:
        read_volume([write(tmp_path / "a.nii", 1), tmp_path / "b.nii"])
    assert caught.value.expected == "(3, 4, 5)"
    assert caught.value.found == "(3, 4, 6)"


def test_whole_float_labels_are_accepted_and_others_refused(tmp_path: Path) -> None:
    """Labels stored as floats are fine if whole; interpolated or missing values are not."""
    assert read_labels(write(tmp_path / "a.nii", 4.0)).data.dtype == np.int16
    assert int(read_labels(write(tmp_path / "b.nii", 100_000.0)).data.max()) == 100_000
    for value in (1.5, float("nan"), float("inf")):
        with pytest.raises(DataError):
            read_labels(write(tmp_path / "c.nii", value))


def test_colour_label_maps_are_refused(tmp_path: Path) -> None:
    """Three channels cannot be label values."""
    grid = Geometry.from_spacing((1, 4, 5), (999.0, 1.0, 1.0))
    write_image(tmp_path / "a.png", Volume(np.zeros((3, 1, 4, 5), np.uint8), grid))
    with pytest.raises(DataError, match="one channel"):
        read_labels(tmp_path / "a.png")


@pytest.mark.parametrize("ending", [".nii", ".nii.gz", ".nrrd", ".mha"])
def test_masks_follow_an_image_of_another_format(tmp_path: Path, ending: str) -> None:
    """A mask lies where its image lies, whatever the two formats; a new NIfTI has scanner codes."""
    volume = read_volume([write(tmp_path / "a.mha", 1)])
    write_labels(tmp_path / f"m{ending}", np.ones(GRID.shape, np.uint8), like=volume)
    assert GRID.matches(read_geometry(tmp_path / f"m{ending}"), tolerance_vox=1e-6)
    if ending.startswith(".nii"):
        header = nibabel.load(tmp_path / f"m{ending}").header
        assert (int(header["qform_code"]), int(header["sform_code"])) == (1, 1)


@pytest.mark.parametrize("ending", [".nii", ".nii.gz", ".nrrd", ".mha"])
def test_masks_have_as_many_axes_as_their_image(tmp_path: Path, ending: str) -> None:
    """A flat image has a flat mask on its very grid; an image of one slice keeps its third axis."""
    for name, shape in (("flat", (4, 5)), ("slice", (1, 4, 5))):
        image = SimpleITK.GetImageFromArray(np.zeros(shape, np.int16))
        image.SetSpacing((0.5, 0.7, 3.0)[: len(shape)])
        image.SetOrigin((30.0, 40.0, 50.0)[: len(shape)])
        source, target = tmp_path / f"{name}{ending}", tmp_path / f"{name}_mask{ending}"
        SimpleITK.WriteImage(image, str(source))
        volume = read_volume([source])
        labels = np.arange(20).reshape(1, 4, 5)
        write_labels(target, labels, like=volume)
        mask, back = SimpleITK.ReadImage(str(target)), read_labels(target)
        for question in ("GetSize", "GetSpacing", "GetOrigin", "GetDirection"):
            assert getattr(mask, question)() == pytest.approx(getattr(image, question)()), question
        if ending.startswith(".nii"):
            assert nibabel.load(target).shape == nibabel.load(source).shape
        np.testing.assert_array_equal(back.data[0], labels)
        np.testing.assert_array_equal(back.geometry.affine, volume.geometry.affine)


@pytest.mark.parametrize("ending", [".nrrd", ".mha"])
def test_a_flat_image_that_was_turned_has_three_axes(tmp_path: Path, ending: str) -> None:
    """Two axes cannot say where a slice outside of the plane z = 0 lies."""
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(np.zeros((4, 5), np.int16)), str(tmp_path / f"a{ending}"))
    volume = read_volume([tmp_path / f"a{ending}"])
    affine = volume.geometry.affine.copy()
    affine[2, 3] = 12
    raised = Volume(volume.data, Geometry(volume.geometry.shape, affine), volume.header)
    write_labels(tmp_path / f"m{ending}", np.ones((1, 4, 5), np.uint8), like=raised)
    assert raised.geometry.matches(read_geometry(tmp_path / f"m{ending}"))


@pytest.mark.parametrize("ending", [".nrrd", ".mha"])
def test_vector_pixels_are_channels(tmp_path: Path, ending: str) -> None:
    """SimpleITK's formats keep several channels in one file."""
    data = np.random.default_rng(0).normal(size=(2, *GRID.shape)).astype(np.float32)
    write_image(tmp_path / f"a{ending}", Volume(data, GRID))
    np.testing.assert_array_equal(read_volume([tmp_path / f"a{ending}"]).data, data)


def test_writing_refuses_what_cannot_be_a_mask(tmp_path: Path) -> None:
    """Negative values, fractions, a wrong shape, no grid: refused, and no file appears."""
    file = tmp_path / "m.nii"
    for labels in (np.full(GRID.shape, -1), np.full(GRID.shape, 0.5), np.zeros((3, 4, 4), int)):
        with pytest.raises(DataError):
            write_labels(file, labels, geometry=GRID)
    with pytest.raises(UsageError):
        write_labels(file, np.zeros(GRID.shape, int))
    with pytest.raises(DataError, match="one channel"):
        write_image(file, Volume(np.zeros((2, *GRID.shape), np.float32), GRID))
    assert list(tmp_path.iterdir()) == []


def test_masks_replace_whole_files(tmp_path: Path) -> None:
    """Writing over a mask leaves one file with the new content."""
    file = tmp_path / "m.nii.gz"
    for value in (1, 2):
        write_labels(file, np.full(GRID.shape, value), geometry=GRID)
    assert np.unique(read_labels(file).data).tolist() == [2]
    assert [f.name for f in tmp_path.iterdir()] == ["m.nii.gz"]
