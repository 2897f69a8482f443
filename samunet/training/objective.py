"""What training minimises, given a batch.

Legend: B slabs, D slices of a slab, C stored channels, M target maps, V tile side, S encoder side.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from samunet.artifacts.plan import ResolvedRecipe
from samunet.inference.encode import to_encoder, to_store
from samunet.inference.sliding import autocast
from samunet.models.segmentation import SegmentationModel
from samunet.training.losses import segmentation_loss

Batch = tuple[Tensor, ...]


class Objective(Protocol):
    """A loss over batches of samples."""

    def loss(self, model: SegmentationModel, batch: Batch) -> Tensor:
        """The mean loss of a batch whose tensors are on the model's device."""


class SemanticObjective:
    """All structures at once, without a prompt.

    Args:
        recipe: Of the run.
        has_regions: Kind of labels.
        device: Where the model is.
    """

    def __init__(self, recipe: ResolvedRecipe, *, has_regions: bool, device: str) -> None:
        self._recipe, self._has_regions, self._device = recipe, has_regions, device

    def loss(self, model: SegmentationModel, batch: Batch) -> Tensor:
        """Cross-entropy and Dice on the store's grid.

        Args:
            model: In train mode.
            batch: Image (B, D, C, V, V), valid (B, D, 1, V, V) and target (B, D, M, V, V).
        """
        depth = batch[0].shape[1]
        image, valid, target = (part.flatten(0, 1) for part in batch)
        with autocast(self._device, self._recipe.precision):
            logits = model(to_encoder(image, valid, self._recipe), depth=depth)
        return self.score(logits, target)

    def score(self, logits: Tensor, target: Tensor) -> Tensor:
        """The loss of logits (N, T, s, s) against targets (N, M, V, V)."""
        mapped = to_store(logits, self._recipe)
        return segmentation_loss(mapped, target, has_regions=self._has_regions, weights=self._recipe.loss)
