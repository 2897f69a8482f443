"""Facts a slice-wise network needs and nnU-Net does not measure: what each structure and the image grid look like."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from samunet.artifacts.fingerprint import StructureFacts
from samunet.core.geometry import Geometry
from samunet.core.labels import LabelSpec

_MAX_DISTANCE_VOXELS = 4_000_000
_MAX_LINES = 2048
_MIN_LINE = 8
_DERIVATIVE_POWER_KEPT = 0.99
Box = tuple[slice, slice, slice]


def structure_facts(label_map: NDArray[Any], labels: LabelSpec, geometry: Geometry) -> dict[str, StructureFacts]:
    """Facts of every structure present in one case.

    Args:
        label_map: (Z, Y, X) integers.
        labels: What they mean.
        geometry: The map's grid.
    """
    boxes = ndimage.find_objects(np.clip(label_map, 0, None).astype(np.int32))
    found: dict[str, StructureFacts] = {}
    for name, values in labels.names.items():
        present = [boxes[v - 1] for v in values if 0 < v <= len(boxes) and boxes[v - 1] is not None]
        if present:
            box = _union(present)
            found[name] = _facts(np.isin(label_map[box], values), box, geometry)
    return found


def _facts(mask: NDArray[np.bool_], box: Box, geometry: Geometry) -> StructureFacts:
    spacing = geometry.spacing
    size = int(mask.sum())
    centre = np.array([float(np.mean(index)) for index in np.nonzero(mask)]) + [s.start for s in box]
    curves = [coherence_curve(mask, axis) for axis in range(3)]
    lengths = [half_distance(curve) * mm for curve, mm in zip(curves, spacing, strict=True)]
    occupied = [int(mask.any(axis=_others(axis)).sum()) for axis in range(3)]
    extent = [n * mm for n, mm in zip(mask.shape, spacing, strict=True)]
    world = geometry.to_world(centre)
    return StructureFacts(
        volume_mm3=size * geometry.voxel_volume_mm3,
        num_components=int(ndimage.label(mask, structure=np.ones((3, 3, 3)))[1]),
        num_slices=(occupied[0], occupied[1], occupied[2]),
        extent_mm=(extent[0], extent[1], extent[2]),
        width_mm=thickest_width_mm(mask, box, geometry),
        centroid_mm=(float(world[0]), float(world[1]), float(world[2])),
        coherence=(curves[0].get(1, 0.0), curves[1].get(1, 0.0), curves[2].get(1, 0.0)),
        coherence_mm=(lengths[0], lengths[1], lengths[2]),
    )


def coherence_curve(mask: NDArray[np.bool_], axis: int) -> dict[int, float]:
    """Mean Dice between cross-sections by their distance in slices, up to where it has halved.

    Args:
        mask: (Z, Y, X) of one structure.
        axis: The axis across which slices are taken.
    """
    slices = np.moveaxis(mask, axis, 0)
    slices = slices[slices.any(axis=(1, 2))].reshape(-1, mask.size // mask.shape[axis])
    areas = slices.sum(axis=1)
    curve: dict[int, float] = {0: 1.0}
    step = 1
    while step < len(slices) and curve[max(curve)] > 0.5:
        shared = (slices[step:] & slices[:-step]).sum(axis=1)
        curve[step] = float(np.mean(2 * shared / (areas[step:] + areas[:-step])))
        step += max(1, step // 2)
    return curve


def half_distance(curve: dict[int, float]) -> float:
    """Slices at which a coherence curve crosses one half, by linear interpolation; its end if it never does."""
    steps = sorted(curve)
    for near, far in pairwise(steps):
        if curve[far] <= 0.5:
            return near + (far - near) * (curve[near] - 0.5) / max(curve[near] - curve[far], 1e-12)
    return float(max(steps[-1], 1))


def thickest_width_mm(mask: NDArray[np.bool_], box: Box, geometry: Geometry) -> float:
    """Twice the largest distance from a voxel of the structure to the outside, in mm.

    Beyond the image nothing is known, so the image's border is no outside. A structure that fills the image gets its
    largest extent. Structures of more than four million voxels are measured on every n-th voxel.
    """
    margins = [(int(s.start > 0), int(s.stop < n)) for s, n in zip(box, geometry.shape, strict=True)]
    stride = int(np.ceil((mask.size / _MAX_DISTANCE_VOXELS) ** (1 / 3))) if mask.size > _MAX_DISTANCE_VOXELS else 1
    steps = [stride if n > 4 * stride else 1 for n in mask.shape]
    padded = np.pad(mask[:: steps[0], :: steps[1], :: steps[2]], margins)
    spacing = [mm * step for mm, step in zip(geometry.spacing, steps, strict=True)]
    if padded.all():
        return float(max(n * mm for n, mm in zip(mask.shape, geometry.spacing, strict=True)))
    return float(2 * ndimage.distance_transform_edt(padded, sampling=spacing).max())


def effective_resolution(image: NDArray[Any]) -> tuple[float, float, float]:
    """Fraction of the Nyquist frequency that carries the image's detail, per axis.

    The frequency below which 99 % of the power of the derivative lies, over up to 2048 lines per axis and channel;
    1 for constant images and for axes too short to tell.

    Args:
        image: (C, Z, Y, X).
    """
    result = [float(np.median([_line_resolution(channel, axis) for channel in image])) for axis in range(3)]
    return result[0], result[1], result[2]


def _line_resolution(volume: NDArray[Any], axis: int) -> float:
    length = volume.shape[axis]
    if length < _MIN_LINE:
        return 1.0
    lines = np.moveaxis(volume, axis, -1).reshape(-1, length)
    lines = lines[:: max(1, len(lines) // _MAX_LINES)].astype(np.float64)
    lines = (lines - lines.mean(axis=1, keepdims=True)) * np.hanning(length)
    power = np.mean(np.abs(np.fft.rfft(lines, axis=1)) ** 2, axis=0)
    frequency = np.arange(power.size) / (length / 2)
    weighted = power * frequency**2
    if weighted.sum() <= 1e-12 * max(float(power.sum()), 1e-12) or power.sum() <= 1e-9:
        return 1.0
    place = int(np.searchsorted(np.cumsum(weighted), _DERIVATIVE_POWER_KEPT * weighted.sum()))
    return float(min(1.0, frequency[place]))


def _others(axis: int) -> tuple[int, int]:
    first, second = (a for a in range(3) if a != axis)
    return first, second


def _union(boxes: Iterable[Box]) -> Box:
    boxes = list(boxes)
    spans = [slice(min(b[a].start for b in boxes), max(b[a].stop for b in boxes)) for a in range(3)]
    return spans[0], spans[1], spans[2]
