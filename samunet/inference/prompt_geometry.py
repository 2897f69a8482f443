"""From what a user points at in a file to slices and tiles of the preprocessed case.

The way of a position: file voxels or millimetres -> canonical axes (permuted, flipped) -> crop -> store grid, always
continuous, with voxel centres at integers. On the store grid a position is (slice, row, column).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import ArrayLike, NDArray

from samunet.artifacts.prompts import WORLD, XYZ, Prompt, prompted_structure
from samunet.artifacts.store import CaseRecord
from samunet.core.errors import DataError, SamunetError
from samunet.core.geometry import Geometry
from samunet.core.labels import LabelSpec
from samunet.inference.restore import nearest_store_slice
from samunet.inference.simulation import Box, ObjectPrompt, click, tight_box
from samunet.preprocessing.slicing import Pair, tile_starts

SLACK_VOX = 0.01
TILE_OVERLAP = 0.25


@dataclass(frozen=True)
class PlacedObject:
    """One object of a label and where it was pointed at.

    Args:
        label: Structure or region.
        prompts: Slice of the store to what points at the object there, rows and columns of the store.
        extends: Whether it is looked for on other slices too; a box with a thickness says where its object ends.
    """

    label: str
    prompts: Mapping[int, ObjectPrompt]
    extends: bool

    @property
    def sources(self) -> tuple[int, ...]:
        """Slices that can be segmented from what was given there: not by negative points alone."""
        return tuple(sorted(index for index, prompt in self.prompts.items() if prompt.box or any(prompt.positive)))


def store_positions(points: ArrayLike, *, space: str, geometry: Geometry, record: CaseRecord) -> NDArray[np.float64]:
    """Positions in a file to positions on the store grid of the same case.

    Args:
        points: (N, 3), file voxels (i, j, k) or RAS+ mm (x, y, z).
        space: "voxel_ijk" or "world_ras_mm".
        geometry: The file's grid.
        record: How the case was preprocessed.

    Returns:
        (N, 3) continuous (slice, row, column); outside the store where the file's position is outside the crop.
    """
    return on_store_grid(canonical_positions(points, space=space, geometry=geometry, record=record), record)


def canonical_positions(
    points: ArrayLike, *, space: str, geometry: Geometry, record: CaseRecord
) -> NDArray[np.float64]:
    """Positions (N, 3) in a file to its canonical axes (slice, row, column); arguments as above."""
    given = np.asarray(points, np.float64).reshape(-1, 3)
    file_zyx = geometry.to_voxel(given) if space == WORLD else given[:, ::-1]
    canonical = np.empty_like(file_zyx)
    for axis, (source, flipped) in enumerate(zip(record.permutation, record.flips, strict=True)):
        along = file_zyx[:, source]
        canonical[:, axis] = record.file_shape[source] - 1 - along if flipped else along
    return canonical


def on_store_grid(canonical: NDArray[np.float64], record: CaseRecord) -> NDArray[np.float64]:
    """Positions (N, 3) on canonical axes to the store grid."""
    scale = np.array(record.store_shape) / np.array(record.crop_shape)
    result: NDArray[np.float64] = (canonical - np.array(record.crop_start) + 0.5) * scale - 0.5
    return result


def marked_slice(along: float, record: CaseRecord) -> int:
    """The store's slice on which a mark is asked, from its canonical position across the slices.

    A mark lies in one slice of the file; it is asked on the store's slice from which that one is restored.
    """
    start, stop = record.crop_start[0], record.crop_stop[0]
    return nearest_store_slice(min(max(math.floor(along + 0.5), start), stop - 1) - start, record)


def place_prompts(
    prompts: Sequence[Prompt], *, geometry: Geometry, record: CaseRecord, labels: LabelSpec
) -> tuple[PlacedObject, ...]:
    """The objects that a case's prompts point at.

    A box with a thickness is an object of its own. Every other entry marks single slices: entries of one label that
    mark different slices mean the same object, those that share a slice mean different ones.

    Args:
        prompts: Entries of the case.
        geometry: The file's grid.
        record: How the case was preprocessed.
        labels: The model's labels.

    Raises:
        DataError: With all faults of the case: unknown labels, positions outside the image, boxes without extent.
    """
    faults: list[str] = []
    objects: list[PlacedObject] = []
    for number, prompt in enumerate(prompts):
        try:
            _join(objects, _place(prompt, geometry, record, labels))
        except SamunetError as error:
            details = "".join(
                f"; {word} {value}" for word, value in (("expected", error.expected), ("found", error.found)) if value
            )
            faults.append(f"  - entry {number}: {error.problem}{details}")
    if faults:
        raise DataError(
            "\n".join(["the prompts of this case cannot be used", *faults]),
            case=record.name,
            todo="correct these entries of the prompts' file; they are counted from 0",
        )
    return tuple(objects)


def _join(objects: list[PlacedObject], new: PlacedObject) -> None:
    """Add to the first object of the label of which other slices are marked, or as a new object."""
    for index, known in enumerate(objects):
        alike = known.label == new.label and known.extends and new.extends
        if alike and not known.prompts.keys() & new.prompts.keys():
            objects[index] = PlacedObject(known.label, {**known.prompts, **new.prompts}, extends=True)
            return
    objects.append(new)


def _place(prompt: Prompt, geometry: Geometry, record: CaseRecord, labels: LabelSpec) -> PlacedObject:
    if prompt.is_flat and record.file_shape[0] > 1:
        raise DataError(
            "two numbers per position are pixels of a 2D image",
            expected=f"three, k from 0 to {record.file_shape[0] - 1}",
        )
    label = prompted_structure(prompt.label, labels)
    box, span, thick = _place_box(prompt, geometry, record)
    marks = _place_points(prompt, geometry, record)
    placed = {}
    for index in sorted({*span, *marks}):
        points, positive = zip(*marks[index], strict=True) if index in marks else ((), ())
        placed[index] = ObjectPrompt(points, positive, box if index in span else None)
    return PlacedObject(label, placed, extends=not thick)


def _place_points(
    prompt: Prompt, geometry: Geometry, record: CaseRecord
) -> dict[int, list[tuple[tuple[float, float], bool]]]:
    """Store slice to the points on it, (row, column) and whether positive."""
    if not prompt.marks:
        return {}
    given = [point for point, _ in prompt.marks]
    canonical = canonical_positions(given, space=prompt.space, geometry=geometry, record=record)
    shape = np.array(record.store_shape)
    found: dict[int, list[tuple[tuple[float, float], bool]]] = {}
    placed = zip(canonical[:, 0], on_store_grid(canonical, record), prompt.marks, strict=True)
    for along, position, (point, sign) in placed:
        if (position < -0.5 - SLACK_VOX).any() or (position > shape - 0.5 + SLACK_VOX).any():
            raise _outside("a point", point, record, prompt.space)
        found.setdefault(marked_slice(along, record), []).append(((float(position[1]), float(position[2])), sign))
    return found


def _place_box(prompt: Prompt, geometry: Geometry, record: CaseRecord) -> tuple[Box | None, range, bool]:
    """The box within a slice, the store's slices it spans, and whether it has a thickness across them.

    It spans the slices whose centres it holds, or else the one on which its middle is asked.
    """
    if prompt.corners is None:
        return None, range(0), False
    canonical = canonical_positions(prompt.corners, space=prompt.space, geometry=geometry, record=record)
    corners = on_store_grid(canonical, record)
    low, high = corners.min(0), corners.max(0)
    shape = np.array(record.store_shape)
    if (high[1:] - low[1:] < SLACK_VOX).any():
        raise DataError(
            "the box has no extent within the slices",
            expected=f"a box that is flat along file axis {'kji'[record.permutation[0]]} at most, given by its edges",
            found=f"{prompt.box}",
        )
    if (high < -0.5 + SLACK_VOX).any() or (low > shape - 0.5 - SLACK_VOX).any():
        raise _outside("the box", prompt.corners[0] + prompt.corners[1], record, prompt.space)
    thick = bool(high[0] - low[0] >= SLACK_VOX)
    rows_columns = np.clip([low[1:], high[1:]], -0.5, shape[1:] - 0.5).ravel()
    box = (float(rows_columns[0]), float(rows_columns[1]), float(rows_columns[2]), float(rows_columns[3]))
    middle = marked_slice(float(canonical[:, 0].mean()), record)
    return box, _span(float(low[0]), float(high[0]), record.store_shape[0], middle), thick


def _span(low: float, high: float, num_slices: int, middle: int) -> range:
    first, last = math.ceil(low - SLACK_VOX), math.floor(high + SLACK_VOX)
    if first > last or high - low < SLACK_VOX:
        first = last = middle
    return range(min(max(first, 0), num_slices - 1), max(min(last, num_slices - 1), 0) + 1)


def _outside(what: str, given: XYZ | tuple[float, ...], record: CaseRecord, space: str) -> DataError:
    """The fault of a position outside the image, or in its empty margin, which preprocessing cuts away."""
    inverse = record.operation.inverse()
    start, stop = np.array(record.crop_start), np.array(record.crop_stop)
    last = np.array(record.canonical_shape) - 1
    low = inverse.reorder(np.where(record.flips, last - (stop - 1), start).tolist())
    high = inverse.reorder(np.where(record.flips, last - start, stop - 1).tolist())
    ranges = ", ".join(f"{name} {a} to {b}" for name, a, b in zip("ijk", low[::-1], high[::-1], strict=True))
    note = "" if space != WORLD else " (in voxels; is the position RAS+, in mm?)"
    return DataError(
        f"{what} lies outside the image or in its empty (zero) margin",
        expected=ranges + note,
        found=str(tuple(given)),
    )


def ways_from(sources: Sequence[int], num_slices: int) -> list[tuple[int, range]]:
    """Which slices are followed from which marked one, in the order of going there: each from the nearest.

    Args:
        sources: Marked slices, ascending; of two that are equally near the first is followed.
        num_slices: Slices of the volume.
    """
    ways = []
    for number, source in enumerate(sources):
        lowest = 0 if number == 0 else (sources[number - 1] + source) // 2 + 1
        last = num_slices - 1 if number + 1 == len(sources) else (source + sources[number + 1]) // 2
        ways += [(source, range(source - 1, lowest - 1, -1)), (source, range(source + 1, last + 1))]
    return ways


def following_prompt(mask: NDArray[np.bool_], *, clicks: bool, given: ObjectPrompt | None) -> ObjectPrompt:
    """What points at an object beside the slice on which it was found.

    Args:
        mask: (H, W), not empty, where it was found.
        clicks: Also click on the middle of the mask.
        given: Points that the user gave on the slice itself.
    """
    extra = given or ObjectPrompt()
    middle = (click(mask),) if clicks else ()
    return ObjectPrompt(middle + extra.points, (True,) * len(middle) + extra.positive, tight_box(mask))


def tile_places(low: Sequence[float], high: Sequence[float], tile: int, shape: Pair) -> list[Pair]:
    """First row and column of the tiles from which a prompt is answered.

    Args:
        low: First row and column that the prompt reaches.
        high: Last ones.
        tile: Side of a tile.
        shape: Rows and columns of the slice.
    """
    rows, columns = (_places_along(a, b, tile, n) for a, b, n in zip(low, high, shape, strict=True))
    return list(product(rows, columns))


def _places_along(low: float, high: float, tile: int, length: int) -> list[int]:
    if length <= tile:
        return list(tile_starts(length, tile, 0))
    if high - low <= tile:
        first = round((low + high - tile + 1) / 2)
        return [min(max(first, 0), length - tile)]
    begin, end = max(0, int(np.floor(low + 0.5))), min(length, int(np.ceil(high + 0.5)))
    starts = tile_starts(max(end - begin, tile), tile, TILE_OVERLAP)
    return sorted({min(begin + start, length - tile) for start in starts})


def prompt_within(prompt: ObjectPrompt, start: Pair, side: int) -> ObjectPrompt:
    """The part of a prompt that a tile of a given side holds, points on its edge included."""
    low, high = np.array(start) - 0.5, np.array(start) + side - 0.5
    held = [bool((low <= point).all() and (point <= high).all()) for point in np.array(prompt.points).reshape(-1, 2)]
    points = tuple(point for point, inside in zip(prompt.points, held, strict=True) if inside)
    signs = tuple(sign for sign, inside in zip(prompt.positive, held, strict=True) if inside)
    if prompt.box is None:
        return ObjectPrompt(points, signs)
    corners = np.clip(np.array(prompt.box).reshape(2, 2), low, high)
    if (corners[1] <= corners[0]).any():
        return ObjectPrompt(points, signs)
    (a, b), (c, d) = corners.tolist()
    return ObjectPrompt(points, signs, (a, b, c, d))
