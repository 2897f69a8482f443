"""How many parameters a method trains, by formula.

Legend: D token width, r rank, h bottleneck width, L blocks, T mask tokens.
"""

from __future__ import annotations

from itertools import pairwise

from samunet.artifacts.method import Bottleneck, DecoderMethod, Fact, HighFrequency, Lora, Method, PeftLibrary
from samunet.artifacts.model_spec import (
    DECODER_STRIDE,
    PROMPT_DIM,
    SAM_UPSAMPLED,
    TOKEN_SIZE,
    SamSpec,
    side_path_widths,
)

_TRANSFORMER = 3_291_264
_UPSCALER = 73_952
_PROGRESSIVE_UPSCALER = 76_632
PROGRESSIVE_CHANNELS = 8
_TOKEN = 256
_HYPERNETWORK = 131_584
_HYPERNETWORK_PER_CHANNEL = 257
_QUALITY_HEAD = 131_584
_QUALITY_HEAD_PER_TOKEN = 257
_NO_MASK = 256
_DECODER_LORA_PER_RANK = 5_888
_DECODER_ADAPTERS = 6


def block_dims(spec: SamSpec) -> list[int]:
    """Token width of every attention block."""
    if spec.family == "vit":
        return [spec.embed_dim] * spec.depth
    return [dim for dim, depth in zip(spec.stage_dims[1:], spec.stage_depths[1:], strict=True) for _ in range(depth)]


def block_heads(spec: SamSpec) -> list[int]:
    """Attention heads of every attention block."""
    if spec.family == "vit":
        return [spec.num_heads] * spec.depth
    return [n for n, depth in zip(spec.stage_heads[1:], spec.stage_depths[1:], strict=True) for _ in range(depth)]


def chosen_blocks(blocks: tuple[int, ...] | None, number: int) -> list[int]:
    """Indices of the chosen blocks, negative ones counted from the end."""
    return list(range(number)) if blocks is None else sorted({index % number for index in blocks})


def encoder_adapter_parameters(method: Method, spec: SamSpec, *, slab_depth: int = 1) -> int:
    """Parameters that a method adds to the encoder, those of its depth mechanism included."""
    total = sum(_adapter(adapter, spec) for adapter in method.encoder.adapters)
    depth = method.depth
    if depth.kind == "none":
        return total
    dims, heads = block_dims(spec), block_heads(spec)
    for index in chosen_blocks(depth.blocks, len(dims)):
        if depth.kind == "attention":
            total += bottleneck_parameters(dims[index], depth.ratio) + (2 * slab_depth - 1) * heads[index]
        else:
            dim, width = dims[index], depth.width
            total += len(depth.sites) * (2 * dim * width + 3 * width**2 + width + 2 * dim)
    return total


def bottleneck_parameters(dim: int, ratio: float) -> int:
    """Two linear layers with biases: 2 D h + h + D."""
    hidden = max(1, round(dim * ratio))
    return 2 * dim * hidden + hidden + dim


def mask_stride(method: Method) -> int:
    """Encoder pixels per cell of the masks."""
    if method.fusion.kind == "unet" or method.decoder.upsampler == "progressive":
        return 1
    return method.decoder.path_stride if method.decoder.upsampler == "side_path" else DECODER_STRIDE


def decoder_parameters(method: Method, num_tokens: int) -> int:
    """Parameters of the decoder that train, as this project counts: those that some output depends on."""
    decoder = method.decoder
    channels = {"sam": SAM_UPSAMPLED[0], "progressive": PROGRESSIVE_CHANNELS, "side_path": decoder.path_width}
    upsampler = {
        "sam": _UPSCALER,
        "progressive": _PROGRESSIVE_UPSCALER,
        "side_path": _UPSCALER + _side_path(decoder, num_tokens),
    }[decoder.upsampler]
    hypernetwork = _HYPERNETWORK + _HYPERNETWORK_PER_CHANNEL * channels[decoder.upsampler]
    heads = num_tokens * (hypernetwork + _TOKEN) + _TOKEN + upsampler
    if method.promptable:
        heads += _QUALITY_HEAD + _QUALITY_HEAD_PER_TOKEN * num_tokens
    else:
        heads += _NO_MASK
    return {
        "full": heads + _TRANSFORMER,
        "heads": heads,
        "lora": heads + _DECODER_LORA_PER_RANK * decoder.rank,
        "adapters": heads + _decoder_adapters(method),
        "none": 0,
    }[decoder.train]


def _side_path(decoder: DecoderMethod, num_tokens: int) -> int:
    """The path of the image, what joins it, the doublings that SAM does not have, and what makes coarse maps."""
    convolutions = decoder.path_convolutions
    widths = side_path_widths(decoder.path_stride, decoder.path_width)

    def stage(before: int, after: int) -> int:
        return 9 * after * (before + (convolutions - 1) * after) + 3 * after * convolutions

    path = sum(
        stage(before, after) for before, after in zip([3 * decoder.path_stride**2, *widths], widths, strict=False)
    )
    joins = sum(stage(2 * channels, channels) for channels in widths)
    coarse = num_tokens * sum(widths[i] + 1 for i in (1, 2)) if decoder.deep_supervision else 0
    return path + joins + coarse + sum(4 * after * before + before for before, after in pairwise(widths[:-1]))


def _decoder_adapters(method: Method) -> int:
    hidden = max(1, round(PROMPT_DIM * method.decoder.ratio))
    conditioned = {
        "none": 0,
        "add": PROMPT_DIM * hidden + hidden,
        "concat": PROMPT_DIM * hidden + hidden + 2 * hidden**2 + hidden,
        "hyper": (PROMPT_DIM + 1) * hidden**2 + 2 * hidden,
    }[method.decoder.conditioning]
    return _DECODER_ADAPTERS * bottleneck_parameters(PROMPT_DIM, method.decoder.ratio) + 2 * conditioned


def _adapter(adapter: object, spec: SamSpec) -> int:
    dims = block_dims(spec)
    match adapter:
        case Lora() | PeftLibrary():
            indices = chosen_blocks(adapter.blocks, len(dims))
            ranks = adapter.ranks_of(len(indices)) if isinstance(adapter, Lora) else (adapter.rank,) * len(indices)
            return sum(_lora(adapter, dims[i], rank) for i, rank in zip(indices, ranks, strict=True))
        case Bottleneck():
            per_site = [bottleneck_parameters(dims[i], adapter.ratio) for i in chosen_blocks(adapter.blocks, len(dims))]
            return len(adapter.sites) * sum(per_site)
        case Fact():
            chosen = [dims[i] for i in chosen_blocks(adapter.blocks, len(dims))]
            return sum(2 * dim * adapter.rank for dim in set(chosen)) + 2 * len(chosen) * adapter.rank**2
        case HighFrequency():
            return _high_frequency(adapter, spec)
    raise TypeError(f"no count for {type(adapter).__name__}")


def _lora(adapter: Lora | PeftLibrary, dim: int, rank: int) -> int:
    widths = {"q": 2, "k": 2, "v": 2, "o": 2, "qkv": 4, "mlp1": 5, "mlp2": 5}
    factors = sum(widths[target] for target in adapter.targets) * dim * rank
    if isinstance(adapter, PeftLibrary) and adapter.variant == "dora":
        factors += sum({"qkv": 3, "o": 1, "mlp1": 4, "mlp2": 1}[target] for target in adapter.targets) * dim
    return factors


def _high_frequency(adapter: HighFrequency, spec: SamSpec) -> int:
    strides = (TOKEN_SIZE,) if spec.family == "vit" else (8, 16, 16)
    stages = (
        [(spec.embed_dim, spec.depth)]
        if spec.family == "vit"
        else list(zip(spec.stage_dims[1:], spec.stage_depths[1:], strict=True))
    )
    total = 0
    for (dim, depth), stride in zip(stages, strides, strict=True):
        r = max(1, dim // adapter.reduction)
        total += (3 * stride**2 + 1) * r + (dim + 1) * r + depth * (r + 1) * r + (r + 1) * dim
    return total
