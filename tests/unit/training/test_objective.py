"""What training minimises where the decoder makes maps at several scales."""

from __future__ import annotations

import pytest
import torch

from samunet.artifacts.method import DecoderMethod, EncoderMethod, Method
from samunet.artifacts.plan import LossWeights, ResolvedRecipe
from samunet.inference.encode import to_store
from samunet.models.segmentation import SegmentationModel
from samunet.training.losses import segmentation_loss
from samunet.training.objective import SemanticObjective, mean_over_scales
from tests.unit.models.model_helpers import build, perturb, recipe
from tests.unit.training.test_fallback import gradients, largest_difference
from tests.unit.training.test_iou_estimate import SIZE, TILE, batch

SUPERVISED = Method(
    encoder=EncoderMethod(train="full"),
    decoder=DecoderMethod(upsampler="side_path", path_width=8, deep_supervision=True),
)


def supervised(loss: LossWeights) -> tuple[SegmentationModel, SemanticObjective, ResolvedRecipe]:
    chosen = recipe(backbone="vit_xs", input_size=SIZE, tile_vox=TILE, loss=loss, method=SUPERVISED)
    model = build(chosen).model
    perturb(model)
    return model.train(), SemanticObjective(chosen, has_regions=False, device="cpu"), chosen


def test_a_scale_counts_half_as_much_as_the_next_finer_one() -> None:
    """Weights 1, 1/2 and 1/4 over their sum; one scale alone is its own loss."""
    losses = [torch.tensor(value) for value in (1.0, 2.0, 4.0)]
    assert float(mean_over_scales(losses)) == pytest.approx((1 + 0.5 * 2 + 0.25 * 4) / 1.75)
    assert float(mean_over_scales(losses[:1])) == 1.0


@pytest.mark.parametrize("loss", [LossWeights(), LossWeights(estimated_iou=1.0)])
def test_the_loss_is_the_mean_over_the_scales(loss: LossWeights) -> None:
    """Of the losses on the store's grid; and the sums of parts of a batch stand for the same loss."""
    model, objective, chosen = supervised(loss)
    image, valid, target = batch()
    with torch.no_grad():
        found = objective.loss(model, (image, valid, target))
        logits, estimated = objective.outputs(model, (image, valid, target))
        maps = [to_store(m, chosen) for m in (logits, *model.take_coarse())]
    assert len(maps) == 3
    flat = target.flatten(0, 1)
    expected = mean_over_scales([segmentation_loss(m, flat, has_regions=False) for m in maps])
    if estimated is None:
        torch.testing.assert_close(found, expected)
    else:
        assert float(found) > float(expected)
    with torch.no_grad():
        halves = [objective.sums(model, tuple(part[i : i + 2] for part in (image, valid, target))) for i in (0, 2)]
    summed = objective.loss_of(tuple(sum(parts) for parts in zip(*halves, strict=True)))
    torch.testing.assert_close(summed, found, rtol=1e-5, atol=1e-6)


def test_a_step_in_parts_has_the_gradient_of_the_whole() -> None:
    """Also where every scale has a loss of its own."""
    model, objective, _ = supervised(LossWeights())
    (loss, whole), (other, parts) = (gradients(model, objective, batch(), pieces=pieces) for pieces in (1, 2))
    torch.testing.assert_close(loss, other, rtol=1e-5, atol=1e-6)
    assert largest_difference(whole, parts) < 1e-4
