"""What makes two cells the same run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import cells
from benchmarks.cells import POINTS, Cell, identity, paired_points, span_of
from samunet.core.files import write_json

DATA = Path("Dataset900_Phantoms")


def starting_from(file: Path, *, kind: str = "") -> Cell:
    return Cell("name", DATA, 5.0, ("--weights", f"{kind}{file}", "--seed", "1"))


@pytest.mark.parametrize("kind", ["", "sam:"])
@pytest.mark.parametrize("ending", [".safetensors", ".pth"])
def test_weights_are_told_apart_by_what_they_hold(tmp_path: Path, kind: str, ending: str) -> None:
    """Files of one name in different folders are the same run if, and only if, they hold the same."""
    files = [tmp_path / folder / f"weights{ending}" for folder in ("first", "second", "copy")]
    for file, content in zip(files, ("one", "other", "one"), strict=True):
        file.parent.mkdir()
        file.write_text(content)
    first, second, copy = (identity(starting_from(file, kind=kind), "0") for file in files)
    assert first != second
    assert first == copy
    assert first["words"] == second["words"] == ["--weights", f"{kind}weights{ending}", "--seed", "1"]


def test_random_weights_have_no_hash_and_mirrored_views_are_another_run() -> None:
    """What is averaged over views is not what is not."""
    cell = Cell("name", DATA, 5.0, ("--weights", "none"))
    assert identity(cell, "0")["base_sha256"] is None
    assert identity(cell, "0") != identity(replace(cell, mirror=True), "0")


@pytest.mark.parametrize("groups", [{}, {"a": "patient", "b": "patient"}])
def test_a_single_case_or_group_has_no_interval(groups: dict[str, str]) -> None:
    """All that is known is that Dice lies between 0 and 1; the table says why."""
    cases = ("a", "b") if groups else ("a",)
    found = paired_points([(dict.fromkeys(cases, 0.6), dict.fromkeys(cases, 0.5))], groups)
    assert found == {"regret": 10.0, "low": -POINTS, "high": POINTS}
    assert span_of(found["low"], found["high"]) == "one case or group"
    assert span_of(-1.0, 2.25) == "-1.0 to +2.2"


def test_an_outdated_row_is_not_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row is taken from another table, but not one that was marked as outdated or has failed."""
    monkeypatch.setattr(cells, "RESULTS", tmp_path)
    cell = Cell("name", DATA, 5.0, ("--weights", "none"))
    row = {**identity(cell, "0"), "mean_dice": 0.5}
    for mark in ({}, {"outdated": True}, {"failed": "exit code 2"}):
        write_json(tmp_path / "table.json", {"row": {**row, **mark}})
        assert (cells.same_run(cell, "0") is None) == bool(mark)


def test_the_model_of_another_cell_is_scored_anew(tmp_path: Path) -> None:
    """What was trained is copied, its scores are not; without a finished model the cell trains its own."""
    trained, scored = Cell("plan", DATA, 5.0), Cell("mirrored views", DATA, 5.0, mirror=True, model_of="plan")
    fold = cells.cell_folder(tmp_path, "plan") / DATA.name / "2d__auto__none" / "fold_0"
    (fold / "validation").mkdir(parents=True)
    (fold / "validation" / "summary.json").touch()
    assert not cells.copy_model(scored, tmp_path, "0")
    (fold / "checkpoint_final.safetensors").write_text("weights")
    assert not cells.copy_model(trained, tmp_path, "0")
    assert not cells.copy_model(scored, tmp_path, "1")
    assert cells.copy_model(scored, tmp_path, "0")
    own = cells.cell_folder(tmp_path, "mirrored views") / DATA.name / "2d__auto__none" / "fold_0"
    assert (own / "checkpoint_final.safetensors").read_text() == "weights"
    assert not (own / "validation").exists()


def test_only_the_very_run_that_was_interrupted_goes_on(tmp_path: Path) -> None:
    """A checkpoint of the same run is gone on with; of another one, and without a checkpoint, nothing is left."""
    folder, run = tmp_path / "cell", identity(Cell("name", DATA, 5.0, ("--weights", "none")), "0")
    checkpoint = folder / DATA.name / "checkpoint_latest.safetensors"
    assert not cells.has_begun(folder, run)
    assert not cells.has_begun(folder, run)
    checkpoint.parent.mkdir()
    checkpoint.touch()
    assert cells.has_begun(folder, run)
    assert not cells.has_begun(folder, {**run, "rules": "others"})
    assert not checkpoint.exists()
