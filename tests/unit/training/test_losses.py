"""The loss against hand-computed values, with ignored voxels and regions."""

from __future__ import annotations

import math

import pytest
import torch

from samunet.core.labels import IGNORE_INDEX
from samunet.training.losses import label_loss, region_loss, segmentation_loss, soft_dice


def test_uniform_logits_give_log_classes_plus_the_dice_of_a_uniform_guess():
    """With equal logits the cross-entropy is log(T) and the Dice follows from its formula."""
    target = torch.zeros(1, 1, 2, 2, dtype=torch.int16)
    target[0, 0, 0, 0] = 1
    loss = label_loss(torch.zeros(1, 2, 2, 2), target)
    dice = 2 * 0.5 / (4 * 0.5 + 1)
    assert float(loss) == pytest.approx(math.log(2) + 1 - dice, abs=1e-4)


def test_a_perfect_prediction_costs_nothing():
    """Large logits on the right classes bring both parts to zero."""
    target = torch.randint(0, 3, (2, 1, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.int16)
    logits = torch.nn.functional.one_hot(target[:, 0].long(), 3).permute(0, 3, 1, 2).float() * 50
    assert float(label_loss(logits, target)) == pytest.approx(0, abs=1e-4)


def test_ignored_voxels_change_neither_value_nor_gradient():
    """Whatever the network says at an ignored voxel, the loss is that of the others."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(2, 3, 6, 6, generator=generator, requires_grad=True)
    target = torch.randint(0, 3, (2, 1, 6, 6), generator=generator).to(torch.int16)
    target[:, :, :3] = IGNORE_INDEX
    loss = label_loss(logits, target)
    loss.backward()
    altered = logits.detach().clone()
    altered[:, :, :3] += 7
    assert float(label_loss(altered, target)) == pytest.approx(float(loss), rel=1e-6)
    assert logits.grad is not None
    assert torch.all(logits.grad[:, :, :3] == 0)
    assert torch.any(logits.grad[:, :, 3:] != 0)


@pytest.mark.parametrize("has_regions", [False, True])
def test_a_batch_without_a_valid_voxel_contributes_zero_and_no_nan(has_regions: bool):
    """All-ignored batches give loss 0 with finite zero gradients."""
    logits = torch.randn(2, 3, 4, 4, requires_grad=True)
    target = torch.full((2, 3 if has_regions else 1, 4, 4), IGNORE_INDEX, dtype=torch.int16)
    loss = segmentation_loss(logits, target, has_regions=has_regions)
    loss.backward()
    assert float(loss) == 0
    assert logits.grad is not None
    assert torch.all(logits.grad == 0)


def test_regions_may_overlap():
    """Two nested regions are both predicted perfectly at once."""
    target = torch.zeros(1, 2, 4, 4, dtype=torch.int16)
    target[:, 0] = 1
    target[:, 1, 1:3, 1:3] = 1
    logits = (target.float() * 2 - 1) * 50
    assert float(region_loss(logits, target)) == pytest.approx(0, abs=1e-4)


def test_dice_is_summed_over_the_batch():
    """A structure absent from one image of the batch does not count as an extra perfect score."""
    onehot = torch.zeros(2, 1, 4, 4)
    onehot[0] = 1
    probabilities = torch.full((2, 1, 4, 4), 0.5)
    assert float(soft_dice(probabilities, onehot, torch.ones(2, 1, 4, 4))) == pytest.approx(2 * 8 / (16 + 16), abs=1e-5)


def test_half_precision_logits_give_a_float32_loss():
    """Under autocast the loss is still computed in float32."""
    target = torch.zeros(1, 1, 4, 4, dtype=torch.int16)
    loss = segmentation_loss(torch.zeros(1, 2, 4, 4, dtype=torch.bfloat16), target, has_regions=False)
    assert loss.dtype == torch.float32
