"""The ablation's copies of a plan: folds inside the training cases, changes under names of their own."""

from __future__ import annotations

from benchmarks.recipe import CHANGES, Change, decoder, selection


def test_groups_stay_together_inside_the_training_cases() -> None:
    """A fifth of the groups is set aside, the same whatever the order of the cases."""
    cases = [f"case_{index:02d}" for index in range(40)]
    groups = {case: f"patient_{index // 4}" for index, case in enumerate(cases)}
    found = selection(cases, groups)
    assert sorted(found["train"] + found["val"]) == cases
    assert not {groups[case] for case in found["train"]} & {groups[case] for case in found["val"]}
    assert len(found["val"]) == 8
    assert selection(list(reversed(cases)), groups) == found


def test_every_case_is_its_own_group_where_there_are_none() -> None:
    """Of five cases one is set aside."""
    found = selection(["a", "b", "c", "d", "e"], {})
    assert (len(found["train"]), len(found["val"])) == (4, 1)


def test_rows_differ_from_the_plan() -> None:
    """Only the row of the plan changes nothing."""
    unchanged = [title for title, change in CHANGES.items() if change == Change(change.group)]
    assert unchanged == ["as planned"]
    assert decoder(path_width=32)["decoder"]["path_width"] == 32
