"""Across which axes slices are cut: the rule's conditions one by one, and what a recipe makes of them."""

from __future__ import annotations

import re
from typing import Any

import pytest

from samunet.artifacts.fingerprint import CaseFacts, MirrorPair
from samunet.artifacts.plan import Plan
from samunet.artifacts.plan_document import EDITED, reduced, resolved
from samunet.artifacts.plan_parts import STORED
from samunet.core.config import parse_schema
from samunet.core.errors import ConfigError
from samunet.planners import planes
from samunet.planners.edits import edits_of
from samunet.planners.planner import make_plan
from tests import planning_facts as facts

ALL = ("slices", "rows", "columns")
CUBE = (1.0, 1.0, 1.0)
CUBIC = [facts.case(shape=(60, 50, 40))] * 4
AXES = ("superior-inferior", "anterior-posterior", "left-right")


def chosen(**changes: Any) -> tuple[tuple[str, ...], str]:
    """The rule for cubic voxels and labels that change alike along every axis, with something else."""
    given: dict[str, Any] = {
        "voxels_mm": [(1.0, 1.0, 1.0)],
        "shapes": [(40, 50, 60)],
        "coherence": (0.8, 0.8, 0.8),
        "axes": AXES,
        "mirror": AXES,
        "num_tokens": 3,
    }
    return planes.planes(**given | changes)


def test_cubic_voxels_are_cut_across_all_axes() -> None:
    """The stored slices come first."""
    assert chosen()[0] == ALL


@pytest.mark.parametrize(
    ("changes", "expected", "words"),
    [
        ({"shapes": [(1, 50, 60)]}, STORED, "2D"),
        ({"voxels_mm": [(1.6, 1.0, 1.0)]}, STORED, "1.6 times longer"),
        ({"voxels_mm": [CUBE] * 8 + [(5.0, 1.0, 1.0)] * 2, "shapes": [(40, 50, 60)] * 10}, STORED, "2 of 10 cases"),
        ({"voxels_mm": [CUBE] * 9 + [(5.0, 1.0, 1.0)], "shapes": [(40, 50, 60)] * 10}, ALL, "typically 1 times"),
        ({"shapes": [(12, 256, 256)]}, STORED, "cut into strips"),
        ({"shapes": [(12, 50, 60)]}, ALL, "Dice"),
        ({"coherence": (0.0, 0.0, 0.0)}, STORED, "no label"),
        ({"voxels_mm": [(1.5, 1.0, 1.0)]}, ALL, "1.5 times longer"),
        ({"coherence": (0.8, 0.77, 0.79)}, ("slices", "columns"), "not across rows, where labels change more"),
        ({"coherence": (0.8, 0.9, 0.7)}, ("slices", "rows"), "not across columns, where labels change more"),
        ({"mirror": AXES[:2]}, ("slices", "rows"), "left and right look alike"),
        ({"mirror": ()}, ("slices", "rows"), "left and right look alike"),
        ({"axes": AXES[::-1], "mirror": ()}, ALL, "Dice"),
        ({"shapes": [(203, 203, 203)]}, ALL, "Dice"),
        ({"shapes": [(204, 204, 204)]}, STORED, "too large"),
        ({"shapes": [(160, 160, 160)], "num_tokens": 65}, ALL, "Dice"),
        ({"shapes": [(160, 160, 160)], "num_tokens": 66}, STORED, "66 maps is too large"),
    ],
)
def test_each_condition_has_its_reason(changes: dict[str, Any], expected: tuple[str, ...], words: str) -> None:
    """Thick or flat voxels, labels that change more, a body's two sides and large volumes keep slices in one plane."""
    found, reason = chosen(**changes)
    assert found == expected
    assert words in reason


def test_a_recipe_takes_what_its_method_and_time_allow() -> None:
    """Prompts, slabs and a slow prediction on a CPU keep to the stored slices; a GPU has the time."""
    possible = (ALL, "")
    free: dict[str, Any] = {"device": "cpu", "promptable": False, "slab_depth": 1, "passes": 12.0, "seconds": 60.0}
    assert planes.of_recipe(possible, **free) == possible
    for other in ({"promptable": True}, {"slab_depth": 3}, {"seconds": 61.0}):
        assert planes.of_recipe(possible, **free | other)[0] == STORED
    assert planes.of_recipe(possible, **free | {"seconds": 61.0, "device": "gpu"}) == possible


@pytest.mark.parametrize(("passes", "number"), [(0.1, 1), (7.9, 1), (8.0, 2), (11.9, 2), (12.0, 3), (900.0, 3)])
def test_planes_share_the_passes(passes: float, number: int) -> None:
    """Each has four at least, on either device; where they are fewer, the reason says so."""
    for device in ("cpu", "gpu"):
        found, reason = planes.of_recipe(
            (ALL, "cubic"), device=device, promptable=False, slab_depth=1, passes=passes, seconds=1.0
        )
        assert found == ALL[:number]
        assert ("share" in reason) == (number < 3)
        assert "cubic" in reason


def test_the_plane_with_most_mirrored_views_counts() -> None:
    """Where only rows may not be mirrored, slices across rows have two axes to mirror along, stored ones have one."""
    mirrored = (True, False, True)
    assert planes.most_mirrors(mirrored, STORED) == 1
    assert planes.most_mirrors(mirrored, ("slices", "rows")) == 2
    assert planes.most_mirrors(mirrored, ("slices", "columns")) == 1


def test_passes_count_every_tile_of_every_slice() -> None:
    """Ten steps of eight slices are two passes over forty slices in one tile, and half of one where it takes four."""
    shapes = [(30, 50, 50), (10, 50, 50)]
    assert planes.passes(10, 8, shapes, 50) == 2
    assert planes.passes(10, 8, shapes, 25) == 0.5


def plan_of(cases: list[CaseFacts], **decided: Any) -> Plan:
    given = facts.fingerprint(cases, pairs=[MirrorPair(first="l", second="r", axis="left-right", evidence="name")])
    return make_plan(given, facts.description(), facts.budget(), **decided)


def test_the_plan_holds_the_planes() -> None:
    """Axes are those of the dataset's frame, volumes those after the crop; slabs and thick slices have one plane."""
    cubic = plan_of(CUBIC)
    assert cubic.frame.value.slice_axis == 2
    for name, configuration in cubic.configurations.items():
        recipe = configuration.recipes["sam"]["gpu"]
        assert recipe.planes.value == (STORED if name == "3d" else ALL)
    axial = plan_of([facts.case(shape=(40, 50, 60))] * 4)
    assert axial.frame.value.slice_axis == 0
    assert axial.configuration("2.5d").recipes["none"]["cpu"].planes.value == ("slices", "rows")
    thick = plan_of([facts.case(shape=(40, 50, 60), spacing=(2.0, 1.0, 1.0))] * 4)
    assert thick.configuration("2.5d").recipes["none"]["cpu"].planes.value == STORED


def edited(found: Plan, place: tuple[str, ...], field: str, value: Any) -> Plan:
    """The plan made again after an edit of a field of a recipe of 2.5d."""
    content = reduced(found.model_dump(mode="json"))
    recipe = content["configurations"]["2.5d"]["recipes"][place[0]][place[1]]
    recipe[field] = {**recipe[field], "value": value, "source": "user"}
    changed = parse_schema(Plan, resolved(content), context=EDITED)
    return plan_of(CUBIC, edits=edits_of(changed))


def test_edited_planes_stay_and_mirrored_views_are_planned_around_them() -> None:
    """What a view of a volume takes counts the planes that are decided on."""
    first = plan_of(CUBIC)
    again = edited(first, ("none", "cpu"), "planes", ["columns"])
    before, after = (p.configuration("2.5d").recipes["none"]["cpu"] for p in (first, again))
    assert after.planes.value == ("columns",)
    assert after.planes.by_rule == before.planes.value == ALL
    seconds = [float(re.findall(r"about ([\d.e+-]+) s per view", r.mirror_views.reason)[0]) for r in (before, after)]
    # 40 + 60 + 50 slices against the 50 columns of the frame
    assert seconds[1] / seconds[0] == pytest.approx(50 / 150, abs=0.02)


def test_prompts_and_planes_do_not_go_together() -> None:
    """Planned planes make way for prompts; edited ones are refused with what to change."""
    first = plan_of(CUBIC)
    prompts = {"kind": "box"}
    asked = edited(first, ("sam", "gpu"), "prompts", prompts)
    assert asked.configuration("2.5d").recipes["sam"]["gpu"].planes.value == STORED
    content = reduced(asked.model_dump(mode="json"))
    recipe = content["configurations"]["2.5d"]["recipes"]["sam"]["gpu"]
    recipe["planes"] = {**recipe["planes"], "value": list(ALL), "source": "user"}
    with pytest.raises(ConfigError, match="prompts point at stored slices"):
        parse_schema(Plan, resolved(content))


@pytest.mark.parametrize("wrong", [[], ["slices", "slices"], ["across"]])
def test_planes_that_are_none_or_twice_the_same_are_refused(wrong: list[str]) -> None:
    """An empty list trains on nothing."""
    content = reduced(plan_of(CUBIC).model_dump(mode="json"))
    content["configurations"]["2.5d"]["recipes"]["none"]["cpu"]["planes"]["value"] = wrong
    with pytest.raises(ConfigError, match="planes"):
        parse_schema(Plan, resolved(content))
