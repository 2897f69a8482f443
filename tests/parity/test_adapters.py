"""Every adapter starts as upstream's own encoder, and what is merged is upstream's own encoder again."""

from __future__ import annotations

import copy
from functools import lru_cache

import pytest
import torch
from segment_anything.modeling.image_encoder import LayerNorm2d
from timm.models.tiny_vit import TinyVit
from torch import Tensor, nn

from samunet.artifacts.method import Fact, Lora
from samunet.artifacts.model_spec import SamSpec
from samunet.models.peft.state import adapter_parameters, merge
from samunet.models.sam.encoder import SamEncoder, build_encoder
from tests.unit.models.model_helpers import images, perturb, upstream_vit
from tests.unit.models.peft_helpers import (
    ALL_TARGETS,
    EVERY_METHOD,
    SPECS,
    TINY,
    adapt,
    inject_some,
    pretend_training,
)

# Windows of 14 tokens need padding on grids of 7 and 20 tokens per side, and none on 14.
SIZES = pytest.mark.parametrize("size", [112, 224, 320], ids=["grid 7", "grid 14", "grid 20"])


class _PlainTiny(nn.Module):
    """timm's TinyViT with its last merging at stride one and SAM's neck, without any of our code."""

    def __init__(self) -> None:
        super().__init__()
        self.body = TinyVit(
            num_classes=0,
            embed_dims=TINY.stage_dims,
            depths=TINY.stage_depths,
            num_heads=TINY.stage_heads,
            window_sizes=TINY.stage_windows,
            drop_path_rate=0.0,
        )
        self.body.head = nn.Identity()
        self.body.stages[3].downsample.conv2.conv.stride = (1, 1)
        self.neck = nn.Sequential(
            nn.Conv2d(TINY.embed_dim, 256, kernel_size=1, bias=False),
            LayerNorm2d(256),
            nn.Conv2d(256, 256, kernel_size=3, padding=1, bias=False),
            LayerNorm2d(256),
        )

    def forward(self, pixels: Tensor) -> Tensor:
        result: Tensor = self.neck(self.body.forward_features(pixels))
        return result


def _upstream(spec: SamSpec, size: int) -> nn.Module:
    if spec.family == "tiny_vit":
        return _PlainTiny()
    return upstream_vit(spec, size)


def _pair(spec: SamSpec, size: int) -> tuple[nn.Module, SamEncoder]:
    """Upstream's encoder, perturbed, and ours with the same state, both in float64 and eval mode."""
    return copy.deepcopy(_originals(spec, size))


@lru_cache(maxsize=8)
def _originals(spec: SamSpec, size: int) -> tuple[nn.Module, SamEncoder]:
    upstream = _upstream(spec, size)
    perturb(upstream)
    ours = build_encoder(spec, image_size=size)
    state = {_our_key(key): tensor for key, tensor in upstream.state_dict().items()}
    ours.load_state_dict(state, strict=True)
    return upstream.double().eval(), ours.double().eval()


def _our_key(key: str) -> str:
    return key.removeprefix("body.")


@SPECS
@SIZES
@EVERY_METHOD
def test_adapted_encoder_is_upstreams_at_the_start(spec: SamSpec, size: int, method: str) -> None:
    """In float64 the freshly adapted encoder gives exactly upstream's embeddings of a slab of two slices."""
    upstream, ours = _pair(spec, size)
    adapt(ours, method, depth=2)
    assert adapter_parameters(ours)
    pixels = images(2, size=size).double()
    with torch.no_grad():
        expected = upstream(pixels)
        torch.testing.assert_close(ours(pixels), expected, rtol=0, atol=1e-12)
    assert float(expected.std()) > 0.1


@SPECS
@pytest.mark.parametrize("size", [112, 224])
@pytest.mark.parametrize("method", ["everything", "ma_sam"])
def test_gradients_of_the_base_are_upstreams_at_the_start(spec: SamSpec, size: int, method: str) -> None:
    """Under adapters at their start every base parameter has upstream's gradient."""
    upstream, ours = _pair(spec, size)
    adapt(ours, method)
    pixels = images(1, size=size).double()
    weights = torch.randn(1, 256, size // 16, size // 16, generator=torch.Generator().manual_seed(8)).double()
    for encoder in (upstream, ours):
        (encoder(pixels) * weights).sum().backward()
    found = dict(ours.named_parameters())
    for name, parameter in upstream.named_parameters():
        gradient = found[_our_key(name)].grad
        assert gradient is not None
        tolerance = 1e-10 * max(1.0, float(parameter.grad.abs().max()))
        torch.testing.assert_close(gradient, parameter.grad, rtol=0, atol=tolerance)


@SPECS
@EVERY_METHOD
def test_injection_keeps_upstreams_keys(spec: SamSpec, method: str) -> None:
    """All keys and values of the base stay, and every other key is an adapter's."""
    _, ours = _pair(spec, 112)
    before = {key: tensor.clone() for key, tensor in ours.state_dict().items()}
    after = adapt(ours, method).state_dict()
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())
    assert set(after) - set(before) == set(adapter_parameters(ours))


@SPECS
@EVERY_METHOD
def test_a_batch_is_its_slabs_one_by_one(spec: SamSpec, method: str) -> None:
    """Three slabs of two slices together give what each gives alone."""
    _, ours = _pair(spec, 112)
    pretend_training(adapt(ours, method, depth=2))
    pixels = images(6).double()
    with torch.no_grad():
        together = ours(pixels)
        alone = torch.cat([ours(pixels[i : i + 2]) for i in (0, 2, 4)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-11 * float(alone.abs().max()))


@SPECS
@pytest.mark.parametrize(
    "choice", [Lora(targets=ALL_TARGETS, rank=3, alpha=6), Fact(rank=5, scale=1.5)], ids=["lora", "fact"]
)
def test_merged_encoder_is_plain_upstreams(spec: SamSpec, choice: Lora | Fact) -> None:
    """A trained and merged encoder gives the same embeddings and loads strictly into upstream's own class."""
    upstream, ours = _pair(spec, 320)
    inject_some(ours, [choice])
    pretend_training(ours)
    pixels = images(1, size=320).double()
    with torch.no_grad():
        before, plain = ours(pixels), upstream(pixels)
        merge(ours)
        after = ours(pixels)
        keys = {_our_key(key): key for key in upstream.state_dict()}
        upstream.load_state_dict({keys[key]: tensor for key, tensor in ours.state_dict().items()}, strict=True)
        loaded = upstream.eval()(pixels)
    torch.testing.assert_close(after, before, rtol=0, atol=1e-10 * float(before.abs().max()))
    torch.testing.assert_close(loaded, before, rtol=0, atol=1e-10 * float(before.abs().max()))
    assert float((before - plain).abs().max()) > 0.01
    once = copy.deepcopy(ours.state_dict())
    merge(ours)
    assert all(torch.equal(tensor, once[key]) for key, tensor in ours.state_dict().items())
    assert not adapter_parameters(ours)
