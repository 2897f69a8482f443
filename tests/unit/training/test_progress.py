"""A run's picture takes little of its time."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

import pytest

from samunet.training import progress


def test_picture_takes_a_small_share_of_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A drawing that takes a second is made every fifty seconds, and at the end of the training."""
    now, drawn = [0.0], []

    def draw(path: Path, history: list[dict[str, float]]) -> None:
        drawn.append(now[0])
        now[0] += 1

    monkeypatch.setattr(progress, "monotonic", lambda: now[0])
    monkeypatch.setattr(progress, "draw_progress", draw)
    picture = progress.ProgressPicture(tmp_path / "progress.png")
    for _ in range(120):
        now[0] += 1
        picture.update([{"progress": 0.5}])
    picture.update([{"progress": 1.0}])
    assert drawn[:2] == [50.0, 101.0]
    assert len(drawn) == 3


def test_a_log_whose_writing_failed_misses_no_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a line on a full disk is replaced, and the rows that could not be written stand in the log later."""
    path, history = tmp_path / "log.jsonl", [{"epoch": number} for number in (1, 2, 3, 4)]
    log = progress.RunLog(path)
    log.add(history[0], history[:1])

    def fill(path: Path, _row: dict[str, int]) -> None:
        with path.open("a") as stream:
            stream.write('{"ep')
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr(progress, "append_log", fill)
        full.setattr(progress, "rewrite_log", fill)
        for number in (2, 3):
            with pytest.raises(OSError, match="No space"):
                log.add(history[number - 1], history[:number])
    log.add(history[3], history)
    assert [json.loads(line) for line in path.read_text().splitlines()] == history


def test_a_picture_that_cannot_be_drawn_is_not_tried_at_every_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A failed drawing takes time like any other."""
    now, tried = [0.0], []

    def draw(_path: Path, _history: list[dict[str, float]]) -> None:
        tried.append(now[0])
        now[0] += 1
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(progress, "monotonic", lambda: now[0])
    monkeypatch.setattr(progress, "draw_progress", draw)
    picture = progress.ProgressPicture(tmp_path / "progress.png")
    for _ in range(120):
        now[0] += 1
        with suppress(OSError):
            picture.update([{"progress": 0.5}])
    assert tried == [50.0, 101.0]
