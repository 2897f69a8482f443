"""Choices of a method into modules inside an encoder.

Weights are loaded before: the keys of the base weights stay, except where the peft library wraps a layer.
"""

from __future__ import annotations

from collections.abc import Sequence

from samunet.artifacts.method import (
    Adapter,
    Bottleneck,
    Depth,
    DepthAttention,
    DepthConvolution,
    Fact,
    HighFrequency,
    Lora,
    NoDepth,
    PeftLibrary,
)
from samunet.models.peft.bottleneck import inject_bottleneck
from samunet.models.peft.fact import inject_fact
from samunet.models.peft.high_frequency import inject_high_frequency
from samunet.models.peft.library import inject_library
from samunet.models.peft.lora import inject_lora
from samunet.models.sam.encoder import SamEncoder
from samunet.models.volumetric.attention import inject_depth_attention
from samunet.models.volumetric.convolution import inject_depth_convolution


def inject_adapters(encoder: SamEncoder, adapters: Sequence[Adapter]) -> None:
    """Inject the adapters in order.

    Args:
        encoder: Changed in place; its output stays the same until the new parameters are trained.
        adapters: May be empty.

    Raises:
        ConfigError: If one does not fit the encoder, or what is already in it.
        UsageError: If one needs a library that is not installed.
    """
    for adapter in adapters:
        match adapter:
            case Lora():
                inject_lora(encoder, adapter)
            case Bottleneck():
                inject_bottleneck(encoder, adapter)
            case Fact():
                inject_fact(encoder, adapter)
            case HighFrequency():
                inject_high_frequency(encoder, adapter)
            case PeftLibrary():
                inject_library(encoder, adapter)


def inject_depth(encoder: SamEncoder, depth: Depth, *, max_depth: int) -> None:
    """Let the slices of a slab see each other; ``encoder.slab.depth`` is set before each forward.

    Args:
        encoder: Changed in place; its output stays the same until the new parameters are trained.
        depth: How, or not at all.
        max_depth: Most slices of a slab.

    Raises:
        ConfigError: If it does not fit the encoder, or what is already in it.
    """
    match depth:
        case NoDepth():
            return
        case DepthAttention():
            inject_depth_attention(encoder, depth, max_depth=max_depth)
        case DepthConvolution():
            inject_depth_convolution(encoder, depth)
