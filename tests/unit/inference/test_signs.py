"""What models say about masks: exact on probabilities and views made by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from samunet.core.labels import LabelSpec
from samunet.inference.agreement import ViewAgreement
from samunet.inference.ensemble import mean_labels
from samunet.inference.signs import MaskSums, join_signs

CLASSES = LabelSpec({"ball": (1,), "cube": (4,)})
REGIONS = LabelSpec({"whole": (1, 2), "core": (2,)}, regions_class_order=(1, 2))


def entropy(p: float) -> float:
    """Bits."""
    return 0.0 if p in (0, 1) else float(-p * np.log2(p) - (1 - p) * np.log2(1 - p))


def test_expected_dice_and_certainty_are_exact() -> None:
    """Two slices, four voxels: the sums by hand, over both slices together; an empty mask has nothing to say."""
    sums = MaskSums(CLASSES)
    for probabilities, labels in (
        ([[[0.2, 0.9]], [[0.7, 0.1]], [[0.1, 0.0]]], [[1, 0]]),
        ([[[0.0, 0.5]], [[0.9, 0.3]], [[0.1, 0.2]]], [[1, 0]]),
    ):
        sums.add(torch.tensor(probabilities), np.array(labels, np.uint8))
    found = sums.signs()
    assert found["ball"].voxels == 2
    assert found["ball"].expected == pytest.approx(2 * 1.6 / (2 + 2.0), abs=1e-5)
    assert found["ball"].certainty == pytest.approx(1 - (entropy(0.7) + entropy(0.9)) / 2, abs=1e-5)
    assert found["cube"].model_dump() == dict.fromkeys(found["cube"].model_dump(), None) | {"voxels": 0}


def test_certain_masks_are_expected_to_be_perfect_and_uncertain_ones_are_not() -> None:
    """Probabilities of 0 and 1 give 1; a mask of nothing but one half is expected to be two thirds right."""
    mask = np.zeros((6, 6), np.uint8)
    mask[2:4, 2:4] = 4
    for p, expected in ((1.0, 1.0), (0.5, 2 * 2 / (4 + 2))):
        sums = MaskSums(CLASSES)
        cube = torch.from_numpy((mask == 4) * p).float()
        sums.add(torch.stack([1 - cube, torch.zeros(6, 6), cube]), mask)
        assert sums.signs()["cube"].expected == pytest.approx(expected, abs=1e-5)
        assert sums.signs()["cube"].certainty == pytest.approx(float(p == 1.0), abs=1e-4)


def test_regions_count_all_their_values() -> None:
    """The inner region's voxels are the outer's too."""
    sums = MaskSums(REGIONS)
    probabilities = torch.tensor([[[0.9, 0.8, 0.1]], [[0.2, 0.7, 0.0]]])
    sums.add(probabilities, np.array([[1, 2, 0]], np.uint8))
    found = sums.signs()
    assert (found["whole"].voxels, found["core"].voxels) == (2, 1)
    assert found["whole"].expected == pytest.approx(2 * 1.7 / (2 + 1.8), abs=1e-5)
    assert found["core"].expected == pytest.approx(2 * 0.7 / (1 + 0.9), abs=1e-5)


def maps_of(*masks: list[int]) -> torch.Tensor:
    """(B, T, 1, V) logits that decide for these classes (0 background, 1 ball, 2 cube)."""
    return torch.nn.functional.one_hot(torch.tensor(masks), 3).permute(0, 2, 1)[:, :, None].float()


def test_agreement_is_the_mean_pairwise_dice() -> None:
    """Two views of four voxels in common two, over two batches; padding does not count."""
    views, valid = ViewAgreement(CLASSES), torch.tensor([1.0, 1, 1, 1, 0]).view(1, 1, 1, 5)
    for first, second in (([1, 1, 1, 0, 1], [1, 1, 0, 0, 2]), ([0, 1, 0, 2, 1], [1, 0, 0, 2, 0])):
        views.add(0, maps_of(first), valid, None)
        views.add(0, maps_of(second), valid, None)
        views.close()
    sums = MaskSums(CLASSES)
    sums.add(torch.full((3, 1, 4), 1 / 3), np.array([[1, 1, 4, 0]], np.uint8))
    found = views.complete(sums.signs())
    assert found["ball"].agreement == pytest.approx(2 * 2 / (5 + 2), abs=1e-5)
    assert found["cube"].agreement == 1.0
    assert found["ball"].models_agree is None
    assert found["ball"].iou_head is None


def test_views_and_models_are_told_apart() -> None:
    """Models that each agree with themselves and not with each other: 1 within, 0.5 across."""
    views, valid = ViewAgreement(CLASSES), torch.ones(1, 1, 1, 4)
    for _ in range(2):
        views.add(0, maps_of([1, 1, 0, 0]), valid, None)
        views.add(1, maps_of([0, 1, 1, 0]), valid, None)
    views.close()
    sums = MaskSums(CLASSES)
    sums.add(torch.full((3, 1, 4), 1 / 3), np.array([[1, 1, 0, 0]], np.uint8))
    found = views.complete(sums.signs())["ball"]
    assert found.agreement == 1.0
    assert found.models_agree == 0.5


def test_one_view_of_one_model_agrees_with_nothing() -> None:
    """There is no agreement to speak of, and the estimated IoU becomes a Dice weighted by the slices' areas."""
    views = ViewAgreement(CLASSES)
    iou = torch.tensor([[9.0, 0.5, 0.0], [9.0, 1.0, 0.0]])
    views.add(0, maps_of([1, 0, 0, 0], [1, 1, 1, 0]), torch.ones(2, 1, 1, 4), iou)
    views.close()
    sums = MaskSums(CLASSES)
    sums.add(torch.full((3, 1, 4), 1 / 3), np.array([[1, 0, 0, 0]], np.uint8))
    found = views.complete(sums.signs())["ball"]
    assert found.agreement is None
    assert found.iou_head == pytest.approx((1 * 2 / 3 + 3 * 1) / 4, abs=1e-5)


def test_an_average_of_models_is_measured_on_its_own_probabilities() -> None:
    """Sums over averaged probabilities, agreement of the members' masks, means of what the members said."""
    draw = np.random.default_rng(0)
    members = [(m / m.sum(0)).astype(np.float16) for m in draw.uniform(0.01, 1, (2, 3, 2, 5, 5))]
    sums = MaskSums(CLASSES)
    combined = mean_labels(members, CLASSES, sums=sums)
    mean = (members[0].astype(np.float32) + members[1]) / 2
    own = [mean_labels([member], CLASSES) for member in members]
    said = []
    for agreement in (0.5, 0.7):
        one = MaskSums(CLASSES).signs()["ball"].model_copy(update={"voxels": 3, "agreement": agreement})
        said.append({"ball": one, "cube": one})
    found = join_signs(sums.signs(), list(zip(own, said, strict=True)), CLASSES)["ball"]
    mask = combined == 1
    assert found.voxels == mask.sum()
    assert found.expected == pytest.approx(2 * mean[1][mask].sum() / (mask.sum() + mean[1].sum()), abs=1e-4)
    a, b = (labels == 1 for labels in own)
    assert found.models_agree == pytest.approx(2 * (a & b).sum() / (a.sum() + b.sum()), abs=1e-5)
    assert found.agreement == pytest.approx(0.6)
    assert found.iou_head is None
