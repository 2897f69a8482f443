"""The gradient of the loss on the encoder's projections, before anything is adapted.

The dataset's mask tokens start random, and a gradient that comes through them says nothing about the encoder; so the
decoder is trained for a short while on the frozen encoder first.

Legend: D token width, R rows of a projection.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from time import monotonic

import torch
from torch import Tensor, nn

from samunet.artifacts.method import EncoderMethod, Method, NoDepth
from samunet.artifacts.plan import ResolvedRecipe
from samunet.artifacts.probe import NUM_SINGULAR_VALUES, ProjectionFacts, Target
from samunet.core.errors import TrainingError
from samunet.core.log import Reporter
from samunet.models.peft.lora import qkv_rows
from samunet.models.segmentation import SegmentationModel
from samunet.training.data import Sample, next_batch
from samunet.training.objective import Objective
from samunet.training.optim import clip_gradients
from samunet.training.trainer import MAX_GRADIENT_NORM

WARMUP_STEPS = 100
WARMUP_SHARE = 0.25
LEAST_BATCHES = 2
_HEAD_RATE, _RISING_STEPS = 1e-3, 10
_TARGETS: tuple[Target, ...] = ("q", "k", "v", "o")


@dataclass(frozen=True)
class Measurement:
    """What a probe measured.

    Args:
        projections: Facts of every projection of every block.
        warmup_loss: Loss of every step in which only the decoder was trained.
        batches: Batches that the gradient is averaged over.
    """

    projections: tuple[ProjectionFacts, ...]
    warmup_loss: tuple[float, ...]
    batches: int


def probe_recipe(recipe: ResolvedRecipe) -> ResolvedRecipe:
    """A recipe of the same network with nothing injected: a frozen encoder under a decoder that trains whole."""
    method = Method(encoder=EncoderMethod(train="frozen"), depth=NoDepth())
    precision = "fp32" if recipe.precision == "fp16" else recipe.precision
    return replace(recipe, method=method, precision=precision)


def measure(
    model: SegmentationModel,
    batches: Iterator[Sample],
    *,
    recipe: ResolvedRecipe,
    objective: Objective,
    device: str,
    num_batches: int,
    minutes: float | None,
    reporter: Reporter,
) -> Measurement:
    """Train the decoder for a short while, then measure the encoder's gradient.

    Args:
        model: Of :func:`probe_recipe`, on its device; its decoder changes.
        batches: Endless.
        recipe: Of :func:`probe_recipe`.
        objective: Whose gradient.
        device: Where the model is.
        num_batches: Batches to average over.
        minutes: Limit: a quarter for the decoder, the rest for the gradient; None for no limit.
        reporter: Told about progress.

    Raises:
        TrainingError: If the loss or the gradient is not a number.
    """
    began = monotonic()

    def spent(share: float) -> bool:
        return minutes is not None and monotonic() - began > share * 60 * minutes

    def backward() -> float:
        return _backward(model, objective, next_batch(batches), recipe.accumulation_steps, device)

    model.train()
    losses = _train_decoder(model, backward, lambda: spent(WARMUP_SHARE), reporter)
    gradients = _GradientSums(model)
    for count in range(1, num_batches + 1):
        model.zero_grad(set_to_none=True)
        backward()
        gradients.add()
        reporter.status(f"gradient of batch {count} of {num_batches}")
        if count >= LEAST_BATCHES and spent(1.0):
            break
    return Measurement(gradients.facts(), tuple(losses), gradients.count)


def _train_decoder(
    model: SegmentationModel, backward: Callable[[], float], stop: Callable[[], bool], reporter: Reporter
) -> list[float]:
    """A few steps of AdamW on everything but the encoder; returns their losses."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=_HEAD_RATE)
    losses: list[float] = []
    while len(losses) < WARMUP_STEPS and not (losses and stop()):
        for group in optimizer.param_groups:
            group["lr"] = _HEAD_RATE * min(1.0, (len(losses) + 1) / _RISING_STEPS)
        optimizer.zero_grad(set_to_none=True)
        losses.append(backward())
        clip_gradients(trained, MAX_GRADIENT_NORM)
        optimizer.step()
        reporter.status(f"decoder step {len(losses)}, loss {losses[-1]:.3f}")
    return losses


def _backward(model: SegmentationModel, objective: Objective, batch: Sample, parts: int, device: str) -> float:
    """Add the gradient of a batch's mean loss, in parts; returns the loss."""
    moved = tuple(tensor.to(device, non_blocking=True) for tensor in batch)
    total = 0.0
    for part in zip(*(tensor.chunk(parts) for tensor in moved), strict=True):
        loss = objective.loss(model, part) * (len(part[0]) / len(moved[0]))
        loss.backward()  # type: ignore[no-untyped-call]
        total += loss.item()
    if not torch.isfinite(torch.tensor(total)):
        raise TrainingError("the loss is not a number", found=f"{total}", todo="look at the images and the weights")
    return total


class _GradientSums:
    """Gradients of all projections, summed over batches; nothing else of the model keeps a gradient.

    Args:
        model: From here on its encoder's attention weights have gradients.
    """

    def __init__(self, model: SegmentationModel) -> None:
        encoder = model.network.image_encoder
        model.requires_grad_(False)
        self._layers: list[dict[Target, tuple[nn.Parameter, Tensor | None]]] = []
        for attention in encoder.attention_layers():
            fused: nn.Parameter = attention.qkv.weight  # type: ignore[union-attr, assignment]
            mixing: nn.Parameter = attention.proj.weight  # type: ignore[union-attr, assignment]
            rows = qkv_rows(attention, encoder.qkv_layout)
            places: dict[Target, tuple[nn.Parameter, Tensor | None]] = {t: (fused, rows[t]) for t in _TARGETS[:3]}
            self._layers.append(places | {"o": (mixing, None)})
            for weight in (fused, mixing):
                weight.requires_grad_(True)
        self._sums: dict[tuple[int, Target], Tensor] = {}
        self._norms: dict[tuple[int, Target], float] = {}
        self.count = 0

    def add(self) -> None:
        """Add the gradients that the weights hold now."""
        self.count += 1
        for block, places in enumerate(self._layers):
            for target, (weight, rows) in places.items():
                assert weight.grad is not None
                found = weight.grad if rows is None else weight.grad[rows.to(weight.grad.device)]
                gradient = found.detach().float().cpu().double()
                key = block, target
                self._sums[key] = self._sums.get(key, torch.zeros_like(gradient)) + gradient
                self._norms[key] = self._norms.get(key, 0.0) + float(gradient.norm())

    def facts(self) -> tuple[ProjectionFacts, ...]:
        """Singular values of the mean gradients.

        Raises:
            TrainingError: If one is not a number.
        """
        return tuple(
            projection_facts(total / self.count, block, target, batch_norm=self._norms[block, target] / self.count)
            for (block, target), total in self._sums.items()
        )


def projection_facts(mean: Tensor, block: int, target: Target, *, batch_norm: float) -> ProjectionFacts:
    """Facts of a mean gradient (R, D).

    Args:
        mean: Averaged over batches.
        block: Where.
        target: Where.
        batch_norm: Mean norm of a batch's gradient.

    Raises:
        TrainingError: If it holds something that is not a number.
    """
    if not bool(mean.isfinite().all()):
        raise TrainingError("a gradient is not a number", found=f"block {block}, {target}", todo="probe in fp32")
    values = torch.linalg.svdvals(mean)
    squares = values.square()
    energy = squares.cumsum(0) / squares.sum().clamp(min=torch.finfo(squares.dtype).tiny)
    return ProjectionFacts(
        block=block,
        target=target,
        singular_values=tuple(values[:NUM_SINGULAR_VALUES].tolist()),
        energy=tuple(energy[:NUM_SINGULAR_VALUES].tolist()),
        norm=float(mean.norm()),
        batch_norm=batch_norm,
    )
