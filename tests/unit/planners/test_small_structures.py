"""From the fingerprint of lesions to tiles in which they are found."""

from __future__ import annotations

import pytest

from samunet.artifacts.fingerprint import StructureFacts
from samunet.artifacts.plan import Plan, WeightsKind
from samunet.planners import sizes
from samunet.planners.planner import facts_of_plan, make_plan
from samunet.planners.rests_on import measured
from tests.planning_facts import budget, case, description, fingerprint, structure

LESION = structure(width_mm=7.2, volume_mm3=468.0, num_slices=(4, 8, 8))
HEAD = structure(width_mm=72.0, num_slices=(24, 116, 96))
LESION_AREA = 39.0
MINUTES = 2.5


def planned(**structures: StructureFacts) -> tuple[Plan, float]:
    """Heads of 24 x 144 x 128 voxels, for minutes of a CPU: the plan, and the area of their small structures."""
    known = fingerprint([case(shape=(24, 144, 128), spacing=(3.0, 1.0, 1.0), structures=structures)] * 30)
    labels = {"background": 0, **{name: index for index, name in enumerate(structures, 1)}}
    made = make_plan(known, description(labels=labels), budget(minutes=MINUTES))
    return made, facts_of_plan(made, known).plane.area_vox


def tile(plan: Plan, weights: WeightsKind = "sam") -> int:
    """Voxels along a side of what one input covers on a CPU."""
    return plan.configuration("2d").recipes[weights]["cpu"].tile_vox.value


def test_area_of_a_lesion() -> None:
    """468 mm3 in four slices of 3 mm are 39 square millimetres, on pixels of 1 mm."""
    assert planned(lesion=LESION)[1] == pytest.approx(LESION_AREA)


def test_lesions_get_tiles_of_their_size() -> None:
    """Alone or beside the head they decide; beside three large structures they do not."""
    alone, beside = planned(lesion=LESION), planned(lesion=LESION, head=HEAD)
    assert tile(alone[0]) == tile(beside[0]) == 72
    many = planned(lesion=LESION, head=HEAD, brain=HEAD, skull=HEAD)
    assert many[1] == planned(head=HEAD)[1] > alone[1]
    assert tile(many[0]) == tile(planned(head=HEAD)[0]) == 144


def test_a_side_path_finds_lesions_in_larger_tiles() -> None:
    """It has twice the cells of SAM's decoder a side, so that six make up a lesion in tiles of twice the side."""
    found = planned(lesion=LESION)[0]
    assert tile(found, "none") == 144
    assert tile(found) == 72
    recipe = found.configuration("2d").recipes["none"]["cpu"]
    cell = sizes.grid_of(recipe.method_parts()).stride * 144 / recipe.input_size.value
    assert LESION_AREA / cell**2 > sizes.CELLS_OF_SMALL / sizes.TILE_SLACK**2


def test_the_plan_names_the_fact() -> None:
    """The reader of a plan sees how large small structures are."""
    known = fingerprint([case(shape=(24, 144, 128), spacing=(3.0, 1.0, 1.0), structures={"lesion": LESION})] * 30)
    made = make_plan(known, description(labels={"background": 0, "lesion": 1}), budget(minutes=MINUTES))
    assert measured(made, known)["small structures"].startswith("39 square voxels")
