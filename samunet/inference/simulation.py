"""Prompts as a user might give them, made from a reference mask; every random choice comes from a given generator.

Positions are (row, column) of voxel centres, boxes (row0, column0, row1, column1) of voxel edges: voxels 3 to 5 of an
axis lie between 2.5 and 5.5. What is made here has seen the reference: results obtained with it are oracle results.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from samunet.core.errors import DataError, UsageError

Point = tuple[float, float]
Box = tuple[float, float, float, float]
Mask = NDArray[np.bool_]
Grade = Literal["whole_image", "clicks_1", "clicks_3", "box_0.5", "box_0.75", "box_tight"]

GRADES: tuple[Grade, ...] = get_args(Grade)
CENTRAL_QUANTILE = 0.9
_NEIGHBOURS = np.ones((3, 3), dtype=bool)
_MAX_DRAWS = 50
_LONGEST_WAY = 16.0
_BISECTIONS = 60


@dataclass(frozen=True)
class ObjectPrompt:
    """The prompt of one object on one slice: clicks, or a box.

    Args:
        points: Clicks, (row, column).
        positive: For each click, whether it lies on the object.
        box: (row0, column0, row1, column1); None for clicks.
    """

    points: tuple[Point, ...] = ()
    positive: tuple[bool, ...] = ()
    box: Box | None = None


@dataclass(frozen=True)
class ErrorClick:
    """A click that corrects a mask.

    Args:
        point: (row, column).
        positive: Whether the object was missed there, rather than added.
    """

    point: Point
    positive: bool


def simulate(mask: Mask, grade: Grade, generator: np.random.Generator | None) -> ObjectPrompt:
    """A prompt of a given quality for one object.

    Args:
        mask: (H, W), the object.
        grade: "whole_image": a box as large as the image; "clicks_1", "clicks_3": positive clicks, as :func:`clicks`
            spreads them; "box_0.5", "box_0.75": a box of that IoU with the tight one; "box_tight".
        generator: Randomness; the boxes of a given overlap need it.

    Raises:
        DataError: If the mask is empty.
        UsageError: If there is no such grade, or no generator where one is needed.

    Source: Wu et al., Medical SAM Adapter, 2025 (clicks and overlaps); Ma et al., MedSAM, 2024 (evaluation by boxes).
    """
    if grade == "whole_image":
        return ObjectPrompt(box=whole_image_box(mask.shape))
    if grade in ("clicks_1", "clicks_3"):
        points = clicks(mask, 1 if grade == "clicks_1" else 3, generator)
        return ObjectPrompt(points, (True,) * len(points))
    if grade == "box_tight":
        return ObjectPrompt(box=tight_box(mask))
    if grade not in GRADES:
        raise UsageError("no such grade of prompts", expected=f"one of {', '.join(GRADES)}", found=str(grade))
    if generator is None:
        raise UsageError("a box of a given overlap is drawn at random", expected="a generator", found="None")
    overlap = 0.5 if grade == "box_0.5" else 0.75
    return ObjectPrompt(box=box_with_overlap(tight_box(mask), overlap, generator, mask.shape, mask=mask))


def objects(mask: Mask) -> list[Mask]:
    """The connected components (8-connectivity) of a mask (H, W), the largest first."""
    numbered, count = ndimage.label(mask, structure=_NEIGHBOURS)
    sizes = np.bincount(numbered.ravel(), minlength=count + 1)[1:]
    return [numbered == number for number in 1 + np.argsort(-sizes, kind="stable")]


def largest_object(mask: Mask) -> Mask | None:
    """The largest connected component of a mask (H, W); None if it is empty."""
    numbered, count = ndimage.label(mask, structure=_NEIGHBOURS)
    if not count:
        return None
    largest: Mask = numbered == 1 + int(np.argmax(np.bincount(numbered.ravel())[1:]))
    return largest


def whole_image_box(shape: Sequence[int]) -> Box:
    """The box of a whole slice of H rows and W columns."""
    return -0.5, -0.5, int(shape[0]) - 0.5, int(shape[1]) - 0.5


def tight_box(mask: Mask) -> Box:
    """The smallest box around a mask (H, W).

    Raises:
        DataError: If the mask is empty.
    """
    rows, columns = _window(mask)
    return rows.start - 0.5, columns.start - 0.5, rows.stop - 0.5, columns.stop - 0.5


def jittered_box(box: Box, shift: float, generator: np.random.Generator, shape: Sequence[int]) -> Box:
    """A box whose sides are each moved outwards by up to a fraction of the box, and not beyond the image.

    Args:
        box: The tight box.
        shift: Most that a side moves, as a fraction of the box's height (upper, lower side) or width.
        generator: Draws the four moves, uniformly.
        shape: Rows and columns of the image.

    Source: Ma et al., MedSAM, 2024 (there in pixels); Gu et al., finetune-SAM, 2025.
    """
    sides = np.array([box[2] - box[0], box[3] - box[1]])
    moves = generator.uniform(0, shift, 4) * np.tile(sides, 2)
    return _clipped(np.array(box) + moves * (-1, -1, 1, 1), shape)


def box_with_overlap(
    box: Box, iou: float, generator: np.random.Generator, shape: Sequence[int], *, mask: Mask | None = None
) -> Box:
    """A random box whose intersection over union with a given one is exactly as wanted.

    A direction of moving and scaling is drawn, and the box goes along it, staying in the image, until the overlap has
    fallen to the wanted one. Directions that the image's edge blocks, or at whose end the box would miss the object
    (a box can lie in the hole of a ring), are drawn again; in the end the box loses its lower part instead.

    Args:
        box: The tight box.
        iou: Wanted overlap, in (0, 1].
        generator: Draws the directions.
        shape: Rows and columns of the image.
        mask: (H, W), the object that the box must meet; None: any box will do.

    Raises:
        UsageError: If the overlap is not in (0, 1].
    """
    if not 0 < iou <= 1:
        raise UsageError("no box has such an overlap", expected="an IoU above 0, at most 1", found=str(iou))
    for _ in range(_MAX_DRAWS):
        moved = _moved_until(box, iou, generator.normal(size=4), shape)
        if moved is not None and (mask is None or _meets(moved, mask)):
            return moved
    return box[0], box[1], box[0] + iou * (box[2] - box[0]), box[3]


def box_iou(first: Box, second: Box) -> float:
    """Intersection over union of two boxes."""
    height = max(0.0, min(first[2], second[2]) - max(first[0], second[0]))
    width = max(0.0, min(first[3], second[3]) - max(first[1], second[1]))
    common = height * width
    return common / (_area(first) + _area(second) - common)


def click(mask: Mask, generator: np.random.Generator | None = None) -> Point:
    """A click on an object, near its middle: far from what is outside, be it beyond the image's edge.

    Args:
        mask: (H, W), not empty.
        generator: Draws among the tenth of the voxels that lie farthest inside; without it the farthest is taken
            (of several, the one nearest to the centre of mass).

    Returns:
        (row, column) of a voxel of the mask.

    Raises:
        DataError: If the mask is empty.
    """
    return _farthest(mask, _depth(mask), generator)


def clicks(mask: Mask, count: int, generator: np.random.Generator | None = None) -> tuple[Point, ...]:
    """Several clicks spread over one object.

    The first is :func:`click`'s. Each following one is chosen in the same way among the voxels that lie outside the
    neighbourhood of the former clicks, whose radius is half the distance to the object's farthest voxel. An object of
    fewer voxels than clicks is clicked again at the first place.

    Raises:
        DataError: If the mask is empty.
    """
    depth = _depth(mask)
    points = [_farthest(mask, depth, generator)]
    rows, columns = np.indices(mask.shape)
    distance = np.full(mask.shape, np.inf)
    while len(points) < count:
        distance = np.minimum(distance, np.hypot(rows - points[-1][0], columns - points[-1][1]))
        left = mask & (distance > distance[mask].max() / 2)
        points.append(_farthest(left, depth, generator) if left.any() else points[0])
    return tuple(points)


def error_click(
    prediction: Mask, reference: Mask, valid: Mask, generator: np.random.Generator | None = None
) -> ErrorClick | None:
    """A click in the middle of the largest error, which is a connected region that was missed or added.

    Args:
        prediction: (H, W).
        reference: (H, W).
        valid: (H, W), where the reference is known; elsewhere nothing is an error.
        generator: As in :func:`click`.

    Returns:
        The click, positive where the object was missed; None without an error.

    Source: interactive training of Sofiiuk et al., RITM, 2022; Kirillov et al., Segment Anything, 2023.
    """
    missed = largest_object(reference & ~prediction & valid)
    added = largest_object(prediction & ~reference & valid)
    if missed is None and added is None:
        return None
    positive = added is None or (missed is not None and bool(missed.sum() >= added.sum()))
    region = missed if positive else added
    assert region is not None
    return ErrorClick(click(region, generator), positive)


def _window(mask: Mask) -> tuple[slice, slice]:
    """Rows and columns that a mask occupies."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        raise DataError("an empty mask cannot be prompted", expected="an object", found="no voxel")
    return slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)


def _depth(mask: Mask) -> NDArray[np.float64]:
    """(H, W) distance of each voxel of a mask to the nearest one outside it, 0 outside."""
    window = _window(mask)
    depth = np.zeros(mask.shape)
    depth[window] = ndimage.distance_transform_edt(np.pad(mask[window], 1))[1:-1, 1:-1]
    return depth


def _farthest(mask: Mask, depth: NDArray[np.float64], generator: np.random.Generator | None) -> Point:
    """The deepest voxel of a mask (nearest to its centre of mass if several are), or one of its deepest tenth."""
    rows, columns = np.nonzero(mask)
    depths = depth[rows, columns]
    if generator is not None:
        deepest = np.flatnonzero(depths >= np.quantile(depths, CENTRAL_QUANTILE))
        chosen = int(deepest[generator.integers(len(deepest))])
    else:
        away = np.hypot(rows - rows.mean(), columns - columns.mean())
        chosen = int(np.lexsort((away, -depths))[0])
    return float(rows[chosen]), float(columns[chosen])


def _clipped(box: NDArray[Any], shape: Sequence[int]) -> Box:
    low_row, low_column, high_row, high_column = whole_image_box(shape)
    rows = np.clip(box[[0, 2]], low_row, high_row)
    columns = np.clip(box[[1, 3]], low_column, high_column)
    return float(rows[0]), float(columns[0]), float(rows[1]), float(columns[1])


def _area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def _moved(box: Box, way: NDArray[np.float64], shape: Sequence[int]) -> Box:
    """A box moved by a part of its sides (the way's first two numbers) and scaled by the exponential of the others."""
    low, high = np.array(box[:2]), np.array(box[2:])
    centre = (low + high) / 2 + way[:2] * (high - low)
    half = (high - low) / 2 * np.exp(way[2:])
    return _clipped(np.concatenate([centre - half, centre + half]), shape)


def _moved_until(box: Box, iou: float, direction: NDArray[np.float64], shape: Sequence[int]) -> Box | None:
    """The box on its way along a direction, where the overlap has fallen to the wanted one; None if it never does."""
    near, far = 0.0, 0.125
    while box_iou(box, _moved(box, far * direction, shape)) > iou:
        near, far = far, 2 * far
        if far > _LONGEST_WAY:
            return None
    for _ in range(_BISECTIONS):
        middle = (near + far) / 2
        if box_iou(box, _moved(box, middle * direction, shape)) > iou:
            near = middle
        else:
            far = middle
    return _moved(box, near * direction, shape)


def _meets(box: Box, mask: Mask) -> bool:
    """Whether a box holds a part of a voxel of a mask."""
    first = np.floor(np.array(box[:2]) + 0.5).astype(int)
    last = np.ceil(np.array(box[2:]) + 0.5).astype(int)
    return bool(mask[first[0] : last[0], first[1] : last[1]].any())
