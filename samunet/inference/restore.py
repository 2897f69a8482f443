"""From logits on the store grid to labels on the file's own grid, slice by slice.

Classes x full grid never exists: each slice's logits are resampled and decided as they come.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from numpy.typing import NDArray
from torch import Tensor

from samunet.artifacts.quality import StructureSigns
from samunet.artifacts.store import CaseRecord
from samunet.core.labels import LabelSpec
from samunet.inference.signs import MaskSums

TIE, ABSENT_SLACK = 0.5, 1e-3

SliceLogits = tuple[int, Tensor]
Allocate = Callable[[tuple[int, ...]], NDArray[np.float16]]


@dataclass(frozen=True, eq=False)
class Restored:
    """A prediction on the file's grid.

    Args:
        labels: (Z, Y, X) label values.
        probabilities: (T, Z, Y, X) float16, or None when not asked for.
        signs: Per structure what the model says about its mask, or None when not asked for.
    """

    labels: NDArray[np.integer[Any]]
    probabilities: NDArray[np.float16] | None = None
    signs: Mapping[str, StructureSigns] | None = None


def store_positions_of_slices(record: CaseRecord) -> NDArray[np.float64]:
    """Where the slices of the cropped grid lie among the store's, continuous, within the first and the last."""
    depth_in, depth_out = record.store_shape[0], record.crop_shape[0]
    return np.clip((np.arange(depth_out) + 0.5) * depth_in / depth_out - 0.5, 0, depth_in - 1)


def nearest_store_slice(index: int, record: CaseRecord) -> int:
    """The store's slice that alone restores a slice of the cropped grid where the other was not asked."""
    position = store_positions_of_slices(record)[index]
    below = int(np.floor(position))
    return below if position - below < TIE else below + 1


def crop_slices(
    logits: Iterable[SliceLogits], record: CaseRecord, *, absent: float | None = None
) -> Iterator[SliceLogits]:
    """Resample a stream of store slices to the slices of the cropped grid.

    Args:
        logits: (index, (T, H, W)) in order of the store's slices.
        record: Store and crop shapes of the case.
        absent: What stands all over a slice on which a structure was not asked. It is no logit to average with: beside
            it, the nearer slice counts alone, and of two that are equally near the second, on which a mark is asked.

    Yields:
        (index, (T, h, w)) in order of the cropped grid's slices: bilinear in plane, linear along depth (half-voxel
        aligned, edges repeated), nothing where the grids agree.
    """
    depth_in, depth_out = record.store_shape[0], record.crop_shape[0]
    positions = store_positions_of_slices(record)
    below = np.floor(positions).astype(int)
    above = np.minimum(below + 1, depth_in - 1)
    window: dict[int, Tensor] = {}
    done = 0
    for index, maps in logits:
        window[index] = _in_plane(maps, record.crop_shape[1:])
        while done < depth_out and above[done] <= index:
            weight = float(positions[done] - below[done])
            lower, upper = window[int(below[done])], window[int(above[done])]
            yield done, lower if weight == 0 else _between(lower, upper, weight, absent)
            done += 1
        keep = below[done] if done < depth_out else depth_in
        window = {kept: value for kept, value in window.items() if kept >= keep}


def _between(lower: Tensor, upper: Tensor, weight: float, absent: float | None) -> Tensor:
    """Linear between two slices for the structures that were asked on both or on none."""
    mixed = torch.lerp(lower, upper, weight)
    if absent is None:
        return mixed
    asked = [maps.flatten(1).amax(1) > absent + ABSENT_SLACK for maps in (lower, upper)]
    nearer = lower if weight < TIE else upper
    return torch.where((asked[0] != asked[1])[:, None, None], nearer, mixed)


def _in_plane(maps: Tensor, shape: tuple[int, int]) -> Tensor:
    if tuple(maps.shape[-2:]) == shape:
        return maps
    return F.interpolate(maps[None], size=shape, mode="bilinear", align_corners=False)[0]


def restore(
    logits: Iterable[SliceLogits],
    record: CaseRecord,
    labels: LabelSpec,
    *,
    with_probabilities: bool = False,
    allocate: Allocate | None = None,
    sums: MaskSums | None = None,
    absent: float | None = None,
) -> Restored:
    """Undo preprocessing: resample, decide, paste into the uncropped grid, invert the axis operation.

    Args:
        logits: (index, (T, H, W)) in order of the store's slices.
        record: How the case was preprocessed.
        labels: How maps become label values.
        with_probabilities: Also return softmax (or sigmoid) maps on the file's grid.
        allocate: Gives the array of zeros that they are written to; in memory by default.
        sums: Told the probabilities and labels of every slice.
        absent: What stands on slices on which a structure was not asked, as for :func:`crop_slices`.

    Returns:
        Labels (and probabilities) in the file's axes (Z, Y, X). Outside the crop everything is background.
    """
    dtype = np.uint8 if max(labels.values) < 256 else np.uint16
    painted = np.full(record.canonical_shape, labels.background, dtype=dtype)
    probabilities = None
    if with_probabilities:
        shape = (labels.num_tokens, *record.canonical_shape)
        probabilities = np.zeros(shape, np.float16) if allocate is None else allocate(shape)
        if not labels.has_regions:
            probabilities[0] = 1
    _, rows, columns = (slice(a, b) for a, b in zip(record.crop_start, record.crop_stop, strict=True))
    for index, maps in crop_slices(logits, record, absent=absent):
        place = record.crop_start[0] + index
        painted[place, rows, columns] = labels.decide(maps.cpu().numpy())
        if probabilities is None and sums is None:
            continue
        scores = maps.float().sigmoid() if labels.has_regions else maps.float().softmax(0)
        if sums is not None:
            sums.add(scores, painted[place, rows, columns])
        if probabilities is not None:
            probabilities[:, place, rows, columns] = scores.cpu().numpy()
    operation = record.operation
    return Restored(
        np.ascontiguousarray(operation.invert(painted)),
        None if probabilities is None else operation.invert(probabilities),
        None if sums is None else sums.signs(),
    )
