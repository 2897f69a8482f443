"""A run's picture takes little of its time."""

from __future__ import annotations

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
