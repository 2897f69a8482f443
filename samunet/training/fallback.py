"""What a training step does to take less memory, in which order, and how it starts again where memory ran out.

A step always means the same: the same batch, cut into the planned parts, each with its own loss. What changes is how
much of it is held at once.

1. The encoder's blocks keep only their input and are recomputed in the backward pass.
2. Each part is computed in 2, 4, ... pieces, in the end sample by sample.

Recomputing comes first for every backbone: it costs one more forward of the encoder, while pieces cost one more forward
of the whole model (:mod:`samunet.training.gradients`) and save less. Pieces also give batch norm that trains fewer
slices for its statistics, so there each keeps at least eight slices, in at least two samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from samunet.artifacts.model_spec import STOCK_TOKENS, get_spec
from samunet.artifacts.plan import ResolvedRecipe
from samunet.models.segmentation import SegmentationModel
from samunet.planners import memory
from samunet.planners.batches import LEAST_BATCH_NORM


@dataclass(frozen=True)
class Footprint:
    """How a step is computed.

    Args:
        parts: How many forwards share its batch: the planned parts times the pieces of each.
        checkpointing: Whether the encoder's blocks keep only their input.
    """

    parts: int
    checkpointing: bool

    def change_from(self, before: Footprint) -> str:
        """What is different, for the user."""
        changes = ["checkpointing on"] if self.checkpointing and not before.checkpointing else []
        return " and ".join(changes + ([f"a step in {self.parts} parts"] if self.parts != before.parts else []))


@dataclass(frozen=True)
class Ladder:
    """The footprints of a run, each taking less memory than the one before.

    Args:
        samples: Samples (slabs; slices where a slab is one) of a step.
        planned_parts: Parts of a step that have a loss each.
        least: Samples that a forward keeps at least.
        recomputes: Whether the encoder records anything that checkpointing could leave out.
    """

    samples: int
    planned_parts: int
    least: int
    recomputes: bool

    def below(self, footprint: Footprint) -> Footprint | None:
        """The next smaller footprint; None at the end."""
        if self.recomputes and not footprint.checkpointing:
            return replace(footprint, checkpointing=True)
        pieces = footprint.parts // self.planned_parts
        most = math.ceil(self.samples / self.planned_parts) // self.least
        if pieces >= most:
            return None
        return replace(footprint, parts=self.planned_parts * min(2 * pieces, most))


def ladder_of(model: SegmentationModel, recipe: ResolvedRecipe) -> Ladder:
    """The footprints that a run of a model, in train mode, may fall back to."""
    depth = recipe.slab_depth
    least = max(2, math.ceil(LEAST_BATCH_NORM / depth)) if _training_norms(model) else 1
    parts = (model.channel_input, model.network.image_encoder)
    recomputes = any(p.requires_grad for part in parts for p in part.parameters())
    return Ladder(recipe.batch_size // depth, recipe.accumulation_steps, least, recomputes)


def predicted_gib(recipe: ResolvedRecipe, num_tokens: int, footprint: Footprint) -> float:
    """Predicted peak of a step in GiB.

    Args:
        recipe: Of the run.
        num_tokens: Mask tokens of a model without prompts.
        footprint: How the step is computed.
    """
    part = math.ceil(recipe.batch_size // recipe.slab_depth / recipe.accumulation_steps)
    samples = math.ceil(part / (footprint.parts // recipe.accumulation_steps))
    load = memory.Load(
        get_spec(recipe.backbone),
        recipe.input_size,
        recipe.tile_vox,
        STOCK_TOKENS if recipe.method.promptable else num_tokens,
        samples * recipe.slab_depth,
        recipe.method,
        slab_depth=recipe.slab_depth,
        checkpointing=footprint.checkpointing,
        precision=recipe.precision,
        attention=recipe.attention,
        accumulates=footprint.parts > 1,
    )
    return memory.memory_gib(load)


def in_advance(
    ladder: Ladder, start: Footprint, predicted: Callable[[Footprint], float], available_gib: float
) -> Footprint:
    """The first footprint from the start down that is predicted to fit; the smallest if none is.

    Args:
        ladder: Of the run.
        start: Where it stands.
        predicted: Peak in GiB of a footprint; one that takes no less than those above it is passed over.
        available_gib: Memory that a step may take.
    """
    chosen, candidate = start, ladder.below(start)
    while predicted(chosen) > available_gib and candidate is not None:
        if predicted(candidate) < predicted(chosen):
            chosen = candidate
        candidate = ladder.below(candidate)
    return chosen


@dataclass(frozen=True)
class Volatile:
    """What a forward changes in train mode: the random state, and the statistics of batch norm.

    Args:
        cpu: State of the CPU's generator.
        cuda: Of the GPU's, if the model is on one.
        device: Where the model is.
        statistics: Buffers and their values.
    """

    cpu: Tensor
    cuda: Tensor | None
    device: torch.device
    statistics: tuple[tuple[Tensor, Tensor], ...]

    @classmethod
    def of(cls, model: nn.Module) -> Volatile:
        """As it is now."""
        device = next(model.parameters()).device
        buffers = [buffer for norm in _training_norms(model) for buffer in norm.buffers()]
        return cls(
            cpu=torch.get_rng_state(),
            cuda=torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
            device=device,
            statistics=tuple((buffer, buffer.clone()) for buffer in buffers),
        )

    def restore(self) -> None:
        """As it was."""
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, self.device)
        for buffer, value in self.statistics:
            buffer.copy_(value)


def _training_norms(model: nn.Module) -> list[_BatchNorm]:
    """Batch norms whose statistics are those of the forward's slices."""
    return [module for module in model.modules() if isinstance(module, _BatchNorm) and module.training]
