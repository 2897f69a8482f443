"""Peak memory of a training step: weights and what belongs to them, saved activations, temporaries; of a prediction.

The peak is the largest of four moments: the end of the forward pass with the loss, the backward pass at the encoder's
end with all of it still there, the worst of its blocks from there on, and the optimizer's update. What each part keeps
follows from its operations, see :mod:`samunet.planners.activations`; ``python -m benchmarks.memory`` compares the sum
with counted steps.

Legend: S input side, T mask tokens, V tile side in voxels.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import replace
from functools import lru_cache
from itertools import pairwise

from samunet.artifacts.method import DecoderMethod, Method
from samunet.artifacts.model_spec import (
    MOST_UNET_CHANNELS,
    PROMPT_DIM,
    SAM_UPSAMPLED,
    TOKEN_SIZE,
    SamSpec,
    side_path_widths,
)
from samunet.planners.activations import embedding_bytes, encoder_parts, outside_bytes
from samunet.planners.counts import (
    PROGRESSIVE_CHANNELS,
    block_dims,
    chosen_blocks,
    decoder_parameters,
    encoder_adapter_parameters,
    mask_stride,
)
from samunet.planners.load import Load as Load

GIB = 1 << 30
# What is no tensor of the step: a GPU's context and libraries, the allocator's rounding and holes.
_FIXED_BYTES = GIB
# Of a decoder without prompts: what estimates the masks' IoU trains, though no mask depends on it.
_ESTIMATOR_PARAMETERS = 132_000
# Float32 copies of what trains: two moments and the moving average, and in the update the gradient.
_HELD_COPIES, _UPDATE_COPIES = 3, 1
_WIDE, _NARROW, _INDEX = 4, 2, 8
# Mask decoder, bytes per pixel of S x S in float32 and under autocast. Heads alone: the upsampler with its channel
# norm, keys, values and residuals of two layers, together 13 maps of 256 channels at stride 16, a number per pixel.
# What trains in the transformer keeps its inputs beside: all layers 8 more, q and v 4, bottlenecks 2.5.
_HEADS = (53.0, 32.0)
_TRANSFORMER = {"full": (32.0, 18.0), "lora": (17.0, 10.5), "adapters": (10.5, 6.0)}
# Two more steps of upsampling with a norm between: 16 channels at half, 8 at the full resolution.
_PROGRESSIVE = (170.0, 121.0)
_PER_TOKEN = (0.61, 0.93)
_FINE_PER_TOKEN = (4.9, 3.1)
# While the masks are made, beside what is kept: of the upsampler, and per token. Gone before the loss.
_DECODER_PASSING, _PASSING_PER_TOKEN = (21.2, 25.2), (0.25, 0.14)
# Two moments of the loss. Logits, their logarithm, the reference, softmax and its products with reference and validity;
# and, with four of these, whole numbers as wide as two for the classes, the choice and their histogram.
_LOSS_COPIES, _COPIES_BESIDE_INDICES, _LOSS_INDICES = 6, 4, 13
_SUPERVISED_SCALES = 3
_BATCH_VOXEL_BYTES = 18
_IMAGE_BYTES = 12
_UNET_STAGES = 5
# Per convolution its result and the norm's; on the way up also what was joined.
_UNET_FINE_UNITS, _UNET_COARSE_UNITS, _UNET_PASSING_UNITS = 10, 5, 4
# Where nothing is recorded. Mask decoder: bytes per pixel of keys, their projections and the maps of the upsampler.
_DECODER_ALONE, _PROGRESSIVE_ALONE = 30.0, (76.0, 68.0)
_PER_TOKEN_ALONE = 0.25
# Maps in the finest stage of a U-Net or, by its stride, of a side path: features, skip, both joined, convolution, norm,
# and the coarser skips; numbers per pixel of the mask decoder beside a path and beside masks.
_FINEST_STAGE_UNITS, _BESIDE_MASKS = 6.5, 4.0
_PATH_ALONE = {1: (6.5, 13.0), 2: (6.0, 9.0)}
# Of a predicted slice beside its tiles: a store slice and its mean, two resampled, what is between, probabilities.
_PREDICTED_PLANES = 6
_PREDICTED_VOXEL_BYTES = 16
_VOTE_BYTES = 2


@lru_cache(maxsize=1 << 14)  # what would change a plan is found by planning hundreds of times, mostly the same loads
def training_bytes(load: Load) -> int:
    """Bytes that one training step needs: its tensors, and a fixed share for what is none."""
    return _FIXED_BYTES + tensor_bytes(load)


def tensor_bytes(load: Load) -> int:
    """Peak bytes of all tensors alive in one training step."""
    held, trained = _parameters(load)
    weights = _WIDE * (held + _HELD_COPIES * trained) + _bias_bytes(load.spec)
    images = load.slices * (_IMAGE_BYTES * load.input_size**2 + _BATCH_VOXEL_BYTES * load.tile_vox**2)
    gradients = _WIDE * trained if load.accumulates else 0
    moments = (*_encoder_and_decoder(load), _WIDE * _UPDATE_COPIES * trained - gradients)
    return int(weights + images + gradients + max(moments))


def memory_gib(load: Load) -> float:
    """What one training step needs in GiB, to two decimals."""
    return round(training_bytes(load) / GIB, 2)


def largest_batch(load: Load, *, budget_gib: float, cap: int) -> int:
    """Most slices per forward that fit the budget, at most ``cap``; 0 if not even one fits.

    Fewer than ``cap`` are a part of a step, whose gradients wait for those of the others.
    """
    if training_bytes(replace(load, slices=cap, accumulates=False)) <= budget_gib * GIB:
        return cap
    part = replace(load, accumulates=True)
    return bisect_right(
        range(1, cap), budget_gib * GIB, key=lambda slices: training_bytes(replace(part, slices=slices))
    )


def prediction_bytes(load: Load, *, models: int = 1, views: int = 1, plane_vox: int = 0, held_vox: int = 0) -> int:
    """Peak bytes of the tensors that predicting a volume needs beside the weights.

    Args:
        load: ``slices`` go through a forward together; nothing is recorded of them.
        models: Whose maps are averaged.
        views: Mirrored views of a slice.
        plane_vox: Voxels of a whole slice, maps of which stand beside those of the forward's tiles.
        held_vox: Voxels of a volume whose maps stand beside all that; 0 where they pass slice by slice.
    """
    pixels, grid = load.input_size**2, load.num_tokens * load.tile_vox**2
    # Of those before: every model's votes, and the sum.
    held = _IMAGE_BYTES * pixels + _PREDICTED_VOXEL_BYTES * load.tile_vox**2
    held += _VOTE_BYTES * grid * (models if views > 1 else models - 1) + _WIDE * grid * (models * views > 1)
    # The first block's input stays until the last one is done.
    first = _WIDE * load.spec.embed_dim * pixels / TOKEN_SIZE**2 if load.spec.family == "vit" else 0.0
    encoding = first + max(part.alone for part in encoder_parts(load))
    decoding = embedding_bytes(load) + _decoder_alone(load)
    logits = load.num_tokens * pixels / mask_stride(load.method) ** 2
    # On the store's grid: widened where they are narrow and resampled, then mirrored back.
    mapping = load.width * logits + _WIDE * grid + _WIDE * max(logits * load.is_half, grid)
    copies = _NARROW * _parameters(load)[1] if load.is_half else 0
    network = load.slices * max(encoding, decoding) + copies
    planes = _WIDE * load.num_tokens * plane_vox * (load.slab_depth + _PREDICTED_PLANES)
    volume = _WIDE * load.num_tokens * held_vox
    return int(load.slices * held + max(network, load.slices * mapping) + planes + volume)


def largest_prediction(load: Load, *, budget_gib: float, cap: int, **seen: int) -> int:
    """Most slices per forward of a prediction, in whole slabs, that fit the budget; at least one slab.

    Args:
        load: As for :func:`prediction_bytes`, whatever its slices.
        budget_gib: Memory that tensors beside the weights may take.
        cap: Most slices.
        seen: Further arguments of :func:`prediction_bytes`.
    """
    slabs = range(1, cap // load.slab_depth + 1)

    def needed(number: int) -> int:
        return prediction_bytes(replace(load, slices=number * load.slab_depth), **seen)

    return max(1, bisect_right(slabs, budget_gib * GIB, key=needed)) * load.slab_depth


def encoder_parameters(spec: SamSpec, input_size: int) -> int:
    """Number of encoder parameters, up to a few percent."""
    neck = spec.embed_dim * PROMPT_DIM + 9 * PROMPT_DIM**2
    whole = neck + sum(_block_parameters(spec))
    if spec.family == "vit":
        tokens = (input_size // TOKEN_SIZE) ** 2
        whole += spec.embed_dim * (3 * TOKEN_SIZE**2 + tokens)
    return whole


def _block_parameters(spec: SamSpec) -> list[int]:
    """Parameters of every block, in the order of their activations; TinyViT's with the merging ahead of them."""
    if spec.family == "vit":
        return [12 * spec.embed_dim**2] * spec.depth
    numbers = [8 * spec.stage_dims[0] ** 2] * spec.stage_depths[0]
    for (fine, dim), depth in zip(pairwise(spec.stage_dims), spec.stage_depths[1:], strict=True):
        numbers += [12 * dim**2 + dim * (fine + dim) * (index == 0) for index in range(depth)]
    return numbers


def _bias_bytes(spec: SamSpec) -> int:
    """TinyViT's position biases of every pair of a window's tokens: where they are in the table, and each head's."""
    stages = zip(spec.stage_depths[1:], spec.stage_windows[1:], spec.stage_heads[1:], strict=True)
    return sum(depth * window**4 * (_INDEX + _WIDE * heads) for depth, window, heads in stages)


def unet_parameters(method: Method) -> int:
    """Number of parameters of the U-Net that makes the masks, if there is one, up to a few percent."""
    if method.fusion.kind != "unet":
        return 0
    widths = _unet_widths(method)
    total = 18 * widths[0] ** 2 + 9 * PROMPT_DIM * widths[-1]
    for fine, coarse in pairwise(widths):
        total += 9 * (fine * coarse + coarse**2) + 4 * fine * coarse + 27 * fine**2
    return int(total)


def first_trained_block(method: Method, spec: SamSpec) -> int:
    """The first block that gradients reach, counted over the blocks whose activations are kept."""
    if method.encoder.train == "full":
        return 0
    number = len(block_dims(spec))
    chosen = [chosen_blocks(getattr(a, "blocks", None), number) for a in method.encoder.adapters]
    if method.depth.kind != "none":
        chosen.append(chosen_blocks(method.depth.blocks, number))
    first = min(min(blocks) for blocks in chosen)
    convolutional = spec.stage_depths[0] if spec.family == "tiny_vit" else 0
    return first + convolutional


def _parameters(load: Load) -> tuple[int, int]:
    """How many are held, and how many of them train."""
    method, encoder = load.method, encoder_parameters(load.spec, load.input_size)
    adapters = encoder_adapter_parameters(method, load.spec, slab_depth=load.slab_depth)
    unet = unet_parameters(method)
    trained = adapters + unet + decoder_parameters(method, load.num_tokens)
    if method.decoder.train != "none" and not method.promptable:
        trained += _ESTIMATOR_PARAMETERS
    held = encoder + adapters + unet + _mask_decoder_parameters(load)
    return held, trained + (encoder if method.encoder.train == "full" else 0)


def _mask_decoder_parameters(load: Load) -> int:
    """All of the mask decoder with its adapters, whether used or not."""

    def count(train: str) -> int:
        plain = load.method.decoder.model_copy(update={"train": train, "conditioning": "none"})
        return decoder_parameters(load.method.model_copy(update={"decoder": plain}), load.num_tokens)

    injected = load.method.decoder.train in ("lora", "adapters")
    added = decoder_parameters(load.method, load.num_tokens) - count("heads") if injected else 0
    return count("full") + added + (0 if load.method.promptable else _ESTIMATOR_PARAMETERS)


def _encoder_and_decoder(load: Load) -> tuple[float, float]:
    """Bytes of activations at the loss, and where the backward pass enters the encoder (frozen: before the decoder)."""
    decoder, passing = _decoder_bytes(load)
    rounds = 1 + load.method.prompts.corrections * load.method.promptable
    is_unet = load.method.fusion.kind == "unet"
    weights = unet_parameters(load.method) if is_unet else _mask_decoder_parameters(load)
    copies = _NARROW * rounds * weights if load.is_half else 0
    scales = _SUPERVISED_SCALES if load.method.decoder.deep_supervision else 1
    classes = scales * load.num_tokens
    maps = max(_LOSS_COPIES * classes, _COPIES_BESIDE_INDICES * classes + _LOSS_INDICES)
    loss = _WIDE * maps * load.tile_vox**2
    decoding = load.slices * (rounds * decoder + max(loss, passing) + embedding_bytes(load)) + copies
    parts = encoder_parts(load)
    if load.method.encoder.train == "frozen":
        return decoding, load.slices * max(part.alone for part in parts)
    first = first_trained_block(load.method, load.spec)
    *ahead, neck = outside_bytes(load, first)
    kept = sum(ahead) + neck + sum(part.entry if load.checkpointing else part.kept for part in parts[first:])
    # Where gradients wait for other parts of a step, all of them are counted already.
    making = 0 if load.accumulates else _WIDE
    gradients = making * (decoder_parameters(load.method, load.num_tokens) + unet_parameters(load.method))
    # The rounds before the last still wait for their gradient when the decoder has one.
    entering = load.slices * (kept + (rounds - 1) * decoder) + _copied_at_the_loss(load, first)
    backward = gradients + max(entering, _passing_bytes(load, first))
    return load.slices * kept + _copied_at_the_loss(load, first) + decoding, backward


def _passing_bytes(load: Load, first: int) -> float:
    """The most while the backward pass walks through the encoder from its end.

    What a block has kept is gone when the block ahead of it has its turn; with checkpointing it is there only then. The
    narrow copies of its weights go with it, and their gradients stay.
    """
    *ahead, _ = outside_bytes(load, first)
    copies, gradients = _block_copies(load)[first:], _block_gradients(load)[first:]
    kept = most = copied = 0.0
    later = 0.0 if load.accumulates else sum(gradients)
    for outside, part, copy, gradient in zip(ahead, encoder_parts(load)[first:], copies, gradients, strict=True):
        kept += outside
        later = max(0.0, later - gradient)
        most = max(most, load.slices * (kept + part.kept + part.passing) + copied + copy + later)
        kept += part.entry if load.checkpointing else part.kept
        copied += 0 if load.checkpointing else copy
    return most


def _copied_at_the_loss(load: Load, first: int) -> float:
    """Bytes of the narrow copies of encoder weights that are there when the forward pass has ended."""
    copies = _block_copies(load)[first:]
    # Autocast keeps the copies of what trains until its end; a checkpointed block keeps no copy of what does not.
    is_kept = load.method.encoder.train == "full" or not load.checkpointing
    return sum(copies) if is_kept else max(copies)


def _block_copies(load: Load) -> list[float]:
    """Per block: bytes of the narrow copies of its weights."""
    numbers = _block_parameters(load.spec)
    if not load.is_half:
        return [0.0] * len(numbers)
    dims = block_dims(load.spec)
    adapters = encoder_adapter_parameters(load.method, load.spec, slab_depth=load.slab_depth) / len(numbers)
    twice = [0] * len(numbers)
    if load.method.depth.kind == "attention":
        # The block's own q, k, v and output layers are used twice.
        for index in chosen_blocks(load.method.depth.blocks, len(dims)):
            twice[index - len(dims)] = 4 * dims[index] ** 2
    return [_NARROW * (number + more + adapters) for number, more in zip(numbers, twice, strict=True)]


def _block_gradients(load: Load) -> list[float]:
    """Per block: bytes of the gradients of what trains in it."""
    numbers = _block_parameters(load.spec)
    adapters = encoder_adapter_parameters(load.method, load.spec, slab_depth=load.slab_depth) / len(numbers)
    return [_WIDE * (number * (load.method.encoder.train == "full") + adapters) for number in numbers]


def _decoder_bytes(load: Load) -> tuple[float, float]:
    """Per slice: what the decoder keeps, and what it holds beside that."""
    pixels, half = load.input_size**2, load.is_half
    if load.method.fusion.kind == "unet":
        fine = sum(width / 4**stage for stage, width in enumerate(_unet_widths(load.method)[:-1]))
        coarse = (_UNET_COARSE_UNITS * _unet_widths(load.method)[-1] + PROMPT_DIM) / TOKEN_SIZE**2
        kept = _UNET_FINE_UNITS * fine + coarse + load.num_tokens
        return load.width * pixels * kept, load.width * pixels * _UNET_PASSING_UNITS * load.method.fusion.width
    decoder, passing = load.method.decoder, _DECODER_PASSING[half] + _PASSING_PER_TOKEN[half] * load.num_tokens
    kept = _HEADS[half] + _TRANSFORMER.get(decoder.train, (0.0, 0.0))[half] + _PER_TOKEN[half] * load.num_tokens
    finest = mask_stride(load.method) ** 2
    if decoder.upsampler != "sam":
        kept += (_FINE_PER_TOKEN[half] - _PER_TOKEN[half]) * load.num_tokens / finest
    if decoder.upsampler == "progressive":
        kept += _PROGRESSIVE[half]
    if decoder.upsampler == "side_path":
        kept += load.width * _side_path_numbers(decoder)
        passing = max(passing, load.width * _UNET_PASSING_UNITS * decoder.path_width / finest)
    return pixels * kept, pixels * passing


def _decoder_alone(load: Load) -> float:
    """Per slice: what the decoder holds at most where nothing is recorded."""
    pixels, decoder = load.input_size**2, load.method.decoder
    finest = mask_stride(load.method) ** 2
    if load.method.fusion.kind == "sam" and decoder.upsampler == "sam":
        return pixels * (_DECODER_ALONE + _PER_TOKEN_ALONE * load.num_tokens)
    if load.method.fusion.kind == "unet":
        channels, alone = load.method.fusion.width, load.width * _FINEST_STAGE_UNITS * load.method.fusion.width
    elif decoder.upsampler == "side_path":
        channels = decoder.path_width
        units, beside = _PATH_ALONE[decoder.path_stride]
        alone = load.width * (units * channels / finest + beside)
    else:
        channels, alone = PROGRESSIVE_CHANNELS, _PROGRESSIVE_ALONE[load.is_half]
    return pixels * max(alone, load.width * (load.num_tokens + channels + _BESIDE_MASKS) / finest)


def _side_path_numbers(decoder: DecoderMethod) -> float:
    """Numbers per pixel of the image that the path and its joins keep.

    Each convolution its result and the norm's, on the way down and in the join; the join also what is joined. Stages
    finer than stride 4 also a doubling's result and the sum; at the others these are SAM's own.
    """
    channels = side_path_widths(decoder.path_stride, decoder.path_width)
    own = len(channels) - len(SAM_UPSAMPLED)
    numbers = [c * (4 * decoder.path_convolutions + (4 if i < own else 2)) / 4**i for i, c in enumerate(channels)]
    squares = 3.0 if decoder.path_stride == 2 else 0.0
    kept: float = sum(numbers) / decoder.path_stride**2
    return squares + kept


def _unet_widths(method: Method) -> list[int]:
    return [min(MOST_UNET_CHANNELS, method.fusion.width * 2**stage) for stage in range(_UNET_STAGES)]
