"""Values of a plan in a few words."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from samunet.artifacts.augmentation import Augmentation
from samunet.artifacts.method import DecoderMethod, EncoderMethod, Lora, summarise_decoder, summarise_encoder
from samunet.artifacts.plan import ChannelNormalization, Decay, Frame, LossWeights
from samunet.planners.rules import FILE_AXES


def short(value: Any) -> str:
    """A decision's value in a few words."""
    if isinstance(value, tuple | list):
        return _listed(value)
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, BaseModel):
        return _schema(value)
    return "-" if value is None else f"{value}"


def ranks(encoder: EncoderMethod) -> str:
    """The rank of every block, where they differ; empty otherwise."""
    found = [adapter.ranks for adapter in encoder.adapters if isinstance(adapter, Lora) and adapter.ranks is not None]
    return f"rank by block: {' '.join(map(str, found[0]))}" if found else ""


def _listed(values: tuple[Any, ...] | list[Any]) -> str:
    if len(values) == 3 and all(value is None or isinstance(value, float | int) for value in values):
        return " x ".join("own" if mm is None else f"{mm:.4g}" for mm in values) + " mm"
    return ", ".join(short(value) for value in values) or "none"


def _schema(value: BaseModel) -> str:
    if isinstance(value, Frame):
        return f"{FILE_AXES[value.slice_axis]} of {'-'.join(value.orientation)}"
    if isinstance(value, ChannelNormalization):
        return value.scheme + (" of nonzero voxels" if value.use_nonzero_mask else "")
    if isinstance(value, EncoderMethod):
        return summarise_encoder(value)
    if isinstance(value, DecoderMethod):
        return summarise_decoder(value)
    if isinstance(value, LossWeights):
        estimated = f" + {value.estimated_iou:g} IoU estimate" if value.estimated_iou else ""
        return f"{value.cross_entropy:g} CE + {value.dice:g} Dice{estimated}"
    if isinstance(value, Decay):
        return f"{value.kind} {value.power:g}"
    if isinstance(value, Augmentation):
        return str(value)
    return str(getattr(value, "kind", value))
