"""nnU-Net's cells: each has its own cases and plan, and nothing is taken for something else."""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.minutes import COMPARED, is_complete
from benchmarks.nnunet_peer import VARIANTS, name_of, table, view
from samunet.core.files import read_json, write_json

DATA = Path("Dataset900_Phantoms")


def options(**changes: object) -> argparse.Namespace:
    return argparse.Namespace(
        **{"fold": "0", "num_cases": None, "subset_seed": 1, "threads": 1, "cpu_clock": False, **changes}
    )


def test_cells_share_arrays_and_nothing_else(tmp_path: Path) -> None:
    """Splits and edited plans lie in a folder per cell, and what they were made from stays as it was."""
    shared = tmp_path / "shared"
    (shared / "nnUNetPlans_2d").mkdir(parents=True)
    (shared / "nnUNetPlans_2d" / "case.b2nd").write_text("array")
    planned = {"plans_name": "nnUNetPlans", "configurations": {"2d": {"batch_size": 281}}}
    write_json(shared / "nnUNetPlans.json", planned)
    splits = {cell: {"train": [cell], "val": ["case"]} for cell in ("first", "second")}
    names = {
        cell: view(shared, tmp_path / cell, split, VARIANTS[variant])
        for (cell, split), variant in zip(splits.items(), ("2d as made", "2d batch 12 AdamW"), strict=True)
    }
    for cell, split in splits.items():
        assert read_json(tmp_path / cell / "splits_final.json") == [split]
        assert (tmp_path / cell / "nnUNetPlans_2d" / "case.b2nd").read_text() == "array"
    assert names == {"first": "nnUNetPlans", "second": "nnUNetPlans_batch12"}
    edited = read_json(tmp_path / "second" / "nnUNetPlans_batch12.json")
    assert (edited["plans_name"], edited["configurations"]["2d"]["batch_size"]) == ("nnUNetPlans_batch12", 12)
    assert read_json(shared / "nnUNetPlans.json") == planned


def test_names_hold_what_decides_a_cell() -> None:
    """Clock, threads, fold, subset, minutes and variant all tell cells apart."""
    choices = [options(), options(cpu_clock=True), options(threads=2), options(fold="1"), options(num_cases=5)]
    choices += [options(num_cases=5, subset_seed=2)]
    names = {name_of(DATA, minutes, variant, one) for one in choices for minutes in (5, 10) for variant in VARIANTS}
    assert len(names) == len(choices) * 2 * len(VARIANTS)


def test_failed_cells_are_no_rows() -> None:
    """A table of nothing but failures has a head only."""
    assert len(table({"a": {"dataset": DATA.name, "failed": "exit code 1"}}).splitlines()) == 2


def test_rows_without_what_is_compared_are_run_again() -> None:
    """A row counts only with all that it is paired by."""
    complete = {"case_dice": {}, **dict.fromkeys(COMPARED, "")}
    assert is_complete(complete)
    assert not any(is_complete({k: v for k, v in complete.items() if k != name}) for name in complete)
    assert not is_complete(None)
