"""prompts.json: what a user points at in images, per case and label.

``{case: [{"label": ..., "box": ..., "points": ..., "positive": ..., "space": ...}]}``. Coordinates are continuous,
integers are voxel centres; (i, j, k) are the file's own indices, i the fastest (NIfTI's first, a picture's column x),
k the slowest. Entries of a case are counted from 0 in messages.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, FiniteFloat, StrictBool, StrictInt, StrictStr, model_validator

from samunet.core.config import Schema, parse_schema
from samunet.core.errors import ConfigError
from samunet.core.files import read_json
from samunet.core.labels import LabelSpec

VOXEL, WORLD = "voxel_ijk", "world_ras_mm"
Point = Annotated[tuple[FiniteFloat, ...], Field(min_length=2, max_length=3)]
XYZ = tuple[float, float, float]


class Prompt(Schema):
    """One entry: a box, points, or both, at one object of a label.

    Args:
        label: Name of a structure or region, or the value of a structure.
        box: Two opposite corners, (a0, b0, c0, a1, b1, c1), taken as they are: voxels 3 to 5 are 2.5 to 5.5 by their
            edges. Its sides lie along the image's axes, in either space. In a 2D image (i0, j0, i1, j1).
        points: Each (i, j, k) or (x, y, z); in a 2D image (i, j).
        positive: Per point, whether it lies in the object; all do by default.
        space: "voxel_ijk": the file's indices; "world_ras_mm": millimetres to the right, anterior and superior.
    """

    label: StrictStr | StrictInt
    box: tuple[FiniteFloat, ...] | None = None
    points: tuple[Point, ...] | None = Field(default=None, min_length=1)
    positive: tuple[StrictBool, ...] | None = None
    space: Literal["voxel_ijk", "world_ras_mm"]

    @model_validator(mode="after")
    def _possible(self) -> Prompt:
        faults = self._faults()
        if faults:
            raise ValueError("; ".join(faults))
        return self

    def _faults(self) -> list[str]:
        num_points = len(self.points or ())
        faults = {
            "an entry needs a box or points": self.box is None and not num_points,
            "a box has six numbers, or four in a 2D image": self.box is not None and len(self.box) not in (4, 6),
            "positive goes with points": self.positive is not None and not num_points,
            f"positive needs one true or false for each of the {num_points} points": (
                self.positive is not None and num_points > 0 and len(self.positive) != num_points
            ),
            "without a box at least one point must be positive": (
                self.box is None and self.positive is not None and not any(self.positive)
            ),
            "two numbers per position are pixels of a 2D image: space must be voxel_ijk": (
                self.is_flat and self.space == WORLD
            ),
        }
        return [text for text, wrong in faults.items() if wrong]

    @property
    def is_flat(self) -> bool:
        """Whether any position lacks its third number, as is allowed in 2D images."""
        return len(self.box or ()) == 4 or any(len(point) == 2 for point in self.points or ())

    @property
    def corners(self) -> tuple[XYZ, XYZ] | None:
        """The box's two corners, k = 0 where it has four numbers."""
        if self.box is None:
            return None
        half = len(self.box) // 2
        return _three(self.box[:half]), _three(self.box[half:])

    @property
    def marks(self) -> tuple[tuple[XYZ, bool], ...]:
        """Every point, k = 0 where it has two numbers, and whether it is positive."""
        points = self.points or ()
        positive = (True,) * len(points) if self.positive is None else self.positive
        return tuple((_three(point), sign) for point, sign in zip(points, positive, strict=True))


def _three(numbers: tuple[float, ...]) -> XYZ:
    a, b, c = (*numbers, 0.0)[:3]
    return a, b, c


CasePrompts = tuple[Prompt, ...]


class Prompts(Schema):
    """A whole prompts.json.

    Args:
        cases: Case name to its entries.
    """

    cases: dict[str, Annotated[CasePrompts, Field(min_length=1)]]


def load_prompts(path: Path) -> dict[str, CasePrompts]:
    """Read prompts.json.

    Raises:
        ConfigError: With every fault of the file: the case, the entry counted from 0, and what was found.
    """
    try:
        return parse_schema(Prompts, {"cases": read_json(path)}, file=path).cases
    except ConfigError as error:
        error.todo = "correct these entries (case.entry, the first is 0); documentation/how-to/prompts.md shows them"
        raise


def prompted_structure(label: str | int, labels: LabelSpec) -> str:
    """The structure or region that an entry's label means.

    Raises:
        ConfigError: If there is none; the message lists those that are.
    """
    if isinstance(label, str):
        found = [name for name in labels.names if name == label]
    else:
        found = [] if labels.has_regions else [name for name, values in labels.names.items() if values == (label,)]
    if not found:
        known = [name if labels.has_regions else f"{name} ({v[0]})" for name, v in labels.names.items()]
        what = "the name of a region" if labels.has_regions else "a structure's name or value"
        raise ConfigError("unknown label", expected=f"{what}: {', '.join(known)}", found=repr(label))
    return found[0]
