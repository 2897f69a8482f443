"""The layouts in which SAM's weights are published, brought to upstream's names.

Recognised: segment-anything's own files, MedSAM's (the same names, sometimes inside a training checkpoint), MobileSAM's
(TinyViT under its authors' names), and encoder-only files.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from samunet.core.errors import WeightsError

ENCODER = "image_encoder."
PARTS = (ENCODER, "prompt_encoder.", "mask_decoder.")
WRAPPERS = ("model", "state_dict")
NOT_STATE = ("pixel_mean", "pixel_std")

# MobileSAM's name of a part -> timm's, applied in order to keys without the encoder's prefix.
_MOBILE_SAM_NAMES = (
    (re.compile(r"^patch_embed\.seq\.0\."), "patch_embed.conv1."),
    (re.compile(r"^patch_embed\.seq\.2\."), "patch_embed.conv2."),
    (re.compile(r"^layers\.(\d+)\.downsample\."), lambda m: f"stages.{int(m[1]) + 1}.downsample."),
    (re.compile(r"^layers\."), "stages."),
    (re.compile(r"\.c\."), ".conv."),
)
_MOBILE_SAM_DEAD = ("norm_head.", "head.")


@dataclass(frozen=True)
class PublishedTensors:
    """The content of a weights file.

    Args:
        tensors: Upstream name (timm's inside a TinyViT encoder) to tensor.
        kind: The kind of weights, as far as names tell.
        encoder_only: Whether the file holds nothing but an image encoder.
        dropped: Keys that no SAM uses: the classification head of MobileSAM's encoder.
    """

    tensors: dict[str, Tensor]
    kind: str
    encoder_only: bool
    dropped: tuple[str, ...]


def read_published(path: Path) -> PublishedTensors:
    """Read a file of pretrained weights without running code from it.

    Raises:
        WeightsError: If it is missing, damaged, or holds no SAM.
    """
    raw = {k: t for k, t in _unwrap(_read(path), path).items() if k not in NOT_STATE}
    if not any(key.startswith(PARTS) for key in raw):
        raw = {ENCODER + key: tensor for key, tensor in raw.items()}
    mobile = any(key.startswith((f"{ENCODER}layers.", f"{ENCODER}patch_embed.seq.")) for key in raw)
    dropped = tuple(k for k in raw if mobile and k.removeprefix(ENCODER).startswith(_MOBILE_SAM_DEAD))
    tensors = {(mobile_sam_to_timm(k) if mobile else k): t for k, t in raw.items() if k not in dropped}
    encoder_only = all(key.startswith(ENCODER) for key in tensors)
    if f"{ENCODER}neck.0.weight" not in tensors:
        raise WeightsError(
            "the file holds no SAM image encoder",
            expected="keys such as image_encoder.neck.0.weight",
            found=_shortened(raw),
            file=path,
        )
    return PublishedTensors(tensors, _kind(path, mobile, encoder_only), encoder_only, dropped)


def mobile_sam_to_timm(key: str) -> str:
    """The name under which timm's TinyViT holds a parameter of MobileSAM's encoder; other keys stay as they are."""
    if not key.startswith(ENCODER):
        return key
    name = key.removeprefix(ENCODER)
    for pattern, replacement in _MOBILE_SAM_NAMES:
        name = pattern.sub(replacement, name)
    return ENCODER + name


def _kind(path: Path, mobile: bool, encoder_only: bool) -> str:
    if encoder_only:
        return "ssl"
    if mobile:
        return "mobile_sam"
    return "medsam" if "medsam" in path.name.lower() else "sam"


def _read(path: Path) -> Any:
    if not path.is_file():
        raise WeightsError("the weights file does not exist", file=path)
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError, ValueError, KeyError) as error:
        raise WeightsError(
            "the weights file cannot be read",
            expected="tensors in a safetensors file or a torch file that needs no code to run",
            found=str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__,
            file=path,
        ) from error
    except Exception as error:
        if type(error).__name__ != "SafetensorError":
            raise
        raise WeightsError("the weights file cannot be read", found=str(error), file=path) from error


def _unwrap(content: Any, path: Path) -> dict[str, Tensor]:
    for wrapper in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping) or not all(isinstance(t, Tensor) for t in content.values()):
        raise WeightsError("the file holds no state dict", found=type(content).__name__, file=path)
    if content and all(key.startswith("module.") for key in content):
        return {key.removeprefix("module."): tensor for key, tensor in content.items()}
    return dict(content)


def _shortened(keys: Iterable[str]) -> str:
    names = list(keys)
    return ", ".join(names[:5]) + (f", ... ({len(names)} keys)" if len(names) > 5 else "")
