"""How long to train: steps from the dataset, minutes from the budget, and what a CPU can do in them."""

from __future__ import annotations

import math
from itertools import pairwise

from samunet.artifacts.method import DecoderMethod, Method
from samunet.artifacts.model_spec import (
    MOST_UNET_CHANNELS,
    PROMPT_DIM,
    TOKEN_SIZE,
    WINDOW_TOKENS,
    SamSpec,
    side_path_widths,
)

Decision = tuple[float, str]

DEFAULT_CPU_MINUTES = 60.0
LEAST_CPU_STEPS = 300
# Forward GFLOP whose slices are trained per second on two CPU threads: measured 18 to 20 slices/s for vit_t_xs, 5.4
# for vit_t and 18 for vit_xs at 224 px on two cores of a 2.4 GHz x86 server.
_CPU_GFLOPS = {"vit": 30.0, "tiny_vit": 15.0}
_CPU_CONVOLUTION_GFLOPS = 25.0
# What a step takes whatever its slices: starting the operations of all layers, there and back.
_STEP_SECONDS = 0.03
# Augmentation, resampling and loss of a voxel of the tile, and of each of its maps: `benchmarks.sizes`.
_VOXEL_SECONDS, _MAP_VOXEL_SECONDS = 0.25e-6, 0.02e-6
_DECODER_GFLOP = 0.19e9
_DECODER_GFLOP_PER_TOKEN = 0.007e9
_FRAMEWORK_SHARE = 0.85
_PASSES = 100
_FEWEST_STEPS, _MOST_STEPS = 3000, 40_000
_STEPS_PER_EPOCH = 250
_EPOCHS_ON_CPU = 40
_FEWEST_STEPS_PER_EPOCH = 10
_WARMUP_STEPS = 250
_WARMUP_SHARE = 0.1
_AVERAGED_SHARE = 0.03


def forward_gflop(spec: SamSpec, method: Method, input_size: int, num_tokens: int) -> tuple[float, float]:
    """Floating point operations of one forward pass of one slice, in 1e9: of SAM, and of convolutions beside it."""
    pixels = input_size**2
    tokens = pixels / TOKEN_SIZE**2
    neck = 2 * tokens * (spec.embed_dim * PROMPT_DIM + 9 * PROMPT_DIM**2)
    encoder = _vit_flop(spec, tokens) if spec.family == "vit" else _tiny_flop(spec, pixels)
    if method.fusion.kind == "unet":
        return (encoder + neck) / 1e9, unet_flop(method.fusion.width, input_size, num_tokens) / 1e9
    decoder = (_DECODER_GFLOP + _DECODER_GFLOP_PER_TOKEN * num_tokens) * pixels / 224**2
    path = 0.0
    if method.decoder.upsampler == "side_path":
        path = side_path_flop(method.decoder, input_size, num_tokens)
    return (encoder + neck + decoder) / 1e9, path / 1e9


def unet_flop(width: int, input_size: int, num_tokens: int) -> float:
    """Floating point operations of the U-Net of models.fusion, without norms."""
    widths = [min(MOST_UNET_CHANNELS, width << stage) for stage in range(5)]
    pixels = [(input_size / (1 << stage)) ** 2 for stage in range(5)]
    total = 2.0 * widths[0] * num_tokens * pixels[0]
    coarsest = PROMPT_DIM + widths[-1]
    for before, width_, size in zip([3, *widths], widths, pixels, strict=False):
        total += _stage_flop(before, width_, 2) * size
    for width_, below, size in zip(widths, [*widths[1:-1], coarsest], pixels, strict=False):
        total += (2 * below * width_ + _stage_flop(2 * width_, width_, 2)) * size
    return total


def side_path_flop(decoder: DecoderMethod, input_size: int, num_tokens: int) -> float:
    """Floating point operations of the side path and what joins it, beside those of SAM's own decoder."""
    stride, convolutions = decoder.path_stride, decoder.path_convolutions
    widths = side_path_widths(stride, decoder.path_width)
    pixels = [(input_size / (stride << stage)) ** 2 for stage in range(len(widths))]
    total = 2.0 * widths[0] * num_tokens * pixels[0]
    for before, width, size in zip([3 * stride**2, *widths], widths, pixels, strict=False):
        total += (_stage_flop(before, width, convolutions) + _stage_flop(2 * width, width, convolutions)) * size
    return total + sum(
        2 * after * before * size for (before, after), size in zip(pairwise(widths[:-1]), pixels, strict=False)
    )


def _stage_flop(before: int, after: int, number: int) -> float:
    """Per pixel, of 3x3 convolutions."""
    return 18.0 * (before * after + (number - 1) * after**2)


def _vit_flop(spec: SamSpec, tokens: float) -> float:
    """Of all blocks: projections, scores and perceptrons.

    Windows are padded before all but the last of these; a map that is smaller than one is not.
    """
    num_global = len(spec.global_blocks)
    num_windowed = spec.depth - num_global
    side = math.sqrt(tokens)
    padded = tokens if side < WINDOW_TOKENS else (math.ceil(side / WINDOW_TOKENS) * WINDOW_TOKENS) ** 2
    projections = 8 * spec.embed_dim**2 * (padded * num_windowed + tokens * num_global)
    scores = 4 * spec.embed_dim * (padded * min(tokens, WINDOW_TOKENS**2) * num_windowed + tokens**2 * num_global)
    return projections + scores + 16 * spec.embed_dim**2 * tokens * spec.depth


def _tiny_flop(spec: SamSpec, pixels: int) -> float:
    """Of the stem, the convolutions of the first stage and the blocks of the others, whose attention pads windows."""
    first = spec.stage_dims[0]
    stem = pixels * first * (27 / 4 + 9 * first / 16)
    convolutions = 16 * first**2 * pixels / 16 * spec.stage_depths[0]
    blocks = 0.0
    stages = zip(spec.stage_dims[1:], spec.stage_depths[1:], spec.stage_windows[1:], (8, 16, 16), strict=True)
    for dim, depth, window, stride in stages:
        side = math.sqrt(pixels) / stride
        padded = math.ceil(side / window) * window if side >= window else side
        blocks += (8 * padded**2 + 16 * side**2) * dim**2 * depth
    return stem + convolutions + blocks


def cpu_images_per_second(
    spec: SamSpec, method: Method, input_size: int, num_tokens: int, *, batch: int, tile_vox: int
) -> float:
    """Slices trained per second on two CPU threads, estimated from the operations and the tile's voxels."""
    sam, convolutions = forward_gflop(spec, method, input_size, num_tokens)
    seconds = sam / _CPU_GFLOPS[spec.family] + convolutions / _CPU_CONVOLUTION_GFLOPS
    seconds += tile_vox**2 * (_VOXEL_SECONDS + _MAP_VOXEL_SECONDS * num_tokens)
    return 1 / (seconds + _STEP_SECONDS / batch)


def cpu_steps(
    spec: SamSpec, method: Method, input_size: int, num_tokens: int, *, batch: int, tile_vox: int, minutes: float
) -> int:
    """Optimizer steps that fit the minutes, after the share that loading and validation take."""
    rate = cpu_images_per_second(spec, method, input_size, num_tokens, batch=batch, tile_vox=tile_vox)
    return int(minutes * 60 * _FRAMEWORK_SHARE * rate / batch)


def dataset_steps(num_slices: int, batch: int, *, tiles_per_slice: float = 1.0) -> tuple[int, str]:
    """Optimizer steps a dataset is worth: a hundred passes over its labelled slices, within limits.

    Args:
        num_slices: Slices that hold a structure.
        batch: Samples per step, of which each sees one tile.
        tiles_per_slice: Tiles that a slice takes, see :func:`samunet.planners.sizes.tiles_per_slice`.
    """
    wanted = math.ceil(_PASSES * num_slices * tiles_per_slice / batch)
    steps = min(max(wanted, _FEWEST_STEPS), _MOST_STEPS)
    limits = "" if steps == wanted else f", kept within {_FEWEST_STEPS} to {_MOST_STEPS}"
    tiles = "" if tiles_per_slice == 1 else f", of which each takes {tiles_per_slice:g} tiles,"
    return steps, f"{_PASSES} passes over {num_slices} labelled slices{tiles} in steps of {batch} are {wanted}{limits}"


def epochs(steps: int, *, on_cpu: bool) -> tuple[int, int]:
    """Split steps into (iterations per epoch, epochs)."""
    iterations = _STEPS_PER_EPOCH
    if on_cpu:
        iterations = min(_STEPS_PER_EPOCH, max(_FEWEST_STEPS_PER_EPOCH, steps // _EPOCHS_ON_CPU))
    return iterations, max(1, math.ceil(steps / iterations))


def warmup_steps(steps: int) -> tuple[int, str]:
    """Steps of rising learning rate: 250, at most a tenth of the training.

    Source: SAMed (Zhang and Liu 2023) warms up over 250 steps.
    """
    value = max(1, min(_WARMUP_STEPS, int(_WARMUP_SHARE * steps)))
    return value, f"{_WARMUP_STEPS} steps as SAMed, at most {_WARMUP_SHARE:.0%} of {steps}"


def ema_decay(steps: int) -> tuple[float, str]:
    """Decay of the averaged weights: the average spans about three percent of the training."""
    span = max(2.0, _AVERAGED_SHARE * steps)
    value = round(min(0.999, max(0.9, 1 - 1 / span)), 4)
    return value, f"the average spans about {1 / (1 - value):.0f} of {steps} steps"
