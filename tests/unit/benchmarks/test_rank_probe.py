"""The rank benchmark: what is compared has as many parameters, and a table of some seeds says so."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from benchmarks import rank_probe as module
from samunet.artifacts.dataset import DatasetDescription, RawDataset
from tests.planted_probe import make_probe


def test_choices_differ_in_the_ranks_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The probe's ranks sum to the planned ones; every choice is there with both seeds and the same other words."""
    monkeypatch.setattr(module, "planned_rank", lambda *_: 4)
    labels = DatasetDescription(channel_names={"0": "MRI"}, labels={"background": 0, "a": 1}, file_ending=".nii.gz")
    monkeypatch.setattr(module, "load_raw_dataset", lambda _: RawDataset(tmp_path, labels, (), (), None))
    probe = make_probe([[float((b + 1) * (32 - i)) for i in range(32)] for b in range(6)])
    options = argparse.Namespace(workspace=tmp_path, base=tmp_path, minutes=1.0)
    made = module.cells(tmp_path / "Dataset001_A", probe, 0.5, options)
    assert len(made) == len({cell.name for cell in made}) == 4 * len(module.SEEDS)
    assert {cell.facts["choice"] for cell in made} == {"probe", "rank 4", "rank 1", "rank 16"}
    probed = [cell for cell in made if cell.facts["choice"] == "probe"]
    assert all(sum(cell.facts["ranks"]) == 24 and len(set(cell.facts["ranks"])) > 1 for cell in probed)
    assert f"--set=encoder.adapters.0.ranks={probed[0].facts['ranks']}" in probed[0].words
    assert {cell.words[:6] for cell in made} == {
        ("-c", "2d", "--backbone", "vit_xs", "--weights", f"sam:{tmp_path / 'vit_xs.pth'}")
    }


def test_the_table_pairs_with_the_planned_rank() -> None:
    """Differences are in points over common cases; one seed of two is called partial."""
    results = {}
    for choice, dice in (("probe", 0.65), ("rank 4", 0.6), ("rank 1", 0.4)):
        for seed in (1, 2) if choice != "rank 1" else (1,):
            results[f"{choice} {seed}"] = {
                "dataset": "D",
                "choice": choice,
                "planned_rank": 4,
                "seed": seed,
                "groups": None,
                "ranks": [1, 7],
                "mean_dice": dice,
                "case_dice": {"a": dice, "b": dice, "c": None},
                "parameters": {"encoder": 1000},
            }
    lines = module.table(results).splitlines()
    assert "probe: 1, 7" in lines[2]
    assert "+5.00 (+5.0 to +5.0) |" in lines[2]
    assert "-20.00 (-20.0 to -20.0), partial: 1 of 2 seeds" in lines[3]
    assert lines[4].endswith("| 0.600, 0.600 |  |")
