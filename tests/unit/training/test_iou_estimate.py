"""The head that estimates the masks' IoU: what it learns, and that the masks never notice."""

from __future__ import annotations

import pytest
import torch

from samunet.artifacts.plan import LossWeights
from samunet.core.labels import IGNORE_INDEX
from samunet.models.segmentation import ESTIMATOR, SegmentationModel
from samunet.training.losses import iou_error_sums, mean_error
from samunet.training.objective import SemanticObjective
from tests.unit.models.model_helpers import build, perturb, recipe
from tests.unit.training.test_fallback import gradients, largest_difference

TILE, SIZE = 32, 64
ESTIMATED = LossWeights(estimated_iou=1.0)


def small(loss: LossWeights) -> tuple[SegmentationModel, SemanticObjective]:
    """A small model without batch norm, perturbed, and what it minimises."""
    chosen = recipe(backbone="vit_xs", input_size=SIZE, tile_vox=TILE, loss=loss)
    model = build(chosen).model
    perturb(model)
    return model.train(), SemanticObjective(chosen, has_regions=False, device="cpu")


def batch(number: int = 4) -> tuple[torch.Tensor, ...]:
    """Slices with two structures, the second on the first slice only, some voxels unknown."""
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(0, 2, (number, 1, 1, TILE, TILE), generator=generator).to(torch.int16)
    target[0, ..., 10:20] = 2
    target[1, ..., :4] = IGNORE_INDEX
    image = torch.randn(number, 1, 3, TILE, TILE, generator=generator)
    return image, torch.ones(number, 1, 1, TILE, TILE), target


def decided(*rows: list[int], classes: int = 3) -> torch.Tensor:
    """(B, T, 1, W) logits that decide for these classes."""
    return torch.nn.functional.one_hot(torch.tensor(rows), classes).permute(0, 2, 1)[:, :, None].float()


def test_errors_are_those_of_the_hard_masks() -> None:
    """IoU 1/3 of class 1 and 0 of an invented class 2; a class in neither mask and unknown voxels do not count."""
    logits = decided([1, 1, 0, 2, 0], [0, 0, 0, 0, 0])
    target = torch.tensor([[1, 0, 1, 0, IGNORE_INDEX], [0, 0, 0, 0, 0]]).view(2, 1, 1, 5)
    estimated = torch.tensor([[9.0, 0.5, 0.25], [9.0, 9.0, 9.0]])
    total, number = iou_error_sums(logits, target, estimated, has_regions=False)
    assert int(number) == 2
    assert float(total) == pytest.approx((0.5 - 1 / 3) ** 2 + 0.25**2)


@pytest.mark.parametrize("classes", [2, 5, 40])
def test_errors_of_random_masks(classes: int) -> None:
    """Against IoUs of one class of one slice at a time; a third of the voxels is unknown."""
    generator = torch.Generator().manual_seed(classes)
    logits = torch.randn(3, classes, 17, 19, generator=generator)
    target = torch.randint(0, classes, (3, 1, 17, 19), generator=generator).to(torch.int16)
    target[torch.rand(target.shape, generator=generator) < 1 / 3] = IGNORE_INDEX
    target[0][target[0] == 1] = 0
    estimated = torch.rand(3, classes, generator=generator)
    errors = []
    for logit, reference, estimate in zip(logits, target[:, 0], estimated, strict=True):
        known = reference != IGNORE_INDEX
        for index in range(1, classes):
            chosen, wanted = (logit.argmax(0) == index) & known, reference == index
            if int(either := (chosen | wanted).sum()):
                errors.append((float(estimate[index]) - int((chosen & wanted).sum()) / either) ** 2)
    total, number = iou_error_sums(logits, target, estimated, has_regions=False)
    assert int(number) == len(errors)
    assert float(total) == pytest.approx(float(sum(errors)), rel=1e-5)


def test_regions_are_counted_each_for_itself() -> None:
    """Overlapping regions, the second missed where it is: IoU 1 and 0."""
    logits = torch.tensor([[1.0, 1, -1], [-1, -1, -1]]).view(1, 2, 1, 3)
    target = torch.tensor([[1, 1, 0], [0, 1, 0]]).view(1, 2, 1, 3)
    total, number = iou_error_sums(logits, target, torch.tensor([[0.5, 0.5]]), has_regions=True)
    assert int(number) == 2
    assert float(total) == pytest.approx(0.5)


def test_nothing_known_is_no_error() -> None:
    """A batch without a valid voxel contributes 0, not NaN."""
    target = torch.full((1, 1, 1, 3), IGNORE_INDEX)
    sums = iou_error_sums(decided([1, 2, 0]), target, torch.ones(1, 3), has_regions=False)
    assert float(mean_error(*sums)) == 0


@pytest.mark.parametrize("pieces", [1, 2])
def test_gradients_of_everything_else_are_bit_equal(pieces: int) -> None:
    """With and without the loss all gradients but the head's are the same bits, and the head has one."""
    with_loss, without = small(ESTIMATED), small(LossWeights())
    assert not without[0].estimates_iou
    first, found = gradients(*with_loss, batch(), pieces=pieces)
    second, wanted = gradients(*without, batch(), pieces=pieces)
    head = {name for name in found if name.startswith(ESTIMATOR)}
    assert found.keys() - head == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert head
    assert any(found[name].abs().sum() > 0 for name in head)
    assert float(first) > float(second)


def test_pieces_give_the_same_gradient_of_the_head() -> None:
    """The mean over structures that are there is that of the whole batch, however it is cut."""
    model, objective = small(ESTIMATED)
    whole = gradients(model, objective, batch(), pieces=1)
    parts = gradients(model, objective, batch(), pieces=4)
    assert float(whole[0]) == pytest.approx(float(parts[0]), rel=1e-5)
    assert largest_difference(whole[1], parts[1]) < 1e-4


def test_the_head_counts_apart_and_maps_are_those_of_forward() -> None:
    """Trained parameters are counted as published; what estimates gives beside its estimate is what forward gives."""
    (model, _), (plain, _) = small(ESTIMATED), small(LossWeights())
    counts, without = model.count_parameters(), plain.count_parameters()
    assert counts.pop("estimator") == sum(p.numel() for p in model.estimator_parameters()) > without.pop("estimator")
    assert counts == without
    assert {id(p) for p in model.estimator_parameters()} <= {id(p) for p in model.parameters() if p.requires_grad}
    images = torch.randn(2, 3, SIZE, SIZE)
    maps, iou = model.estimated(images)
    assert iou is not None
    assert iou.shape == maps.shape[:2]
    assert torch.equal(maps, model(images))
    assert plain.estimated(images)[1] is None
