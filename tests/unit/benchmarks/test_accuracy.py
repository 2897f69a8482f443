"""samunet beside nnU-Net: what is paired with what, and what is drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks import accuracy
from samunet.core.files import write_json

DATASET = "Dataset900_Phantoms"


def cell(mean: float, *, minutes: float = 30, clock: str = "wall", **facts: Any) -> dict[str, Any]:
    cases = {f"case_{index}": mean + 0.01 * index for index in range(-2, 3)}
    interval = {"value": mean, "low": mean - 0.01, "high": mean + 0.01}
    place = {"dataset": DATASET, "fold": "0", "device": "cpu", "threads": 1, "clock": clock, "minutes": minutes}
    return {**place, "mean_dice": mean, "interval": interval, "case_dice": cases, **facts}


def peer(mean: float, variant: str, **facts: Any) -> dict[str, Any]:
    return cell(mean, **{"subset": None, **facts}, variant=variant)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(accuracy, "RESULTS", tmp_path)
    return tmp_path


def rows_of(table: str) -> list[list[str]]:
    return [[word.strip() for word in line.strip("|").split("|")] for line in table.splitlines()[2:]]


def test_minutes_stand_beside_nnunets_best_for_the_same_minutes_and_clock(folder: Path) -> None:
    """Rows of other folds, devices, threads, clocks or minutes are no peers, and unfinished ones no rows."""
    write_json(folder / "minutes.json", {"a": cell(0.86), "b": cell(0.80, clock="process"), "old": {"mean_dice": 0.9}})
    other_clock = peer(0.88, "3d batch 2", clock="process", subset={"cases": 5, "seed": 1})
    elsewhere = {"t": peer(0.9, "3d", fold="1"), "u": peer(0.9, "3d", threads=2), "v": peer(0.9, "3d", device="cuda")}
    peers = elsewhere | {
        "p": peer(0.85, "3d batch 2"),
        "q": peer(0.82, "2d as made"),
        "r": peer(0.87, "2d", minutes=60),
    }
    write_json(folder / "nnunet_peer.json", {**peers, "s": other_clock})
    rows = rows_of(accuracy.minutes_table())
    assert [row[1] for row in rows] == ["30 of one thread", "30"]
    assert rows[0][4:] == ["not measured", "", ""]
    assert rows[1][4:6] == ["3d batch 2", "0.850"]
    assert rows[1][6].startswith("+1.0 (")


def test_few_cases_stand_beside_nnunet_on_the_same_subset(folder: Path) -> None:
    """Each start is compared with nnU-Net on the very cases; where that is missing, the table says so."""
    few = {"num_cases": 5, "subset_seed": 12345, "minutes": 15, "clock": None, "plan": "p"}
    cells = {"a": cell(0.80, **few, setup="none"), "b": cell(0.83, **few, setup="self-supervised")}
    write_json(folder / "pretraining.json", {**cells, "c": cell(0.7, **{**few, "subset_seed": 1}, setup="none")})
    same = {"minutes": 15, "clock": "process", "subset": {"cases": 5, "seed": 12345}}
    write_json(folder / "nnunet_peer.json", {"p": peer(0.78, "2d batch 12 AdamW", **same), "q": peer(0.9, "3d")})
    rows = {(row[3], row[4]): row for row in rows_of(accuracy.few_cases_table())}
    assert rows["12345", "none"][1] == "15"
    assert rows["12345", "none"][9].startswith("+2.0 (")
    assert rows["12345", "self-supervised"][9].startswith("+5.0 (")
    assert rows["1", "none"][7] == "not measured"


def test_plots_show_every_row(folder: Path) -> None:
    """Both curves are drawn, and nothing where nothing was measured."""
    write_json(folder / "minutes.json", {f"{m}": cell(0.8 + m / 1000, minutes=m) for m in (10, 30, 60)})
    write_json(folder / "nnunet_peer.json", {"p": peer(0.85, "3d batch 2")})
    accuracy.save(folder / "minutes.svg", accuracy.draw_minutes)
    drawn = (folder / "minutes.svg").read_text(encoding="utf-8")
    assert "samunet, random weights" in drawn
    assert "nnU-Net 2.8.1, its best variant" in drawn
    accuracy.save(folder / "few_cases.svg", accuracy.draw_few_cases)
    assert not (folder / "few_cases.svg").exists(), "nothing measured, nothing drawn"
