"""Tiny encoders with every kind of adapter, for the tests of samunet.models.peft and samunet.models.volumetric."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from samunet.artifacts.method import (
    Bottleneck,
    Depth,
    DepthAttention,
    DepthConvolution,
    Fact,
    HighFrequency,
    Lora,
    NoDepth,
)
from samunet.artifacts.model_spec import SamSpec
from samunet.models.peft.inject import inject_adapters, inject_depth
from samunet.models.peft.state import adapter_parameters
from samunet.models.sam.encoder import SamEncoder, build_encoder
from tests.unit.models.model_helpers import perturb

VIT = SamSpec(name="vit_test", family="vit", embed_dim=32, depth=4, num_heads=2, global_blocks=(1, 3))
TINY = SamSpec(
    name="tiny_test",
    family="tiny_vit",
    embed_dim=96,
    depth=5,
    stage_dims=(8, 32, 64, 96),
    stage_depths=(1, 1, 2, 1),
    stage_heads=(1, 1, 2, 3),
    stage_windows=(7, 7, 14, 7),
)
SPECS = pytest.mark.parametrize("spec", [VIT, TINY], ids=lambda spec: spec.family)
MAX_DEPTH = 5

ALL_TARGETS = ("q", "k", "v", "o", "mlp1", "mlp2")
ATTENTION = DepthAttention()
CONVOLUTION = DepthConvolution(width=8)
# Name to (adapters, depth).
METHODS: dict[str, tuple[tuple[Any, ...], Depth]] = {
    "lora": ((Lora(targets=ALL_TARGETS, rank=2, alpha=3),), NoDepth()),
    "bottleneck": ((Bottleneck(),), NoDepth()),
    "fact": ((Fact(rank=3, dropout=0.0),), NoDepth()),
    "high_frequency": ((HighFrequency(reduction=8),), NoDepth()),
    "previous": ((HighFrequency(reduction=8, inputs="previous"),), NoDepth()),
    "depth_attention": ((), ATTENTION),
    "depth_convolution": ((), CONVOLUTION),
    "med_sa": ((Bottleneck(ratio=0.5, activation="relu"),), ATTENTION),
    "ma_sam": ((Fact(rank=3, dropout=0.0),), CONVOLUTION),
    "everything": ((Lora(rank=2), Bottleneck(), HighFrequency(reduction=8)), ATTENTION),
}
EVERY_METHOD = pytest.mark.parametrize("method", METHODS)


def encoder_of(spec: SamSpec, *, size: int = 112, double: bool = True) -> SamEncoder:
    """A tiny encoder in eval mode, every parameter and buffer perturbed."""
    encoder = copy.deepcopy(_base(spec, size))
    return encoder.double() if double else encoder


@lru_cache(maxsize=16)
def _base(spec: SamSpec, size: int) -> SamEncoder:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        encoder = build_encoder(spec, image_size=size)
    perturb(encoder)
    encoder.eval()
    return encoder


def adapt(encoder: SamEncoder, method: str, *, depth: int = 1) -> SamEncoder:
    """Inject one of METHODS, seeded; the slabs that follow hold ``depth`` slices."""
    adapters, depth_choice = METHODS[method]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        inject_adapters(encoder, adapters)
        inject_depth(encoder, depth_choice, max_depth=MAX_DEPTH)
    encoder.slab.depth = depth
    return encoder


def pretend_training(module: nn.Module, *, scale: float = 0.3) -> None:
    """Give all adapters random values, as training would."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in adapter_parameters(module).values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * scale)


def count(module: nn.Module) -> int:
    """Parameters of all adapters."""
    return sum(parameter.numel() for parameter in adapter_parameters(module).values())


def changed(one: Tensor, other: Tensor) -> list[int]:
    """Indices along the first axis at which two batches differ at all."""
    return [i for i, (a, b) in enumerate(zip(one, other, strict=True)) if not torch.equal(a, b)]


def inject_some(encoder: SamEncoder, choices: Sequence[Any]) -> SamEncoder:
    """Inject adapters, seeded, and return the encoder."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        inject_adapters(encoder, choices)
    return encoder
