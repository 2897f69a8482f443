"""Overlap of two boolean masks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class VoxelCounts:
    """The four cells of a mask's confusion table, in voxels.

    Args:
        tp: In both masks.
        fp: In the prediction only.
        fn: In the reference only.
        tn: In neither.
    """

    tp: int
    fp: int
    fn: int
    tn: int

    @property
    def num_reference(self) -> int:
        """Voxels of the reference."""
        return self.tp + self.fn

    @property
    def num_prediction(self) -> int:
        """Voxels of the prediction."""
        return self.tp + self.fp


def count_voxels(
    reference: NDArray[np.bool_], prediction: NDArray[np.bool_], *, num_voxels: int | None = None
) -> VoxelCounts:
    """Count the four cells.

    Args:
        reference: Boolean mask of any shape.
        prediction: Boolean mask of the same shape.
        num_voxels: Voxels that count in all; more than the masks' size when they are a crop around both, less when
            some voxels are ignored. Default: the masks' size.
    """
    tp = int(np.count_nonzero(reference & prediction))
    fp = int(np.count_nonzero(prediction)) - tp
    fn = int(np.count_nonzero(reference)) - tp
    total = reference.size if num_voxels is None else num_voxels
    return VoxelCounts(tp, fp, fn, total - tp - fp - fn)


def dice(counts: VoxelCounts) -> float:
    """2 TP / (2 TP + FP + FN); NaN when both masks are empty."""
    total = counts.num_reference + counts.num_prediction
    return 2 * counts.tp / total if total else float("nan")


def iou(counts: VoxelCounts) -> float:
    """TP / (TP + FP + FN); NaN when both masks are empty."""
    union = counts.tp + counts.fp + counts.fn
    return counts.tp / union if union else float("nan")
