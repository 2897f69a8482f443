"""Where a run stands."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass
class RunState:
    """Where a run stands; everything here is in a resumable checkpoint.

    Args:
        step: Optimizer steps taken.
        seconds: Elapsed time over all resumes.
        milestones: Milestones of progress already evaluated.
        best_score: Monitor score of the checkpoint "best".
        best_epoch: Epoch of the best monitor score.
        finished: Whether the run reached its end.
        history: One row per epoch, as logged.
        parts: Parts of a step since memory ran out; None: as planned.
        checkpointing: Whether blocks are recomputed since memory ran out; None: as planned.
        epoch_loss: Sum of the losses of the steps since the last row.
        epoch_steps: How many these are.
        lessons: How many times images without labels were labelled.
        evaluated_cases: How many cases of each set are evaluated in a run whose time is limited, once measured.
    """

    step: int = 0
    seconds: float = 0.0
    milestones: int = 0
    best_score: float = -math.inf
    best_epoch: int = 0
    finished: bool = False
    history: list[dict[str, Any]] = field(default_factory=list)
    parts: int | None = None
    checkpointing: bool | None = None
    epoch_loss: float = 0.0
    epoch_steps: int = 0
    lessons: int = 0
    evaluated_cases: dict[str, int] = field(default_factory=dict)

    def epochs_without_better(self) -> int:
        """Epochs since the best one that have a monitor score; those that could not be scored do not count."""
        later = [row for row in self.history if row["epoch"] > self.best_epoch]
        return sum(row.get("monitor") is not None for row in later)

    def add_losses(self, losses: list[float]) -> None:
        """Count the losses of further steps, in their order: the sum does not depend on interruptions."""
        for loss in losses:
            self.epoch_loss += loss
        self.epoch_steps += len(losses)

    def take_mean_loss(self) -> float:
        """The mean since the last row; counting starts again."""
        mean = self.epoch_loss / self.epoch_steps
        self.epoch_loss, self.epoch_steps = 0.0, 0
        return mean


def snapshot(state: RunState, elapsed: float) -> RunState:
    """The state with the time since the last start added, as it goes into a checkpoint."""
    return replace(state, seconds=elapsed, history=list(state.history))
