"""What a pretraining run does at milestones, checkpoints and epoch ends."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from samunet.core.files import atomic_path
from samunet.preprocessing.store import remove_leftovers
from samunet.training.checkpointing import RunIdentity, save_resumable
from samunet.training.data import Slabs
from samunet.training.events import LOG_FILE, PICTURE_FILE
from samunet.training.objective import Objective
from samunet.training.pretraining import MaskedImageObjective, reconstruction
from samunet.training.progress import ProgressPicture, RunLog
from samunet.training.trainer import Trainer

RECONSTRUCTION_FILE = "reconstruction.png"
_SHOWN = 4


class PretrainingEvents:
    """Writes checkpoints, the log, the course of the loss, and what the model makes of a few masked slices.

    Args:
        folder: The run's folder.
        identity: What the run is.
        samples: What it sees.
        objective: What it minimises.
    """

    def __init__(self, folder: Path, identity: RunIdentity, *, samples: Slabs, objective: Objective) -> None:
        self._folder, self._identity = folder, identity
        self._samples, self._objective = samples, objective
        self._reconstruction: Sequence[Tensor] = ()
        self._log, self._picture = RunLog(folder / LOG_FILE), ProgressPicture(folder / PICTURE_FILE)

    def begin(self) -> None:
        """Remove what killed runs left unfinished, here and in the folders beside it."""
        remove_leftovers(self._folder.parent)

    def evaluate(self, trainer: Trainer, seconds: float | None, *, plot: bool) -> dict[str, float | None]:
        """Make reconstructions for the next log; nothing is measured, as no case is set aside."""
        del seconds, plot
        if isinstance(self._objective, MaskedImageObjective):
            samples = [self._samples[0, index] for index in range(_SHOWN)]
            batch = tuple(torch.stack(parts).to(trainer.settings.device) for parts in zip(*samples, strict=True))
            self._reconstruction = reconstruction(self._objective, trainer.model, batch)
        return {}

    def is_lesson_due(self, trainer: Trainer) -> bool:
        """Never: no label is predicted."""
        return False

    def teach(self, trainer: Trainer, seconds: float | None) -> None:
        """Nothing."""

    def save(self, name: str, trainer: Trainer) -> None:
        """Write "latest", to continue from; nothing is ever best."""
        if name == "latest":
            save_resumable(self._folder, trainer, self._identity)

    def log(self, row: dict[str, Any], history: list[dict[str, Any]]) -> None:
        """Append the epoch to the log, draw new reconstructions, bring the picture up to date now and then."""
        self._log.add(row, history)
        if self._reconstruction:
            draw_reconstruction(self._folder / RECONSTRUCTION_FILE, self._reconstruction)
            self._reconstruction = ()
        self._picture.update(history)

    def restart_log(self, history: list[dict[str, Any]]) -> None:
        """Cut the log back to the epochs of the checkpoint that is continued."""
        self._log.restart(history)


def draw_reconstruction(path: Path, rows: Sequence[Tensor]) -> None:
    """Draw slices, the same with parts hidden, and as completed; the middle channel in grey.

    Args:
        path: PNG file.
        rows: Three tensors (B, 3, S, S).
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    number = len(rows[0])
    figure = Figure(figsize=(2.2 * number, 6.8), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(rows), number, squeeze=False)
    for images, line, title in zip(rows, panels, ("slice", "seen", "completed"), strict=True):
        for index, panel in enumerate(line):
            limits = (float(rows[0][index, 1].min()), float(rows[0][index, 1].max()))
            panel.imshow(images[index, 1].float().cpu().numpy(), cmap="gray", vmin=limits[0], vmax=limits[1])
            panel.set_axis_off()
        line[0].set_title(title, loc="left")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
