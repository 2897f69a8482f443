"""What training minimises, given a batch.

Legend: B slabs, D slices of a slab, C stored channels, M target maps, V tile side, S encoder side.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from samunet.artifacts.plan import ResolvedRecipe
from samunet.inference.encode import to_encoder, to_store
from samunet.inference.sliding import autocast
from samunet.models.segmentation import SegmentationModel
from samunet.training.losses import (
    LossSums,
    iou_error_sums,
    loss_of_sums,
    mean_error,
    segmentation_loss,
    segmentation_sums,
)

SCALE_WEIGHT = 0.5
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


def mean_over_scales(losses: Sequence[Tensor]) -> Tensor:
    """Mean of losses at one stride, its double and so on, each of half the weight of the one before.

    Source: nnU-Net (Isensee et al. 2021), weights of deep supervision.
    """
    weights = [SCALE_WEIGHT**index for index in range(len(losses))]
    return sum((w * loss for w, loss in zip(weights, losses, strict=True)), torch.zeros_like(losses[0])) / sum(weights)


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
        """Cross-entropy and Dice on the store's grid, and the error of the IoU that the decoder estimates.

        Under deep supervision cross-entropy and Dice are weighted means over the decoder's maps, each counting half as
        much as the next finer one.

        Args:
            model: In train mode.
            batch: Image (B, D, C, V, V), valid (B, D, 1, V, V) and target (B, D, M, V, V).
        """
        maps, estimated, target = self._on_the_store_grid(model, batch)
        loss = mean_over_scales(
            [segmentation_loss(m, target, has_regions=self._has_regions, weights=self._recipe.loss) for m in maps]
        )
        if estimated is None:
            return loss
        error = mean_error(*iou_error_sums(maps[0], target, estimated, has_regions=self._has_regions))
        return loss + self._recipe.loss.estimated_iou * error

    def sums(self, model: SegmentationModel, batch: Batch) -> Sums:
        """Cross-entropy, voxels, intersection and total per channel, finest maps first; last the errors of IoU."""
        maps, estimated, target = self._on_the_store_grid(model, batch)
        sums: Sums = tuple(part for m in maps for part in segmentation_sums(m, target, has_regions=self._has_regions))
        if estimated is None:
            return sums
        return (*sums, *iou_error_sums(maps[0], target, estimated, has_regions=self._has_regions))

    def loss_of(self, sums: Sums) -> Tensor:
        """Cross-entropy and Dice of their sums, and the mean error of the estimated IoU."""
        parts = len(LossSums._fields)
        scales, rest = divmod(len(sums), parts)
        each = [LossSums(*sums[parts * scale : parts * (scale + 1)]) for scale in range(scales)]
        loss = mean_over_scales([loss_of_sums(one, self._recipe.loss) for one in each])
        if not rest:
            return loss
        return loss + self._recipe.loss.estimated_iou * mean_error(*sums[parts * scales :])

    def outputs(self, model: SegmentationModel, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """What the model says about a batch: (B * D, T, s, s) on a grid of its own, and IoU (B * D, T) if estimated."""
        image, valid = (part.flatten(0, 1) for part in batch[:2])
        encoded, depth = to_encoder(image, valid, self._recipe), batch[0].shape[1]
        return model.estimated(encoded, depth=depth)

    def _on_the_store_grid(self, model: SegmentationModel, batch: Batch) -> tuple[list[Tensor], Tensor | None, Tensor]:
        """Logits (B * D, T, V, V) of every scale, finest first, estimated IoU (B * D, T), targets (B * D, M, V, V)."""
        with autocast(self._device, self._recipe.precision):
            logits, estimated = self.outputs(model, batch)
            maps = [logits, *model.take_coarse()]
        return [to_store(m, self._recipe) for m in maps], estimated, batch[2].flatten(0, 1)
