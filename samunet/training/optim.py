"""Learning-rate schedule over progress, and the moving average of trained weights."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from samunet.artifacts.plan import Decay

WARMUP_PROGRESS = 0.1
POLYNOMIAL = Decay()


def learning_rate_factor(step: int, progress: float, *, warmup_steps: int, decay: Decay = POLYNOMIAL) -> float:
    """Factor on the base learning rate: linear warm-up, then decay over progress.

    Args:
        step: Optimizer steps already taken.
        progress: Fraction of the run that is over, 0 to 1: steps taken of steps planned, or elapsed time of the limit.
        warmup_steps: Steps until the full rate; a run shorter than planned warms up in its first tenth.
        decay: How it falls.
    """
    warmup = min(1.0, max((step + 1) / max(1, warmup_steps), progress / WARMUP_PROGRESS))
    done = min(max(progress, 0.0), 1.0)
    if decay.kind == "constant":
        return float(warmup)
    if decay.kind == "cosine":
        return float(warmup * (1 + math.cos(math.pi * done)) / 2)
    return float(warmup * (1.0 - done) ** decay.power)


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Set the learning rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


class MovingAverage:
    """Exponential moving average of the trainable parameters of a model.

    Buffers (TinyViT's batch statistics) are not averaged: they are the model's own. The decay grows from 0.1 as
    (1 + n) / (10 + n) so that short runs are not dominated by the random start.

    Args:
        model: The model in training.
        decay: Final decay; 0 keeps no average and :meth:`weights` returns the live ones.

    Source: Polyak & Juditsky 1992; the growing decay as in TensorFlow's ExponentialMovingAverage.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._model = model
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._decay = decay
        self._updates = 0
        self._shadow = {name: p.detach().clone() for name, p in self._parameters.items()} if decay > 0 else {}

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the current weights."""
        if not self._shadow:
            return
        self._updates += 1
        decay = min(self._decay, (1 + self._updates) / (10 + self._updates))
        average = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
        average(list(self._shadow.values()), [self._parameters[name].detach() for name in self._shadow], None)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange live and averaged weights; calling it twice restores both."""
        for name, shadow in self._shadow.items():
            live = self._parameters[name]
            kept = live.detach().clone()
            live.copy_(shadow)
            shadow.copy_(kept)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The model with the averaged weights, to evaluate; afterwards it trains on with its own."""
        self.swap()
        self._model.eval()
        try:
            yield
        finally:
            self.swap()
            self._model.train()

    def state(self) -> dict[str, Tensor]:
        """The averaged tensors and the number of updates, for a checkpoint."""
        return {**self._shadow, "num_updates": torch.tensor(self._updates)}

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore what :meth:`state` gave."""
        self._updates = int(state["num_updates"])
        for name, shadow in self._shadow.items():
            shadow.copy_(state[name])


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> None:
    """Clip the total gradient norm."""
    nn.utils.clip_grad_norm_(parameters, max_norm)
