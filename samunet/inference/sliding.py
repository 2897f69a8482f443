"""A volume through slice-wise networks: slices and tiles batched, mirrored views and models averaged.

Legend: B batch, C channels, S slices, H W in-plane store grid, T mask tokens, V tile side.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from samunet.artifacts.plan import ResolvedRecipe
from samunet.inference.encode import gaussian_window, to_encoder, to_store
from samunet.inference.restore import SliceLogits
from samunet.inference.tta import mirror_combinations
from samunet.preprocessing.slicing import Pair, context_indices, cut_tile, tile_positions, tile_windows


@dataclass(frozen=True)
class SlidingOptions:
    """How a volume is cut and averaged.

    Args:
        context: Neighbouring slices on each side that are input channels.
        tile_overlap: Fraction by which neighbouring tiles overlap.
        mirror_axes: In-plane axes (0 rows, 1 columns) to average mirrored views over; empty for none.
        batch_size: Tiles per forward.
        device: Where the models are.
        precision: "fp32", "bf16" or "fp16" autocast.
    """

    context: int
    tile_overlap: float
    mirror_axes: tuple[int, ...]
    batch_size: int
    device: str
    precision: str


@dataclass(frozen=True)
class _Tile:
    index: int
    start: Pair


def gather_channels(data: NDArray[np.float32], index: int, context: int) -> NDArray[np.float32]:
    """The input channels of one slice.

    Args:
        data: (C, S, H, W).
        index: Slice.
        context: Neighbours on each side (edge slices repeat); each original channel contributes 2 * context + 1.

    Returns:
        (channels, H, W): a single channel without context is repeated to three.
    """
    stacked = data[:, context_indices(index, data.shape[1], context)].reshape(-1, *data.shape[2:])
    return np.repeat(stacked, 3, axis=0) if len(stacked) == 1 else stacked


class SlidingPredictor:
    """Slice-wise prediction of whole volumes with one or several models of the same recipe.

    Args:
        models: In eval mode; their logits are averaged.
        recipe: Tile, input size and intensity map.
        options: Cutting and averaging.
    """

    def __init__(self, models: Sequence[nn.Module], recipe: ResolvedRecipe, options: SlidingOptions) -> None:
        self._models = list(models)
        self._recipe = recipe
        self._options = options
        self._views = mirror_combinations(options.mirror_axes)

    def slices(self, data: NDArray[np.float32]) -> Iterator[SliceLogits]:
        """Logits of every slice on the store grid, in order.

        Args:
            data: (C, S, H, W) as stored.

        Yields:
            (slice index, (T, H, W) logits on the device).
        """
        side, shape = self._recipe.tile_vox, data.shape[2:]
        starts = tile_positions(shape, side, self._options.tile_overlap)
        tiles = [_Tile(index, start) for index in range(data.shape[1]) for start in starts]
        weights = gaussian_window(side).to(self._options.device)
        for index, group in groupby(self._tiles(data, tiles), key=lambda pair: pair[0].index):
            yield index, _assemble(group, weights, shape)

    def _tiles(self, data: NDArray[np.float32], tiles: Sequence[_Tile]) -> Iterator[tuple[_Tile, Tensor]]:
        size, side, device = self._options.batch_size, self._recipe.tile_vox, self._options.device
        inside = np.ones((1, *data.shape[2:]), np.float32)
        for first in range(0, len(tiles), size):
            chunk = tiles[first : first + size]
            image = np.stack([cut_tile(self._channels(data, t.index), t.start, side, fill=0) for t in chunk])
            valid = np.stack([cut_tile(inside, t.start, side, fill=0) for t in chunk])
            averaged = self._average(torch.from_numpy(image).to(device), torch.from_numpy(valid).to(device))
            yield from zip(chunk, averaged, strict=True)

    def _channels(self, data: NDArray[np.float32], index: int) -> NDArray[np.float32]:
        return gather_channels(data, index, self._options.context)

    @torch.inference_mode()
    def _average(self, image: Tensor, valid: Tensor) -> Tensor:
        """Mean logits (B, T, V, V) over mirrored views and models."""
        total: Tensor | None = None
        for axes in self._views:
            dims = [axis - 2 for axis in axes]
            encoded = to_encoder(image.flip(dims), valid.flip(dims), self._recipe)
            for model in self._models:
                with autocast(self._options.device, self._options.precision):
                    logits = model(encoded)
                mapped = to_store(logits, self._recipe).flip(dims)
                total = mapped if total is None else total + mapped
        assert total is not None
        return total / (len(self._views) * len(self._models))


def autocast(device: str, precision: str) -> torch.autocast:
    """Automatic mixed precision for a device; does nothing for fp32."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.bfloat16)
    return torch.autocast(torch.device(device).type, dtype=dtype, enabled=precision != "fp32")


def _assemble(group: Iterator[tuple[_Tile, Tensor]], weights: Tensor, shape: Sequence[int]) -> Tensor:
    """Put the tiles of one slice together: (T, H, W), weighted where they overlap."""
    total: Tensor | None = None
    covered = weights.new_zeros(tuple(shape))
    for tile, logits in group:
        outer, inner = tile_windows(tile.start, weights.shape[0], shape)
        if total is None:
            total = logits.new_zeros((logits.shape[0], *shape))
        total[(slice(None), *outer)] += logits[(slice(None), *inner)] * weights[inner]
        covered[outer] += weights[inner]
    assert total is not None
    return total / covered
