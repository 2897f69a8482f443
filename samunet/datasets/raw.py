"""Datasets in nnU-Net's raw format, as found on disk."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from samunet.artifacts.dataset import Case, DatasetDescription, RawDataset
from samunet.core.errors import ConfigError, UsageError
from samunet.core.files import read_json, strip_ending
from samunet.core.labels import LabelSpec
from samunet.datasets.findings import Finding
from samunet.imageio import ENDINGS, ending_of

GROUPS_FILE = "case_groups.json"
_NAMES_SHOWN = 12
_COLOUR_ENDINGS = (".png", ".tif", ".tiff")
_CHANNEL = re.compile(r"^(?P<case>.+)_(?P<channel>\d{4})$")


def load_raw_dataset(folder: Path) -> RawDataset:
    """Read dataset.json and find the cases, without opening any image.

    A training case's files are those that should be there: verification says which are not.

    Raises:
        ConfigError: If dataset.json or case_groups.json is missing or malformed.
    """
    description = load_description(folder / "dataset.json")
    if description.dataset is not None:
        training = explicit_cases(folder, description.dataset)
    else:
        found = find_cases(folder / "imagesTr", num_channels=len(description.channels), ending=description.file_ending)
        labels = folder / "labelsTr"
        training = tuple(Case(c.name, c.images, labels / f"{c.name}{description.file_ending}") for c in found)
    test = find_cases(folder / "imagesTs", num_channels=len(description.channels), ending=description.file_ending)
    groups = _load_groups(folder / GROUPS_FILE, [case.name for case in training])
    return RawDataset(folder, description, training, test, groups)


def load_description(file: Path) -> DatasetDescription:
    """Read dataset.json.

    Raises:
        ConfigError: With every fault in one message.
    """
    content = read_json(file)
    try:
        description = DatasetDescription.model_validate(content)
    except ValidationError as error:
        faults = [_describe(fault, content) for fault in error.errors(include_url=False)]
        raise ConfigError(
            "dataset.json is not as nnU-Net defines it\n" + "\n".join(f"  - {text}" for text in faults),
            file=file,
            todo="correct these entries",
        ) from None
    _check_description(description, file)
    return description


def load_label_spec(file: Path) -> LabelSpec:
    """Read what a dataset.json says of labels, whatever else it holds.

    Raises:
        ConfigError: If it is no JSON, or declares no labels or contradictory ones.
    """
    content = read_json(file)
    if not isinstance(content, dict) or not isinstance(content.get("labels"), dict):
        raise ConfigError("dataset.json declares no labels", expected='"labels": {"background": 0, ...}', file=file)
    return _label_spec(content, file)


def list_cases(folder: Path, *, num_channels: int, ending: str) -> tuple[tuple[Case, ...], tuple[Finding, ...]]:
    """Find the cases of a folder of images to predict.

    Files of the dataset's ending are taken, as in nnU-Net; where there are none, those of every other readable ending.

    Returns:
        The cases whose files are those of one image, and findings: an error for each one whose files are not, a warning
        if readable files are left out.

    Raises:
        UsageError: If the folder does not exist or holds no image.
    """
    if not folder.is_dir():
        raise UsageError("the input folder does not exist", file=folder)
    cases = find_cases(folder, num_channels=num_channels, ending=ending)
    left_out = other_endings(folder, ending)
    if not cases:
        spellings = {file.name[-len(ending_of(file)) :] for file in _images(folder)}
        others = [find_cases(folder, num_channels=num_channels, ending=other) for other in sorted(spellings)]
        cases = tuple(sorted((case for found in others for case in found), key=lambda case: case.name))
        left_out = []
    if not cases:
        raise UsageError("the input folder holds no image", expected=f"files as CASE_0000{ending}", file=folder)
    faults = [*missing_channels(cases), *surplus_channels(cases, num_channels), *duplicated_names(cases)]
    bad = {finding.case for finding in faults}
    return tuple(case for case in cases if case.name not in bad), (*faults, *left_out)


def find_cases(folder: Path, *, num_channels: int, ending: str) -> tuple[Case, ...]:
    """Group a folder's files into cases as nnU-Net does, sorted by name; every file belongs to one.

    With one channel a file needs no ``_0000``; with three, one colour file counts as all three. Where one file is
    enough, a number at the end of a name is a channel only if there is a ``_0000`` of the same name.

    A case's files are those of all channels, whether they exist or not, and those of surplus numbers.
    """
    stems = {strip_ending(file.name, ending) for file in _images(folder) if file.name.endswith(ending)}
    colour = num_channels == 3 and ending.lower() in _COLOUR_ENDINGS
    one_is_enough = num_channels == 1 or colour
    found: dict[str, set[int]] = {}
    bare: set[str] = set()
    for stem in stems:
        match = _CHANNEL.match(stem)
        if match and not (one_is_enough and f"{match['case']}_0000" not in stems):
            found.setdefault(match["case"], set()).add(int(match["channel"]))
        else:
            bare.add(stem)
    cases = [_suffixed_case(folder, name, found[name], num_channels, ending, colour) for name in found]
    cases += [_bare_case(folder, name, num_channels, ending, colour) for name in bare]
    return tuple(sorted(cases, key=lambda case: case.name))


def missing_channels(cases: Iterable[Case]) -> list[Finding]:
    """A finding for each image file that should be there and is not."""
    return [
        Finding(
            "error", f"channel {index} is missing", case.name, file, file.name, "no such file", _advice(case.images)
        )
        for case in cases
        for index, file in enumerate(case.images)
        if not file.is_file()
    ]


def surplus_channels(cases: Iterable[Case], num_channels: int) -> list[Finding]:
    """A finding for each case with more files than channels: it may be several images."""
    return [
        Finding(
            "error",
            "there are more files than channels",
            case.name,
            case.images[0].parent,
            expected=_listed(case.images[:num_channels]),
            found=f"{_listed(case.images[num_channels:])} too",
            todo=_advice(case.images),
        )
        for case in cases
        if len(case.images) > num_channels
    ]


def other_endings(folder: Path, ending: str) -> list[Finding]:
    """A warning that names the readable files of a folder which do not have the dataset's ending."""
    files = [file for file in _images(folder) if not file.name.endswith(ending)]
    todo = "convert them, or put them into a folder of their own"
    problem = "images of another file ending are left out"
    return [Finding("warning", problem, None, folder, f"*{ending}", _listed(files), todo)] if files else []


def duplicated_names(cases: Iterable[Case]) -> list[Finding]:
    """A finding for each name that two cases share."""
    files: dict[str, list[Path]] = {}
    for case in cases:
        files.setdefault(case.name, []).extend(case.images[:1])
    return [
        Finding("error", "two images have the same case name", name, found=", ".join(f.name for f in paths))
        for name, paths in files.items()
        if len(paths) > 1
    ]


def _images(folder: Path) -> list[Path]:
    """All readable files of a folder, sorted; none if there is no such folder."""
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    return [file for file in files if ending_of(file) and not file.name.startswith(".") and file.is_file()]


def _listed(files: Sequence[Path]) -> str:
    more = f" and {len(files) - _NAMES_SHOWN} more" if len(files) > _NAMES_SHOWN else ""
    return ", ".join(file.name for file in files[:_NAMES_SHOWN]) + more


def _advice(images: Sequence[Path]) -> str | None:
    """How to name the files of a case that may be several images, as there is more than one."""
    files = [file for file in images if file.is_file()]
    if len(files) < 2:
        return None
    ending = files[-1].name[-len(ending_of(files[-1])) :]
    example = f"{strip_ending(files[-1].name, ending)}_0000{ending}"
    return f"if each file is an image of its own, add its channel to its name: {example}"


def _suffixed_case(folder: Path, name: str, channels: set[int], count: int, ending: str, colour: bool) -> Case:
    wanted = channels if colour and channels == {0} else channels | set(range(count))
    return Case(name, tuple(folder / f"{name}_{index:04d}{ending}" for index in sorted(wanted)))


def _bare_case(folder: Path, name: str, count: int, ending: str, colour: bool) -> Case:
    if count == 1 or colour:
        return Case(name, (folder / f"{name}{ending}",))
    return Case(name, tuple(folder / f"{name}_{index:04d}{ending}" for index in range(count)))


def explicit_cases(folder: Path, entries: Mapping[str, Any]) -> tuple[Case, ...]:
    """Cases of dataset.json's own lists, sorted by name; paths are absolute or relative to the dataset folder.

    Raises:
        ConfigError: If an entry lacks its images or its label.
    """
    cases = []
    for name, entry in sorted(entries.items()):
        images = entry.get("images") if isinstance(entry, dict) else None
        label = entry.get("label") if isinstance(entry, dict) else None
        well_formed = isinstance(images, list) and images and all(isinstance(image, str) for image in images)
        if not well_formed or not isinstance(label, str):
            raise ConfigError(
                "an explicit file list is malformed",
                expected='{"images": [path, ...], "label": path}',
                found=str(entry),
                case=name,
                file=folder / "dataset.json",
            )
        cases.append(Case(name, tuple(folder / image for image in images or ()), folder / label))
    return tuple(cases)


def groups_beside(dataset_json: Path | None) -> dict[str, str] | None:
    """Case to group, as far as a case_groups.json beside a dataset.json says; None without one."""
    file = None if dataset_json is None else dataset_json.parent / GROUPS_FILE
    content = read_json(file) if file is not None and file.is_file() else None
    return _load_groups(file, list(content)) if file is not None and isinstance(content, dict) else None


def _load_groups(file: Path, names: list[str]) -> dict[str, str] | None:
    """Case to group, when the dataset has such a file; every training case must be in it, others may be."""
    if not file.is_file():
        return None
    content = read_json(file)
    if not isinstance(content, dict):
        raise ConfigError("the groups must be an object", expected='{"CASE": "GROUP", ...}', file=file)
    missing = [name for name in names if name not in content]
    if missing:
        raise ConfigError(
            "training cases without a group",
            expected="an entry for every training case",
            found=f"none for {', '.join(missing)}",
            file=file,
            todo="add them, each with a group of its own if it stands alone, or delete the file",
        )
    return {name: str(group) for name, group in content.items()}


def _check_description(description: DatasetDescription, file: Path) -> None:
    keys = description.channel_names
    if sorted(keys) != sorted(str(index) for index in range(len(keys))) or not keys:
        raise ConfigError(
            "channel_names must be numbered from 0", expected='{"0": "T1", "1": "T2", ...}', found=str(keys), file=file
        )
    if description.file_ending not in ENDINGS:
        raise ConfigError(
            "unknown file_ending", expected=f"one of {' '.join(ENDINGS)}", found=description.file_ending, file=file
        )
    _label_spec(description.model_dump(), file)


def _label_spec(content: Mapping[str, Any], file: Path) -> LabelSpec:
    try:
        return LabelSpec.from_dataset_json(content)
    except ConfigError as error:
        error.file = file
        raise


def _describe(fault: Any, content: Any) -> str:
    place = ".".join(str(part) for part in fault["loc"])
    if fault["type"] != "missing":
        return f"{place or 'content'}: {fault['msg']} (found {str(fault.get('input'))[:60]})"
    hint = ""
    if place == "channel_names" and isinstance(content, dict) and "modality" in content:
        hint = ": this is the old format, rename 'modality' to 'channel_names'"
    return f"the key '{place}' is missing{hint}"
