"""How far mirrored views and models agree on a mask, and what IoU they estimate for it, batch by batch.

Legend: B slices, T mask tokens, K structures, V tile side.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from samunet.artifacts.quality import StructureSigns
from samunet.core.labels import LabelSpec
from samunet.inference.signs import DIGITS


class ViewAgreement:
    """Compares the masks that every model makes of every mirrored view of a batch, and adds up over batches.

    Masks are compared on the store's grid, tile by tile; what is outside the image does not count. Voxels where tiles
    overlap count once per tile.

    Args:
        labels: Meaning of the maps.

    Source: Roy et al., Bayesian QuickNAT, 2019 (mean pairwise Dice of several predictions predicts Dice).
    """

    def __init__(self, labels: LabelSpec) -> None:
        self._labels = labels
        self._votes: list[Tensor] = []
        self._views: list[int] = []
        zero = torch.zeros(labels.num_foreground, dtype=torch.float64)
        self._within, self._within_size, self._across, self._across_size, self._iou, self._area = (
            zero.clone() for _ in range(6)
        )

    def add(self, model: int, maps: Tensor, valid: Tensor, iou: Tensor | None) -> None:
        """Add what a model says of one view of the batch.

        Args:
            model: Its index; models come in the same order for every view.
            maps: (B, T, V, V) logits, mirrored back.
            valid: (B, 1, V, V), 1 inside the image.
            iou: (B, T) estimated IoU; None where the model estimates none.
        """
        masks = self._masks(maps) & (valid > 0)
        if model == len(self._votes):
            self._votes.append(torch.zeros_like(masks, dtype=torch.int16))
            self._views.append(0)
        self._votes[model] += masks
        self._views[model] += 1
        if iou is not None:
            area = masks.sum((2, 3)).double()
            share = iou.double()[:, -area.shape[1] :].clamp(0, 1)
            self._iou += (area * 2 * share / (1 + share)).sum(0).cpu()
            self._area += area.sum(0).cpu()

    def close(self) -> None:
        """The batch is complete: compare the masks of all pairs of its views."""
        squares = [_sum(votes.square()) for votes in self._votes]
        sizes = [_sum(votes) for votes in self._votes]
        for square, size, views in zip(squares, sizes, self._views, strict=True):
            if views > 1:
                self._within += (square - size) / (views * (views - 1))
                self._within_size += size / views
        if len(self._votes) > 1:
            together = self._votes[0].clone()
            for votes in self._votes[1:]:
                together += votes
            pairs = sum(self._views) ** 2 - sum(views**2 for views in self._views)
            self._across += (_sum(together.square_()) - torch.stack(squares).sum(0)) / pairs
            self._across_size += torch.stack(sizes).sum(0) / sum(self._views)
        self._votes, self._views = [], []

    def complete(self, signs: Mapping[str, StructureSigns]) -> dict[str, StructureSigns]:
        """The signs with agreement of views, agreement of models and estimated IoU, of masks that are not empty."""
        return {
            name: own
            if not own.voxels
            else own.model_copy(
                update={
                    "agreement": _ratio(self._within[index], self._within_size[index]),
                    "models_agree": _ratio(self._across[index], self._across_size[index]),
                    "iou_head": _ratio(self._iou[index], self._area[index]),
                }
            )
            for index, (name, own) in enumerate(signs.items())
        }

    def _masks(self, maps: Tensor) -> Tensor:
        """(B, K, V, V) bool."""
        if self._labels.has_regions:
            return maps > 0
        chosen = torch.zeros_like(maps, dtype=torch.bool).scatter_(1, maps.max(1, keepdim=True).indices, 1)
        return chosen[:, 1:]


def _sum(masks: Tensor) -> Tensor:
    """Per structure over slices and voxels."""
    return masks.sum((0, 2, 3), dtype=torch.float64).cpu()


def _ratio(part: Tensor, whole: Tensor) -> float | None:
    return round(float(part / whole), DIGITS) if whole > 0 else None
