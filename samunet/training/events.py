"""What a fold does at evaluations, checkpoints and epoch ends."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from samunet.artifacts.dataset import Case
from samunet.core.log import Reporter
from samunet.inference.loading import Member
from samunet.inference.oracle import oracle_settings
from samunet.inference.predictor import Predictor
from samunet.preprocessing.store import remove_leftovers
from samunet.training.checkpointing import RunIdentity, save_result, save_resumable
from samunet.training.progress import ProgressPicture, RunLog
from samunet.training.self_training import LESSONS, SelfTaughtSlices
from samunet.training.trainer import Trainer
from samunet.training.validation import VolumeEvaluator

LOG_FILE, PICTURE_FILE = "training_log.jsonl", "progress.png"


class FoldEvents:
    """Evaluates on monitor and validation cases, writes checkpoints, log and picture into the fold's folder.

    Args:
        folder: The fold's folder.
        identity: What the run is.
        store: Folder of preprocessed images.
        monitor: Training cases held out to choose the best checkpoint and to stop early.
        validation: Cases of the fold that are only plotted.
        device: Where the model is.
        reporter: Told where memory runs out while evaluating.
        taught: Samples of images without labels too, which the run labels itself.
    """

    def __init__(
        self,
        folder: Path,
        identity: RunIdentity,
        *,
        store: Path,
        monitor: Sequence[Case],
        validation: Sequence[Case],
        device: str,
        reporter: Reporter,
        taught: SelfTaughtSlices | None = None,
    ) -> None:
        labels = identity.plan.label_spec
        self._folder, self._identity, self._device = folder, identity, device
        self._log, self._picture = RunLog(folder / LOG_FILE), ProgressPicture(folder / PICTURE_FILE)
        self._reporter, self._taught = reporter, taught
        self._batch_size: int | None = None
        oracle = oracle_settings(identity.plan, identity.recipe, seed=identity.seed)
        self._sets = {
            "monitor": VolumeEvaluator(store, monitor, labels, oracle=oracle),
            "validation": VolumeEvaluator(store, validation, labels, oracle=oracle),
        }

    def begin(self) -> None:
        """Remove what killed runs left unfinished, here and in the folders beside it."""
        remove_leftovers(self._folder.parent)

    def evaluate(self, trainer: Trainer, seconds: float | None, *, plot: bool) -> dict[str, float | None]:
        """Mean whole-volume Dice per set, without mirrored views; each set takes about half of the seconds.

        How many cases that is stays the same for the whole run, continued or not: scores are compared with each other.
        """
        share = None if seconds is None else seconds / len(self._sets)
        predictor = self._predictor(trainer)
        clock = trainer.settings.clock
        scores, limits = {}, trainer.state.evaluated_cases
        try:
            for name, evaluator in self._sets.items():
                if name == "validation" and not plot:
                    continue
                evaluator.limit = limits.get(name)
                scores[name] = evaluator.mean_dice(predictor, share, clock=clock)
                if evaluator.limit is not None:
                    limits[name] = evaluator.limit
        finally:
            self._batch_size = predictor.batch_size
        return scores

    def is_lesson_due(self, trainer: Trainer) -> bool:
        """Whether the run has come to the next lesson on images without labels."""
        taken = trainer.state.lessons
        return self._taught is not None and taken < len(LESSONS) and trainer.progress >= LESSONS[taken]

    def teach(self, trainer: Trainer, seconds: float | None) -> None:
        """Label these images, without mirrored views, for about so many seconds; the samples that follow hold them."""
        assert self._taught is not None
        predictor = self._predictor(trainer)
        try:
            self._taught.teach(predictor, trainer.state.lessons, seconds=seconds, clock=trainer.settings.clock)
        finally:
            self._batch_size = predictor.batch_size

    def _predictor(self, trainer: Trainer) -> Predictor:
        member = Member(trainer.model, self._identity.manifest(), self._identity.plan)
        return Predictor(
            [member], device=self._device, mirror=False, batch_size=self._batch_size, reporter=self._reporter
        )

    def save(self, name: str, trainer: Trainer) -> None:
        """Write "latest" (to continue from) or "best" (the averaged weights, as they were evaluated)."""
        if name == "latest":
            save_resumable(self._folder, trainer, self._identity)
            return
        trainer.average.swap()
        try:
            save_result(self._folder, name, trainer, self._identity)
        finally:
            trainer.average.swap()

    def log(self, row: dict[str, Any], history: list[dict[str, Any]]) -> None:
        """Append the epoch to the log and bring the picture up to date now and then."""
        self._log.add(row, history)
        self._picture.update(history)

    def restart_log(self, history: list[dict[str, Any]]) -> None:
        """Cut the log back to the epochs of the checkpoint that is continued."""
        self._log.restart(history)
