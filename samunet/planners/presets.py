"""The published methods as points of one space, selected by name.

A preset fixes the backbone, the method and, where it has its own, the intensities; sizes and schedules are the plan's
unless the published ones are asked for. Where a published code differs from its paper, the paper is followed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from samunet.artifacts.method import (
    Bottleneck,
    DecoderMethod,
    DepthAttention,
    DepthConvolution,
    EncoderMethod,
    Fact,
    Fusion,
    HighFrequency,
    Lora,
    Method,
    NoDepth,
    PeftLibrary,
    PromptMethod,
)
from samunet.artifacts.plan import Decay, LossWeights, WeightsKind
from samunet.core.errors import UsageError

AUTO = "auto"
MEDSAM_CONFIGURATION = "2d_medsam"
SLAB_CONFIGURATION = "3d"
EQUAL = LossWeights()


@dataclass(frozen=True)
class Published:
    """The schedule a method was published with.

    Args:
        input_size: Encoder side in pixels.
        learning_rate: Peak.
        weight_decay: AdamW's (or Adam's, SGD's) own.
        warmup_steps: Steps of rising rate.
        decay: How the rate falls.
        batch_size: Slices per step over all devices.
        epochs: Passes over the labelled slices.
        loss: Weights of the loss's parts.
        left_to_plan: Fields that are planned all the same.
        left_because: Why they are.
    """

    input_size: int
    learning_rate: float
    weight_decay: float
    warmup_steps: int
    decay: Decay
    batch_size: int
    epochs: int
    loss: LossWeights = EQUAL
    left_to_plan: tuple[str, ...] = ()
    left_because: str = ""


@dataclass(frozen=True)
class Preset:
    """A published method.

    Args:
        name: What ``--preset`` takes.
        summary: One line.
        source: Paper.
        backbone: As published.
        weights: Kind of weights it starts from.
        method: What is adapted and how.
        published: Its schedule.
        own_intensities: Whether it needs MedSAM's intensities.
    """

    name: str
    summary: str
    source: str
    backbone: str
    weights: WeightsKind
    method: Method
    published: Published
    own_intensities: bool = False

    @property
    def configuration(self) -> str | None:
        """The configuration it needs; None: the plan's recommended one without slabs."""
        if self.own_intensities:
            return MEDSAM_CONFIGURATION
        return SLAB_CONFIGURATION if self.method.depth.kind != "none" else None


_CONSTANT = Decay(kind="constant")
_SAMED = Published(512, 5e-3, 0.1, 250, Decay(), 24, 160, LossWeights(cross_entropy=0.2, dice=0.8))
_SAMED_H = Published(512, 5e-3, 0.1, 250, Decay(power=7), 24, 300, LossWeights(cross_entropy=0.2, dice=0.8))
_MEDSAM = Published(1024, 1e-4, 0.01, 1, _CONSTANT, 160, 100)
_SAM_ADAPTER = Published(1024, 2e-4, 0.01, 1, Decay(kind="cosine"), 8, 20)
_MED_SA = Published(1024, 1e-4, 0.0, 1, _CONSTANT, 16, 60)
_MED_SA_SLICES = replace(_MED_SA, loss=LossWeights(cross_entropy=1.0, dice=0.0))
_FINETUNE_SAM = Published(1024, 1e-3, 0.1, 200, Decay(), 4, 200)
_MA_SAM = Published(512, 8e-4, 0.1, 250, Decay(power=7), 120, 300, LossWeights(cross_entropy=0.2, dice=0.8))
_NNSAM = Published(
    1024,
    1e-2,
    3e-5,
    1,
    Decay(),
    12,
    1000,
    left_to_plan=("learning_rate", "weight_decay"),
    left_because="published: SGD with Nesterov momentum at rate 0.01 and decay 3e-5, which say nothing about AdamW",
)
_LORA = EncoderMethod(train="adapters", adapters=(Lora(),))
_FROZEN = EncoderMethod(train="frozen")


def _finetune_sam() -> list[Preset]:
    """All 18 of the study; adapters in all blocks, new heads always trainable, layer norm before the windows."""
    encoders = {
        "vanilla": EncoderMethod(train="full"),
        "adapter": EncoderMethod(train="adapters", adapters=(Bottleneck(),)),
        "lora": _LORA,
    }
    decoders = {
        "vanilla": DecoderMethod(train="full"),
        "adapter": DecoderMethod(train="adapters"),
        "lora": DecoderMethod(train="lora"),
    }
    presets = []
    for backbone in ("vit_h", "vit_b", "vit_t"):
        for parts in ("both", "decoder"):
            for kind in ("vanilla", "adapter", "lora"):
                encoder = encoders[kind] if parts == "both" else _FROZEN
                presets.append(
                    Preset(
                        name=f"finetune_sam_{backbone}_{parts}_{kind}",
                        summary=f"{'encoder and decoder' if parts == 'both' else 'decoder only'}, {kind}",
                        source="Gu et al., finetune-SAM, MELBA 2025",
                        backbone=backbone,
                        weights="mobile_sam" if backbone == "vit_t" else "sam",
                        method=Method(encoder=encoder, decoder=decoders[kind]),
                        published=_FINETUNE_SAM,
                    )
                )
    return presets


def _med_sa() -> list[Preset]:
    """The published method, and its ablation's steps."""
    encoder = EncoderMethod(train="adapters", adapters=(Bottleneck(ratio=1 / 16, activation="relu"),))
    rows: list[tuple[str, str, bool, Any]] = [
        ("med_sa", "adapters, depth attention, decoder adapters conditioned by HyP-Adpt", True, "hyper"),
        ("med_sa_2d", "the same without depth attention", False, "hyper"),
        ("med_sa_concat", "prompt conditioning by concatenation", True, "concat"),
        ("med_sa_add", "prompt conditioning by addition", True, "add"),
        ("med_sa_depth", "depth attention, no prompt conditioning", True, "none"),
        ("med_sa_plain", "adapters only: no depth attention, no prompt conditioning", False, "none"),
    ]
    return [
        Preset(
            name=name,
            summary=summary,
            source="Wu et al., Medical SAM Adapter, Medical Image Analysis 2025",
            backbone="vit_h",
            weights="sam",
            method=Method(
                encoder=encoder,
                depth=DepthAttention(ratio=1 / 16, activation="relu") if depth else NoDepth(),
                decoder=DecoderMethod(train="adapters", conditioning=conditioning),
                prompts=PromptMethod(kind="mixed", corrections=1),
            ),
            published=_MED_SA if depth else _MED_SA_SLICES,
        )
        for name, summary, depth, conditioning in rows
    ]


_SAMED_PAPER = "Zhang and Liu, SAMed, 2023"
_SAM_PAPER = "Kirillov et al., Segment Anything, 2023"
_MEDSAM_PAPER = "Ma et al., MedSAM, Nature Communications 2024"
_PEFT = "Hugging Face peft"
_FULL = EncoderMethod(train="full")
_BOX = PromptMethod(kind="box", box_shift=0.1)
_SINGLES = (
    Preset(
        "sam_decoder", "frozen encoder, whole decoder", _SAM_PAPER, "vit_b", "sam", Method(encoder=_FROZEN), _MEDSAM
    ),
    Preset(
        "sam_zero_shot",
        "nothing trains: SAM as it is, prompted",
        _SAM_PAPER,
        "vit_b",
        "sam",
        Method(encoder=_FROZEN, decoder=DecoderMethod(train="none"), prompts=PromptMethod(kind="mixed")),
        _MEDSAM,
    ),
    Preset(
        "medsam",
        "everything trains, prompted by boxes, its own intensities",
        _MEDSAM_PAPER,
        "vit_b",
        "sam",
        Method(encoder=_FULL, prompts=_BOX),
        _MEDSAM,
        own_intensities=True,
    ),
    Preset(
        "medsam_points",
        "the decoder trains, prompted by clicks, its own intensities",
        _MEDSAM_PAPER,
        "vit_b",
        "medsam",
        Method(encoder=_FROZEN, prompts=PromptMethod(kind="points")),
        Published(1024, 5e-5, 0.01, 1, _CONSTANT, 8, 100),
        own_intensities=True,
    ),
    Preset(
        "sam_adapter",
        "high-frequency prompts before every block",
        "Chen et al., SAM-Adapter, ICCV workshops 2023",
        "vit_h",
        "sam",
        Method(encoder=EncoderMethod(train="adapters", adapters=(HighFrequency(),))),
        _SAM_ADAPTER,
    ),
    Preset("samed", "LoRA r4 on q and v, whole decoder", _SAMED_PAPER, "vit_b", "sam", Method(encoder=_LORA), _SAMED),
    Preset(
        "samed_s",
        "LoRA r4 on q and v, also in the decoder",
        _SAMED_PAPER,
        "vit_b",
        "sam",
        Method(encoder=_LORA, decoder=DecoderMethod(train="lora")),
        _SAMED,
    ),
    Preset("samed_h", "SAMed on ViT-H", _SAMED_PAPER, "vit_h", "sam", Method(encoder=_LORA), _SAMED_H),
    Preset(
        "ma_sam",
        "FacT and depth convolutions, progressive decoder",
        "Chen et al., MA-SAM, Medical Image Analysis 2024",
        "vit_h",
        "sam",
        Method(
            encoder=EncoderMethod(train="adapters", adapters=(Fact(),)),
            depth=DepthConvolution(),
            decoder=DecoderMethod(train="full", upsampler="progressive"),
        ),
        _MA_SAM,
    ),
    Preset(
        "nnsam",
        "frozen SAM features in a convolutional U-Net",
        "Li et al., nnSAM, 2023",
        "vit_t",
        "mobile_sam",
        Method(encoder=_FROZEN, decoder=DecoderMethod(train="none"), fusion=Fusion(kind="unet")),
        _NNSAM,
    ),
    *(
        Preset(
            f"peft_{variant}",
            f"{variant} from the peft library, whole decoder",
            _PEFT,
            "vit_b",
            "sam",
            Method(encoder=EncoderMethod(train="adapters", adapters=(PeftLibrary(variant=variant),))),
            _SAMED,
        )
        for variant in ("dora", "rslora")
    ),
)

PRESETS: Mapping[str, Preset] = {p.name: p for p in (*_SINGLES, *_med_sa(), *_finetune_sam())}


def without_depth(preset: Preset) -> Preset | None:
    """The preset that is the same method without its depth mechanism, if there is one."""
    plain = preset.method.model_copy(update={"depth": NoDepth()})
    return next((p for p in PRESETS.values() if p.method == plain and p.backbone == preset.backbone), None)


def get_preset(name: str) -> Preset:
    """A preset by name.

    Raises:
        UsageError: If there is none; the message lists them.
    """
    if name not in PRESETS:
        raise UsageError("no such preset", expected=f"{AUTO}, {', '.join(PRESETS)}", found=name)
    return PRESETS[name]
