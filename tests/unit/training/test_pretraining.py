"""Masked image modelling: what is hidden, what counts, what learns."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from samunet.artifacts.plan import resolve_recipe
from samunet.models.pretraining import build_masked_model, build_prompted_model, patches, unpatched
from samunet.models.segmentation import SegmentationModel
from samunet.training.mixture import EncoderSlices, Mixture
from samunet.training.pretraining import (
    MASK_RATIO,
    MaskedImageObjective,
    MaskedSlices,
    draw_mask,
    mask_unit,
    normalised,
    reconstruction,
    see_whole_images,
)
from tests.samples import make_plan, make_recipe

BACKBONES = ("vit_xs", "vit_t_xs")
SIDE = 64


def recipe_of(backbone: str):
    plan = make_plan(recipes={"none": {"cpu": make_recipe(backbone=backbone, input_size=SIDE)}})
    return resolve_recipe(plan.configuration("2d"), "none", "cpu")


def masked_model(backbone: str) -> tuple[SegmentationModel, MaskedImageObjective]:
    recipe = recipe_of(backbone)
    model = build_masked_model(recipe, weights=None, seed=3).model
    return model, MaskedImageObjective(recipe, device="cpu")


def batch_of(number: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random images, all valid, with the upper half of the tokens hidden."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(number, 1, 3, SIDE, SIDE, generator=generator)
    mask = torch.zeros(number, 1, 1, SIDE // 16, SIDE // 16)
    mask[..., : SIDE // 32, :] = 1
    return image, torch.ones(number, 1, 1, SIDE, SIDE), mask


@pytest.mark.parametrize("side", [112, 224, 240, 448])
def test_the_share_of_hidden_units_is_exact_and_none_is_beyond_the_image(side: int):
    """Of the units that touch the image the ratio is hidden, in whole units; the padding never is."""
    valid = np.zeros((side, side), bool)
    valid[40 : side - 5, 33:100] = True
    unit = mask_unit(side)
    mask = draw_mask(valid, np.random.default_rng(0), unit=unit)
    assert mask.shape == (side // 16, side // 16)
    step = unit // 16
    rows = -(-side // unit)
    hidden = {(row // step, column // step) for row, column in zip(*np.nonzero(mask), strict=True)}
    touching = {
        (r, c)
        for r in range(rows)
        for c in range(rows)
        if valid[r * unit : (r + 1) * unit, c * unit : (c + 1) * unit].any()
    }
    assert hidden <= touching
    assert len(hidden) == round(MASK_RATIO * len(touching))
    assert mask.sum() == sum(
        len(range(r * step, min((r + 1) * step, side // 16))) * len(range(c * step, min((c + 1) * step, side // 16)))
        for r, c in hidden
    )


def test_units_shrink_with_the_input():
    """Two tokens where seven units fit along the side, else one."""
    assert (mask_unit(112), mask_unit(208), mask_unit(224), mask_unit(1024)) == (16, 16, 32, 32)


class Slices:
    """Constant samples of one source, already in encoder pixels."""

    slab_depth = 1

    def __init__(self, value: float = 0.0) -> None:
        self._value = float(value)

    def __getitem__(self, key: tuple[int, int]) -> tuple[torch.Tensor, ...]:
        image = torch.full((1, 3, SIDE, SIDE), self._value)
        return image, torch.ones(1, 1, SIDE, SIDE), torch.zeros(1, 1, SIDE, SIDE, dtype=torch.int16)


def test_masks_depend_on_seed_epoch_and_index_alone():
    """The same key gives the same mask in any order and process; other keys and seeds give others."""
    first, again, other = (MaskedSlices(Slices(), seed=seed) for seed in (1, 1, 2))
    masks = {key: first[key][2] for key in [(0, 0), (0, 1), (1, 0)]}
    for key in reversed(masks):
        assert torch.equal(again[key][2], masks[key])
    assert not torch.equal(masks[0, 0], masks[0, 1])
    assert not torch.equal(masks[0, 0], masks[1, 0])
    assert not torch.equal(masks[0, 0], other[0, 0][2])


def test_a_mixture_draws_its_sources_by_their_weights():
    """Nine tenths of the samples come from the source of nine tenths of the weight, the same ones every time."""
    mixture = Mixture([Slices(0), Slices(1)], [1, 9], seed=5)
    drawn = [float(mixture[0, index][0].mean()) for index in range(400)]
    assert 0.86 < np.mean(drawn) < 0.94
    assert drawn[:20] == [float(Mixture([Slices(0), Slices(1)], [1, 9], seed=5)[0, i][0].mean()) for i in range(20)]


class Stored(Slices):
    """A sample in stored intensities, 32 voxels of two channels, with a labelled corner."""

    def __getitem__(self, key: tuple[int, int]) -> tuple[torch.Tensor, ...]:
        target = torch.zeros(1, 1, 32, 32, dtype=torch.int16)
        target[..., :8, :8] = 2
        valid = torch.ones(1, 1, 32, 32)
        valid[..., 24:, :] = 0
        return torch.full((1, 2, 32, 32), 3.0), valid, target


def test_samples_reach_the_encoders_pixels_with_their_labels():
    """Images become three channels of the input's side, zero beyond the image; labels keep their values and place."""
    average = nn.Conv2d(2, 3, 1, bias=False)
    nn.init.constant_(average.weight, 0.5)
    image, valid, target = EncoderSlices(Stored(), recipe=recipe_of("vit_xs"), channels=average)[0, 0]
    assert image.shape == (1, 3, SIDE, SIDE)
    assert torch.allclose(image[..., : SIDE // 2, :], torch.tensor(3.0))
    assert image[..., 52:, :].abs().max() == 0
    assert set(valid.unique().tolist()) == {0.0, 1.0}
    assert set(target.unique().tolist()) == {0, 2}
    assert (target[0, 0, :16, :16] == 2).all()
    assert (target == 2).sum() == 16 * 16


def test_patches_are_undone():
    """Cutting into patches and putting them together is exact."""
    image = torch.randn(2, 3, SIDE, SIDE)
    assert torch.equal(unpatched(patches(image)), image)


def test_targets_lose_mean_and_deviation_of_each_patch_but_noise_of_flat_ones_stays_small():
    """A textured patch gets deviation one; background that hardly varies stays near zero."""
    textured, flat = torch.randn(1, 768, 1, 1) * 5 + 2, torch.randn(1, 768, 1, 1) * 0.001 + 4
    values, mean, deviation = normalised(torch.cat([textured, flat], dim=3))
    assert values.mean(1).abs().max() < 1e-4
    assert values[..., 0].std() == pytest.approx(1, abs=0.01)
    assert values[..., 1].std() < 0.02
    assert torch.allclose(values * deviation + mean, torch.cat([textured, flat], dim=3), atol=1e-5)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_only_hidden_pixels_count_and_hidden_pixels_are_not_seen(backbone: str):
    """The loss of given predictions ignores seen and padded patches; predictions do not depend on hidden pixels."""
    model, objective = masked_model(backbone)
    model.eval()
    image, valid, mask = batch_of()
    before = objective.predict(model, image[:, 0], mask[:, 0])
    changed = image.clone()
    changed[..., : SIDE // 2, :] = 7.0
    assert torch.equal(objective.predict(model, changed[:, 0], mask[:, 0]), before)

    class Fixed(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return torch.zeros(len(images), 768, SIDE // 16, SIDE // 16)

    loss = objective.loss(Fixed(), (image, valid, mask))
    seen_changed = image.clone()
    seen_changed[..., SIDE // 2 :, :] = seen_changed[..., SIDE // 2 :, :].flip(-1)
    assert torch.allclose(objective.loss(Fixed(), (seen_changed, valid, mask)), loss, rtol=1e-6)
    assert objective.loss(Fixed(), (changed, valid, mask)) < 1e-6 < loss
    hidden_is_padding = valid.clone()
    hidden_is_padding[..., : SIDE // 2, :] = 0
    assert objective.loss(Fixed(), (image, hidden_is_padding, mask)) == 0


@pytest.mark.parametrize("backbone", BACKBONES)
def test_mask_token_encoder_and_head_learn_and_the_mask_decoder_lies_idle(backbone: str):
    """A step gives the token and all of the encoder a gradient, and nothing of the decoders."""
    model, objective = masked_model(backbone)
    objective.loss(model, batch_of(8)).backward()
    token = model.channel_input.mask_token.grad
    assert token is not None
    assert token.abs().max() > 0
    silent = [n for n, p in model.network.image_encoder.named_parameters() if p.grad is None]
    assert silent == []
    assert all(p.grad is not None for p in model.unet.parameters())
    idle = [*model.network.mask_decoder.parameters(), *model.network.prompt_encoder.parameters()]
    assert all(p.grad is None and not p.requires_grad for p in idle)


def test_a_batch_in_pieces_has_the_same_sums():
    """Errors and pixel counts of parts add up to those of the batch, so pieces give its gradient."""
    model, objective = masked_model("vit_xs")
    model.eval()
    with torch.no_grad():
        whole = objective.sums(model, batch_of(4))
        parts = [objective.sums(model, tuple(t[i : i + 1] for t in batch_of(4))) for i in range(4)]
    for index, value in enumerate(whole):
        assert float(value) == pytest.approx(sum(float(part[index]) for part in parts), rel=1e-5)


def test_a_perfect_prediction_gives_the_image_back():
    """Reconstruction keeps seen pixels and fills hidden ones from normalised values, mean and deviation."""
    _, objective = masked_model("vit_xs")
    image, valid, mask = batch_of(1)

    class Perfect(nn.Module):
        def forward(self, _: torch.Tensor) -> torch.Tensor:
            return normalised(patches(image[:, 0]))[0]

    original, seen, completed = reconstruction(objective, Perfect(), (image, valid, mask))
    assert torch.allclose(completed, original, atol=1e-5)
    assert torch.equal(seen[..., SIDE // 2 :, :], original[..., SIDE // 2 :, :])
    assert seen[..., : SIDE // 2, :].std() == 0


def test_batch_statistics_are_those_of_whole_images():
    """After pretraining they are measured anew, whatever they were; a ViT has none and stays as it is."""
    model, _ = masked_model("vit_t_xs")
    encoder = model.network.image_encoder
    norm = next(m for m in encoder.modules() if isinstance(m, nn.BatchNorm2d))
    norm.running_mean.fill_(100.0)
    image = batch_of(2)[0]
    encoder.eval()

    def batches():
        while True:
            yield (image,)

    see_whole_images(encoder, batches(), device="cpu")
    seen: list[torch.Tensor] = []
    norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        encoder(image[:, 0])
    assert torch.allclose(norm.running_mean, seen[0].mean((0, 2, 3)), atol=1e-5)
    assert not encoder.training
    vit, _ = masked_model("vit_xs")
    before = {name: tensor.clone() for name, tensor in vit.network.image_encoder.state_dict().items()}
    see_whole_images(vit.network.image_encoder, batches(), device="cpu")
    assert all(torch.equal(before[n], t) for n, t in vit.network.image_encoder.state_dict().items())


def test_a_random_prompt_encoder_learns_with_the_rest():
    """Supervised pretraining from random weights leaves nothing frozen at random values."""
    plan = make_plan(recipes={"none": {"cpu": make_recipe(backbone="vit_xs")}})
    recipe = resolve_recipe(plan.configuration("2d"), "none", "cpu")
    model = build_prompted_model(recipe, weights=None, seed=0).model
    assert all(p.requires_grad for p in model.network.prompt_encoder.parameters())
