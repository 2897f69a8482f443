"""The comparison of rotations: what is changed of a plan, and how cases are paired."""

from __future__ import annotations

import pytest

from benchmarks.rotation import pair_of_seed, table, turned
from samunet.planners.planner import make_plan
from tests import planning_facts as facts


def row(variant: str, fold: str, dice: dict[str, float | None], seed: int = 1) -> dict[str, object]:
    """A finished cell."""
    known = {"dataset": "D", "minutes": 2.0, "planned_deg": 45.0, "groups": {}}
    return known | {"variant": variant, "fold": fold, "seed": seed, "case_dice": dice}


def test_only_the_recommended_configurations_rotation_changes() -> None:
    """From random weights on a CPU; everything else of the plan stays."""
    plan = make_plan(facts.fingerprint([facts.case(tilt=48.0)]), facts.description(), facts.budget())
    changed = turned(plan, 20.0)
    recipe = changed.configuration().recipes["none"]["cpu"]
    assert recipe.augmentation.value.rotation_deg == 20.0
    assert turned(changed, 45.0) == plan != changed


def test_cases_are_paired_over_the_folds_that_both_have() -> None:
    """A fold of which one is missing says nothing, nor does a case without a score."""
    rows = [
        row("plan", "0", {"a": 0.5, "b": 0.7}),
        row("turned 15", "0", {"a": 0.6, "b": 0.7}),
        row("plan", "1", {"c": 0.9, "d": None}),
        row("turned 15", "1", {"c": 0.8, "d": 0.5}),
        row("plan", "2", {"e": 0.9}),
    ]
    narrow, planned = pair_of_seed(rows, 1) or ({}, {})
    assert narrow == {"a": 0.6, "b": 0.7, "c": 0.8, "d": 0.5}
    assert planned == {"a": 0.5, "b": 0.7, "c": 0.9}
    assert pair_of_seed(rows, 2) is None
    text = table({f"{index}": one for index, one in enumerate(rows)}).splitlines()[-1]
    assert "| 45 degrees | 1 |" in text
    assert "+0.00 (" in text


@pytest.mark.parametrize("rows", [[], [row("plan", "0", {"a": 0.5})]])
def test_half_a_pair_is_no_row(rows: list[dict[str, object]]) -> None:
    """Nothing is shown of a dataset until something can be compared."""
    assert len(table({f"{index}": one for index, one in enumerate(rows)}).splitlines()) == 2
