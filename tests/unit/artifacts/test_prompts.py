"""prompts.json: what is accepted, what is refused, and how it is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from samunet.artifacts.prompts import Prompt, load_prompts, prompted_structure
from samunet.core.config import parse_schema
from samunet.core.errors import ConfigError
from samunet.core.labels import LabelSpec

LABELS = LabelSpec({"liver": (1,), "lesion": (5,)})
REGIONS = LabelSpec({"whole": (1, 2), "core": (2,)}, regions_class_order=(1, 2))


def entry(**values: Any) -> dict[str, Any]:
    """An entry as it stands in the file."""
    return {"label": "liver", "space": "voxel_ijk", **values}


def prompt(**values: Any) -> Prompt:
    """A parsed entry."""
    return parse_schema(Prompt, entry(**values))


def written(folder: Path, content: Any) -> Path:
    """A file with the content."""
    path = folder / "prompts.json"
    path.write_text(json.dumps(content))
    return path


def test_a_file_is_read_by_case(tmp_path: Path):
    """Boxes and points of several cases come out as they were given."""
    box = entry(box=[1, 2.5, 3, 4, 5, 6])
    points = entry(label=5, points=[[1, 2, 3], [4, 5, 6]], positive=[True, False], space="world_ras_mm")
    found = load_prompts(written(tmp_path, {"a": [box, points], "b": [box]}))
    assert list(found) == ["a", "b"]
    assert found["a"][0].corners == ((1, 2.5, 3), (4, 5, 6))
    assert found["a"][1].marks == (((1, 2, 3), True), ((4, 5, 6), False))
    assert found["a"][1].label == 5


def test_points_are_positive_unless_said_otherwise():
    """Without "positive" all points lie in the object."""
    assert [sign for _, sign in prompt(points=[[1, 2, 3], [4, 5, 6]]).marks] == [True, True]


def test_two_numbers_lie_in_the_only_slice():
    """Pixels of a 2D image get k = 0."""
    flat = prompt(box=[1, 2, 3, 4], points=[[5, 6]])
    assert flat.corners == ((1, 2, 0), (3, 4, 0))
    assert flat.marks == (((5, 6, 0), True),)
    assert flat.is_flat
    assert not prompt(box=[1, 2, 3, 4, 5, 6]).is_flat


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({}, "needs a box or points"),
        ({"points": []}, "at least 1 item"),
        ({"box": [1, 2, 3, 4, 5]}, "six numbers, or four"),
        ({"points": [[1]]}, "at least 2 items"),
        ({"box": [0, 0, 0, 1, 1, 1], "positive": [True]}, "positive goes with points"),
        ({"points": [[1, 2, 3]], "positive": [True, False]}, "each of the 1 points"),
        ({"points": [[1, 2, 3]], "positive": [False]}, "at least one point must be positive"),
        ({"points": [[1, 2]], "space": "world_ras_mm"}, "space must be voxel_ijk"),
        ({"points": [[1, 2, float("nan")]]}, "finite"),
        ({"points": [[1, 2, 3]], "space": "lps"}, "voxel_ijk"),
        ({"points": [[1, 2, 3]], "label": True}, "label"),
        ({"points": [[1, 2, 3]], "positive": [1]}, "boolean"),
    ],
)
def test_an_impossible_entry_is_refused(values: dict[str, Any], says: str):
    """Each fault is named in words."""
    with pytest.raises(ConfigError, match=says):
        prompt(**values)


def test_the_space_is_never_guessed():
    """An entry without "space" is refused: voxels taken for millimetres would mark another place."""
    with pytest.raises(ConfigError, match="space: Field required"):
        parse_schema(Prompt, {"label": "liver", "points": [[1, 2, 3]]})


def test_all_faults_of_a_file_are_told_at_once(tmp_path: Path):
    """The message names the case, the entry and the nearest key of every fault, and the file."""
    path = written(
        tmp_path, {"a": [entry(points=[[1, 2, 3]]), entry(bxo=[1])], "b": [entry(box=[1])], "c": [entry(points=[[1]])]}
    )
    with pytest.raises(ConfigError) as caught:
        load_prompts(path)
    text = str(caught.value)
    assert "cases.a.1.bxo: unknown key 'bxo', did you mean 'box'?" in text
    assert "cases.b.0" in text
    assert "cases.c.0.points.0" in text
    assert "cases.a.0" not in text
    assert str(path) in text
    assert "plan again" not in text


@pytest.mark.parametrize("content", [[entry(points=[[1, 2, 3]])], {"a": entry(points=[[1, 2, 3]])}, {"a": []}, 7])
def test_a_file_of_another_form_is_refused(tmp_path: Path, content: Any):
    """A list of entries, an entry without its list, or nothing are no prompts."""
    with pytest.raises(ConfigError):
        load_prompts(written(tmp_path, content))


@pytest.mark.parametrize(("label", "name"), [("liver", "liver"), (1, "liver"), ("lesion", "lesion"), (5, "lesion")])
def test_a_structure_is_named_or_numbered(label: str | int, name: str):
    """Names and values mean the same structure."""
    assert prompted_structure(label, LABELS) == name


@pytest.mark.parametrize("label", ["spleen", 2, 0, "background", "1"])
def test_an_unknown_label_is_refused_with_those_that_exist(label: str | int):
    """The message lists names and values; background is no structure, and "1" is a name."""
    with pytest.raises(ConfigError) as caught:
        prompted_structure(label, LABELS)
    assert "liver (1), lesion (5)" in str(caught.value)


def test_regions_are_meant_by_name():
    """A value is part of several regions, so only names are taken."""
    assert prompted_structure("core", REGIONS) == "core"
    with pytest.raises(ConfigError, match="unknown label") as caught:
        prompted_structure(2, REGIONS)
    assert "the name of a region: whole, core" in str(caught.value)
