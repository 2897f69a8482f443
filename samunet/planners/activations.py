"""What autograd keeps of each part of the encoder for the backward pass, per slice, and what is held beside it.

Counted from what the operations save: a linear layer its input if its weight trains, a norm and an activation their
input, a product both factors, a convolution its input always. Under autocast on a GPU, products, linear layers and
convolutions work in two bytes; norms and softmax in four, so that what enters both is held twice. The residual stream
of a ViT stays in four.

Legend: S input side, N tokens, D token width, C head width, E folded head width, a bytes of a number under autocast.
A "unit" is N D numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from samunet.artifacts.method import Bottleneck, DepthAttention, DepthConvolution, Fact, HighFrequency, Lora, Method
from samunet.artifacts.model_spec import PROMPT_DIM, TOKEN_SIZE, WINDOW_TOKENS, SamSpec
from samunet.planners.counts import chosen_blocks
from samunet.planners.load import Load

_WIDE = 4
_LINEARS = {"q": "qkv", "k": "qkv", "v": "qkv", "o": "o", "mlp1": "mlp1", "mlp2": "mlp2"}
_EVERY_LINEAR = frozenset(_LINEARS.values())
_LINEAR_OUTPUTS = {"qkv": 3, "o": 1, "mlp1": 4, "mlp2": 1}
# Q, k and v rearranged by heads, and q scaled.
_UPSTREAM_UNITS = 4.0
# The position terms' products keep q by rows (upstream) or by rows and by columns (folded) where the tables train.
_TABLE_UNITS = {"upstream": 1.0, "folded": 2.0}
_HIDDEN_UNITS = 4.0
# A fused kernel wants whole vectors of eight numbers.
_FOLDED_STEP = 8
# Softmax keeps its result in four bytes; the product with v a copy in two.
_SCORE_BYTES = {False: 4, True: 6}
# In the backward pass of a score matrix: its gradient before and after softmax, in the precision of each.
_SCORE_GRADIENT_BYTES = {False: 8, True: 6}
# Where nothing is recorded: scores, their sum with the position terms and softmax, at once.
_SCORE_ALONE_BYTES = {False: 12, True: 10}
# The gradients on both sides of the MLP's activation; where the MLP trains, one takes the place of what was kept.
_MLP_GRADIENT_UNITS = {False: 8.0, True: 5.0}
_MLP_ALONE_UNITS = 10.0
# Normed tokens (wide before they are narrow), q, k and v, and upstream's rearrangement, or the folded form's scaled q
# and position terms.
_ATTENTION_ALONE_UNITS = 8.0
_FOLDED_ALONE_UNITS = {False: 6.0, True: 7.0}
# TinyViT's inverted bottleneck widens four times: of each wide convolution its result, the norm's and the activation's.
_CONV_BLOCK_UNITS = 27.0
_CONV_ALONE_UNITS = 13.0
# When its last convolution has its turn: the gradients of its wide input, its result and the shortcut, less what the
# norm and activation behind it kept.
_CONV_PASSING_UNITS = 3.0
_STEM_UNITS = 0.5
# A merging: three maps of its fine grid, then four of its coarse one.
_MERGE_FINE, _MERGE_COARSE = 3.0, 4.0
_TINY_STRIDES = (4, 8, 16, 16)
# The neck's two channel norms keep the deviations twice and, where they train, the normed map: bytes per pixel of the
# input, which are as many as numbers in a map of 256 channels at stride 16.
_NECK_BYTES = {(False, False): 24.0, (False, True): 32.0, (True, False): 19.0, (True, True): 27.0}


# The image's high frequencies in three channels, under autocast twice.
_DETAIL_BYTES = {False: 12.0, True: 18.0}


@dataclass(frozen=True)
class Part:
    """Bytes of one block per slice.

    Args:
        kept: Kept from forward to backward, its output included.
        entry: What checkpointing keeps of it.
        passing: Held beside what is kept while its gradient is computed.
        alone: Held while it is computed with nothing recorded.
    """

    kept: float
    entry: float
    passing: float
    alone: float


def encoder_parts(load: Load) -> list[Part]:
    """All blocks of the encoder, TinyViT's convolutional ones first."""
    if load.spec.family == "vit":
        return [_vit_block(load, index) for index in range(load.spec.depth)]
    stage_dims, depths = load.spec.stage_dims, load.spec.stage_depths
    unit = stage_dims[0] * (load.input_size / _TINY_STRIDES[0]) ** 2 * load.width
    convolutional = Part(_CONV_BLOCK_UNITS * unit, unit, _CONV_PASSING_UNITS * unit, _CONV_ALONE_UNITS * unit)
    stages = [stage for stage in range(1, len(depths)) for _ in range(depths[stage])]
    return [convolutional] * depths[0] + [_tiny_block(load, index, stage) for index, stage in enumerate(stages)]


def outside_bytes(load: Load, first: int) -> list[float]:
    """What is kept ahead of each block from one on, and last of the neck, per slice.

    Args:
        load: What is trained.
        first: The first block that gradients reach.
    """
    ahead = _ahead_of_vit(load) if load.spec.family == "vit" else _ahead_of_tiny(load)
    ahead = [0.0] * (first > 0) + ahead[first + (first > 0) :]
    if load.method.adapter("high_frequency") is not None:
        ahead[0] += _DETAIL_BYTES[load.is_half] * load.input_size**2
    return [*ahead, _neck(load)]


def _ahead_of_vit(load: Load) -> list[float]:
    tokens = (load.input_size / TOKEN_SIZE) ** 2
    return [_WIDE * tokens * load.spec.embed_dim] + [0.0] * (load.spec.depth - 1)


def _ahead_of_tiny(load: Load) -> list[float]:
    """The stem, and a merging ahead of the first block of every later stage."""
    spec, pixels = load.spec, load.input_size**2
    ahead: list[float] = []
    for stage, (dim, depth) in enumerate(zip(spec.stage_dims, spec.stage_depths, strict=True)):
        fine, coarse = (dim * pixels / _TINY_STRIDES[s] ** 2 for s in (max(0, stage - 1), stage))
        numbers = _MERGE_FINE * fine + _MERGE_COARSE * coarse if stage else _STEM_UNITS * dim * pixels
        ahead += [load.width * numbers] + [0.0] * (depth - 1)
    return ahead


def _neck(load: Load) -> float:
    pixels = load.input_size**2
    kept = _NECK_BYTES[load.is_half, load.method.encoder.train == "full"] * pixels
    if load.is_half and load.spec.family == "vit":
        kept += load.width * load.spec.embed_dim * pixels / TOKEN_SIZE**2
    return kept


def _vit_block(load: Load, index: int) -> Part:
    spec, half = load.spec, load.is_half
    side = load.input_size // TOKEN_SIZE
    is_global = index in spec.global_blocks
    unit = side**2 * spec.embed_dim
    # A map smaller than a window is not padded, and its few scores are kept in every form of attention.
    is_small = not is_global and side < WINDOW_TOKENS
    windowed = not is_global and not is_small
    padded = (math.ceil(side / WINDOW_TOKENS) * WINDOW_TOKENS / side) ** 2 if windowed else 1.0
    span = WINDOW_TOKENS if windowed else side
    folded = not is_small and (load.attention == "folded" or (is_global and load.attention == "folded_global"))
    scores = 0.0 if folded else spec.num_heads * padded * side**2 * span**2
    linears = trained_linears(load.method, spec, index)
    attention = _folded_units(spec, span) if folded else _UPSTREAM_UNITS
    held = attention + ("qkv" in linears) + ("o" in linears)
    if load.method.encoder.train == "full":
        held += _TABLE_UNITS["folded" if folded else "upstream"]
    mlp = _HIDDEN_UNITS + ("mlp1" in linears) + _HIDDEN_UNITS * ("mlp2" in linears)
    kept = load.width * unit * (padded * held + mlp) + 2 * _WIDE * unit + _SCORE_BYTES[half] * scores
    kept += _adapters(load, index, unit, spec.num_heads, linears)
    gradient = _SCORE_GRADIENT_BYTES[half] * scores - load.width * mlp * unit
    alone = (attention + _FOLDED_ALONE_UNITS[half] if folded else _ATTENTION_ALONE_UNITS) * padded * load.width * unit
    return Part(
        kept=kept,
        entry=_WIDE * unit,
        passing=max(load.width * _MLP_GRADIENT_UNITS["mlp2" in linears] * unit, gradient),
        # Beside its input, and the patches from which the first block's was made.
        alone=(_WIDE + load.width) * unit
        + max(load.width * _MLP_ALONE_UNITS * unit, alone + _SCORE_ALONE_BYTES[half] * scores),
    )


def _folded_units(spec: SamSpec, span: int) -> float:
    """Units of q, k, v and the result, each widened from C to E: C + 2 span, rounded up."""
    head = spec.embed_dim // spec.num_heads
    return 4 * math.ceil((head + 2 * span) / _FOLDED_STEP) * _FOLDED_STEP / head


def _tiny_block(load: Load, index: int, stage: int) -> Part:
    """Windows, local convolution with its batch norm, MLP; the fused attention of a GPU keeps no scores."""
    spec, half = load.spec, load.is_half
    dim, window = spec.stage_dims[stage], spec.stage_windows[stage]
    side = load.input_size / _TINY_STRIDES[stage]
    unit = side**2 * dim
    padded = (math.ceil(side / window) * window / side) ** 2 if side >= window else 1.0
    linears = trained_linears(load.method, spec, index)
    scores = 0.0 if half else spec.stage_heads[stage] * padded * side**2 * min(side, window) ** 2
    # Windows (for the norm) and q, k, v; where scores are not kept, the attention's result.
    windowed = _WIDE + load.width * (3 + half + ("qkv" in linears) + ("o" in linears))
    # The convolution's input and its norm's, the MLP norm's, and the hidden layer.
    rest = _WIDE + load.width * (2 + _HIDDEN_UNITS + ("mlp1" in linears) + _HIDDEN_UNITS * ("mlp2" in linears))
    kept = unit * (padded * windowed + rest) + _SCORE_BYTES[half] * scores
    # What stands beside attention or MLP normalises their input anew, and so keeps it: for the MLP a second wide copy.
    beside = (load.method.depth.kind == "attention") + (half and _has_parallel(load.method))
    kept += _WIDE * unit * beside
    return Part(
        kept=kept + _adapters(load, index, unit, spec.stage_heads[stage], linears),
        entry=load.width * unit,
        passing=load.width * _MLP_GRADIENT_UNITS["mlp2" in linears] * unit,
        alone=load.width * _MLP_ALONE_UNITS * unit + _SCORE_ALONE_BYTES[half] * scores,
    )


def _has_parallel(method: Method) -> bool:
    bottleneck = method.adapter("bottleneck")
    return bottleneck is not None and "mlp" in bottleneck.sites


def trained_linears(method: Method, spec: SamSpec, index: int) -> frozenset[str]:
    """Which linear layers of an attention block keep their input, because they or what adapts them train."""
    if method.encoder.train == "full":
        return _EVERY_LINEAR
    found: set[str] = set()
    for adapter in method.encoder.adapters:
        if index not in chosen_blocks(getattr(adapter, "blocks", None), spec.num_attention_blocks):
            continue
        targets = ("qkv",) if isinstance(adapter, Fact) else getattr(adapter, "targets", ())
        found |= {_LINEARS.get(target, target) for target in targets}
    return frozenset(found)


def _adapters(load: Load, index: int, unit: float, heads: int, linears: frozenset[str]) -> float:
    """Bytes that a block's adapters and depth mechanism keep."""
    method, number = load.method, load.spec.num_attention_blocks
    dim = _dim(load.spec, index)
    total = 0.0
    for adapter in method.encoder.adapters:
        if index in chosen_blocks(getattr(adapter, "blocks", None), number):
            total += _adapter(adapter, load, dim, linears)
    depth = method.depth
    if depth.kind != "none" and index in chosen_blocks(depth.blocks, number):
        total += _depth(depth, load, dim, heads)
    return total * unit


def _adapter(adapter: object, load: Load, dim: int, linears: frozenset[str]) -> float:
    """Bytes per number of a unit."""
    a = load.width
    match adapter:
        case Bottleneck():
            hidden = adapter.ratio * (2 if adapter.activation == "gelu" else 1)
            shared = "mlp" in adapter.sites and "mlp1" in linears and not load.is_half
            return a * (len(adapter.sites) * (1 + hidden) - shared)
        case Fact():
            # After U, after the cores and after dropout, with its mask, for q and v.
            return (5 * a + 2) * adapter.rank / dim
        case HighFrequency():
            return 2 * a / adapter.reduction
        case Lora():
            return a * len(adapter.targets) * adapter.rank / dim
    variant, targets = getattr(adapter, "variant", ""), getattr(adapter, "targets", ())
    inner = a * len(targets) * getattr(adapter, "rank", 0) / dim
    # DoRA's magnitudes multiply the layer's output and the update's.
    return inner + (a + _WIDE) * sum(_LINEAR_OUTPUTS[t] for t in targets) * (variant == "dora")


def _depth(depth: DepthAttention | DepthConvolution, load: Load, dim: int, heads: int) -> float:
    """Bytes per number of a unit."""
    a = load.width
    if isinstance(depth, DepthConvolution):
        # Per site the normed tokens, three maps of the bottleneck's width, and a new residual stream.
        return len(depth.sites) * (a * (1 + 3 * depth.width / dim) + _WIDE)
    hidden = depth.ratio * (2 if depth.activation == "gelu" else 1)
    # Q, k and v, the bottleneck's input and hidden layer, and d scores per head and position.
    return a * (4 + hidden) + _SCORE_BYTES[load.is_half] * heads * load.slab_depth / dim


def _dim(spec: SamSpec, index: int) -> int:
    if spec.family == "vit":
        return spec.embed_dim
    stages = zip(spec.stage_dims[1:], spec.stage_depths[1:], strict=True)
    return [dim for dim, depth in stages for _ in range(depth)][index]


def embedding_bytes(load: Load) -> float:
    """The embedding that the decoder reads."""
    return load.width * PROMPT_DIM * (load.input_size / TOKEN_SIZE) ** 2
