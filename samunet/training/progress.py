"""A run's log and its picture."""

from __future__ import annotations

import json
from pathlib import Path
from time import monotonic
from typing import Any

from samunet.core.files import atomic_path

_LARGEST_SHARE = 0.02


def append_log(path: Path, row: dict[str, Any]) -> None:
    """Append one JSON object as a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as stream:
        stream.write(json.dumps(row, allow_nan=False) + "\n")


def rewrite_log(path: Path, history: list[dict[str, Any]]) -> None:
    """Replace the log by the rows of a resumed run, so that steps taken twice stand once."""
    with atomic_path(path) as temporary:
        temporary.write_text("".join(json.dumps(row) + "\n" for row in history))


class RunLog:
    """The log of a run, which misses no row of an epoch whose writing failed.

    Args:
        path: JSON lines.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._is_whole = path, True

    def add(self, row: dict[str, Any], history: list[dict[str, Any]]) -> None:
        """Append a row; where the one before failed, whole or in part, write all of them again."""
        was_whole, self._is_whole = self._is_whole, False
        if was_whole:
            append_log(self._path, row)
        else:
            rewrite_log(self._path, history)
        self._is_whole = True

    def restart(self, history: list[dict[str, Any]]) -> None:
        """Cut the log back to the epochs of the checkpoint that is continued."""
        rewrite_log(self._path, history)


class ProgressPicture:
    """The picture of a run's course, drawn anew as often as that takes two percent of the time.

    Args:
        path: PNG file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._drawn, self._took = monotonic(), 1.0

    def update(self, history: list[dict[str, Any]]) -> None:
        """Draw the log's rows, unless the last drawing was just now; always at the end of the training."""
        began = monotonic()
        if history[-1]["progress"] < 1 and _LARGEST_SHARE * (began - self._drawn) < self._took:
            return
        try:
            draw_progress(self._path, history)
        finally:
            self._drawn = monotonic()
            self._took = self._drawn - began


def draw_progress(path: Path, history: list[dict[str, Any]]) -> None:
    """Draw loss, Dice of monitor and validation cases, and learning rate over minutes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    minutes = [row["minutes"] for row in history]
    upper.plot(minutes, [row["loss"] for row in history], color="tab:blue", label="training loss")
    upper.set_ylabel("loss")
    dice = upper.twinx()
    for name, color in (("monitor", "tab:green"), ("validation", "tab:orange")):
        points = [(row["minutes"], row[name]) for row in history if row.get(name) is not None]
        if points:
            dice.plot(*zip(*points, strict=True), "o-", color=color, label=f"Dice, {name} cases")
    dice.set_ylim(0, 1)
    dice.set_ylabel("mean Dice (whole volumes)")
    handles = [*upper.get_legend_handles_labels()[0], *dice.get_legend_handles_labels()[0]]
    upper.legend(handles=handles, loc="center right")
    lower.plot(minutes, [row["learning_rate"] for row in history], color="tab:gray")
    lower.set_ylabel("learning rate")
    lower.set_xlabel("minutes")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
