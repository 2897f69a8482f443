"""The U-Net that takes SAM's embedding in: shapes, size, what reaches what, and that the encoder stays the file's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from samunet.artifacts.method import DecoderMethod, EncoderMethod, Fusion, Method
from samunet.models.build import BuiltModel
from samunet.models.fusion import FusionUNet, stage_widths
from tests.unit.models.model_helpers import SMALL_VIT, base_file, build, images, recipe

WIDTH, TOKENS = 4, 3
FROZEN_UNET = Method(
    encoder=EncoderMethod(train="frozen"),
    decoder=DecoderMethod(train="none"),
    fusion=Fusion(kind="unet", width=WIDTH),
)


def _unet(*, in_channels: int = 3, width: int = WIDTH) -> FusionUNet:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return FusionUNet(in_channels, TOKENS, width=width)


def _pixels(batch: int, channels: int, side: int) -> Tensor:
    return torch.randn(batch, channels, side, side, generator=torch.Generator().manual_seed(1))


def _embeddings(batch: int, grid: int, *, seed: int = 2) -> Tensor:
    return torch.randn(batch, 256, grid, grid, generator=torch.Generator().manual_seed(seed))


def _expected_parameters(in_channels: int, width: int) -> int:
    """Convolutions with bias, each followed by a norm's scale and shift; 256 channels more come in at stride 16."""
    widths = [min(512, width * 2**i) for i in range(5)]

    def stage(before: int, after: int) -> int:
        return sum(9 * channels * after + after + 2 * after for channels in (before, after))

    down = sum(stage(before, after) for before, after in zip([in_channels, *widths], widths, strict=False))
    incoming = [widths[4] + 256, *reversed(widths[1:4])]
    ups = sum(4 * a * b + b for a, b in zip(incoming, reversed(widths[:4]), strict=True))
    return down + ups + sum(stage(2 * w, w) for w in widths[:4]) + widths[0] * TOKENS + TOKENS


@pytest.mark.parametrize("size", [64, 96, 112, 224])
@pytest.mark.parametrize("channels", [1, 3, 5])
def test_logits_have_the_size_of_the_images(size: int, channels: int) -> None:
    """Any multiple of 16 and any number of channels gives (B, T, S, S), from features at strides 1 to 16."""
    unet, pixels = _unet(in_channels=channels), _pixels(2, channels, size)
    with torch.no_grad():
        features = unet.down(pixels)
        assert unet(pixels, _embeddings(2, size // 16)).shape == (2, TOKENS, size, size)
    expected = [(2, w, size // 2**i, size // 2**i) for i, w in enumerate(stage_widths(WIDTH))]
    assert [tuple(f.shape) for f in features] == expected


@pytest.mark.parametrize(("in_channels", "width"), [(1, 4), (3, 8), (2, 48)])
def test_parameters_follow_the_formula(in_channels: int, width: int) -> None:
    """The count is that of the layers, with the cap of 512 channels and the 256 of the embedding."""
    unet = _unet(in_channels=in_channels, width=width)
    assert sum(p.numel() for p in unet.parameters()) == _expected_parameters(in_channels, width)


def test_the_embedding_adds_its_channels_to_one_layer_only() -> None:
    """Against a U-Net without an embedding only the first transposed convolution grows, by 256 inputs."""
    with_it = {name: p.shape for name, p in _unet().named_parameters()}
    without = {name: p.shape for name, p in FusionUNet(3, TOKENS, 0, WIDTH).named_parameters()}
    assert {name for name in with_it if with_it[name] != without[name]} == {"up.ups.0.weight"}
    assert with_it["up.ups.0.weight"][0] - without["up.ups.0.weight"][0] == 256


def test_every_layer_starts_as_he_says() -> None:
    """Weights have the standard deviation for leaky ReLU, biases are zero, norms are the identity."""
    for module in _unet(width=16).modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            fan_in = module.weight[0].numel()
            assert module.bias is not None
            assert not module.bias.any()
            if module.weight.numel() > 2000:
                assert module.weight.std().item() == pytest.approx((2 / (1 + 0.01**2) / fan_in) ** 0.5, rel=0.08)
        if isinstance(module, nn.InstanceNorm2d):
            assert bool((module.weight == 1).all())
            assert not module.bias.any()


def test_the_embedding_changes_the_masks_and_receives_a_gradient() -> None:
    """Another embedding gives other logits, and one that trains is told how to."""
    unet, pixels = _unet(), _pixels(1, 3, 64)
    embeddings = _embeddings(1, 4).requires_grad_()
    logits = unet(pixels, embeddings)
    assert not torch.allclose(logits, unet(pixels, _embeddings(1, 4, seed=3)))
    logits.square().mean().backward()
    assert embeddings.grad is not None
    assert bool((embeddings.grad.abs().amax((0, 2, 3)) > 0).all())


def test_every_parameter_takes_part() -> None:
    """No layer of the U-Net is without a gradient (a bias before an instance norm has one of zero)."""
    unet = _unet()
    unet(_pixels(2, 3, 64), _embeddings(2, 4)).square().mean().backward()
    assert all(p.grad is not None for p in unet.parameters())
    assert all(p.grad.abs().max() > 0 for p in unet.parameters() if p.grad is not None and p.ndim > 1)


def test_an_embedding_of_another_grid_is_resized_bilinearly() -> None:
    """A grid of 7 meets a stage of 4 as if it had been resized before."""
    unet, pixels, embeddings = _unet(), _pixels(1, 3, 64), _embeddings(1, 7)
    resized = functional.interpolate(embeddings, size=(4, 4), mode="bilinear", align_corners=False)
    with torch.no_grad():
        torch.testing.assert_close(unet(pixels, embeddings), unet(pixels, resized), rtol=0, atol=0)


def test_a_batch_is_its_images_one_by_one() -> None:
    """In train mode too, no image changes the masks of another."""
    unet = _unet().double().train()
    pixels, embeddings = _pixels(3, 3, 96).double(), _embeddings(3, 6).double()
    with torch.no_grad():
        together = unet(pixels, embeddings)
        alone = torch.cat([unet(pixels[i : i + 1], embeddings[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-10)


def test_the_memory_layout_does_not_change_the_masks() -> None:
    """Channels last gives the same masks, and gives them channels last."""
    unet, pixels, embeddings = _unet(), _pixels(2, 3, 64), _embeddings(2, 4)
    with torch.no_grad():
        expected = unet(pixels, embeddings)
        unet.to(memory_format=torch.channels_last)
        found = unet(pixels.to(memory_format=torch.channels_last), embeddings)
    assert found.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.fixture
def fused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[BuiltModel, dict[str, Tensor]]:
    """A frozen SAM with a U-Net, and the tensors of its weights file."""
    monkeypatch.setattr("samunet.models.build.get_spec", lambda _: SMALL_VIT)
    file = base_file(tmp_path, SMALL_VIT, image_size=112, kind="sam")
    built = build(recipe(backbone=SMALL_VIT.name, method=FROZEN_UNET, weights_kind="sam"), weights=file)
    return built, torch.load(file.path, weights_only=True)


def _encoder_is_the_files(built: BuiltModel, stored: dict[str, Tensor]) -> bool:
    encoder = built.model.network.image_encoder.state_dict()
    return all(torch.equal(tensor, stored[f"image_encoder.{key}"]) for key, tensor in encoder.items())


def test_building_and_training_leave_the_frozen_encoder_as_it_is(
    fused: tuple[BuiltModel, dict[str, Tensor]],
) -> None:
    """The encoder is bit for bit the file's after the U-Net was made and after a step, which moves only the U-Net."""
    built, stored = fused
    model = built.model
    assert _encoder_is_the_files(built, stored)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(images(2)).square().mean().backward()
    optimizer.step()
    assert _encoder_is_the_files(built, stored)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved
    assert all(name.startswith(("unet.", "channel_input.")) for name in moved)


def test_nothing_is_recorded_in_the_frozen_encoder(fused: tuple[BuiltModel, dict[str, Tensor]]) -> None:
    """The embedding that the U-Net gets carries no graph, and the masks depend on it."""
    model = fused[0].model.train()
    pixels = images(1)
    embeddings = model.encode(pixels)
    assert not embeddings.requires_grad
    assert model.unet is not None
    with torch.no_grad():
        assert torch.equal(model(pixels), model.unet(pixels, embeddings))
        assert not torch.allclose(model(pixels), model.unet(pixels, torch.zeros_like(embeddings)))
