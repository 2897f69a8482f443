"""Across which axes of a volume slices are cut: facts in, (value, reason) out."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import numpy as np

from samunet.artifacts.plan import DeviceClass
from samunet.artifacts.plan_parts import STORED, Across, Planes
from samunet.core.geometry import SpacingTriple, Triple
from samunet.planners import augmentation, schedule, sizes
from samunet.planners.augmentation import LONGEST_SECONDS
from samunet.planners.edits import Reasoned
from samunet.planners.load import Load
from samunet.planners.mirrors import LEFT_RIGHT
from samunet.planners.rules import COHERENCE_TIE
from samunet.preprocessing.planes import turned, why_one_plane

LEAST_PASSES = 4.0
MOST_UNFIT = 0.1
PREDICTION_SPEEDUP = 3.0
_OTHERS: tuple[Across, ...] = ("rows", "columns")


def planes(
    voxels_mm: Sequence[SpacingTriple],
    shapes: Sequence[Triple],
    coherence: Sequence[float],
    axes: Sequence[str],
    mirror: Collection[str],
    *,
    num_tokens: int,
) -> tuple[Planes, str]:
    """The axes across which a dataset can be cut into slices; the stored slices first.

    Others join them where nine cases in ten have voxels about as long as they are wide and labels change as little from
    slice to slice. Not left-right where structures have sides: slices of both halves of the body look alike and hold
    other structures.

    Args:
        voxels_mm: Stored voxels (slice, row, column) per case.
        shapes: Voxels (slices, rows, columns) per case.
        coherence: Dice of labels between neighbouring slices across slices, rows and columns.
        axes: Anatomical axis of slices, rows and columns.
        mirror: Anatomical axes along which images may be mirrored.
        num_tokens: Maps of a prediction.

    Source: QuickNAT (Guha Roy et al. 2019), view aggregation.
    """
    if max(shape[0] for shape in shapes) == 1:
        return STORED, "the data are 2D"
    if not max(coherence):
        return STORED, "no label says in which planes structures are easy to see"
    reasons = [why_one_plane(mm, s, num_tokens=num_tokens) for mm, s in zip(voxels_mm, shapes, strict=True)]
    unfit = [reason for reason in reasons if reason is not None]
    if len(unfit) > MOST_UNFIT * len(reasons):
        return (
            STORED,
            f"{len(unfit)} of {len(reasons)} cases are cut in one plane only, such as: {min(unfit)}",
        )
    ratio = np.median([max(mm) / min(mm) for mm in voxels_mm])
    chosen, left_out = list(STORED), []
    for name, own, axis in zip(_OTHERS, coherence[1:], axes[1:], strict=True):
        if own < coherence[0] - COHERENCE_TIE:
            left_out.append(f"not across {name}, where labels change more")
        elif axis == LEFT_RIGHT and axis not in mirror:
            left_out.append(f"not across {name}, as left and right look alike and are other structures")
        else:
            chosen.append(name)
    shown = ", ".join(f"{name} {own:.2f}" for name, own in zip((*STORED, *_OTHERS), coherence, strict=True))
    known = [f"voxels are typically {ratio:.2g} times longer one way than another", f"labels agree with Dice {shown}"]
    return tuple(chosen), "; ".join([*known, *left_out])


def most_mirrors(mirrored: Sequence[bool], chosen: Planes) -> int:
    """Most in-plane axes, over the planes, along which images may be mirrored.

    Args:
        mirrored: Whether they may be along slices, rows and columns.
        chosen: Axes across which slices are cut.
    """
    return max(sum(turned(mirrored, across)[1:]) for across in chosen)


def seconds_per_view(
    load: Load,
    shapes: Sequence[Triple],
    chosen: Planes,
    batch: int,
    num_tokens: int,
    tile_overlap: float,
    depth_overlap: float | None,
) -> float:
    """What predicting a typical volume takes on two CPU threads without mirrored views.

    Args:
        load: Of a training step.
        shapes: Voxels (slices, rows, columns) per case.
        chosen: Axes across which slices are cut.
        batch: Slices of a step.
        num_tokens: Maps of a prediction.
        tile_overlap: Fraction by which neighbouring tiles overlap.
        depth_overlap: Fraction by which slabs overlap; a slice is seen once more where they do. None: the rule's.
    """
    depth, side = load.slab_depth, load.tile_vox
    overlap = augmentation.depth_overlap(depth)[0] if depth_overlap is None else depth_overlap
    seen = depth / max(1, math.floor(depth * (1 - overlap)))
    tiles = sum(
        augmentation.num_tiles([turned(shape, across) for shape in shapes], side, tile_overlap) for across in chosen
    )
    rate = schedule.cpu_images_per_second(
        load.spec, load.method, load.input_size, num_tokens, batch=batch, tile_vox=side
    )
    return round(seen * tiles) / (PREDICTION_SPEEDUP * rate)


def passes(steps: int, batch: int, shapes: Sequence[Triple], tile_vox: int) -> float:
    """How often a training sees every stored slice, in all its tiles.

    Args:
        steps: Of the training.
        batch: Slices of a step.
        shapes: Voxels (slices, rows, columns) per case.
        tile_vox: Side of a tile.
    """
    return steps * batch / (sum(shape[0] for shape in shapes) * sizes.tiles_per_slice(shapes, tile_vox))


def of_recipe(
    possible: Reasoned, *, device: DeviceClass, promptable: bool, slab_depth: int, passes: float, seconds: float
) -> Reasoned:
    """The axes across which a recipe cuts slices.

    Args:
        possible: Those of the data, with the reason.
        device: Class of device.
        promptable: Whether prompts are needed.
        slab_depth: Slices that see each other.
        passes: How often the training sees every stored slice, which the planes share.
        seconds: What a typical volume takes on a CPU across all axes, without mirrored views.
    """
    if possible[0] == STORED:
        return possible
    if promptable:
        return STORED, "prompts point at stored slices"
    if slab_depth > 1:
        return STORED, "slabs are stacked along the stored slices"
    if device == "cpu" and seconds > LONGEST_SECONDS:
        return STORED, (
            f"a typical volume would take about {seconds:.2g} s across {len(possible[0])} axes on two CPU threads "
            f"(more than {LONGEST_SECONDS:g} s)"
        )
    chosen = possible[0][: max(1, math.floor(passes / LEAST_PASSES))]
    if chosen == possible[0]:
        return possible
    return chosen, (
        f"training sees every slice about {passes:.2g} times, which planes share, and each needs {LEAST_PASSES:g}; "
        f"{possible[1]}"
    )
