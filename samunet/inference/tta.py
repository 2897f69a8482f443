"""Which in-plane axes of a case may be mirrored, from the plan's anatomical axes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, combinations


def mirror_axes(planned: Sequence[str], anatomical_axes: Sequence[str]) -> tuple[int, ...]:
    """In-plane axes (0 rows, 1 columns) of a case that correspond to planned anatomical mirror axes.

    Args:
        planned: Anatomical axes along which the plan allows mirroring.
        anatomical_axes: The anatomical axis closest to each canonical axis (slice, row, column) of the case.
    """
    return tuple(axis for axis in (0, 1) if anatomical_axes[1 + axis] in planned)


def mirror_combinations(axes: Sequence[int], most: int = 4) -> list[tuple[int, ...]]:
    """The views of test-time mirroring: every subset of the axes, the empty one first.

    Args:
        axes: In-plane axes.
        most: Where there are more views than that, none and all of the axes (2), or none (1).
    """
    views = list(chain.from_iterable(combinations(axes, size) for size in range(len(axes) + 1)))
    return views if len(views) <= most else [views[0], views[-1]][:most]
