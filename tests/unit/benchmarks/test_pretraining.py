"""The table of the three set-ups."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from benchmarks import pretraining
from benchmarks.pretraining import NONE, SELF, SUPERVISED, cells, table


def outcome(setup: str, number: int, dice: float) -> dict[str, object]:
    cases = {f"case_{index}": dice + index / 100 for index in range(5)}
    return {
        "setup": setup,
        "num_cases": number,
        "subset_seed": 1,
        "dataset": "D",
        "minutes": 15.0,
        "plan": "p",
        "mean_dice": dice + 0.02,
        "case_dice": cases,
    }


def test_gains_are_paired_and_a_partial_table_says_so() -> None:
    """Each set-up stands beside no pretraining with its gain; rows without one are counted, failed ones left out."""
    results = {
        "a": outcome(NONE, 5, 0.60),
        "b": outcome(SUPERVISED, 5, 0.61),
        "c": outcome(SELF, 5, 0.65),
        "d": outcome(NONE, 10, 0.70),
        "e": {"failed": "exit code 3"},
    }
    text = table(results)
    gains = "| 0.630 | +0.010 (+0.010 to +0.010) | 0.670 | +0.050 (+0.050 to +0.050) |"
    assert f"| D | 15.0 | p | 5 | 1 | 0.620 {gains}" in text
    assert "1 rows lack a set-up" in text
    assert "partial" not in table({name: results[name] for name in "abc"})
    others = {"f": outcome(NONE, 5, 0.7) | {"minutes": 30.0}, "g": outcome(SELF, 5, 0.8) | {"plan": "q"}}
    longer = table(results | others)
    assert f"| D | 15.0 | p | 5 | 1 | 0.620 {gains}" in longer, "rows of other minutes and plans stand apart"
    assert longer.count("\n| D |") == 4


def test_set_ups_differ_in_their_weights_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows without pretraining name the backbone of the others; large subsets are drawn once."""
    monkeypatch.setattr(pretraining, "planned", lambda _: "abcd1234")
    options = argparse.Namespace(
        data=Path("D"),
        num_cases=[5, 40],
        subset_seeds=[12345, 1],
        one_subset_from=40,
        minutes=15,
        backbone="vit_t_xs",
        fold="0",
        pretrain_minutes=30,
    )
    made = cells([NONE], {}, options)
    assert [(cell.facts["num_cases"], cell.facts["subset_seed"]) for cell in made] == [(5, 12345), (5, 1), (40, 12345)]
    assert len({cell.name for cell in made}) == 3
    assert all("abcd1234" in cell.name and cell.facts["plan"] == "abcd1234" for cell in made)
    assert all(cell.mirror for cell in made), "as nnU-Net predicts, beside which they stand"
    assert all(cell.words[-4:] == ("--weights", "none", "--backbone", "vit_t_xs") for cell in made)
