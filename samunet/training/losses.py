"""Cross-entropy and soft Dice with ignored voxels, for exclusive labels and for overlapping regions.

Legend: B batch, T mask tokens, H W in-plane.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor

from samunet.artifacts.plan import LossWeights
from samunet.core.labels import IGNORE_INDEX

EQUAL = LossWeights()
_SMOOTH = 1e-5


class LossSums(NamedTuple):
    """What a loss is computed from; the sums of a batch are those of its parts, added up.

    Args:
        cross_entropy: () over the voxels (and regions) that count.
        num_voxels: () how many those are.
        intersection: (C,) probability times reference, per channel that Dice is taken of.
        total: (C,) probability plus reference.
    """

    cross_entropy: Tensor
    num_voxels: Tensor
    intersection: Tensor
    total: Tensor


def soft_dice(probabilities: Tensor, onehot: Tensor, valid: Tensor, *, smooth: float = _SMOOTH) -> Tensor:
    """Mean soft Dice over channels, summed over the batch and all valid voxels (batch Dice).

    Channels with neither prediction nor reference count as well as their smoothing says: near 1.

    Args:
        probabilities: (B, T, H, W) in [0, 1].
        onehot: (B, T, H, W) reference, 0 or 1.
        valid: (B, 1, H, W), 1 where the voxel counts.
        smooth: Added to numerator and denominator.

    Source: V-Net (Milletari 2016); batch Dice as in nnU-Net (Isensee 2021).
    """
    return _dice_of(*_dice_sums(probabilities, onehot, valid), smooth)


def label_loss(logits: Tensor, target: Tensor, weights: LossWeights = EQUAL) -> Tensor:
    """Cross-entropy over classes plus 1 - soft Dice over foreground.

    Args:
        logits: (B, T, H, W), channel 0 background.
        target: (B, 1, H, W) class indices, IGNORE_INDEX where nothing is known.
        weights: Of the two parts.

    Returns:
        A scalar; exactly 0 (with a gradient of 0) when no voxel is valid.
    """
    return _loss_of_logits(label_sums(logits, target), logits, weights)


def label_sums(logits: Tensor, target: Tensor) -> LossSums:
    """What :func:`label_loss` is computed from."""
    indices = target[:, 0].long()
    valid = (indices != IGNORE_INDEX).unsqueeze(1)
    log_probabilities = F.log_softmax(logits, 1)
    cross_entropy = F.nll_loss(log_probabilities, indices, ignore_index=IGNORE_INDEX, reduction="sum")
    onehot = torch.zeros_like(logits).scatter_(1, indices.clamp(min=0).unsqueeze(1), 1.0)
    dice = _dice_sums(log_probabilities[:, 1:].exp(), onehot[:, 1:], valid)
    return LossSums(cross_entropy, valid.sum().float(), *dice)


def region_loss(logits: Tensor, target: Tensor, weights: LossWeights = EQUAL) -> Tensor:
    """Binary cross-entropy plus 1 - soft Dice over overlapping regions.

    Args:
        logits: (B, T, H, W), one channel per region.
        target: (B, T, H, W) of 0, 1 or IGNORE_INDEX.
        weights: Of the two parts.
    """
    return _loss_of_logits(region_sums(logits, target), logits, weights)


def region_sums(logits: Tensor, target: Tensor) -> LossSums:
    """What :func:`region_loss` is computed from."""
    valid = (target != IGNORE_INDEX).all(1, keepdim=True)
    reference = target.clamp(min=0).to(logits.dtype)
    entropy = F.binary_cross_entropy_with_logits(logits, reference, reduction="none")
    dice = _dice_sums(logits.sigmoid(), reference, valid)
    return LossSums((entropy * valid).sum(), (valid.sum() * logits.shape[1]).float(), *dice)


def loss_of_sums(sums: LossSums, weights: LossWeights = EQUAL) -> Tensor:
    """The loss that sums stand for; 0 when no voxel is valid."""
    return torch.where(sums.num_voxels > 0, _weighted(sums, weights), sums.cross_entropy * 0.0)


def _loss_of_logits(sums: LossSums, logits: Tensor, weights: LossWeights) -> Tensor:
    return torch.where(sums.num_voxels > 0, _weighted(sums, weights), logits.sum() * 0.0)


def _weighted(sums: LossSums, weights: LossWeights) -> Tensor:
    cross_entropy = sums.cross_entropy / sums.num_voxels.clamp(min=1)
    dice = _dice_of(sums.intersection, sums.total, _SMOOTH)
    return weights.cross_entropy * cross_entropy + weights.dice * (1 - dice)


def _dice_sums(probabilities: Tensor, onehot: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    axes = (0, 2, 3)
    counted = probabilities * valid
    return (counted * onehot).sum(axes), counted.sum(axes) + (onehot * valid).sum(axes)


def _dice_of(intersection: Tensor, total: Tensor, smooth: float) -> Tensor:
    return ((2 * intersection + smooth) / (total + smooth)).mean()


def segmentation_loss(logits: Tensor, target: Tensor, *, has_regions: bool, weights: LossWeights = EQUAL) -> Tensor:
    """The loss for a dataset's kind of labels, in float32 whatever the logits' precision."""
    loss = region_loss if has_regions else label_loss
    return loss(logits.float(), target, weights)


def segmentation_sums(logits: Tensor, target: Tensor, *, has_regions: bool) -> LossSums:
    """What :func:`segmentation_loss` is computed from."""
    sums = region_sums if has_regions else label_sums
    return sums(logits.float(), target)


def iou_error_sums(logits: Tensor, target: Tensor, estimated: Tensor, *, has_regions: bool) -> tuple[Tensor, Tensor]:
    """Squared error of estimated IoUs, added up over structures and slices.

    The truth is the IoU of the mask as it would be written with the reference, per structure and slice, over the
    voxels that count. Where neither holds the structure there is no IoU to learn; where only one does it is 0. The
    background is no structure.

    Args:
        logits: (B, T, H, W); no gradient reaches them.
        target: As for :func:`segmentation_loss`.
        estimated: (B, T).
        has_regions: Kind of labels.

    Returns:
        () sum of squared errors, () number of structures and slices.

    Source: Kirillov et al., Segment Anything, 2023 (appendix A, mean squared error of the IoU head).
    """
    with torch.no_grad():
        common, either = _region_overlap(logits, target) if has_regions else _label_overlap(logits, target)
        known = (either > 0).float()
        truth = common / either.clamp(min=1)
    errors = (estimated.float()[:, -truth.shape[1] :] - truth) ** 2
    return (errors * known).sum(), known.sum()


def mean_error(total: Tensor, number: Tensor) -> Tensor:
    """Mean of what was added up; 0 of nothing."""
    return total / number.clamp(min=1)


def _label_overlap(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Voxels of intersection and union (B, K) of every class but the background.

    The classes are those of the largest logit; ``max`` finds them many times faster than ``argmax`` on a CPU.
    """
    number, classes = logits.shape[:2]
    wanted, chosen = target[:, 0].long(), logits.max(1).indices
    first = torch.arange(number, device=logits.device).view(-1, 1, 1) * (classes + 1)
    wanted = first + torch.where(wanted == IGNORE_INDEX, classes, wanted)
    pairs = torch.bincount((wanted * classes + chosen).flatten(), minlength=number * (classes + 1) * classes)
    confusion = pairs.view(number, classes + 1, classes)[:, :classes].float()
    common = confusion.diagonal(dim1=1, dim2=2)
    return common[:, 1:], (confusion.sum(1) + confusion.sum(2) - common)[:, 1:]


def _region_overlap(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Voxels of intersection and union (B, T) of every region."""
    valid = (target != IGNORE_INDEX).all(1, keepdim=True)
    chosen, wanted = (logits > 0) & valid, (target > 0) & valid
    common, either = (part.flatten(2).sum(2).float() for part in (chosen & wanted, chosen | wanted))
    return common, either
