"""Every planted fault is found, with its case and file, and nothing else is."""

from __future__ import annotations

import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest
from PIL import Image

from samunet.core.geometry import Geometry
from samunet.core.volume import Volume
from samunet.datasets.integrity import Finding, VerificationReport, verify_dataset
from samunet.datasets.raw import load_raw_dataset
from samunet.imageio import write_image
from tests.unit.datasets.raw_helpers import GRID, add_image, add_label, describe, make_dataset


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A correct dataset of three cases with two channels."""
    return make_dataset(tmp_path / "Dataset001_A", channels=2)


def check(folder: Path, *, processes: int = 1) -> VerificationReport:
    """Load and verify."""
    return verify_dataset(load_raw_dataset(folder), processes=processes)


def only(report: VerificationReport) -> Finding:
    """The report's single finding."""
    assert len(report.findings) == 1, report.render()
    return report.findings[0]


def moved(mm: float, *, spacing: tuple[float, float, float] = (3.0, 1.0, 1.0)) -> Geometry:
    """The test grid, moved along x."""
    return Geometry.from_spacing(GRID.shape, spacing, origin=(mm, 0, 0))


def test_a_correct_dataset_has_no_findings(folder: Path) -> None:
    """Nothing is said about what is right."""
    assert check(folder).findings == ()
    assert "nothing to complain" in check(folder).render()


def test_missing_files_are_found(folder: Path) -> None:
    """A missing channel and a missing label name the file that should be there."""
    (folder / "imagesTr" / "case_0_0001.nii.gz").unlink()
    (folder / "labelsTr" / "case_2.nii.gz").unlink()
    report = check(folder)
    assert report.bad_cases == ("case_0", "case_2")
    assert [(f.case, f.problem, f.file.name if f.file else "") for f in report.errors] == [
        ("case_0", "channel 1 is missing", "case_0_0001.nii.gz"),
        ("case_2", "the label map is missing", "case_2.nii.gz"),
    ]


def test_other_shapes_are_found(folder: Path) -> None:
    """Channel and label are both held against the first channel."""
    other = Geometry.from_spacing((3, 4, 6), GRID.spacing)
    add_image(folder / "imagesTr" / "case_0_0001.nii.gz", grid=other)
    add_label(folder / "labelsTr" / "case_1.nii.gz", grid=other)
    report = check(folder)
    assert [f.case for f in report.errors] == ["case_0", "case_1"]
    assert report.errors[0].expected == "(3, 4, 5)"
    assert report.errors[1].found == "(3, 4, 6)"


@pytest.mark.parametrize(
    ("grid", "severity", "words"),
    [
        (moved(0.5), "error", "lies elsewhere"),
        (moved(0.05), "warning", "lies elsewhere"),
        (moved(0.001), None, ""),
        (moved(0, spacing=(3.0, 1.0, 1.2)), "error", "another spacing"),
        (Geometry(GRID.shape, GRID.affine @ np.diag([-1, 1, 1, 1])), "error", "orientation SAL"),
    ],
)
def test_grids_are_compared_with_tolerance(folder: Path, grid: Geometry, severity: str | None, words: str) -> None:
    """Rounding noise is silent, a hundredth of a voxel a warning, a tenth an error."""
    add_label(folder / "labelsTr" / "case_1.nii.gz", grid=grid)
    report = check(folder)
    if severity is None:
        assert report.findings == ()
        return
    assert only(report).severity == severity
    assert words in only(report).render()


def test_nan_and_infinity_are_found(folder: Path) -> None:
    """Their number is told."""
    data = np.ones((1, *GRID.shape), np.float32)
    data[0, 0, 0, :2] = np.nan, np.inf
    write_image(folder / "imagesTr" / "case_0_0000.nii.gz", Volume(data, GRID))
    assert only(check(folder)).found == "2 of 60 voxels"


def test_undeclared_and_fractional_labels_are_found(folder: Path) -> None:
    """The values found are listed."""
    add_label(folder / "labelsTr" / "case_0.nii.gz", values=(0, 1, 7, 9))
    fractional = Volume(np.full((1, *GRID.shape), 0.5, np.float32), GRID)
    write_image(folder / "labelsTr" / "case_1.nii.gz", fractional)
    first, second = check(folder).errors
    assert first.found == "7, 9"
    assert first.expected == "0, 1, 2"
    assert second.problem == "labels must be whole numbers"


def test_broken_files_are_found(folder: Path) -> None:
    """An empty image, a truncated image and a label of noise, each in its case; the third case stays good."""
    (folder / "imagesTr" / "case_0_0000.nii.gz").write_bytes(b"")
    file = folder / "imagesTr" / "case_0_0001.nii.gz"
    file.write_bytes(file.read_bytes()[:-20])
    (folder / "labelsTr" / "case_1.nii.gz").write_bytes(b"\x1f\x8bnoise" * 20)
    report = check(folder)
    assert [f.file.name if f.file else "" for f in report.errors] == [
        "case_0_0001.nii.gz",
        "case_0_0000.nii.gz",
        "case_1.nii.gz",
    ]
    assert report.bad_cases == ("case_0", "case_1")


def test_labels_without_structure_are_a_warning(folder: Path) -> None:
    """An empty label map may be meant."""
    add_label(folder / "labelsTr" / "case_1.nii.gz", values=(0,))
    assert only(check(folder)).severity == "warning"


def test_the_same_image_twice_is_a_warning(folder: Path) -> None:
    """Both names are told; one channel in common is not enough."""
    shutil.copy(folder / "imagesTr" / "case_0_0000.nii.gz", folder / "imagesTr" / "case_2_0000.nii.gz")
    assert check(folder).findings == ()
    shutil.copy(folder / "imagesTr" / "case_0_0001.nii.gz", folder / "imagesTr" / "case_2_0001.nii.gz")
    assert only(check(folder)).found == "case_0, case_2"


@pytest.mark.parametrize("file", ["imagesTr/case_0_0001.nii.gz", "labelsTr/case_0.nii.gz"])
def test_forms_that_disagree_are_a_warning(folder: Path, file: str) -> None:
    """The reader's note about qform and sform of an image or a label map reaches the report."""
    image = nibabel.load(folder / file)
    qform = image.affine.copy()
    qform[0, 3] += 5
    image.set_qform(qform, code=1)
    nibabel.save(nibabel.Nifti1Image(np.asanyarray(image.dataobj), None, image.header), folder / file)
    finding = only(check(folder))
    assert finding.file == folder / file, finding
    assert finding.severity == "warning"
    assert "qform and sform" in finding.problem


def test_counts_that_disagree_are_warnings(folder: Path) -> None:
    """The number of cases is checked, and a label map without an image is noticed."""
    describe(folder, channels=2, numTraining=5)
    add_label(folder / "labelsTr" / "lonely.nii.gz")
    report = check(folder)
    assert report.errors == ()
    assert {f.problem for f in report.warnings} == {
        "numTraining does not agree with the cases found",
        "a label map without an image",
    }


def test_an_empty_dataset_is_an_error(tmp_path: Path) -> None:
    """It concerns no case, so it cannot be skipped."""
    report = check(describe(tmp_path))
    assert only(report).problem == "no training case was found"
    assert report.bad_cases == ()


def test_one_name_for_two_images_is_an_error(tmp_path: Path) -> None:
    """CASE.nii.gz and CASE_0000.nii.gz would both be CASE."""
    folder = make_dataset(tmp_path, cases=2)
    add_image(folder / "imagesTr" / "case_0.nii.gz", seed=99)
    assert "two images have the same case name" in {f.problem for f in check(folder).errors}
    assert check(folder).bad_cases == ("case_0",)


def test_grey_pictures_where_colours_are_declared(tmp_path: Path) -> None:
    """One file stands for three channels only if it holds three."""
    folder = describe(tmp_path, channels=3, ending=".png")
    (folder / "imagesTr").mkdir()
    (folder / "labelsTr").mkdir()
    Image.fromarray(np.zeros((6, 7), np.uint8)).save(folder / "imagesTr" / "a.png")
    Image.fromarray(np.ones((6, 7, 3), np.uint8)).save(folder / "imagesTr" / "b.png")
    for name in "ab":
        Image.fromarray(np.ones((6, 7), np.uint8)).save(folder / "labelsTr" / f"{name}.png")
    finding = only(check(folder))
    assert (finding.case, finding.found) == ("a", "1")


def test_several_processes_find_the_same(folder: Path) -> None:
    """The report does not depend on how many processes made it."""
    (folder / "imagesTr" / "case_0_0001.nii.gz").write_bytes(b"")
    add_label(folder / "labelsTr" / "case_1.nii.gz", values=(0, 5))
    assert check(folder, processes=2) == check(folder)
    assert len(check(folder).errors) == 2


def test_reports_read_well(folder: Path) -> None:
    """Severity, case, problem, file, expected, found, and a count at the end."""
    add_label(folder / "labelsTr" / "case_1.nii.gz", values=(0, 5))
    text = check(folder).render()
    assert "[error] case_1: label values that dataset.json does not declare" in text
    assert f"file: {folder / 'labelsTr' / 'case_1.nii.gz'}" in text
    assert text.endswith("1 errors in 1 cases, 0 warnings")


def test_surplus_channels_and_other_endings_are_reported(folder: Path) -> None:
    """A file that belongs to no channel makes its case bad; images of another ending are named."""
    add_image(folder / "imagesTr" / "case_1_0002.nii.gz")
    add_image(folder / "imagesTr" / "case_9_0000.mha")
    report = check(folder)
    assert [(f.case, f.problem) for f in report.errors] == [("case_1", "there are more files than channels")]
    assert [f.found for f in report.warnings] == ["case_9_0000.mha"]
