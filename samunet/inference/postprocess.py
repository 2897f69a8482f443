"""Connected components of masks: which of a structure's parts are kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from samunet.artifacts.best import ComponentFilter
from samunet.core.labels import LabelSpec

Mask = NDArray[np.bool_]


def component_sizes(mask: Mask) -> NDArray[np.int64]:
    """Voxels of every connected component (26 neighbours) of a mask (Z, Y, X)."""
    _, sizes = _components(mask)
    return sizes[1:]


def filtered_mask(mask: Mask, rule: ComponentFilter, voxel_mm3: float) -> Mask:
    """A mask without the components that a filter removes.

    Args:
        mask: (Z, Y, X).
        rule: The filter; its structure is not looked at.
        voxel_mm3: Volume of a voxel.
    """
    box = _bounding_box(mask)
    if box is None:
        return mask
    parts, sizes = _components(mask[box])
    keep = sizes * voxel_mm3 >= rule.least_mm3
    if rule.kind == "largest":
        keep = np.arange(len(sizes)) == 1 + int(np.argmax(sizes[1:]))
    keep[0] = False
    result = np.zeros_like(mask)
    result[box] = keep[parts]
    return result


def apply_filters(
    labels: NDArray[Any], filters: Sequence[ComponentFilter], spec: LabelSpec, voxel_mm3: float
) -> NDArray[Any]:
    """A label map without the components that filters remove.

    A voxel that a structure loses becomes background; where regions overlap, it becomes what the regions it is still
    in are painted as.

    Args:
        labels: (Z, Y, X) label values.
        filters: At most one per structure.
        spec: Meaning of the values.
        voxel_mm3: Volume of a voxel.
    """
    rules = {rule.structure: rule for rule in filters}
    lost = np.zeros(labels.shape, bool)
    kept: dict[str, Mask] = {}
    for name in spec.names:
        mask = spec.structure_mask(labels, name)
        kept[name] = filtered_mask(mask, rules[name], voxel_mm3) if name in rules else mask
        lost |= mask & ~kept[name]
    if not lost.any():
        return labels
    result = labels.copy()
    result[lost] = spec.background
    if spec.regions_class_order is not None:
        for value, mask in zip(spec.regions_class_order, kept.values(), strict=True):
            result[lost & mask] = value
    return result


def _components(mask: Mask) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Number of its component per voxel (0 outside), and the components' voxels (those outside first)."""
    from scipy.ndimage import label

    parts, _ = label(mask, structure=np.ones((3, 3, 3)))
    return parts, np.bincount(parts.ravel(), minlength=1)


def _bounding_box(mask: Mask) -> tuple[slice, ...] | None:
    from scipy.ndimage import find_objects

    return find_objects(mask.view(np.uint8))[0] if mask.any() else None
