"""The upsampler with a path of the image: shapes, size, what reaches what, and that the encoder stays what it is."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from samunet.artifacts.method import DecoderMethod, EncoderMethod, Method, summarise
from samunet.models.decoders.side_path import SidePath, SidePathUpsampler
from samunet.models.sam.network import build_mask_decoder, fresh_keys
from samunet.models.segmentation import SegmentationModel
from samunet.planners.counts import decoder_parameters
from tests.unit.models.model_helpers import build, images, recipe

WIDTH = 8
WIDTHS = {1: [WIDTH, 2 * WIDTH, 32, 64], 2: [WIDTH, 32, 64]}
SIDE_PATH = Method(encoder=EncoderMethod(train="full"), decoder=DecoderMethod(upsampler="side_path", path_width=WIDTH))


def _upsampler(*, stride: int = 1, number: int = 1) -> SidePathUpsampler:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        upsampler = build_mask_decoder(3, "side_path", path=SidePath(stride, WIDTH, number)).output_upscaling
    assert isinstance(upsampler, SidePathUpsampler)
    return upsampler


def _model() -> SegmentationModel:
    return build(recipe(backbone="vit_xs", method=SIDE_PATH)).model.train()


def _random(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", [64, 96, 112, 224])
@pytest.mark.parametrize(("stride", "number"), [(1, 1), (1, 2), (2, 1)])
def test_features_have_the_size_of_the_first_stage(size: int, stride: int, number: int) -> None:
    """Any multiple of 16 gives (B, w, S, S) from a path at strides 1, 2, 4 and 8, or half of that from one at 2 on."""
    upsampler, shapes = _upsampler(stride=stride, number=number), []
    upsampler.images = _random(2, 3, size, size)
    upsampler.path.register_forward_hook(lambda _, __, found: shapes.extend(tuple(f.shape) for f in found))
    with torch.no_grad():
        found = upsampler(_random(2, 256, size // 16, size // 16))
    assert found.shape == (2, WIDTH, size // stride, size // stride)
    assert shapes == [(2, w, size // (stride << i), size // (stride << i)) for i, w in enumerate(WIDTHS[stride])]


@pytest.mark.parametrize(("stride", "number"), [(1, 1), (1, 2), (2, 1)])
def test_parameters_follow_the_formula(stride: int, number: int) -> None:
    """Per stage and way convolutions with bias and a norm's scale and shift; doublings beside SAM's own layers."""
    widths = WIDTHS[stride]

    def stage(before: int, after: int) -> int:
        return sum(9 * channels * after + 3 * after for channels in [before, *[after] * (number - 1)])

    expected = sum(stage(before, after) for before, after in zip([3 * stride**2, *widths], widths, strict=False))
    expected += sum(stage(2 * w, w) for w in widths)
    expected += sum(4 * widths[i + 1] * widths[i] + widths[i] for i in range(len(widths) - 2))
    stock = sum(p.numel() for p in build_mask_decoder(3).output_upscaling.parameters())
    assert sum(p.numel() for p in _upsampler(stride=stride, number=number).parameters()) == stock + expected
    decoder = DecoderMethod(upsampler="side_path", path_stride=stride, path_width=WIDTH, path_convolutions=number)
    planned = decoder_parameters(SIDE_PATH.model_copy(update={"decoder": decoder}), 3)
    model = build(recipe(backbone="vit_xs", method=SIDE_PATH.model_copy(update={"decoder": decoder}))).model
    assert planned == model.count_parameters()["decoder"] + model.count_parameters()["other"]


def test_sams_own_layers_keep_their_names() -> None:
    """What a checkpoint of SAM holds of the upsampler is loaded, all else is new."""
    decoder = build_mask_decoder(3, "side_path")
    stock = {n for n, _ in build_mask_decoder(3).named_parameters() if n.startswith("output_upscaling.")}
    own = {n for n, _ in decoder.named_parameters() if n.startswith("output_upscaling.")}
    new = tuple(prefix.removeprefix("mask_decoder.") for prefix in fresh_keys(decoder))
    assert {name for name in own if not name.startswith(new)} == stock


def test_every_layer_and_the_embedding_get_a_gradient() -> None:
    """All convolutions of the path, the joins and the doublings learn, and all channels of the embedding."""
    model = _model()
    embeddings: list[Tensor] = []
    hook = model.network.mask_decoder.output_upscaling.register_forward_pre_hook(
        lambda _, inputs: embeddings.append(inputs[0]) or inputs[0].retain_grad()
    )
    model(images(2)).square().mean().backward()
    hook.remove()
    parameters = model.network.mask_decoder.output_upscaling.named_parameters()
    assert not [n for n, p in parameters if p.ndim > 1 and (p.grad is None or not p.grad.any())]
    assert embeddings[0].grad is not None
    assert bool((embeddings[0].grad.abs().amax((0, 2, 3)) > 0).all())


@pytest.mark.parametrize("stride", [1, 2])
def test_what_is_finer_than_a_patch_reaches_the_masks(stride: int) -> None:
    """With the same embedding a single pixel changes the features there, also if it is no corner of a square."""
    upsampler, pixels = _upsampler(stride=stride).eval(), _random(1, 3, 64, 64)
    embeddings = _random(1, 256, 4, 4)
    found = []
    for shift in (0.0, 5.0):
        pixels[..., 21, 31] += shift
        upsampler.images = pixels
        with torch.no_grad():
            found.append(upsampler(embeddings))
    change = (found[0] - found[1]).abs().amax(1)[0]
    assert change[21 // stride, 31 // stride] > 10 * change.median()


def test_the_encoder_is_untouched_and_the_images_are_let_go() -> None:
    """The embedding is that of the encoder alone; after a pass the model holds no image and can be copied."""
    model, pixels = _model(), images(2)
    assert torch.equal(model.encode(pixels), model.network.image_encoder(model.channel_input(pixels)))
    logits = model(pixels)
    assert logits.shape == (2, 3, 112, 112)
    assert model.network.mask_decoder.output_upscaling.images is None
    copy.deepcopy(model)


def test_a_batch_is_its_images_one_by_one() -> None:
    """In train mode too, no image changes the masks of another."""
    model, pixels = _model().double(), images(3).double()
    with torch.no_grad():
        together = model(pixels)
        alone = torch.cat([model(pixels[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-9)


def test_its_name_and_what_it_refuses() -> None:
    """It is named with its width and stride, and prompts are refused with what to change."""
    assert summarise(SIDE_PATH) == "full encoder + full decoder with side path 8/1"
    with pytest.raises(ValueError, match=r"set decoder\.upsampler to sam"):
        Method.model_validate({**SIDE_PATH.model_dump(), "prompts": {"kind": "box"}})


def _supervised(stride: int = 1) -> SegmentationModel:
    decoder = SIDE_PATH.decoder.model_copy(update={"deep_supervision": True, "path_stride": stride})
    return build(recipe(backbone="vit_xs", method=SIDE_PATH.model_copy(update={"decoder": decoder}))).model.train()


@pytest.mark.parametrize("stride", [1, 2])
def test_coarse_maps_are_made_in_training_alone_and_given_away(stride: int) -> None:
    """At the next two stages, finest first; in eval none, and the finest maps are the same with and without them."""
    model, pixels = _supervised(stride), images(2)
    logits = model(pixels)
    assert logits.shape[-1] == 112 // stride
    assert [m.shape[-1] for m in model.take_coarse()] == [56 // stride, 28 // stride]
    assert model.take_coarse() == ()
    copy.deepcopy(model)
    assert torch.equal(model.eval()(pixels), logits)
    assert model.take_coarse() == ()
    assert _model().take_coarse() == ()


def test_every_scale_teaches_what_lies_before_it() -> None:
    """A loss of the coarse maps reaches their own layers and the embedding, and nothing finer."""
    model = _supervised()
    model(images(2))
    torch.stack([m.square().mean() for m in model.take_coarse()]).sum().backward()
    learned = {n for n, p in model.network.mask_decoder.output_upscaling.named_parameters() if p.grad is not None}
    assert {"coarse_heads.1.weight", "coarse_heads.2.weight", "0.weight", "doublings.1.weight"} <= learned
    assert not any(name.startswith(("doublings.0", "joins.0")) for name in learned)


def test_parameters_of_coarse_maps_are_counted() -> None:
    """A convolution of one pixel per supervised stride, with bias."""
    model = _supervised()
    assert (
        decoder_parameters(model.method, 3) == model.count_parameters()["decoder"] + model.count_parameters()["other"]
    )
    extra = sum(p.numel() for n, p in model.named_parameters() if "coarse_heads" in n)
    assert extra == 3 * (2 * WIDTH + 1) + 3 * (32 + 1)
