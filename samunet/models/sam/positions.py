"""Positions of a checkpoint made for another input size, brought to this one once, at loading."""

from __future__ import annotations

import re

from torch import Tensor
from torch.nn import functional

REL_POS = re.compile(r"\.attn\.rel_pos_[hw]$")
MODE = "bilinear"


def resize_absolute(position: Tensor, side: int) -> Tensor:
    """Absolute position embeddings on another square grid, bilinear with the corners not aligned.

    Args:
        position: (1, H, W, D).
        side: New grid side.

    Returns:
        (1, side, side, D), the same tensor where nothing changes.

    Source: Zhang & Liu, SAMed, 2023, resize the 64 x 64 grid in the same way.
    """
    if position.shape[1:3] == (side, side):
        return position
    grid = functional.interpolate(position.permute(0, 3, 1, 2), size=(side, side), mode=MODE, align_corners=False)
    return grid.permute(0, 2, 3, 1).contiguous()


def resize_relative(table: Tensor, length: int) -> Tensor:
    """A relative position table of another length, by the same linear interpolation that upstream does at run time.

    Args:
        table: (2 * old side - 1, head width).
        length: 2 * new side - 1.

    Returns:
        (length, head width).
    """
    if table.shape[0] == length:
        return table
    return functional.interpolate(table.T.unsqueeze(0), size=length, mode="linear")[0].T.contiguous()


def fit_positions(state: dict[str, Tensor], wanted: dict[str, Tensor], prefix: str) -> dict[str, str]:
    """Replace an encoder's positions in ``state`` by ones of the wanted size.

    Args:
        state: Tensors of a checkpoint, changed in place.
        wanted: Tensors of the network.
        prefix: Prefix of the encoder's keys in both.

    Returns:
        Key to what was done, for those that changed.
    """
    done: dict[str, str] = {}
    for key in [k for k in state if k in wanted and k.startswith(prefix) and state[k].shape != wanted[k].shape]:
        old, new = state[key], wanted[key]
        if key == f"{prefix}pos_embed" and old.ndim == 4 and old.shape[-1] == new.shape[-1]:
            state[key] = resize_absolute(old, new.shape[1])
            done[key] = f"{MODE} {old.shape[1]}x{old.shape[2]} -> {new.shape[1]}x{new.shape[2]}"
        elif REL_POS.search(key) and old.shape[-1] == new.shape[-1]:
            state[key] = resize_relative(old, new.shape[0])
            done[key] = f"linear {old.shape[0]} -> {new.shape[0]}"
    return done
