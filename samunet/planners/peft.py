"""What is trained, on which backbone and how fast, per kind of weights."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any, Literal

from samunet.artifacts.method import (
    SIDE_PATH_FIELDS,
    DecoderMethod,
    Depth,
    DepthAttention,
    EncoderMethod,
    Lora,
    Method,
    NoDepth,
)
from samunet.artifacts.plan import DeviceClass, WeightsKind
from samunet.artifacts.probe import Probe
from samunet.planners.ranks import choose_ranks

BACKBONES: dict[WeightsKind, str] = {
    "sam": "vit_b",
    "medsam": "vit_b",
    "mobile_sam": "vit_t",
    "ssl": "vit_b",
    "none": "vit_t",
}
SCRATCH_BACKBONE_CPU = "vit_t_xs"
LORA_TARGETS: tuple[Literal["q"], Literal["v"]] = ("q", "v")
LEAST_RANK, MOST_RANK = 4, 8
FROM_SCRATCH_RATE = 2e-3
# Rate at the least rank and the reference batch, and its limits: beside a whole decoder, and beside parts of one.
_LORA_RATES = {True: (2e-3, (5e-4, 2e-3)), False: (5e-3, (1e-3, 5e-3))}
_CAREFUL_RATE, _ADAPTER_RATE = 1e-4, 1e-3
_REFERENCE_BATCH = 24
_SLICES_FOR_LEAST_RANK, _CLASSES_FOR_LEAST_RANK = 2000, 8

# No rule picks a larger one from memory, time or the data: decision record 0026 says what is missing.
_FIXED = "fixed per kind of weights, whatever the memory (--backbone changes it)"
_BACKBONE_REASONS: dict[WeightsKind, str] = {
    "sam": f"the smallest official SAM, {_FIXED}; ViT-H gains about 2 Dice points (SAMed) for 3 to 4 times the time",
    "medsam": "MedSAM is published for ViT-B only",
    "mobile_sam": "MobileSAM is published for ViT-T only",
    "ssl": "the backbone whose weights are continued without labels",
    "none": f"nothing is pretrained, so an encoder with convolutional early stages learns most per step; {_FIXED}",
}


def backbone(weights: WeightsKind, device: DeviceClass) -> tuple[str, str]:
    """The image encoder."""
    if weights == "none" and device == "cpu":
        return SCRATCH_BACKBONE_CPU, (
            "nothing is pretrained and a CPU sees few slices: a thin encoder with convolutional early stages sees most"
        )
    return BACKBONES[weights], _BACKBONE_REASONS[weights]


def encoder_method(
    weights: WeightsKind,
    num_labelled_slices: int,
    num_structures: int,
    *,
    depth: Depth,
    probe: Probe | None = None,
    left_aside: str = "",
) -> tuple[EncoderMethod, str]:
    """Which part of the encoder trains.

    Args:
        weights: Kind of weights.
        num_labelled_slices: Slices with a structure.
        num_structures: Structures.
        depth: How slices of a slab see each other.
        probe: Of this encoder on this dataset; without one the rank is the same everywhere.
        left_aside: Why a probe that is there is not used.

    Source: SAMed (Zhang and Liu 2023): decoder only 67.95, LoRA and whole decoder 81.88 Dice on Synapse.
    """
    if weights == "none":
        return EncoderMethod(train="full"), "random weights hold nothing to preserve, so the whole encoder trains"
    rank, rank_reason = lora_rank(num_labelled_slices, num_structures)
    reason = (
        "low-rank adapters keep what the weights know; adapting only the decoder costs about 14 Dice (SAMed); rank: "
        f"{rank_reason}; q and v: SAMed reaches 81.88 Dice with them, 73.76 with q, 50.93 with q, k, v and output"
    )
    if depth.kind != "none":
        reason += "; the adapters of the depth mechanism train with them"
    ranks = None
    if probe is not None:
        ranks, ranks_reason = choose_ranks(probe, rank=rank, targets=LORA_TARGETS)
        reason += f"; {ranks_reason}"
    elif left_aside:
        reason += f"; {left_aside}"
    lora = Lora(targets=LORA_TARGETS, rank=rank, ranks=ranks)
    return EncoderMethod(train="adapters", adapters=(lora,)), reason


def decoder_method(weights: WeightsKind, device: DeviceClass) -> tuple[DecoderMethod, str]:
    """What of the mask decoder trains.

    Source: SAMed: trained for long, the whole decoder reaches 81.88, LoRA in it 77.78 Dice on Synapse (finetune-SAM
    finds the opposite). Decision 0029: what was ahead on a CPU.
    """
    if weights == "none":
        return DecoderMethod(train="full", upsampler="side_path", path_stride=2), (
            "random weights hold nothing to preserve, and a convolutional path beside the encoder learns detail sooner"
        )
    if device == "cpu":
        return DecoderMethod(train="lora"), (
            "LoRA in the decoder was ahead of training all of it in each run on a CPU, of 290 to 1320 steps; longer "
            "ones were not measured"
        )
    return DecoderMethod(train="full"), "the whole decoder reaches 81.88 Dice, LoRA in it 77.78 (SAMed)"


def has_place_for_path(*, prompts: object, fusion: object) -> bool:
    """Whether a decoder may have a side path beside these kinds of prompts and of fusion."""
    return prompts == "none" and fusion == "sam"


def without_side_path(decoder: Mapping[str, Any], kept: Collection[str] = ()) -> dict[str, Any]:
    """A decoder's values without those of a side path.

    Args:
        decoder: Values of :class:`DecoderMethod`.
        kept: Names that stay nevertheless.
    """
    return {name: value for name, value in decoder.items() if name in kept or name not in SIDE_PATH_FIELDS}


def depth_mechanism(slab_depth: int) -> tuple[Depth, str]:
    """How the slices of a slab see each other."""
    if slab_depth == 1:
        return NoDepth(), "slices are predicted on their own"
    return DepthAttention(), (
        f"attention over the {slab_depth} slices of a slab with the blocks' own weights (Medical SAM Adapter)"
    )


def lora_rank(num_labelled_slices: int, num_structures: int) -> tuple[int, str]:
    """Rank 4 to 8, one more for every doubling of labelled slices or structures beyond a moderate dataset.

    Source: SAMed: rank 1, 4, 16 reach 78.26, 81.88, 69.03 Dice.
    """
    growth = math.log2(max(1.0, num_labelled_slices / _SLICES_FOR_LEAST_RANK))
    growth += math.log2(max(1.0, num_structures / _CLASSES_FOR_LEAST_RANK))
    rank = min(MOST_RANK, LEAST_RANK + int(growth))
    return rank, (
        f"{LEAST_RANK}, and one more per doubling beyond {_SLICES_FOR_LEAST_RANK} labelled slices "
        f"(here {num_labelled_slices}) or {_CLASSES_FOR_LEAST_RANK} structures (here {num_structures}), "
        f"at most {MOST_RANK}"
    )


def learning_rate(method: Method, *, weights: WeightsKind, batch: int) -> tuple[float, str]:
    """Peak learning rate of AdamW.

    Source: decision 0027 (LoRA; SAMed has 5e-3 at rank 4 and batch 24); finetune-SAM and MedSAM (at most 1e-4 for full
    fine-tuning and for models that keep their prompts); MA-SAM (8e-4 for FacT and depth convolutions).
    """
    if weights == "none":
        return FROM_SCRATCH_RATE, (
            "random weights, with warm-up and a clipped gradient: between 0.001 and 0.003, which learn alike"
        )
    if method.fusion.kind == "unet":
        return FROM_SCRATCH_RATE, "the U-Net starts from random weights"
    if method.encoder.train == "full" or method.promptable:
        return _CAREFUL_RATE, "pretrained weights that all move, or prompts that must keep working, need small steps"
    lora = method.adapter("lora")
    if lora is None:
        return _ADAPTER_RATE, "new modules and a fresh head beside fixed weights"
    whole = method.decoder.train == "full"
    reference, (low, high) = _LORA_RATES[whole]
    projections = max(1.0, len(lora.targets) / len(LORA_TARGETS))
    raw = reference * LEAST_RANK / (lora.rank * projections)
    falling = f"falling with the rank (here {lora.rank}) and the number of adapted projections ({len(lora.targets)})"
    if whole:
        raw *= math.sqrt(batch / _REFERENCE_BATCH)
        falling += f", at a batch other than {_REFERENCE_BATCH} with its square root (here {batch})"
    value = float(f"{min(high, max(low, raw)):.2g}")
    words = "a whole decoder beside LoRA may not start to learn at more" if whole else "as SAMed's"
    return value, f"{reference:g} at rank {LEAST_RANK}, q and v ({words}), {falling}, within {low:g} to {high:g}"


def learning_rate_from_random() -> tuple[float, str]:
    """Peak learning rate for weights that were pretrained from random ones."""
    return FROM_SCRATCH_RATE, "pretrained from random weights: all of them go on training as fast as random ones"


def weight_decay(method: Method) -> tuple[float, str]:
    """AdamW's weight decay."""
    if method.encoder.train == "full":
        return 0.05, "the usual value where a whole transformer trains"
    return 0.1, "SAMed's, on few trained parameters"
