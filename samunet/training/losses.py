"""Cross-entropy and soft Dice with ignored voxels, for exclusive labels and for overlapping regions.

Legend: B batch, T mask tokens, H W in-plane.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor

from samunet.artifacts.plan import LossWeights
from samunet.core.labels import IGNORE_INDEX

EQUAL = LossWeights()


def soft_dice(probabilities: Tensor, onehot: Tensor, valid: Tensor, *, smooth: float = 1e-5) -> Tensor:
    """Mean soft Dice over channels, summed over the batch and all valid voxels (batch Dice).

    Channels with neither prediction nor reference count as well as their smoothing says: near 1.

    Args:
        probabilities: (B, T, H, W) in [0, 1].
        onehot: (B, T, H, W) reference, 0 or 1.
        valid: (B, 1, H, W), 1 where the voxel counts.
        smooth: Added to numerator and denominator.

    Source: V-Net (Milletari 2016); batch Dice as in nnU-Net (Isensee 2021).
    """
    axes = (0, 2, 3)
    intersection = (probabilities * onehot * valid).sum(axes)
    total = (probabilities * valid).sum(axes) + (onehot * valid).sum(axes)
    return ((2 * intersection + smooth) / (total + smooth)).mean()


def label_loss(logits: Tensor, target: Tensor, weights: LossWeights = EQUAL) -> Tensor:
    """Cross-entropy over classes plus 1 - soft Dice over foreground.

    Args:
        logits: (B, T, H, W), channel 0 background.
        target: (B, 1, H, W) class indices, IGNORE_INDEX where nothing is known.
        weights: Of the two parts.

    Returns:
        A scalar; exactly 0 (with a gradient of 0) when no voxel is valid.
    """
    indices = target[:, 0].long()
    valid = (indices != IGNORE_INDEX).unsqueeze(1)
    count = valid.sum().clamp(min=1)
    cross_entropy = F.cross_entropy(logits, indices, ignore_index=IGNORE_INDEX, reduction="sum") / count
    onehot = torch.zeros_like(logits).scatter_(1, indices.clamp(min=0).unsqueeze(1), 1.0)
    dice = soft_dice(logits.softmax(1)[:, 1:], onehot[:, 1:], valid)
    return _zero_if_nothing(weights.cross_entropy * cross_entropy + weights.dice * (1 - dice), logits, valid)


def region_loss(logits: Tensor, target: Tensor, weights: LossWeights = EQUAL) -> Tensor:
    """Binary cross-entropy plus 1 - soft Dice over overlapping regions.

    Args:
        logits: (B, T, H, W), one channel per region.
        target: (B, T, H, W) of 0, 1 or IGNORE_INDEX.
        weights: Of the two parts.
    """
    valid = (target != IGNORE_INDEX).all(1, keepdim=True)
    reference = target.clamp(min=0).to(logits.dtype)
    entropy = F.binary_cross_entropy_with_logits(logits, reference, reduction="none")
    cross_entropy = (entropy * valid).sum() / (valid.sum() * logits.shape[1]).clamp(min=1)
    dice = soft_dice(logits.sigmoid(), reference, valid)
    return _zero_if_nothing(weights.cross_entropy * cross_entropy + weights.dice * (1 - dice), logits, valid)


def _zero_if_nothing(loss: Tensor, logits: Tensor, valid: Tensor) -> Tensor:
    return torch.where(valid.any(), loss, logits.sum() * 0.0)


def segmentation_loss(logits: Tensor, target: Tensor, *, has_regions: bool, weights: LossWeights = EQUAL) -> Tensor:
    """The loss for a dataset's kind of labels, in float32 whatever the logits' precision."""
    loss = region_loss if has_regions else label_loss
    return loss(logits.float(), target, weights)
