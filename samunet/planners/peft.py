"""What is trained, on which backbone and how fast, per kind of weights."""

from __future__ import annotations

import math

from samunet.artifacts.plan import DeviceClass, EncoderTuning, WeightsKind

BACKBONES: dict[WeightsKind, str] = {
    "sam": "vit_b",
    "medsam": "vit_b",
    "mobile_sam": "vit_t",
    "ssl": "vit_b",
    "none": "vit_t",
}
SCRATCH_BACKBONE_CPU = "vit_t_xs"
LORA_TARGETS = ("q", "v")
LEAST_RANK, MOST_RANK = 4, 8
FROM_SCRATCH_RATE = 2e-3
_LORA_RATE, _LORA_RATE_LIMITS = 5e-3, (1e-3, 5e-3)
_REFERENCE_BATCH = 24
_SLICES_FOR_LEAST_RANK, _CLASSES_FOR_LEAST_RANK = 2000, 8

_BACKBONE_REASONS: dict[WeightsKind, str] = {
    "sam": "the smallest official SAM; ViT-H gains about 2 Dice points (SAMed) for 3 to 4 times the time",
    "medsam": "MedSAM is published for ViT-B only",
    "mobile_sam": "MobileSAM is published for ViT-T only",
    "ssl": "the backbone whose weights are continued without labels",
    "none": "nothing is pretrained, so an encoder with convolutional early stages learns most per step",
}


def backbone(weights: WeightsKind, device: DeviceClass) -> tuple[str, str]:
    """The image encoder."""
    if weights == "none" and device == "cpu":
        return SCRATCH_BACKBONE_CPU, (
            "nothing is pretrained and a CPU sees few slices: a thin encoder with convolutional early stages sees most"
        )
    return BACKBONES[weights], _BACKBONE_REASONS[weights]


def encoder_tuning(weights: WeightsKind) -> tuple[EncoderTuning, str]:
    """Which part of the encoder trains; the decoder always trains whole.

    Source: SAMed (Zhang and Liu 2023): decoder only 67.95, LoRA and whole decoder 81.88 Dice on Synapse.
    """
    if weights == "none":
        return "full", "random weights hold nothing to preserve, so the whole encoder trains"
    return "lora", "low-rank adapters keep what the weights know; adapting only the decoder costs about 14 Dice (SAMed)"


def lora_rank(num_labelled_slices: int, num_structures: int, tuning: EncoderTuning = "lora") -> tuple[int, str]:
    """Rank 4 to 8, one more for every doubling of labelled slices or structures beyond a moderate dataset.

    Source: SAMed: rank 1, 4, 16 reach 78.26, 81.88, 69.03 Dice.
    """
    growth = math.log2(max(1.0, num_labelled_slices / _SLICES_FOR_LEAST_RANK))
    growth += math.log2(max(1.0, num_structures / _CLASSES_FOR_LEAST_RANK))
    rank = min(MOST_RANK, LEAST_RANK + int(growth))
    unused = "" if tuning == "lora" else "no adapters here; if there were: "
    return rank, (
        f"{unused}{LEAST_RANK}, and one more per doubling beyond {_SLICES_FOR_LEAST_RANK} labelled slices "
        f"(here {num_labelled_slices}) or {_CLASSES_FOR_LEAST_RANK} structures (here {num_structures}), "
        f"at most {MOST_RANK}"
    )


def lora_targets(tuning: EncoderTuning) -> tuple[tuple[str, ...], str]:
    """Which attention projections are adapted.

    Source: SAMed: q and v 81.88, q alone 73.76, q, k, v and output 50.93 Dice.
    """
    unused = "" if tuning == "lora" else "no adapters here; if there were: "
    return LORA_TARGETS, f"{unused}SAMed reaches 81.88 Dice with q and v, 73.76 with q, 50.93 with q, k, v and output"


def learning_rate(tuning: EncoderTuning, *, weights: WeightsKind, rank: int, batch: int) -> tuple[float, str]:
    """Peak learning rate of AdamW.

    Source: SAMed (5e-3 at rank 4 and batch 24); finetune-SAM and MedSAM (at most 1e-4 for full fine-tuning).
    """
    if tuning == "lora":
        low, high = _LORA_RATE_LIMITS
        raw = _LORA_RATE * (LEAST_RANK / rank) * math.sqrt(batch / _REFERENCE_BATCH)
        value = float(f"{min(high, max(low, raw)):.2g}")
        return value, (
            f"SAMed's {_LORA_RATE:g} at rank {LEAST_RANK} and batch {_REFERENCE_BATCH}, falling with the rank (here "
            f"{rank}) and with the square root of the batch (here {batch}), within {low:g} to {high:g}"
        )
    if weights == "none":
        return FROM_SCRATCH_RATE, "random weights, with warm-up and a clipped gradient: between 0.001 and 0.003, which learn alike"
    return 1e-4, "pretrained weights that all move need small steps"


def weight_decay(tuning: EncoderTuning) -> tuple[float, str]:
    """AdamW's weight decay."""
    if tuning == "lora":
        return 0.1, "SAMed's, on few trained parameters"
    return 0.05, "the usual value for transformers trained from random weights"
