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
from samunet.training.losses import LossSums, loss_of_sums, segmentation_loss, segmentation_sums

Batch = tuple[Tensor, ...]
Sums = tuple[Tensor, ...]


class Objective(Protocol):
    """A loss over batches of samples, computable from sums over their samples."""

    def loss(self, model: SegmentationModel, batch: Batch) -> Tensor:
        """The mean loss of a batch whose tensors are on the model's device."""

    def sums(self, model: SegmentationModel, batch: Batch) -> Sums:
        """What the loss is computed from; the sums of a batch are those of its parts, added up."""

    def loss_of(self, sums: Sums) -> Tensor:
        """The loss that sums stand for."""


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
        logits, target = self._on_the_store_grid(model, batch)
        return segmentation_loss(logits, target, has_regions=self._has_regions, weights=self._recipe.loss)

    def sums(self, model: SegmentationModel, batch: Batch) -> Sums:
        """Cross-entropy, voxels, and per channel intersection and total."""
        logits, target = self._on_the_store_grid(model, batch)
        return segmentation_sums(logits, target, has_regions=self._has_regions)

    def loss_of(self, sums: Sums) -> Tensor:
        """Cross-entropy and Dice of their sums."""
        return loss_of_sums(LossSums(*sums), self._recipe.loss)

    def logits(self, model: SegmentationModel, batch: Batch) -> Tensor:
        """What the model says about a batch: (B * D, T, s, s) on a grid of its own."""
        image, valid = (part.flatten(0, 1) for part in batch[:2])
        return model(to_encoder(image, valid, self._recipe), depth=batch[0].shape[1])  # type: ignore[no-any-return]

    def _on_the_store_grid(self, model: SegmentationModel, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits (B * D, T, V, V) and targets (B * D, M, V, V)."""
        with autocast(self._device, self._recipe.precision):
            logits = self.logits(model, batch)
        return to_store(logits, self._recipe), batch[2].flatten(0, 1)
