"""How cases are found on disk, and what a malformed description says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from samunet.core.errors import ConfigError, UsageError
from samunet.datasets.raw import find_cases, list_cases, load_raw_dataset
from tests.unit.datasets.raw_helpers import add_image, describe, make_dataset


def touch(folder: Path, *names: str) -> Path:
    """Create files that are never opened."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(b"")
    return folder


def test_cases_of_several_channels(tmp_path: Path) -> None:
    """Training and test cases are found with all their channels, sorted, with their labels."""
    folder = make_dataset(tmp_path / "Dataset001_A", cases=2, channels=2)
    touch(folder / "imagesTs", "new_0000.nii.gz", "new_0001.nii.gz")
    dataset = load_raw_dataset(folder)
    assert [case.name for case in dataset.training] == ["case_0", "case_1"]
    assert [file.name for file in dataset.training[1].images] == ["case_1_0000.nii.gz", "case_1_0001.nii.gz"]
    assert dataset.training[0].label == folder / "labelsTr" / "case_0.nii.gz"
    assert [case.name for case in dataset.test] == ["new"]
    assert dataset.test[0].label is None
    assert dataset.groups is None


def test_one_channel_needs_no_suffix(tmp_path: Path) -> None:
    """A bare name is a case, and a number at the end of a name is not taken for a channel."""
    touch(tmp_path, "a.nii.gz", "b_0000.nii.gz", "scan_2021.nii.gz", ".partial-c.nii.gz", "notes.txt")
    cases = find_cases(tmp_path, num_channels=1, ending=".nii.gz")
    assert [case.name for case in cases] == ["a", "b", "scan_2021"]
    assert [case.images[0].name for case in cases] == ["a.nii.gz", "b_0000.nii.gz", "scan_2021.nii.gz"]


def test_one_colour_file_counts_as_three_channels(tmp_path: Path) -> None:
    """With three channels and pictures, CASE.png and CASE_0000.png hold all three; separate files still work."""
    touch(tmp_path, "a.png", "b_0000.png", "c_0000.png", "c_0001.png", "c_0002.png")
    cases = {case.name: case.images for case in find_cases(tmp_path, num_channels=3, ending=".png")}
    assert [len(cases[name]) for name in "abc"] == [1, 1, 3]
    touch(tmp_path / "volumes", "a_0000.nii.gz")
    assert len(find_cases(tmp_path / "volumes", num_channels=3, ending=".nii.gz")[0].images) == 3


def test_explicit_lists_replace_the_folder_search(tmp_path: Path) -> None:
    """Paths of dataset.json's own lists may be relative to the folder or absolute."""
    elsewhere = add_image(tmp_path / "archive" / "scan.nii.gz")
    entries = {"one": {"images": [str(elsewhere)], "label": "labels/one.nii.gz"}}
    folder = describe(tmp_path / "Dataset001_A", dataset=entries)
    touch(folder / "imagesTr", "ignored_0000.nii.gz")
    (case,) = load_raw_dataset(folder).training
    assert case.images == (elsewhere,)
    assert case.label == folder / "labels" / "one.nii.gz"
    for wrong in ({"images": [], "label": "a"}, {"images": ["a"]}, ["a"], {"images": "a", "label": "b"}):
        with pytest.raises(ConfigError) as caught:
            load_raw_dataset(describe(tmp_path / "Dataset002_B", dataset={"two": wrong}))
        assert caught.value.case == "two"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"labels": None}, "the key 'labels' is missing"),
        ({"channel_names": None, "modality": {"0": "CT"}}, "rename 'modality'"),
        ({"channel_names": {"1": "CT"}}, "numbered from 0"),
        ({"channel_names": {"zero": "CT"}}, "numbered from 0"),
        ({"file_ending": ".jpg"}, "unknown file_ending"),
        ({"labels": {"background": 1, "organ": 2}}, "background label must be 0"),
        ({"labels": {"background": 0, "organ": "one"}}, "labels.organ"),
        ({"labels": {"background": 0}}, "no foreground label"),
    ],
)
def test_malformed_descriptions_are_explained(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    """Each fault names its key and the file."""
    folder = describe(tmp_path, **changes)
    with pytest.raises(ConfigError, match=words) as caught:
        load_raw_dataset(folder)
    assert caught.value.file == folder / "dataset.json"


def test_a_missing_description_is_a_config_error(tmp_path: Path) -> None:
    """So is one that is no JSON."""
    with pytest.raises(ConfigError, match="does not exist"):
        load_raw_dataset(tmp_path)
    (tmp_path / "dataset.json").write_text("{,}")
    with pytest.raises(ConfigError, match="not valid JSON"):
        load_raw_dataset(tmp_path)


def test_every_training_case_needs_a_group(tmp_path: Path) -> None:
    """Groups are read where the file exists, of other images too; an unlisted case is named."""
    folder = make_dataset(tmp_path / "Dataset001_A")
    groups = {"case_0": "p1", "case_1": "p1", "case_2": "p2", "other": "p3"}
    (folder / "case_groups.json").write_text(json.dumps(groups))
    assert load_raw_dataset(folder).groups == groups
    (folder / "case_groups.json").write_text(json.dumps({"case_0": "p1"}))
    with pytest.raises(ConfigError, match="without a group") as caught:
        load_raw_dataset(folder)
    assert caught.value.found == "none for case_1, case_2"


def test_prediction_folders_keep_complete_cases(tmp_path: Path) -> None:
    """An incomplete case becomes a finding, the others are returned."""
    touch(tmp_path, "a_0000.nii.gz", "a_0001.nii.gz", "b_0001.nii.gz")
    cases, findings = list_cases(tmp_path, num_channels=2, ending=".nii.gz")
    assert [case.name for case in cases] == ["a"]
    assert [(f.case, f.problem) for f in findings] == [("b", "channel 0 is missing")]


def test_prediction_folders_may_hold_other_formats(tmp_path: Path) -> None:
    """Other endings are read where none of the dataset's exists, else named; two files of one name are refused."""
    touch(tmp_path, "a_0000.mha", "b.nrrd", "c.nii", "c.mha")
    cases, findings = list_cases(tmp_path, num_channels=1, ending=".nii.gz")
    assert [case.name for case in cases] == ["a", "b"]
    assert [finding.case for finding in findings] == ["c"]
    touch(tmp_path, "d.nii.gz")
    cases, findings = list_cases(tmp_path, num_channels=1, ending=".nii.gz")
    assert [case.name for case in cases] == ["d"]
    assert [(f.severity, f.found) for f in findings] == [("warning", "a_0000.mha, b.nrrd, c.mha, c.nii")]


def test_endings_in_capitals_are_left_out_as_nnu_net_does_or_read(tmp_path: Path) -> None:
    """Beside files of the dataset's ending they are named; on their own they are images like any other."""
    touch(tmp_path, "b.NII.GZ", "c_0000.Nii.gz")
    cases, findings = list_cases(tmp_path, num_channels=1, ending=".nii.gz")
    assert [(case.name, case.images[0].name) for case in cases] == [("b", "b.NII.GZ"), ("c", "c_0000.Nii.gz")]
    assert findings == ()
    touch(tmp_path, "a.nii.gz")
    cases, findings = list_cases(tmp_path, num_channels=1, ending=".nii.gz")
    assert [case.name for case in cases] == ["a"]
    assert [(f.severity, f.found) for f in findings] == [("warning", "b.NII.GZ, c_0000.Nii.gz")]


@pytest.mark.parametrize(
    ("channels", "ending", "names", "surplus"),
    [
        (1, ".nii.gz", ["p_0000", "p_0001", "p_0002", "p_0003"], ["p_0001", "p_0002", "p_0003"]),
        (1, ".nii.gz", ["p_0000", "p_2021"], ["p_2021"]),
        (2, ".nii.gz", ["p_0000", "p_0001", "p_0002"], ["p_0002"]),
        (2, ".nii.gz", ["p_0000", "p_0007"], ["p_0007"]),
        (3, ".png", ["p_0000", "p_0001", "p_0002", "p_0003"], ["p_0003"]),
    ],
)
def test_more_files_than_channels_are_an_error(
    tmp_path: Path, channels: int, ending: str, names: list[str], surplus: list[str]
) -> None:
    """Numbered images without a channel look like channels of one: none is ignored, the message says what to do."""
    touch(tmp_path, *(name + ending for name in names), *(f"good_000{index}{ending}" for index in range(channels)))
    cases, findings = list_cases(tmp_path, num_channels=channels, ending=ending)
    assert [case.name for case in cases] == ["good"]
    assert {(f.case, f.severity) for f in findings} == {("p", "error")}
    finding = next(f for f in findings if "more files than channels" in f.problem)
    assert finding.found == ", ".join(name + ending for name in surplus) + " too"
    assert f"{surplus[-1]}_0000{ending}" in finding.render()


def test_numbered_colour_pictures_are_cases(tmp_path: Path) -> None:
    """As with one channel: where there is no _0000, a number is a part of the name."""
    touch(tmp_path, "img_0001.png", "img_0002.png", "scan_0000.png", "scan_0001.png")
    cases, findings = list_cases(tmp_path, num_channels=3, ending=".png")
    assert [(case.name, len(case.images)) for case in cases] == [("img_0001", 1), ("img_0002", 1)]
    (finding,) = findings
    assert (finding.case, finding.problem) == ("scan", "channel 2 is missing")
    assert "scan_0001_0000.png" in finding.render()


def test_names_that_end_in_numbers_mean_what_they_mean_in_nnu_net(tmp_path: Path) -> None:
    """With a channel in every name, any number before it is a part of the case."""
    touch(tmp_path, *(f"p_000{case}_0000.nii.gz" for case in range(3)), "p_0000.nii.gz")
    cases, findings = list_cases(tmp_path, num_channels=1, ending=".nii.gz")
    assert [case.name for case in cases] == ["p", "p_0000", "p_0001", "p_0002"]
    assert findings == ()


def test_empty_prediction_folders_are_usage_errors(tmp_path: Path) -> None:
    """A folder without an image, or no folder, is refused before anything starts."""
    with pytest.raises(UsageError, match="no image"):
        list_cases(tmp_path, num_channels=1, ending=".nii.gz")
    with pytest.raises(UsageError, match="does not exist"):
        list_cases(tmp_path / "none", num_channels=1, ending=".nii.gz")


@pytest.mark.data
def test_real_datasets_are_found_whole(shared_data: Path) -> None:
    """Every shared dataset has as many cases as it declares, each with image and label on disk."""
    for folder in sorted(shared_data.glob("Dataset*")):
        dataset = load_raw_dataset(folder)
        assert len(dataset.training) == dataset.description.numTraining
        for case in dataset.training:
            assert case.label is not None
            assert all(file.is_file() for file in (*case.images, case.label))
