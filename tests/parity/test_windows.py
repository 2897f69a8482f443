"""Attention without padding is upstream's, for a ViT whose map is smaller than a window."""

from __future__ import annotations

import pytest
import torch
from segment_anything.modeling import ImageEncoderViT
from torch import Tensor

from samunet.artifacts.model_spec import get_spec
from samunet.models.peft.blocks import adapt_block
from samunet.models.sam.encoder import VitEncoder, build_encoder
from samunet.models.sam.windows import PaddedVitAttention
from tests.unit.models.model_helpers import upstream_vit


def pair(size: int, *, adapted: bool) -> tuple[VitEncoder, ImageEncoderViT]:
    """Our encoder and upstream's with the same perturbed weights."""
    encoder = build_encoder(get_spec("vit_xs"), image_size=size).double()
    assert isinstance(encoder, VitEncoder)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    reference = upstream_vit(get_spec("vit_xs"), size).double()
    reference.load_state_dict(encoder.state_dict(), strict=True)
    for index in range(len(encoder.blocks)) if adapted else ():
        adapt_block(encoder, index)
    return encoder, reference


@pytest.mark.parametrize(("size", "adapted"), [(64, False), (112, False), (112, True), (208, False)])
def test_embeddings_and_gradients_are_upstreams(size: int, adapted: bool) -> None:
    """In float64, for plain and for adapted blocks, with relative positions and norms that are not at their start."""
    encoder, reference = pair(size, adapted=adapted)
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(2, 3, size, size, generator=generator, dtype=torch.float64)
    weights = torch.randn(2, 256, size // 16, size // 16, generator=generator, dtype=torch.float64)
    results: list[Tensor] = []
    for module in (encoder, reference):
        results.append(module(pixels))
        (results[-1] * weights).sum().backward()
    assert torch.allclose(*results, rtol=1e-10, atol=1e-11)
    found = dict(encoder.named_parameters())
    for name, parameter in reference.named_parameters():
        assert parameter.grad is not None
        assert torch.allclose(found[name].grad, parameter.grad, rtol=1e-8, atol=1e-10), name


@pytest.mark.parametrize(("size", "spared"), [(208, True), (224, False)])
def test_only_maps_smaller_than_a_window_are_spared(size: int, spared: bool) -> None:
    """Blocks that attend in windows are replaced below 14 x 14 tokens; those that see the whole image never are."""
    encoder = build_encoder(get_spec("vit_xs"), image_size=size)
    kinds = [isinstance(layer, PaddedVitAttention) for layer in encoder.attention_layers()]
    assert kinds == [spared and index not in get_spec("vit_xs").global_blocks for index in range(6)]


def test_work_on_padding_is_spared() -> None:
    """At 112 px the encoder computes less than half of upstream's operations."""
    from torch.utils.flop_counter import FlopCounterMode

    counts = []
    for module in pair(112, adapted=False):
        with FlopCounterMode(display=False) as flops, torch.no_grad():
            module(torch.randn(1, 3, 112, 112, dtype=torch.float64))
        counts.append(flops.get_total_flops())
    assert counts[0] < 0.6 * counts[1]
