"""Oracle prompts: what a user who knew the reference would mark.

Source: the prompt grades of Medical SAM Adapter (Wu et al. 2025) and MedSAM (Ma et al. 2024).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from samunet.artifacts.plan import Frame, Plan, ResolvedRecipe
from samunet.artifacts.prompts import VOXEL, Prompt
from samunet.core.geometry import Geometry, Triple
from samunet.core.labels import LabelSpec
from samunet.core.rng import derive_seed
from samunet.inference.simulation import Grade, Mask, ObjectPrompt, objects, simulate

BOX_GRADE: Grade = "box_tight"
CLICK_GRADE: Grade = "clicks_1"
_DECIMALS = 4


@dataclass(frozen=True)
class OracleSettings:
    """How prompts are simulated.

    Args:
        labels: Which structures there are.
        grade: Quality of the prompts.
        seed: With the case's name it decides everything random.
        every_slice: Prompt every slice that shows a structure; else only its middle one, to be propagated.
        frame: The plan's axes; None: slices lie along the file's widest spacing.
    """

    labels: LabelSpec
    grade: Grade
    seed: int
    every_slice: bool = True
    frame: Frame | None = None


def oracle_settings(plan: Plan, recipe: ResolvedRecipe, *, seed: int) -> OracleSettings | None:
    """How a promptable model is scored while it trains: tight boxes, or one click where it knows no boxes.

    Returns:
        None for a model that needs no prompts.
    """
    method = recipe.method
    if not method.promptable:
        return None
    grade = CLICK_GRADE if method.prompts.kind == "points" else BOX_GRADE
    return OracleSettings(plan.label_spec, grade, seed, frame=plan.frame.value)


def case_prompts(
    labels: NDArray[np.integer], geometry: Geometry, settings: OracleSettings, *, case: str
) -> tuple[Prompt, ...]:
    """Prompts for every connected object of every structure on the slices of one case.

    Boxes given on every slice are as thick as their slice, so that each is an object by itself; a box on the middle
    slice is flat, which asks for its continuation on the others.

    Args:
        labels: (Z, Y, X) values.
        geometry: The file's grid.
        settings: How.
        case: Name; part of the seed.
    """
    generator = np.random.default_rng(derive_seed(settings.seed, *case.encode()))
    order = slice_order(geometry, settings.frame)
    prompts: list[Prompt] = []
    for name in settings.labels.names:
        masks: Mask = settings.labels.structure_mask(labels, name).transpose(order)
        for index in _slices_to_prompt(masks, every_slice=settings.every_slice):
            simulated = (simulate(part, settings.grade, generator) for part in objects(masks[index]))
            for prompt in dict.fromkeys(simulated):
                prompts.append(_entry(name, prompt, index, order, thick=settings.every_slice))
    return tuple(prompts)


def slice_order(geometry: Geometry, frame: Frame | None) -> Triple:
    """The file axes (0 Z, 1 Y, 2 X) that are slice, row and column.

    Args:
        geometry: The file's grid.
        frame: The plan's; None: slices lie along an axis of one voxel, else along the widest spacing, else along Z.
    """
    if frame is not None:
        return frame.operation_for(geometry).permutation
    across = max(range(3), key=lambda axis: (geometry.shape[axis] == 1, round(geometry.spacing[axis], 3), -axis))
    rows, columns = (axis for axis in range(3) if axis != across)
    return across, rows, columns


def _slices_to_prompt(masks: Mask, *, every_slice: bool) -> Iterable[int]:
    shown = [int(index) for index in np.flatnonzero(masks.any(axis=(1, 2)))]
    return shown if every_slice or not shown else shown[len(shown) // 2 : len(shown) // 2 + 1]


def _entry(name: str, prompt: ObjectPrompt, index: int, order: Triple, *, thick: bool) -> Prompt:
    """One entry in file voxels (i, j, k), which is the reverse of the file's axes Z, Y, X."""

    def to_ijk(across: float, row: float, column: float) -> tuple[float, ...]:
        position = dict(zip(order, (across, row, column), strict=True))
        return tuple(round(position[axis], _DECIMALS) for axis in (2, 1, 0))

    if prompt.box is not None:
        row0, column0, row1, column1 = prompt.box
        margin = 0.5 if thick else 0.0
        corners = to_ijk(index - margin, row0, column0) + to_ijk(index + margin, row1, column1)
        return Prompt(label=name, box=corners, space=VOXEL)
    points = tuple(to_ijk(index, row, column) for row, column in prompt.points)
    return Prompt(label=name, points=points, positive=prompt.positive, space=VOXEL)
