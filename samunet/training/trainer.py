"""The training loop, readable in one sitting."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from time import monotonic
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from samunet.artifacts.plan import ResolvedRecipe
from samunet.core.errors import OutOfMemoryError, TrainingError
from samunet.core.log import Reporter
from samunet.models.device import ran_out, release_memory
from samunet.models.segmentation import SegmentationModel
from samunet.training.data import Sample, loader_lost, next_batch, worker_died
from samunet.training.fallback import Footprint, Volatile, in_advance, ladder_of
from samunet.training.gradients import accumulate
from samunet.training.objective import Objective
from samunet.training.optim import MovingAverage, clip_gradients, learning_rate_factor, set_learning_rate
from samunet.training.run_state import RunState
from samunet.training.tolerance import Attempts

MAX_GRADIENT_NORM = 1.0
NUM_MILESTONES = 10
SAVE_EVERY_SECONDS = 120.0
EVALUATION_SHARE, LESSON_SHARE = 0.04, 0.05
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


class RunEvents(Protocol):
    """What the loop asks of the rest: evaluation, checkpoints, logs. Failing to write stops no run."""

    def begin(self) -> None:
        """Make room for what a run that begins or continues writes."""

    def evaluate(self, trainer: Trainer, seconds: float | None, *, plot: bool) -> dict[str, float | None]:
        """Whole-volume Dice of the current weights: "monitor" chooses, "validation" is only plotted.

        Args:
            trainer: Holds the weights.
            seconds: About how long it may take; None: as long as it takes.
            plot: Whether the latter is wanted.
        """

    def is_lesson_due(self, trainer: Trainer) -> bool:
        """Whether images without labels are to be labelled now."""

    def teach(self, trainer: Trainer, seconds: float | None) -> None:
        """Label them with the current weights, for the loader to give; arguments as for :meth:`evaluate`."""

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
        self._events, self._reporter, self._attempts = events, reporter, Attempts(reporter)
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
        self._losses: list[Tensor] = []
        self._is_unwatched = False
        self._recent: deque[float] = deque(maxlen=10)
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
            TrainingError: If the loss is not a number any more, or the system ended a loader process; the last
                checkpoint is kept.
            OutOfMemoryError: If a step does not fit the device, whatever it is cut into.
        """
        self._started = self._saved = self._now()
        self._saved_step = self.state.step
        self._attempts.attempt("removing what a killed run left", self._events.begin)
        self.model.train()
        self.model.set_checkpointing(self.footprint.checkpointing)
        if self.state.step == 0:
            torch.manual_seed(self.settings.seed)
            self._save("latest")
        batches = self._batches()
        try:
            while not self.state.finished and self.progress < 1:
                if self.state.step % self.settings.recipe.iterations == 0 and self._events.is_lesson_due(self):
                    del batches  # with its processes
                    self._take_lesson()
                    batches = self._batches()
                self._after_epoch(self._epoch(batches))
        except (RuntimeError, MemoryError) as error:
            if ran_out(error):
                raise self._out_of_memory(str(error)) from None
            if worker_died(error):
                raise loader_lost(str(error), saved_step=self._saved_step) from None
            raise
        if not self.state.finished:
            self.state.finished = True
            self._save("latest")
        self.average.swap()
        self.model.eval()
        return self.state

    def _batches(self) -> Iterator[Sample]:
        """Those that follow the steps taken."""
        return iter(self._make_loader(self.state.step * self.settings.samples_per_step))

    def _epoch(self, batches: Iterator[Sample]) -> dict[str, Any]:
        """Optimize until the next epoch boundary or the end of the time; returns its log row."""
        recipe, first = self.settings.recipe, self.state.step
        began = self._now()
        while True:
            self._losses.append(self._step(batches))
            if self.state.step % 10 == 0 or self.state.step <= 3:
                self._report_live(first, began)
            if self.state.step % recipe.iterations == 0 or self.progress >= 1:
                break
            if self._save_is_due():
                self._save("latest")
        seconds = self._now() - began
        self._count_losses()
        return {
            "epoch": math.ceil(self.state.step / recipe.iterations),
            "step": self.state.step,
            "progress": round(self.progress, 5),
            "minutes": round(self.elapsed / 60, 3),
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "loss": self.state.take_mean_loss(),
            "parts": self.footprint.parts,
            "checkpointing": self.footprint.checkpointing,
            "images_per_second": round((self.state.step - first) * recipe.batch_size / max(seconds, 1e-9), 2),
        }

    def _count_losses(self) -> None:
        """Fetch the losses of the last steps from the device.

        Raises:
            TrainingError: If one is not a number; nothing that follows from it may be saved.
        """
        if not self._losses:
            return
        losses = torch.stack(self._losses).tolist()
        self._losses.clear()
        wrong = [loss for loss in losses if not math.isfinite(loss)]
        if wrong:
            raise TrainingError(
                "the loss is not a number any more",
                found=f"{wrong[0]} at step {self.state.step}",
                todo="start again with a lower --lr; the last checkpoint before this is kept",
            )
        self.state.add_losses(losses)
        self._recent.extend(losses)

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
        due, is_best = int(self.progress * NUM_MILESTONES), False
        patience = self.settings.patience
        is_milestone = due > self.state.milestones and self._affordable()
        if is_milestone or patience is not None:
            self.state.milestones = due if is_milestone else self.state.milestones
            scores = self._evaluate(plot=is_milestone)
            row.update(scores or {})
            is_best = self._keep_if_best(row)
            if patience is not None and scores is not None and row.get("monitor") is None:
                self._warn_unwatched()
        self.state.history.append(row)
        if patience is not None and self.state.epochs_without_better() >= patience > 0:
            self._reporter.info(f"no better monitor score for {patience} epochs: stopping at epoch {row['epoch']}")
            self.state.finished = True
        self._attempts.attempt("writing the log and its picture", lambda: self._events.log(row, self.state.history))
        if self.state.finished or is_best or self._save_is_due():
            self._save("latest")

    def _keep_if_best(self, row: dict[str, Any]) -> bool:
        """Whether an epoch has the best monitor score so far; its weights then become the checkpoint "best"."""
        score, before = row.get("monitor"), self.state.best_score
        if score is None or score <= before:
            return False
        self.state.best_score, self.state.best_epoch = score, row["epoch"]
        if not self._save("best"):
            # Compared is with what the file holds; the epoch counts for patience all the same.
            self.state.best_score = before
        return True

    def _warn_unwatched(self) -> None:
        if not self._is_unwatched:
            self._reporter.warn("no monitor case has a score: --patience has nothing to watch, and stops nothing")
        self._is_unwatched = True

    def _affordable(self) -> bool:
        """Whether another evaluation keeps them below a tenth of a run that is limited by time."""
        if self.settings.minutes is None:
            return True
        spare = self.elapsed - self._evaluated_at >= 9 * self._evaluation_seconds
        return spare and self.progress < 1

    def _evaluate(self, *, plot: bool) -> dict[str, float | None] | None:
        """Scores of the averaged weights; None where memory does not suffice, which stops no training."""
        began, what = self._now(), f"evaluating after step {self.state.step}"
        seconds = self._share(EVALUATION_SHARE)
        if seconds is not None and self.settings.patience is not None:  # after every epoch: a tenth of it for each set
            seconds = min(seconds, 0.2 * (self.elapsed - self._evaluated_at))
        with self.average.in_place():
            scores = self._attempts.in_memory(what, lambda: self._events.evaluate(self, seconds, plot=plot))
        self._evaluation_seconds, self._evaluated_at = self._now() - began, self.elapsed
        return scores

    def _take_lesson(self) -> None:
        """Label images without labels with the averaged weights; what the loader gives from now on holds them."""
        self.state.lessons += 1
        seconds, what = self._share(LESSON_SHARE), f"labelling images after step {self.state.step}"
        with self.average.in_place():
            self._attempts.in_memory(what, lambda: self._events.teach(self, seconds))
        self._save("latest")

    def _share(self, share: float) -> float | None:
        """Seconds of a share of a run that is limited by time."""
        return None if self.settings.minutes is None else share * 60 * self.settings.minutes

    def _save_is_due(self) -> bool:
        return self._now() - self._saved > SAVE_EVERY_SECONDS

    def _save(self, name: str) -> bool:
        """Whether a checkpoint could be written; where not, the next one is tried as if it had been."""
        self._count_losses()
        written = self._attempts.attempt(f"saving {name}", lambda: self._events.save(name, self))
        if name == "latest":
            self._saved = self._now()
            self._saved_step = self.state.step if written else self._saved_step
        return written

    def _report_live(self, first: int, began: float) -> None:
        self._count_losses()
        done = self.progress
        speed = (self.state.step - first) * self.settings.recipe.batch_size / max(self._now() - began, 1e-9)
        remaining = self.elapsed * (1 - done) / max(done, 1e-6) / 60
        end = f"{remaining:.1f} min left" if self.state.step > 3 else "estimating the end"
        recent = sum(self._recent) / len(self._recent)
        self._reporter.status(
            f"{done:6.1%}  step {self.state.step}  loss {recent:.3f}  {speed:.1f} slices/s  "
            f"{self.elapsed / 60:.1f} min, {end}"
        )
