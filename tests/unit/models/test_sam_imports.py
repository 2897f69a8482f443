"""A broken torchvision is answered with the line to type."""

from __future__ import annotations

from pathlib import Path

import pytest

from samunet.core.errors import UsageError
from samunet.models.sam.imports import guarded_import


def _module(folder: Path, name: str, content: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / f"{name}.py").write_text(content)
    monkeypatch.syspath_prepend(folder)


def test_mismatched_torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The missing operator becomes a usage error with the pip line."""
    _module(
        tmp_path,
        "broken_vision",
        "raise RuntimeError('operator torchvision::nms does not exist\\nmore')",
        monkeypatch,
    )
    with pytest.raises(UsageError, match="not built for each other") as caught:
        guarded_import("broken_vision")
    assert caught.value.found == "operator torchvision::nms does not exist"
    assert "pip install --force-reinstall torch torchvision" in str(caught.value.todo)


def test_missing_package() -> None:
    """A package that is not there is named with its own pip line."""
    with pytest.raises(UsageError, match="not installed") as caught:
        guarded_import("segment_nothing.modeling")
    assert caught.value.todo == "pip install segment-nothing"


def test_other_faults_are_not_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error that has nothing to do with torchvision passes through."""
    _module(tmp_path, "broken_otherwise", "raise RuntimeError('out of cheese')", monkeypatch)
    with pytest.raises(RuntimeError, match="cheese"):
        guarded_import("broken_otherwise")
