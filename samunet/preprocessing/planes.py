"""The three ways to cut a stored volume into slices: across its slices, across its rows, across its columns.

Voxels that are about as long as they are wide can be read in any of the three.

Source: multi-planar views (Roth et al. 2014) and their aggregation (QuickNAT, Guha Roy et al. 2019).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from samunet.artifacts.plan_parts import Across
from samunet.core.labels import LabelSpec

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
