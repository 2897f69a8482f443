"""Prompts simulated in training: what they point at, where the model sees them, and what is minimised."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from samunet.artifacts.method import PromptMethod
from samunet.artifacts.model_spec import STOCK_TOKENS, get_spec
from samunet.artifacts.plan import ResolvedRecipe, strip_reasons
from samunet.core.labels import IGNORE_INDEX, LabelSpec
from samunet.models.decoders.promptable import PromptBatch
from samunet.models.sam.network import build_network
from samunet.models.segmentation import SegmentationModel
from samunet.training.losses import region_loss
from samunet.training.prompted import (
    NO_CLICK,
    PromptedDataset,
    PromptedObjective,
    PromptedSample,
    PromptRound,
    actual_iou,
    add_corrections,
    choose_structure,
)
from tests.samples import make_recipe

TILE, INPUT = 32, 64
LABELS = LabelSpec({"bar": (1,), "dot": (5,)})
REGIONS = LabelSpec({"all": (1, 2), "core": (2,)}, regions_class_order=(1, 2))


class Slabs:
    """Samples of three slices: a tall bar on the first two, a dot in two pieces on the second, nothing on the third.

    The image is the target itself, half of the last column is unknown; with ``empty`` nothing is shown anywhere.
    """

    slab_depth = 3

    def __init__(self, *, empty: bool = False) -> None:
        target = np.zeros((3, 1, TILE, TILE), np.int16)
        target[:2, 0, 4:28, 20:23] = 1
        target[1, 0, 8:10, 3:8] = target[1, 0, 14, 4] = 2
        target[:, 0, 16:, -1] = IGNORE_INDEX
        self.target = np.minimum(target, 0) if empty else target

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        target = torch.from_numpy(self.target)
        return target.clamp(min=0).float().repeat(1, 3, 1, 1), torch.ones(3, 1, TILE, TILE), target.clone()


def dataset(kind: str, *, empty: bool = False, seed: int = 0, **changes: object) -> PromptedDataset:
    """Prompted slabs."""
    prompts = PromptMethod(kind=kind, **changes)  # type: ignore[arg-type]
    return PromptedDataset(Slabs(empty=empty), labels=LABELS, prompts=prompts, seed=seed)


def chosen_recipe(kind: str, *, corrections: int = 0, clicks: int = 1) -> ResolvedRecipe:
    """A recipe with prompts."""
    prompts = PromptMethod(kind=kind, corrections=corrections, clicks=clicks)  # type: ignore[arg-type]
    chosen = make_recipe(prompts=prompts, input_size=INPUT, tile_vox=TILE)
    return strip_reasons(chosen, "none", "cpu", slab_depth=3)


@dataclass
class Recorder(nn.Module):
    """Answers every prompt with the same maps, and remembers what it was asked.

    Args:
        answer: (R, 4, 16, 16) logits, or one number for all of them.
        quality: Estimated IoU.
    """

    answer: Tensor | float
    quality: float = 0.5
    asked: list[PromptBatch] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.scale = nn.Parameter(torch.ones(()))

    def encode(self, images: Tensor, *, depth: int = 1) -> Tensor:
        """Means of patches."""
        self.depths.append(depth)
        return self.weight * nn.functional.avg_pool2d(images, 16)

    def prompted(self, embeddings: Tensor, prompts: PromptBatch) -> tuple[Tensor, Tensor]:
        """The answer, depending on embeddings and scale."""
        self.asked.append(prompts)
        answer = (
            self.answer if isinstance(self.answer, Tensor) else torch.full((len(embeddings), 4, 16, 16), self.answer)
        )
        level = self.scale * (1 + embeddings.flatten(1).mean(1))
        return answer * level[:, None, None, None], self.quality * self.scale.expand(len(embeddings), 4)


def keys(count: int) -> list[tuple[int, int]]:
    """The first keys of an epoch."""
    return [(0, index) for index in range(count)]


def test_each_structure_shown_is_chosen_about_as_often():
    """The large bar and the small dot alternate at random; the mask is the chosen one's, unknown voxels kept."""
    target = Slabs().target
    masks = [choose_structure(target, LABELS, np.random.default_rng(seed)) for seed in range(200)]
    dots = [mask for mask in masks if mask[0].max() < 1]
    assert 70 < len(dots) < 130
    for mask in masks:
        wanted = 2 if mask[0].max() < 1 else 1
        assert np.array_equal(mask == 1, target[:, 0] == wanted)
        assert np.array_equal(mask == IGNORE_INDEX, target[:, 0] == IGNORE_INDEX)


def test_regions_are_chosen_with_their_whole_extent():
    """A region that holds another one keeps its voxels; one that is not shown is never chosen."""
    target = np.zeros((1, 2, TILE, TILE), np.int16)
    target[0, 0, 2:9, 3:5] = 1
    for seed in range(5):
        mask = choose_structure(target, REGIONS, np.random.default_rng(seed))
        assert np.array_equal(mask[0], target[0, 0])
    target[0, 1, 2:4, 3:5] = 1
    sizes = {int(choose_structure(target, REGIONS, np.random.default_rng(seed)).sum()) for seed in range(20)}
    assert sizes == {4, 14}


def test_a_slab_has_one_structure_and_prompts_where_it_is_shown():
    """Slices without the chosen structure are unknown everywhere and have neither box nor click."""
    for key in keys(10):
        for kind in ("box", "points"):
            sample = dataset(kind)[key]
            shown = (sample.target == 1).flatten(1).any(1)
            assert shown.tolist() in ([True, True, False], [False, True, False])
            assert torch.all(sample.target[~shown] == IGNORE_INDEX)
            assert torch.any(sample.target[shown] == 0)
            assert sample.has_box.tolist() == (shown.tolist() if kind == "box" else [False] * 3)
            assert torch.all(sample.boxes[~sample.has_box] == 0)
            assert torch.all(sample.point_labels[~shown] == NO_CLICK)


def test_boxes_enclose_the_structure_rows_first():
    """Without shift the box is tight, around all pieces; with it, it grows but stays in the tile."""
    tight = {(3.5, 19.5, 27.5, 22.5), (7.5, 2.5, 14.5, 7.5)}
    found = {tuple(dataset("box", box_shift=0)[key].boxes[1].tolist()) for key in keys(20)}
    assert found == tight
    for key in keys(20):
        grown = dataset("box", box_shift=0.5)[key].boxes[1]
        edges = np.array(min(tight, key=lambda box: abs(box[1] - float(grown[1]))))
        assert np.all((grown.numpy() - edges) * (-1, -1, 1, 1) >= 0)
        assert grown.min() >= -0.5
        assert grown.max() <= TILE - 0.5


def test_clicks_lie_on_the_largest_piece_of_the_structure():
    """All clicks of a slice are positive and on the chosen structure, never on the single voxel beside it."""
    for key in keys(20):
        sample = dataset("points", clicks=3)[key]
        assert sample.points.shape == (3, 3, 2)
        for index in range(3):
            for (row, column), label in zip(sample.points[index].tolist(), sample.point_labels[index], strict=True):
                if label != NO_CLICK:
                    assert label == 1
                    assert sample.target[index, 0, int(row), int(column)] == 1
                    assert (int(row), int(column)) != (14, 4)


def test_mixed_prompts_are_of_one_kind_per_sample():
    """Some samples have boxes, some have clicks, none has both; shapes are the same, so that they collate."""
    samples = [dataset("mixed", clicks=2)[key] for key in keys(20)]
    boxed = [bool(sample.has_box.any()) for sample in samples]
    clicked = [bool((sample.point_labels == 1).any()) for sample in samples]
    assert 0 < sum(boxed) < 20
    assert [not box for box in boxed] == clicked
    batch = default_collate(samples)
    assert isinstance(batch, PromptedSample)
    assert batch.points.shape == (20, 3, 2, 2)
    assert batch.boxes.shape == (20, 3, 4)


def test_samples_depend_on_seed_epoch_and_index_alone():
    """The same again whatever the global generators and the order; other ones for other keys and seeds."""
    first = [dataset("mixed")[key] for key in keys(6)]
    np.random.seed(5)  # noqa: NPY002 - a global state that must not matter
    again = [dataset("mixed")[key] for key in reversed(keys(6))][::-1]
    for one, other in zip(first, again, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    boxes = {
        tuple(dataset("box", seed=seed)[key].boxes[1].tolist()) for seed in (0, 1) for key in [(0, 0), (1, 0), (0, 1)]
    }
    assert len(boxes) == 6


def test_the_model_sees_x_before_y_in_encoder_pixels():
    """A box of voxel edges becomes SAM's (x0, y0, x1, y1): half a pixel before the first pixel is -0.5."""
    batch = default_collate([dataset("box", box_shift=0)[key] for key in keys(4)])
    batch.boxes[:, 1] = torch.tensor([-0.5, 2.5, 14.5, 7.5])
    model = Recorder(0.0)
    PromptedObjective(chosen_recipe("box"), device="cpu").loss(model, batch)
    (asked,) = model.asked
    assert model.depths == [3]
    assert asked.points is None
    assert asked.masks is None
    assert [5.5, -0.5, 15.5, 29.5] in asked.boxes.tolist()


def test_clicks_reach_the_model_as_x_and_y():
    """The click on row 20, column 5 is x = 10.5, y = 40.5 where a voxel is two pixels wide."""
    batch = default_collate([dataset("points")[0, 0]])
    batch.points[0, 1, 0] = torch.tensor([20.0, 5.0])
    model = Recorder(0.0)
    PromptedObjective(chosen_recipe("points"), device="cpu").loss(model, batch)
    asked = model.asked[0]
    assert asked.boxes is None
    assert [10.5, 40.5] in asked.points[:, 0].tolist()


def test_a_correction_is_a_click_in_the_largest_error():
    """Missed: positive; added: negative; right or unknown: none. The former clicks are kept."""
    target = torch.zeros(4, 1, TILE, TILE, dtype=torch.int16)
    target[:, 0, 4:20, 6:10] = 1
    target[3, 0] = IGNORE_INDEX
    prediction = target == 1
    prediction[0, 0, 8:] = False
    prediction[1, 0, 22:30, 12:31] = True
    state = PromptRound(torch.zeros(4, 1), target, torch.full((4, 1, 2), 7.0), torch.ones(4, 1, dtype=torch.long), None)
    after = add_corrections(state, prediction)
    assert after.point_labels.tolist() == [[1, 1], [1, 0], [1, NO_CLICK], [1, NO_CLICK]]
    assert torch.all(after.points[:, 0] == 7)
    row, column = after.points[0, 1].int().tolist()
    assert 8 <= row < 20
    assert 6 <= column < 10
    row, column = after.points[1, 1].int().tolist()
    assert 22 <= row < 30
    assert 12 <= column < 31


def test_every_round_adds_a_click_and_shows_the_mask_before():
    """Two corrections make three rounds; the mask of token 0 comes back without a gradient."""
    batch = default_collate([dataset("points", clicks=2)[0, 0]])
    model = Recorder(-3.0)
    PromptedObjective(chosen_recipe("points", corrections=2, clicks=2), device="cpu").loss(model, batch)
    assert [asked.points.shape[1] for asked in model.asked] == [2, 3, 4]
    assert model.asked[0].masks is None
    for asked in model.asked[1:]:
        assert asked.masks.shape[1:] == (1, 16, 16)
        assert not asked.masks.requires_grad
        assert torch.all(asked.point_labels == 1)


def test_boxes_and_clicks_of_a_batch_are_asked_apart():
    """A mixed batch is decoded in two homogeneous parts that hold every prompted slice once; both are corrected."""
    batch = default_collate([dataset("mixed")[key] for key in keys(8)])
    model = Recorder(-3.0)
    PromptedObjective(chosen_recipe("mixed", corrections=1), device="cpu").loss(model, batch)
    boxed, boxed_again, clicked, clicked_again = model.asked
    num_shown = int((batch.target == 1).flatten(2).any(2).sum())
    assert len(boxed.boxes) + len(clicked.points) == num_shown
    assert boxed.points is None
    assert clicked.boxes is None
    assert boxed_again.points.shape[1] == 1
    assert clicked_again.points.shape[1] == 2


def test_the_loss_is_that_of_token_0_and_of_its_estimated_quality():
    """Per prompted slice BCE + Dice of the first map plus the squared error of its IoU, averaged."""
    batch = default_collate([dataset("box")[0, 0]])
    answer = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    shown = (batch.target[0] == 1).flatten(1).any(1)
    answer = answer[: int(shown.sum())]
    model = Recorder(answer, quality=0.9)
    loss = PromptedObjective(chosen_recipe("box"), device="cpu").loss(model, batch)
    target = batch.target[0][shown]
    level = 1 + nn.functional.interpolate(batch.image[0][shown], INPUT, mode="bilinear").flatten(1).mean(1)
    logits = nn.functional.interpolate(answer[:, :1] * level[:, None, None, None], TILE, mode="bilinear")
    parts = [
        region_loss(one[None], wanted[None]) + (0.9 - actual_iou(one[None] > 0, wanted[None])[0]) ** 2
        for one, wanted in zip(logits, target, strict=True)
    ]
    assert loss.item() == pytest.approx(torch.stack(parts).mean().item(), rel=1e-5)


def test_the_actual_iou_counts_known_voxels_only():
    """Two of six known voxels in common; nothing predicted where nothing is wanted is right."""
    target = torch.zeros(2, 1, 4, 4, dtype=torch.int16)
    target[0, 0, 0] = 1
    prediction = torch.zeros(2, 1, 4, 4, dtype=torch.bool)
    prediction[0, 0, :3, :2] = True
    target[0, 0, 3] = IGNORE_INDEX
    prediction[0, 0, 3] = True
    assert actual_iou(prediction, target).tolist() == pytest.approx([2 / 8, 1.0])


def test_a_batch_without_any_structure_costs_nothing():
    """The loss is exactly 0, with gradients that are 0 and not NaN; such samples beside others change nothing."""
    objective = PromptedObjective(chosen_recipe("mixed", corrections=1), device="cpu")
    for kind in ("box", "points", "mixed"):
        model = Recorder(2.0)
        loss = objective.loss(model, default_collate([dataset(kind, empty=True)[key] for key in keys(2)]))
        assert loss.item() == 0
        loss.backward()
        assert model.weight.grad == 0
        assert model.scale.grad == 0
    full = [dataset("box")[key] for key in keys(3)]
    alone = objective.loss(Recorder(2.0), default_collate(full))
    beside = objective.loss(Recorder(2.0), default_collate([dataset("box", empty=True)[0, 0], *full]))
    assert beside.item() == pytest.approx(alone.item(), rel=1e-6)


def test_all_rounds_reach_the_encoder():
    """The encoder's gradient with corrections is the mean of the rounds' gradients, not that of the first alone."""
    batch = default_collate([dataset("points")[0, 0]])

    class Growing(Recorder):
        """Answers stronger in every round."""

        def prompted(self, embeddings: Tensor, prompts: PromptBatch) -> tuple[Tensor, Tensor]:
            logits, quality = super().prompted(embeddings, prompts)
            return logits * len(self.asked), quality

    gradients = []
    for corrections in (0, 1):
        model = Growing(-1.0)
        objective = PromptedObjective(chosen_recipe("points", corrections=corrections), device="cpu")
        objective.loss(model, batch).backward()
        gradients.append(float(model.weight.grad))
    assert abs(gradients[0]) > 0
    assert gradients[1] != pytest.approx(gradients[0], rel=1e-2)


@pytest.mark.parametrize("kind", ["box", "mixed"])
def test_a_small_model_learns_to_follow_prompts(kind):
    """Thirty steps on one batch lower the loss clearly."""
    chosen = chosen_recipe(kind, corrections=0 if kind == "box" else 1)
    torch.manual_seed(0)
    network = build_network(get_spec(chosen.backbone), image_size=INPUT, num_tokens=STOCK_TOKENS)
    model = SegmentationModel(network, channel_input=nn.Identity(), method=chosen.method)
    batch = tuple(default_collate([dataset(kind)[key] for key in keys(2)]))
    objective = PromptedObjective(chosen, device="cpu")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = objective.loss(model, batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert np.mean(losses[-5:]) < 0.7 * losses[0]
    encoder = [p.grad for name, p in model.named_parameters() if "image_encoder" in name and p.grad is not None]
    assert any(gradient.abs().max() > 0 for gradient in encoder)
