"""How many parameters each adapter adds to the real encoders: published numbers, and the planner's formulas."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
import torch

from samunet.artifacts.method import (
    Bottleneck,
    Depth,
    DepthAttention,
    DepthConvolution,
    EncoderMethod,
    Fact,
    HighFrequency,
    Lora,
    Method,
    NoDepth,
)
from samunet.artifacts.model_spec import get_spec
from samunet.models.peft.inject import inject_adapters, inject_depth
from samunet.models.sam.encoder import SamEncoder, TinyVitEncoder, VitEncoder
from samunet.planners.counts import encoder_adapter_parameters
from tests.unit.models.peft_helpers import count

SD_TRANS_TABLE = {"vit_b": 12 * 12, "vit_l": 24 * 16, "vit_h": 32 * 16}
PUBLISHED: dict[str, tuple[Any, dict[str, int]]] = {
    "LoRA q, v of rank 4": (Lora(), {"vit_b": 147_456, "vit_l": 393_216, "vit_h": 655_360, "vit_t": 29_696}),
    "LoRA q, k, v, o of rank 4": (
        Lora(targets=("q", "k", "v", "o")),
        {"vit_b": 294_912, "vit_l": 786_432, "vit_h": 1_310_720},
    ),
    "LoRA q, v and MLP of rank 4": (Lora(targets=("q", "v", "mlp1", "mlp2"), alpha=1.0), {"vit_b": 516_096}),
    "bottlenecks of ratio 1/4": (
        Bottleneck(),
        {"vit_b": 7_100_928, "vit_l": 25_227_264, "vit_h": 52_531_200, "vit_t": 395_808},
    ),
    "bottlenecks of ratio 1/16": (Bottleneck(ratio=1 / 16), {"vit_h": 13_194_240}),
    "FacT of rank 32": (Fact(), {"vit_b": 73_728, "vit_l": 114_688, "vit_h": 147_456}),
    "high frequency": (HighFrequency(), {"vit_b": 63_312, "vit_l": 116_544, "vit_h": 186_960}),
    "convolutions of width 384": (
        DepthConvolution(),
        {"vit_b": 24_818_688, "vit_l": 59_099_136, "vit_h": 91_414_528},
    ),
}
ROWS = [(name, backbone) for name, (_, counts) in PUBLISHED.items() for backbone in counts]


def _bare(backbone: str) -> SamEncoder:
    """An encoder without memory for its weights."""
    spec = get_spec(backbone)
    with torch.device("meta"):
        return TinyVitEncoder(spec) if spec.family == "tiny_vit" else VitEncoder(spec, image_size=1024)


@lru_cache(maxsize=4)
def _base_count(backbone: str) -> int:
    return sum(p.numel() for p in _bare(backbone).parameters())


def _added(backbone: str, adapters: tuple[Any, ...], depth: Depth, *, slab_depth: int = 1) -> int:
    """Parameters that injection adds, checked to be those the adapters name."""
    with torch.device("meta"):
        encoder = _bare(backbone)
        inject_adapters(encoder, adapters)
        inject_depth(encoder, depth, max_depth=slab_depth)
    added = sum(p.numel() for p in encoder.parameters()) - _base_count(backbone)
    assert count(encoder) == added
    return added


@pytest.mark.parametrize(("name", "backbone"), ROWS)
def test_published_counts(name: str, backbone: str) -> None:
    """Each adapter in all blocks adds exactly the published number of parameters."""
    choice, counts = PUBLISHED[name]
    is_depth = isinstance(choice, DepthConvolution)
    added = _added(backbone, () if is_depth else (choice,), choice if is_depth else NoDepth())
    assert added == counts[backbone]


@pytest.mark.parametrize(
    ("backbone", "published"), [("vit_b", 10_651_392), ("vit_l", 37_840_896), ("vit_h", 78_796_800)]
)
def test_published_counts_with_a_depth_adapter(backbone: str, published: int) -> None:
    """Three bottlenecks per block are the published number; the table of depth positions is ours and comes on top."""
    added = _added(backbone, (Bottleneck(),), DepthAttention(), slab_depth=5)
    assert added - published == 9 * SD_TRANS_TABLE[backbone]


@pytest.mark.parametrize("backbone", ["vit_b", "vit_t", "vit_xs", "vit_t_xs"])
@pytest.mark.parametrize("depth", [NoDepth(), DepthAttention(blocks=(0, -1)), DepthConvolution(width=20)])
def test_the_planner_counts_what_is_injected(backbone: str, depth: Depth) -> None:
    """The formulas that plans show give the number of parameters that injection adds, for blocks and options too."""
    choices: list[tuple[Any, ...]] = [
        (Lora(targets=("k", "o", "mlp1"), rank=3, blocks=(1, -2)), Bottleneck(ratio=0.1, blocks=(-1,))),
        (Fact(rank=5, blocks=(0, 1, -1)), HighFrequency(reduction=16)),
    ]
    for adapters in choices:
        method = Method(encoder=EncoderMethod(train="adapters", adapters=adapters), depth=depth)
        expected = encoder_adapter_parameters(method, get_spec(backbone), slab_depth=7)
        assert _added(backbone, adapters, depth, slab_depth=7) == expected
