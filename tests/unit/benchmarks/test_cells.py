"""What makes two cells the same run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.cells import Cell, identity

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
    cell = Cell("name", DATA, 5.0, ("--weights", "none"))
    assert identity(cell, "0")["base_sha256"] is None
    assert identity(cell, "0") != identity(replace(cell, mirror=True), "0")
