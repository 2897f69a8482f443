"""Slices of an optimizer step, and the parts that they are computed in."""

from __future__ import annotations

import math
from collections.abc import Sequence

from samunet.artifacts.method import Method
from samunet.artifacts.model_spec import SamSpec, get_spec
from samunet.artifacts.plan import DeviceClass, ResolvedRecipe

BATCH_CAP: dict[DeviceClass, int] = {"gpu": 24, "cpu": 8}
LEAST_BATCH = 4
LEAST_BATCH_NORM = 8
Split = tuple[int, int, int]


def trains_batch_norm(spec: SamSpec, method: Method) -> bool:
    """Whether batch norm takes its statistics from the slices that are seen at once."""
    return spec.family == "tiny_vit" and method.encoder.train == "full"


def least_batch(spec: SamSpec, method: Method, depth: int) -> int:
    """Batch norm that trains needs eight slices for its statistics; all else takes four for a steady gradient."""
    least = LEAST_BATCH_NORM if trains_batch_norm(spec, method) else LEAST_BATCH
    return math.ceil(least / depth) * depth


def splits(wanted: int, least: int, *, is_fixed: bool) -> list[Split]:
    """Every way to compute a step in parts of at least so many samples: (of the largest part, parts, of the step).

    Args:
        wanted: Samples of the step.
        least: Of every part; a step of fewer is one part.
        is_fixed: Whether the step must have as many as wanted. Else it may have fewer, in equal parts.
    """
    if wanted <= least:
        return [(wanted, 1, wanted)]
    if not is_fixed and least > 1:
        return [(part, parts, part * parts) for part in range(least, wanted + 1) for parts in [wanted // part]]
    sizes_and_parts = [(math.ceil(wanted / parts), parts) for parts in range(1, wanted // least + 1)]
    rests = (wanted - part * (math.ceil(wanted / part) - 1) for part, _ in sizes_and_parts)
    return [(*split, wanted) for split, rest in zip(sizes_and_parts, rests, strict=True) if rest >= least]


def largest_step(ways: Sequence[Split], at_once: int) -> Split:
    """Of the ways to compute a step, the one of most samples, in fewest parts, whose parts fit; else of the least part.

    Args:
        ways: As :func:`splits` gives them.
        at_once: Samples of a part that fit the memory.
    """
    fitting = [way for way in ways if way[0] <= at_once] or [min(ways)]
    return max(fitting, key=lambda way: (way[2], -way[1]))


def split_batch(recipe: ResolvedRecipe, batch: int, *, is_fixed: bool) -> tuple[int, int]:
    """Slices of a step and its parts, for another number of slices than was planned.

    Parts are no larger than planned, unless batch norm that trains would then see too few slices in one.

    Args:
        recipe: As planned.
        batch: Slices of a step, in whole slabs.
        is_fixed: Whether the step must have as many. Else it may have fewer.
    """
    if batch == recipe.batch_size:
        return batch, recipe.accumulation_steps
    depth, spec = recipe.slab_depth, get_spec(recipe.backbone)
    at_once = math.ceil(recipe.batch_size // depth / recipe.accumulation_steps)
    least = least_batch(spec, recipe.method, depth) // depth if trains_batch_norm(spec, recipe.method) else 1
    _, parts, samples = largest_step(splits(batch // depth, least, is_fixed=is_fixed), at_once)
    return samples * depth, parts
