"""The training loop, readable in one sitting."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from time import monotonic
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from samunet.artifacts.plan import ResolvedRecipe
from samunet.core.errors import OutOfMemoryError, TrainingError
from samunet.core.log import Reporter
from samunet.models.segmentation import SegmentationModel
from samunet.training.data import Sample, next_batch
from samunet.training.fallback import Footprint, Volatile, in_advance, ladder_of, ran_out, release_memory
from samunet.training.gradients import accumulate
from samunet.training.objective import Objective
from samunet.training.optim import MovingAverage, clip_gradients, learning_rate_factor, set_learning_rate

MAX_GRADIENT_NORM = 1.0
NUM_MILESTONES = 10
SAVE_EVERY_SECONDS = 120.0
EVALUATION_SHARE = 0.04
# Where torch has one kernel for a whole AdamW step: of a small model's step it saves about a tenth.
FUSED_ON = ("cpu", "cuda")


@dataclass(frozen=True)
class RunSettings:
    """What is fixed for a run.

    Args:
        recipe: As trained.
        device: Where to train.
        seed: Of initialisation and data.
        minutes: Time limit; the schedule then runs on elapsed time. None: it runs on steps.
        patience: Stop after this many epochs without a better monitor score; None: never.
        clock: What tells the seconds; the processor's own, where other programs must not count.
    """

    recipe: ResolvedRecipe
    device: str
    seed: int
    minutes: float | None
    patience: int | None
    clock: Callable[[], float] = monotonic

    @property
    def samples_per_epoch(self) -> int:
        """Samples (slabs; slices where a slab is one) consumed in an epoch."""
        return self.recipe.iterations * self.samples_per_step

    @property
    def samples_per_step(self) -> int:
        """Samples of an optimizer step."""
        return self.recipe.batch_size // self.recipe.slab_depth


@dataclass
class RunState:
    """Where a run stands; everything here is in a resumable checkpoint.

    Args:
        step: Optimizer steps taken.
        seconds: Elapsed time over all resumes.
        milestones: Milestones of progress already evaluated.
        best_score: Best monitor score.
        best_epoch: Epoch of it.
        finished: Whether the run reached its end.
        history: One row per epoch, as logged.
        parts: Parts of a step since memory ran out; None: as planned.
        checkpointing: Whether blocks are recomputed since memory ran out; None: as planned.
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


class RunEvents(Protocol):
    """What the loop asks of the rest: evaluation, checkpoints, logs."""

    def evaluate(self, trainer: Trainer, seconds: float | None) -> dict[str, float | None]:
        """Whole-volume Dice of the current weights: "monitor" chooses, "validation" is only plotted.

        Args:
            trainer: Holds the weights.
            seconds: About how long it may take; None: as long as it takes.
        """

    def save(self, name: str, trainer: Trainer) -> None:
        """Write a checkpoint of the current weights."""

    def log(self, row: dict[str, Any], history: list[dict[str, Any]]) -> None:
        """Record an epoch."""


class Trainer:
    """Optimizes a model until its steps, its time or its patience are used up.

    Args:
        model: On its device.
        settings: Of the run.
        objective: What is minimised.
        make_loader: Builds the endless loader, given the number of samples already consumed.
        events: Evaluation, checkpoints, logs.
        reporter: Who is told.
    """

    def __init__(
        self,
        model: SegmentationModel,
        settings: RunSettings,
        *,
        objective: Objective,
        make_loader: Callable[[int], DataLoader[Sample]],
        events: RunEvents,
        reporter: Reporter,
    ) -> None:
        self.model, self.settings, self.state = model, settings, RunState()
        self._objective, self._make_loader = objective, make_loader
        self._events, self._reporter = events, reporter
        recipe = settings.recipe
        groups = model.trainable_parameters()
        self.optimizer = torch.optim.AdamW(
            [
                {"params": groups["decay"], "weight_decay": recipe.weight_decay},
                {"params": groups["no_decay"], "weight_decay": 0.0},
            ],
            lr=recipe.learning_rate,
            fused=torch.device(settings.device).type in FUSED_ON,
        )
        self.average = MovingAverage(model, recipe.ema_decay)
        uses_scaler = recipe.precision == "fp16" and torch.device(settings.device).type == "cuda"
        self.scaler = torch.amp.GradScaler(enabled=uses_scaler)
        apart = model.estimator_parameters()
        # Clipped on its own: the estimate's gradient must not shorten that of the masks.
        self._clipped = ([p for p in model.parameters() if p.requires_grad and all(p is not q for q in apart)], apart)
        self._ladder = ladder_of(model.train(), recipe)
        self._now = settings.clock
        self._started = self._saved = self._now()
        self._saved_step = 0
        self._evaluation_seconds = self._evaluated_at = 0.0

    @property
    def total_steps(self) -> int:
        """Steps of a run without time limit."""
        return self.settings.recipe.epochs * self.settings.recipe.iterations

    @property
    def elapsed(self) -> float:
        """Seconds of this run over all resumes."""
        return self.state.seconds + self._now() - self._started

    @property
    def epoch(self) -> int:
        """Epochs finished."""
        return self.state.step // self.settings.recipe.iterations

    @property
    def progress(self) -> float:
        """Fraction of the run that is over."""
        if self.settings.minutes is not None:
            return min(1.0, self.elapsed / (60 * self.settings.minutes))
        return self.state.step / self.total_steps

    @property
    def footprint(self) -> Footprint:
        """How steps are computed: as planned, or as they had to be since memory ran out."""
        recipe, state = self.settings.recipe, self.state
        return Footprint(
            recipe.accumulation_steps if state.parts is None else state.parts,
            recipe.checkpointing if state.checkpointing is None else state.checkpointing,
        )

    def economise(self, predicted: Callable[[Footprint], float], available_gib: float, source: str) -> None:
        """Fall back before the first step where it is predicted not to fit; warn where nothing makes it fit.

        Args:
            predicted: Peak of a step in GiB.
            available_gib: What it may take.
            source: Where that figure comes from.
        """
        before = self.footprint
        if predicted(before) <= available_gib:
            return
        after = in_advance(self._ladder, before, predicted, available_gib)
        self._take(after)
        line = f"a step may take {predicted(before):.1f} GiB of memory, and {available_gib:.1f} are there ({source}): "
        line += after.change_from(before) or "nothing makes it smaller"
        if predicted(after) <= available_gib:
            self._reporter.info(f"{line}; going on")
        else:
            least = f"{predicted(after):.1f} GiB at least"
            self._reporter.warn(f"{line}; {least}, so close other programs or plan again on this machine")

    def prolong(self) -> None:
        """Let a run whose length was changed go on, evaluating at the milestones still ahead."""
        self.state.finished = False
        self.state.milestones = int(self.progress * NUM_MILESTONES)

    def run(self) -> RunState:
        """Train to the end; the model then holds the averaged weights.

        Raises:
            TrainingError: If the loss is not a number any more; the last checkpoint is kept.
            OutOfMemoryError: If a step does not fit the device, whatever it is cut into.
        """
        self._started = self._saved = self._now()
        self._saved_step = self.state.step
        self.model.train()
        self.model.set_checkpointing(self.footprint.checkpointing)
        if self.state.step == 0:
            self._save("latest")
        batches: Iterator[Sample] = iter(self._make_loader(self.state.step * self.settings.samples_per_step))
        try:
            while not self.state.finished and self.progress < 1:
                self._after_epoch(self._epoch(batches))
        except (RuntimeError, MemoryError) as error:
            if not ran_out(error):
                raise
            raise self._out_of_memory(str(error)) from None
        if not self.state.finished:
            self.state.finished = True
            self._save("latest")
        self.average.swap()
        self.model.eval()
        return self.state

    def _epoch(self, batches: Iterator[Sample]) -> dict[str, Any]:
        """Optimize until the next epoch boundary or the end of the time; returns its log row."""
        recipe, first = self.settings.recipe, self.state.step
        losses: list[Tensor] = []
        began = self._now()
        while True:
            losses.append(self._step(batches))
            if self.state.step % 10 == 0 or self.state.step <= 3:
                self._report_live(losses, first, began)
            if self.state.step % recipe.iterations == 0 or self.progress >= 1:
                break
        seconds = self._now() - began
        loss = float(torch.stack(losses).mean())
        if not math.isfinite(loss):
            raise TrainingError(
                "the loss is not a number any more",
                found=f"{loss} at step {self.state.step}",
                todo="start again with a lower --lr; the last checkpoint before this is kept",
            )
        return {
            "epoch": math.ceil(self.state.step / recipe.iterations),
            "step": self.state.step,
            "progress": round(self.progress, 5),
            "minutes": round(self.elapsed / 60, 3),
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "loss": loss,
            "parts": self.footprint.parts,
            "checkpointing": self.footprint.checkpointing,
            "images_per_second": round((self.state.step - first) * recipe.batch_size / max(seconds, 1e-9), 2),
        }

    def _step(self, batches: Iterator[Sample]) -> Tensor:
        """One optimizer step over one batch; returns its mean loss."""
        recipe = self.settings.recipe
        factor = learning_rate_factor(
            self.state.step, self.progress, warmup_steps=recipe.warmup_steps, decay=recipe.decay
        )
        set_learning_rate(self.optimizer, recipe.learning_rate * factor)
        total = self._gradients(next_batch(batches))
        self.scaler.unscale_(self.optimizer)
        for parameters in self._clipped:
            clip_gradients(parameters, MAX_GRADIENT_NORM)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.average.update()
        self.state.step += 1
        return total

    def _gradients(self, batch: Sample) -> Tensor:
        """Gradients of a batch; where memory runs out, of the same batch again with the next smaller footprint.

        Only these are tried again: activations are gone by the time of the update, which no footprint makes smaller.

        Raises:
            OutOfMemoryError: If the smallest footprint does not fit; the run as it was before this step is saved.
        """
        while True:
            start = Volatile.of(self.model)
            try:
                return self._backward(batch)
            except (RuntimeError, MemoryError) as error:
                if not ran_out(error):
                    raise
                found = str(error)
            # Outside of the except clause, whose traceback would keep the failed step's tensors.
            start.restore()
            self.optimizer.zero_grad(set_to_none=True)
            release_memory()
            before, smaller = self.footprint, self._ladder.below(self.footprint)
            if smaller is None:
                self._save("latest")
                raise self._out_of_memory(found)
            self._take(smaller)
            self._reporter.info(
                f"memory ran out at step {self.state.step + 1}: {smaller.change_from(before)}; going on"
            )

    def _backward(self, batch: Sample) -> Tensor:
        recipe, device = self.settings.recipe, self.settings.device
        self.optimizer.zero_grad(set_to_none=True)
        return accumulate(
            self.model,
            self._objective,
            tuple(part.to(device, non_blocking=True) for part in batch),
            parts=recipe.accumulation_steps,
            pieces=self.footprint.parts // recipe.accumulation_steps,
            least=self._ladder.least,
            scaler=self.scaler,
        )

    def _take(self, footprint: Footprint) -> None:
        self.state.parts, self.state.checkpointing = footprint.parts, footprint.checkpointing
        self.model.set_checkpointing(footprint.checkpointing)

    def _out_of_memory(self, found: str) -> OutOfMemoryError:
        on_cpu = torch.device(self.settings.device).type == "cpu"
        other = "close other programs" if on_cpu else "plan for less with --gpu-memory"
        return OutOfMemoryError(
            f"memory of {self.settings.device} ran out while training",
            found=found.split("\n")[0],
            todo=f"{other} and go on from step {self._saved_step} with --c, or start again with a smaller --batch-size",
        )

    def _after_epoch(self, row: dict[str, Any]) -> None:
        """Evaluate at milestones, remember the best, stop on patience, save, log."""
        was_skipped = False
        due = int(self.progress * NUM_MILESTONES)
        if (due > self.state.milestones and self._affordable()) or self.settings.patience is not None:
            self.state.milestones = due
            scores = self._evaluate()
            was_skipped = scores is None
            row.update(scores or {})
            score = row.get("monitor")
            if score is not None and score > self.state.best_score:
                self.state.best_score, self.state.best_epoch = score, row["epoch"]
                self._save("best")
        patience = self.settings.patience
        if patience is not None and row["epoch"] - self.state.best_epoch >= patience > 0 and not was_skipped:
            self._reporter.info(f"no better monitor score for {patience} epochs: stopping at epoch {row['epoch']}")
            self.state.finished = True
        self.state.history.append(row)
        self._events.log(row, self.state.history)
        if self.state.finished or self._now() - self._saved > SAVE_EVERY_SECONDS:
            self._save("latest")

    def _affordable(self) -> bool:
        """Whether another evaluation keeps them below a tenth of a run that is limited by time."""
        if self.settings.minutes is None:
            return True
        spare = self.elapsed - self._evaluated_at >= 9 * self._evaluation_seconds
        return spare and self.progress < 1

    def _evaluate(self) -> dict[str, float | None] | None:
        """Scores of the averaged weights; None where memory does not suffice, which stops no training."""
        began = self._now()
        limit = self.settings.minutes
        scores, found = None, ""
        self.average.swap()
        self.model.eval()
        try:
            scores = self._events.evaluate(self, None if limit is None else EVALUATION_SHARE * 60 * limit)
        except (RuntimeError, MemoryError) as error:
            if not ran_out(error):
                raise
            found = str(error).split("\n")[0]
        finally:
            self.average.swap()
            self.model.train()
        if scores is None:
            release_memory()
            self._reporter.warn(
                f"memory ran out while evaluating after step {self.state.step} ({found}): skipped; training goes on"
            )
        self._evaluation_seconds, self._evaluated_at = self._now() - began, self.elapsed
        return scores

    def _save(self, name: str) -> None:
        self._events.save(name, self)
        if name == "latest":
            self._saved, self._saved_step = self._now(), self.state.step

    def _report_live(self, losses: list[Tensor], first: int, began: float) -> None:
        done = self.progress
        speed = (self.state.step - first) * self.settings.recipe.batch_size / max(self._now() - began, 1e-9)
        remaining = self.elapsed * (1 - done) / max(done, 1e-6) / 60
        end = f"{remaining:.1f} min left" if self.state.step > 3 else "estimating the end"
        recent = float(torch.stack(losses[-10:]).mean())
        self._reporter.status(
            f"{done:6.1%}  step {self.state.step}  loss {recent:.3f}  {speed:.1f} slices/s  "
            f"{self.elapsed / 60:.1f} min, {end}"
        )


def snapshot(state: RunState, elapsed: float) -> RunState:
    """The state with the time since the last start added, as it goes into a checkpoint."""
    return replace(state, seconds=elapsed, history=list(state.history))
