"""The three ways to cut a stored volume into slices: across its slices, across its rows, across its columns.

Voxels that are about as long as they are wide can be read in any of the three.

Source: multi-planar views (Roth et al. 2014) and their aggregation (QuickNAT, Guha Roy et al. 2019).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from samunet.artifacts.plan import Plan
from samunet.artifacts.plan_parts import STORED, Across, Planes
from samunet.artifacts.store import CaseRecord
from samunet.core.labels import LabelSpec

LONGEST_VOXEL = 1.5
SHORTEST_SIDE = 0.2
LARGEST_VOX, LARGEST_MAPS_GIB = 2**23, 1.0
_MAP_BYTES = 4
Item = TypeVar("Item")
Voxels = TypeVar("Voxels", bound=Any)
_FIRST: dict[Across, int] = {"slices": 0, "rows": 1, "columns": 2}


class OccupiedSlices(NamedTuple):
    """What the slices of a reference hold.

    Args:
        label_slices: Per structure that occurs, the slices that hold it.
        valid_slices: Slices with at least one voxel that is not ignored.
    """

    label_slices: dict[str, tuple[int, ...]]
    valid_slices: tuple[int, ...]


def turned(items: Sequence[Item], across: Across) -> tuple[Item, Item, Item]:
    """Values for the slice, row and column axis of a volume, in the order in which :func:`turn` puts these axes."""
    first = _FIRST[across]
    before, after = (items[axis] for axis in range(3) if axis != first)
    return items[first], before, after


def turn(volume: Voxels, across: Across) -> Voxels:
    """A view of a volume whose slices are cut across another axis; the other two keep their order.

    Args:
        volume: (..., S, H, W), of numpy or torch.
        across: The axis to cut across.

    Returns:
        (..., S, H, W) across slices, (..., H, S, W) across rows, (..., W, S, H) across columns.
    """
    lead = volume.ndim - 3
    move = np.moveaxis if isinstance(volume, np.ndarray) else type(volume).movedim
    found: Voxels = move(volume, lead + _FIRST[across], lead)
    return found


def why_one_plane(
    voxels_mm: Sequence[float], shape: Sequence[int], *, num_tokens: int, longest_voxel: float = LONGEST_VOXEL
) -> str | None:
    """Why a volume is cut in one plane only; None where it can be cut in others.

    Volumes are read and averaged as a whole where there are several, so they are limited.

    Args:
        voxels_mm: Stored voxels along slices, rows and columns.
        shape: Voxels along slices, rows and columns.
        num_tokens: Maps of a prediction.
        longest_voxel: Most times that a voxel may be longer one way than another.
    """
    ratio, share, size = max(voxels_mm) / min(voxels_mm), min(shape) / max(shape), math.prod(shape)
    if ratio > longest_voxel:
        return (
            f"voxels are {ratio:.1f} times longer one way than another (more than {longest_voxel:g}), so slices look "
            "right in one plane only"
        )
    if share < SHORTEST_SIDE:
        return f"a volume of {' x '.join(map(str, shape))} voxels would be cut into strips in another plane"
    if size > LARGEST_VOX or size * num_tokens * _MAP_BYTES > LARGEST_MAPS_GIB * 2**30:
        return (
            f"a volume of {size / 1e6:.3g} million voxels and {num_tokens} maps is too large to be read and averaged "
            f"as a whole (at most {LARGEST_VOX / 1e6:.2g} million, and {LARGEST_MAPS_GIB:g} GiB of maps)"
        )
    return None


def planes_of(record: CaseRecord, plan: Plan, planes: Planes) -> tuple[Planes, str | None]:
    """The planes of a recipe in which a volume can be cut, and why others are not among them; None where all are.

    Args:
        record: Of the volume.
        plan: Whose target spacing says how long voxels may be at least.
        planes: Of the recipe.
    """
    if planes == STORED:
        return planes, None
    target, tokens = plan.target_spacing.value, plan.label_spec.num_tokens
    longest = max(LONGEST_VOXEL, max(target) / min(target))
    reason = why_one_plane(record.store_spacing, record.store_shape, num_tokens=tokens, longest_voxel=longest)
    return (planes, None) if reason is None else (STORED, reason)


def occupied_slices(labels: NDArray[np.int16], spec: LabelSpec) -> OccupiedSlices:
    """Where structures are, and where there is something to learn.

    Args:
        labels: (S, H, W) label values.
        spec: Their meaning.
    """
    found = [set(np.unique(plane).tolist()) for plane in labels]
    occupied = {
        name: tuple(index for index, values in enumerate(found) if not values.isdisjoint(wanted))
        for name, wanted in spec.names.items()
    }
    valid = tuple(index for index, values in enumerate(found) if values != {spec.ignore})
    return OccupiedSlices({name: slices for name, slices in occupied.items() if slices}, valid)
