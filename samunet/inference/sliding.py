"""A volume through networks that see slices or slabs: tiles batched, mirrored views and models averaged.

Legend: B batch, D slices of a slab, C channels, S slices, H W in-plane store grid, T mask tokens, V tile side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, product

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from samunet.artifacts.plan import ResolvedRecipe
from samunet.artifacts.plan_parts import STORED, Across
from samunet.inference.agreement import ViewAgreement
from samunet.inference.encode import gaussian_window, scale_slice, to_encoder, to_store
from samunet.inference.restore import SliceLogits
from samunet.inference.tta import mirror_combinations
from samunet.preprocessing.planes import turn
from samunet.preprocessing.slicing import Pair, context_indices, cut_tile, tile_positions, tile_starts, tile_windows

DEPTH_SIGMA = 0.125


@dataclass(frozen=True)
class SlidingOptions:
    """How a volume is cut and averaged.

    Args:
        context: Neighbouring slices on each side that are input channels.
        tile_overlap: Fraction by which neighbouring tiles overlap.
        mirror_axes: In-plane axes (0 rows, 1 columns) to average mirrored views over; empty for none.
        batch_size: Slice tiles per forward, at least one slab.
        device: Where the models are.
        precision: "fp32", "bf16" or "fp16" autocast.
        slab_depth: Slices that the model sees together.
        depth_overlap: Fraction by which neighbouring slabs overlap.
        mirror_views: Most mirrored views of a tile, the unmirrored one included: 1, 2 or 4.
    """

    context: int
    tile_overlap: float
    mirror_axes: tuple[int, ...]
    batch_size: int
    device: str
    precision: str
    slab_depth: int = 1
    depth_overlap: float = 0.5
    mirror_views: int = 4


@dataclass(frozen=True)
class _Tile:
    """A tile of a slab: its first slice, its first row and column."""

    first: int
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
    """Prediction of whole volumes, slab by slab, with one or several models of the same recipe.

    Args:
        models: In eval mode; their logits are averaged.
        recipe: Tile, input size and intensity map.
        options: Cutting and averaging.
        views: Told what each model says of each mirrored view.
    """

    def __init__(
        self,
        models: Sequence[nn.Module],
        recipe: ResolvedRecipe,
        options: SlidingOptions,
        *,
        views: ViewAgreement | None = None,
    ) -> None:
        self._models = list(models)
        self._recipe = recipe
        self._options = options
        self._views = mirror_combinations(options.mirror_axes, options.mirror_views)
        self._agreement = views

    def slices(self, data: NDArray[np.float32]) -> Iterator[SliceLogits]:
        """Logits of every slice on the store grid, in order.

        A slice comes as soon as every slab that holds it is done; only the slices of slabs that are not are kept. A
        volume that is shorter than a slab is one slab of its own depth.

        Args:
            data: (C, S, H, W) as stored.

        Yields:
            (slice index, (T, H, W) logits on the device).

        Raises:
            ConfigError: If the overlap is not in [0, 1) or the slab depth is not positive.
        """
        side, shape, num_slices = self._recipe.tile_vox, data.shape[2:], data.shape[1]
        firsts = slab_starts(num_slices, self._options.slab_depth, self._options.depth_overlap)
        corners = tile_positions(shape, side, self._options.tile_overlap)
        depth = min(self._options.slab_depth, num_slices)
        weights = gaussian_window(side) * depth_window(depth)[:, None, None]
        weights = weights.to(self._options.device)
        stream = self._tiles(data, [_Tile(*place) for place in product(firsts, corners)], depth)
        unfinished: dict[int, _SliceSum] = {}
        for first, following in zip(firsts, (*firsts[1:], num_slices), strict=True):
            for tile, logits in islice(stream, len(corners)):
                for index, maps, weight in zip(range(first, first + depth), logits, weights, strict=True):
                    if index not in unfinished:
                        unfinished[index] = _SliceSum(maps, shape)
                    unfinished[index].add(maps, weight, tile.start)
                # Else the last tile would keep its whole batch's maps until the next one is computed.
                del logits, maps
            for index in range(first, following):
                yield index, unfinished.pop(index).mean()

    def _tiles(self, data: NDArray[np.float32], tiles: Sequence[_Tile], depth: int) -> Iterator[tuple[_Tile, Tensor]]:
        """Every tile with its logits (D, T, V, V), several to a forward."""
        size, device = max(1, self._options.batch_size // depth), self._options.device
        for start in range(0, len(tiles), size):
            chunk = tiles[start : start + size]
            image = np.concatenate([self._cut(data, tile, depth) for tile in chunk])
            valid = np.concatenate([self._inside(data.shape[2:], tile, depth) for tile in chunk])
            batch = torch.from_numpy(image).to(device), torch.from_numpy(valid).to(device)
            yield from zip(chunk, self._average(*batch, depth).tensor_split(len(chunk)), strict=True)

    def _cut(self, data: NDArray[np.float32], tile: _Tile, depth: int) -> NDArray[np.float32]:
        """The input channels of a tile's slices: (D, C, V, V)."""
        places = range(tile.first, tile.first + depth)
        channels = (gather_channels(data, place, self._options.context) for place in places)
        scaled = (scale_slice(array, self._recipe.intensity_map) for array in channels)
        return np.stack([cut_tile(array, tile.start, self._recipe.tile_vox, fill=0) for array in scaled])

    def _inside(self, shape: Sequence[int], tile: _Tile, depth: int) -> NDArray[np.float32]:
        """1 inside the image, 0 beyond it: (D, 1, V, V)."""
        whole = np.ones((depth, 1, *shape), np.float32)
        return cut_tile(whole, tile.start, self._recipe.tile_vox, fill=0)

    @torch.inference_mode()
    def _average(self, image: Tensor, valid: Tensor, depth: int) -> Tensor:
        """Mean logits (B, T, V, V) over mirrored views and models; the slices of a slab one after another."""
        total: Tensor | None = None
        for axes in self._views:
            dims = [axis - 2 for axis in axes]
            encoded = to_encoder(image.flip(dims), valid.flip(dims), self._recipe)
            for index in range(len(self._models)):
                maps = self._maps(index, encoded, depth, dims, valid)
                total = maps if total is None else total.add_(maps)
                del maps
        assert total is not None
        if self._agreement is not None:
            self._agreement.close()
        return total.div_(len(self._views) * len(self._models))

    def _maps(self, index: int, encoded: Tensor, depth: int, dims: list[int], valid: Tensor) -> Tensor:
        """Logits (B, T, V, V) of a model, mirrored back; a copy of its own."""
        model, slabs = self._models[index], {} if depth == 1 else {"depth": depth}
        estimates = self._agreement is not None and getattr(model, "estimates_iou", False)
        with autocast(self._options.device, self._options.precision):
            logits, iou = model.estimated(encoded, **slabs) if estimates else (model(encoded, **slabs), None)  # type: ignore[operator]
        maps: Tensor = to_store(logits, self._recipe).flip(dims)
        del logits
        if self._agreement is not None:
            self._agreement.add(index, maps, valid, iou)
        return maps


def average_planes(
    predict: Callable[[Across, NDArray[np.float32]], Iterable[SliceLogits]],
    data: NDArray[np.float32],
    planes: Sequence[Across],
) -> Iterator[SliceLogits]:
    """Mean logits over the planes in which a volume is cut; those of a single plane pass as they come.

    Args:
        predict: Gives the logits of every slice of a volume that is cut across an axis, in order.
        data: (C, S, H, W) as stored.
        planes: Axes to cut across.

    Yields:
        (slice index, (T, H, W) logits), in order of the stored slices.
    """
    if tuple(planes) == STORED:
        yield from predict("slices", data)
        return
    total: Tensor | None = None
    for across in planes:
        for index, maps in predict(across, np.ascontiguousarray(turn(data, across))):
            if total is None:
                total = maps.new_zeros((len(maps), *data.shape[1:]))
            turn(total, across)[:, index] += maps
    assert total is not None
    total /= len(planes)
    yield from enumerate(total.unbind(1))


class _SliceSum:
    """The weighted sum of the tiles that cover a slice.

    Args:
        like: (T, V, V) logits of one of them.
        shape: Rows and columns.
    """

    def __init__(self, like: Tensor, shape: Sequence[int]) -> None:
        self._total = like.new_zeros((len(like), *shape))
        self._covered = like.new_zeros(tuple(shape))

    def add(self, logits: Tensor, weight: Tensor, start: Pair) -> None:
        """Add logits (T, V, V) with a weight (V, V) where the tile starts."""
        outer, inner = tile_windows(start, len(weight), self._covered.shape)
        self._total[(slice(None), *outer)] += logits[(slice(None), *inner)] * weight[inner]
        self._covered[outer] += weight[inner]

    def mean(self) -> Tensor:
        """(T, H, W)."""
        return self._total / self._covered


def slab_starts(num_slices: int, depth: int, overlap: float) -> tuple[int, ...]:
    """First slice of each slab of a volume; one slab where the volume is not deeper than it.

    Args:
        num_slices: Slices of the volume.
        depth: Slices of a slab.
        overlap: Least fraction of a slab that it shares with the next one, in [0, 1).

    Raises:
        ConfigError: If the overlap is not in [0, 1) or a size is not positive.
    """
    return tile_starts(num_slices, min(depth, num_slices), overlap)


def depth_window(depth: int) -> Tensor:
    """(D,) weight of a slab's slices when slabs overlap: a Gaussian around its middle, as wide as that of tiles."""
    position = torch.arange(depth, dtype=torch.float32) - (depth - 1) / 2
    return torch.exp(-0.5 * (position / (depth * DEPTH_SIGMA)) ** 2)


def autocast(device: str, precision: str) -> torch.autocast:
    """Automatic mixed precision for a device; does nothing for fp32."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.bfloat16)
    return torch.autocast(torch.device(device).type, dtype=dtype, enabled=precision != "fp32")
