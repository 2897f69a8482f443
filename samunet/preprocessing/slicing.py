"""How slices become network input and back: context, tiles with zeros beyond the edge, zoom.

Pure functions shared by training and inference, so that both see the same pixels. A slice that is smaller than a
tile lies centred in it: its tile starts at a negative voxel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from samunet.core.errors import ConfigError

Pair = tuple[int, int]


def context_indices(index: int, num_slices: int, context: int) -> NDArray[np.int64]:
    """The slices seen together with one slice: itself in the middle, edge slices repeated beyond the volume.

    Args:
        index: The slice in the middle.
        num_slices: Slices of the volume.
        context: Neighbours on each side.

    Returns:
        (2 * context + 1,) indices.
    """
    return np.clip(np.arange(index - context, index + context + 1), 0, num_slices - 1)


def tile_starts(length: int, tile: int, overlap: float) -> tuple[int, ...]:
    """First voxel of each tile along one axis: everything is covered, evenly, the last tile flush with the end.

    Args:
        length: Voxels along the axis.
        tile: Voxels of a tile. An axis not longer than a tile gets one tile with the axis in its middle, so its
            start is zero or negative.
        overlap: Least fraction of a tile that it shares with the next one, in [0, 1).

    Raises:
        ConfigError: If the overlap is not in [0, 1) or a size is not positive.
    """
    if not 0 <= overlap < 1 or tile < 1 or length < 1:
        raise ConfigError(
            "tiles cannot be laid out",
            expected="0 <= overlap < 1 and positive sizes",
            found=f"overlap {overlap}, tile {tile}, length {length}",
        )
    if length <= tile:
        return (-((tile - length) // 2),)
    longest_step = max(1, math.floor(tile * (1 - overlap) + 1e-9))
    num_steps = math.ceil((length - tile) / longest_step)
    return tuple(index * (length - tile) // num_steps for index in range(num_steps + 1))


def tile_positions(shape: Sequence[int], tile: int, overlap: float) -> tuple[Pair, ...]:
    """First row and column of every tile over a slice, row by row.

    Args:
        shape: Rows and columns.
        tile: Side of a tile in voxels.
        overlap: As in :func:`tile_starts`.
    """
    rows, columns = (tile_starts(int(length), tile, overlap) for length in shape)
    return tuple((row, column) for row in rows for column in columns)


class TileWindows(NamedTuple):
    """Where a tile and a slice meet.

    Args:
        outer: Rows and columns of the slice that the tile holds.
        inner: Rows and columns of the tile that hold them.
    """

    outer: tuple[slice, slice]
    inner: tuple[slice, slice]


def tile_windows(start: Sequence[int], tile: int, shape: Sequence[int]) -> TileWindows:
    """Where a tile and a slice meet.

    Args:
        start: First row and column of the tile; may be negative.
        tile: Side of the tile in voxels.
        shape: Rows and columns of the slice.
    """
    outer, inner = [], []
    for first, length in zip(start, shape, strict=True):
        low, high = max(0, first), min(int(length), first + tile)
        outer.append(slice(low, high))
        inner.append(slice(low - first, high - first))
    return TileWindows((outer[0], outer[1]), (inner[0], inner[1]))


def cut_tile(array: NDArray[Any], start: Sequence[int], tile: int, *, fill: float) -> NDArray[Any]:
    """Cut a square tile out of the last two axes; what lies beyond the slice is filled.

    Args:
        array: (..., H, W).
        start: First row and column; may be negative.
        tile: Side of the tile in voxels.
        fill: Value beyond the slice.

    Returns:
        (..., tile, tile), a copy.
    """
    outer, inner = tile_windows(start, tile, array.shape[-2:])
    result = np.full((*array.shape[:-2], tile, tile), fill, dtype=array.dtype)
    result[(..., *inner)] = array[(..., *outer)]
    return result


def voxel_to_pixel(voxels: ArrayLike, tile: int, input_size: int) -> NDArray[np.float64]:
    """Positions in a tile to positions in the zoomed encoder input; integers are voxel and pixel centres.

    Tile and input cover the same square, so their outer edges coincide (bilinear resizing without aligned corners).

    Args:
        voxels: Positions along one axis or both, any shape.
        tile: Side of the tile in voxels.
        input_size: Side of the encoder input in pixels.
    """
    result: NDArray[np.float64] = (np.asarray(voxels, np.float64) + 0.5) * (input_size / tile) - 0.5
    return result


def pixel_to_voxel(pixels: ArrayLike, tile: int, input_size: int) -> NDArray[np.float64]:
    """Undo :func:`voxel_to_pixel`."""
    return voxel_to_pixel(pixels, input_size, tile)
