"""A first model of training memory: parameters, gradients, optimizer state, saved activations, temporaries.

Counts follow the modules of segment-anything and TinyViT: what autograd keeps of one block was counted once with
saved-tensor hooks and is written here as a formula of tokens and widths. Legend: S input side, N tokens, D width,
T mask tokens, V tile side in voxels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

from samunet.artifacts.method import Method
from samunet.artifacts.model_spec import PROMPT_DIM, TOKEN_SIZE, WINDOW_TOKENS, SamSpec
from samunet.planners.counts import (
    block_dims,
    chosen_blocks,
    decoder_parameters,
    encoder_adapter_parameters,
)

GIB = 1 << 30
_SAVED_PER_BLOCK = 17
_SAVED_PER_TINY_BLOCK = 20
_SAVED_CONV_STEM = 2.0
_SAVED_CONV_BLOCK = 1.62
_DECODER_PARAMETERS = 3_500_000
_DECODER_PARAMETERS_PER_TOKEN = 140_000
_DECODER_SAVED_PER_PIXEL = 26.0
_DECODER_SAVED_PER_PIXEL_TOKEN = 0.43
_LOSS_COPIES = 6
_UNET_STAGES = 5
_UNET_SAVED_PER_PIXEL = 16.0
_SCORE_TEMPORARIES = 2
_FIXED_BYTES = GIB
_TRAINED_BYTES_PER_PARAMETER = 16
_HELD_BYTES_PER_PARAMETER = 4
_COPY_BYTES_PER_PARAMETER = 2


@dataclass(frozen=True)
class Load:
    """What is trained at once, as far as memory is concerned.

    Args:
        spec: The backbone.
        input_size: Encoder side S in pixels.
        tile_vox: Side V of the loss's grid in voxels.
        num_tokens: Mask tokens T.
        slices: Slices per forward.
        method: What trains.
        slab_depth: Slices per slab.
        checkpointing: Whether blocks keep only their input.
        precision: "fp32", "bf16" or "fp16" (autocast: weights stay float32).
        attention: "upstream" keeps score matrices, "folded" none, "folded_global" those of windows.
    """

    spec: SamSpec
    input_size: int
    tile_vox: int
    num_tokens: int
    slices: int
    method: Method
    slab_depth: int = 1
    checkpointing: bool = False
    precision: str = "fp32"
    attention: str = "upstream"


def training_bytes(load: Load) -> int:
    """Peak bytes of one training step."""
    encoder = encoder_parameters(load.spec, load.input_size)
    stock = _DECODER_PARAMETERS + _DECODER_PARAMETERS_PER_TOKEN * load.num_tokens
    trained = decoder_parameters(load.method, load.num_tokens) + unet_parameters(load.method)
    trained += encoder_adapter_parameters(load.method, load.spec, slab_depth=load.slab_depth)
    held = stock
    if load.method.encoder.train == "full":
        trained += encoder
    else:
        held += encoder
    weights = _TRAINED_BYTES_PER_PARAMETER * trained + _HELD_BYTES_PER_PARAMETER * max(0, held - trained)
    if load.precision != "fp32":
        weights += _COPY_BYTES_PER_PARAMETER * (encoder + trained)
    return int(_FIXED_BYTES + weights + load.slices * _bytes_per_slice(load))


def memory_gib(load: Load) -> float:
    """Peak of one training step in GiB, to two decimals."""
    return round(training_bytes(load) / GIB, 2)


def largest_batch(load: Load, *, budget_gib: float, cap: int) -> int:
    """Most slices per forward that fit the budget, at most ``cap``; 0 if not even one fits."""
    free = budget_gib * GIB - training_bytes(replace(load, slices=0))
    return max(0, min(cap, int(free // _bytes_per_slice(load))))


def encoder_parameters(spec: SamSpec, input_size: int) -> int:
    """Number of encoder parameters, up to a few percent."""
    neck = spec.embed_dim * PROMPT_DIM + 9 * PROMPT_DIM**2
    if spec.family == "vit":
        tokens = (input_size // TOKEN_SIZE) ** 2
        return 12 * spec.embed_dim**2 * spec.depth + spec.embed_dim * (3 * TOKEN_SIZE**2 + tokens) + neck
    stages = zip(spec.stage_dims[1:], spec.stage_depths[1:], strict=True)
    attention = sum(12 * dim**2 * depth for dim, depth in stages)
    merging = sum(b * (a + b) for a, b in zip(spec.stage_dims, spec.stage_dims[1:], strict=False))
    return attention + merging + 8 * spec.stage_dims[0] ** 2 * spec.stage_depths[0] + neck


def unet_parameters(method: Method) -> int:
    """Number of parameters of the U-Net that makes the masks, if there is one, up to a few percent."""
    if method.fusion.kind != "unet":
        return 0
    widths = [min(512, method.fusion.width * 2**i) for i in range(_UNET_STAGES)]
    total = 18 * widths[0] ** 2 + 9 * PROMPT_DIM * widths[-1]
    for fine, coarse in pairwise(widths):
        total += 9 * (fine * coarse + coarse**2) + 4 * fine * coarse + 27 * fine**2
    return int(total)


def _bytes_per_slice(load: Load) -> float:
    activation, score = (4, 4) if load.precision == "fp32" else (3, 6)
    pixels, tokens = load.input_size**2, load.num_tokens
    decoder = activation * pixels * (_DECODER_SAVED_PER_PIXEL + _DECODER_SAVED_PER_PIXEL_TOKEN * tokens)
    if load.method.fusion.kind == "unet":
        decoder = activation * pixels * _UNET_SAVED_PER_PIXEL * load.method.fusion.width
    rounds = 1 + load.method.prompts.corrections * load.method.promptable
    loss = 4 * _LOSS_COPIES * tokens * load.tile_vox**2
    blocks = _block_elements(load)
    stem = activation * (_SAVED_CONV_STEM * load.spec.stage_dims[0] * pixels if load.spec.stage_dims else 0)
    largest = max(activation * plain + (1 + _SCORE_TEMPORARIES) * score * scores for plain, scores, _ in blocks)
    if load.method.encoder.train == "frozen":
        return float(rounds * (decoder + loss) + max(largest, stem) / 2)
    first = first_trained_block(load.method, load.spec)
    stem = stem if first == 0 else 0
    trained = blocks[first:]
    if load.checkpointing:
        return float(rounds * (decoder + loss) + stem + 4 * sum(entry for _, _, entry in trained) + largest)
    kept = sum(activation * plain + score * scores for plain, scores, _ in trained)
    temporaries = _SCORE_TEMPORARIES * score * max(scores for _, scores, _ in trained)
    return float(rounds * (decoder + loss) + stem + kept + temporaries)


def first_trained_block(method: Method, spec: SamSpec) -> int:
    """The first block that gradients reach, counted over the blocks whose activations are kept."""
    if method.encoder.train == "full" or method.adapter("high_frequency") is not None:
        return 0
    number = len(block_dims(spec))
    chosen = [chosen_blocks(a.blocks, number) for a in method.encoder.adapters if a.kind != "high_frequency"]
    if method.depth.kind != "none":
        chosen.append(chosen_blocks(method.depth.blocks, number))
    first = min(min(blocks) for blocks in chosen)
    convolutional = spec.stage_depths[0] if spec.family == "tiny_vit" else 0
    return first + convolutional if first or convolutional else 0


def _block_elements(load: Load) -> list[tuple[float, float, float]]:
    """Per block: saved elements beside the attention scores, scores, and the elements of its input."""
    spec = load.spec
    if spec.family == "tiny_vit":
        return _tiny_elements(spec, load.input_size)
    side = load.input_size // TOKEN_SIZE
    tokens = side**2
    windows = (-(-side // WINDOW_TOKENS)) ** 2
    windowed = spec.num_heads * windows * WINDOW_TOKENS**4
    plain = _SAVED_PER_BLOCK * tokens * spec.embed_dim
    whole = 0 if load.attention != "upstream" else spec.num_heads * tokens**2
    windowed = 0 if load.attention == "folded" else windowed
    return [
        (plain, whole if block in spec.global_blocks else windowed, tokens * spec.embed_dim)
        for block in range(spec.depth)
    ]


def _tiny_elements(spec: SamSpec, input_size: int) -> list[tuple[float, float, float]]:
    strides = (4, 8, 16, 16)
    pixels = input_size**2
    first = spec.stage_dims[0] * pixels
    blocks: list[tuple[float, float, float]] = [(_SAVED_CONV_BLOCK * first, 0.0, first / strides[0] ** 2)]
    blocks *= spec.stage_depths[0]
    for stage in range(1, len(spec.stage_dims)):
        entry = spec.stage_dims[stage] * pixels / strides[stage] ** 2
        blocks += [(_SAVED_PER_TINY_BLOCK * entry, 0.0, entry)] * spec.stage_depths[stage]
    return blocks
