"""What would change a plan: its decisions planned again with other hardware and, rule by rule, with other facts."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from statistics import median
from typing import Any

from samunet.artifacts.fingerprint import CaseFacts, Fingerprint
from samunet.artifacts.plan import Budget, Decided, Plan
from samunet.artifacts.probe import NO_PROBES, Probes
from samunet.core.geometry import SpacingTriple
from samunet.planners import peft, rules, sizes
from samunet.planners.edits import decisions, edits_of
from samunet.planners.planner import described, facts_of_plan, make_plan, per_file_axis
from samunet.planners.recipes import Facts
from samunet.planners.words import short

Place = tuple[str, ...]
WhatIfs = Mapping[Place, tuple[str, ...]]
GPU_GIB = (4, 6, 8, 12, 16, 24, 48, 80)
CPU_MINUTES = (5, 10, 20, 30, 60, 120, 240, 480)
CPU_GIB = (2, 4, 8, 16, 32)
_FOLLOWS_ANYWAY = ("memory_gib", "minutes")
_STEPS_OF_SEARCH = 40
_FARTHEST_FACTOR = 32.0
_ANY_FACTOR = 1e6


def what_ifs(plan: Plan, fingerprint: Fingerprint, probes: Probes = NO_PROBES) -> WhatIfs:
    """What would change each decision, by its place; a place without an entry is changed by neither.

    Args:
        plan: With its edits marked.
        fingerprint: What it was made from.
        probes: Those it was made with.
    """
    found: dict[Place, tuple[str, ...]] = {}
    for place, sentence in [*_by_budget(plan, fingerprint, probes), *_by_facts(plan, fingerprint)]:
        found[place] = (*found.get(place, ()), sentence)
    return found


def _by_budget(plan: Plan, fingerprint: Fingerprint, probes: Probes) -> Iterator[tuple[Place, str]]:
    """The nearest larger and smaller hardware that changes a decision of a recipe."""
    description, edits = described(plan), edits_of(plan)

    def planned(**changes: float) -> dict[Place, Decided[Any]]:
        budget: Budget = plan.budget.model_copy(update=changes)
        return dict(decisions(make_plan(fingerprint, description, budget, probes=probes, edits=edits)))

    # a GPU's recipes depend on its memory only, so one plan answers for a GPU and for minutes on a CPU
    both = [planned(gpu_memory_gib=gib, cpu_minutes=minutes) for gib, minutes in zip(GPU_GIB, CPU_MINUTES, strict=True)]
    memory = [planned(cpu_memory_gib=gib) for gib in CPU_GIB]
    budget = plan.budget
    by_gpu, by_minutes, by_memory = (
        dict(zip(rungs, plans, strict=True))
        for rungs, plans in ((GPU_GIB, both), (CPU_MINUTES, both), (CPU_GIB, memory))
    )
    for place, decided in decisions(plan):
        if "recipes" not in place or place[-1] in _FOLLOWS_ANYWAY:
            continue
        if place[-2] == "gpu":
            yield from _nearest(place, decided, budget.gpu_memory_gib, by_gpu, "GiB")
        else:
            yield from _nearest(place, decided, budget.cpu_minutes, by_minutes, "minutes")
            yield from _nearest(place, decided, budget.cpu_memory_gib, by_memory, "GiB")


def _nearest(
    place: Place, decided: Decided[Any], now: float, plans: Mapping[int, Mapping[Place, Decided[Any]]], unit: str
) -> Iterator[tuple[Place, str]]:
    above = sorted(size for size in plans if size > now)
    below = sorted((size for size in plans if size < now), reverse=True)
    for sizes_in_order in (above, below):
        for size in sizes_in_order:
            other = plans[size].get(place)
            if other is not None and other.value != decided.value:
                yield place, f"with {size:g} {unit}: {short(other.value)}"
                break


def _by_facts(plan: Plan, fingerprint: Fingerprint) -> Iterator[tuple[Place, str]]:
    """The nearest facts at which a rule comes to another answer, where it hangs on one of them."""
    cases = [fingerprint.cases[name] for name in sorted(fingerprint.cases)]
    alike = [case for case in cases if case.codes == plan.frame.value.orientation]
    yield ("target_spacing",), _spacing(cases)
    yield ("frame",), _slice_axis(alike, plan.target_spacing.value)
    yield ("normalization",), _nonzero(plan, fingerprint)
    yield ("recommended",), _recommended(plan, alike)
    whole = facts_of_plan(plan, fingerprint)
    for name, chosen in plan.configurations.items():
        start = ("configurations", name)
        spacing = per_file_axis(plan.frame.value, chosen.spacing.value, plan.target_spacing.value)
        if chosen.slab_depth.value > 1:
            yield (*start, "slab_depth"), _slab_depth(plan, cases, alike, spacing)
        facts = whole if spacing == plan.target_spacing.value else facts_of_plan(plan, fingerprint, configuration=name)
        for weights, devices in chosen.recipes.items():
            for device, recipe in devices.items():
                at = (*start, "recipes", weights, device)
                yield (*at, "input_size"), _input_size(facts, sizes.grid_of(recipe.method_parts()))
                yield (*at, "foreground_fraction"), _foreground(facts)
                if recipe.encoder.value.train == "adapters":
                    yield (*at, "encoder"), _rank(facts)


def _spacing(cases: Sequence[CaseFacts]) -> str:
    """At which ratio of spacings the coarsest axis takes, or no longer takes, its low percentile."""
    spacings, shapes = [case.spacing for case in cases], [case.shape_after_crop for case in cases]
    target = [median(spacing[axis] for spacing in spacings) for axis in range(3)]
    worst = max(range(3), key=lambda axis: target[axis])
    ratio = target[worst] / max(target[axis] for axis in range(3) if axis != worst)

    def scaled(factor: float) -> bool:
        changed = [_times(spacing, worst, factor) for spacing in spacings]
        return "percentile" in rules.target_spacing(changed, shapes)[1]

    axis = rules.FILE_AXES[worst]
    # as far as the rule's own ratio, however coarse the axis is (999 mm stand for pictures)
    factor = _first_change(scaled, down=scaled(1.0), farthest=max(_FARTHEST_FACTOR, ratio))
    if factor is None:
        return f"however coarse axis {axis} is, its median: it has a third of the others' voxels or more"
    other = "its median" if scaled(1.0) else f"its {rules.LOW_PERCENTILE}th percentile"
    return f"with axis {axis} {ratio * factor:.1f} times coarser than the others (now {ratio:.1f}): {other}"


def _slice_axis(alike: Sequence[CaseFacts], target: SpacingTriple) -> str:
    """How much coarser another axis would have to be for slices to be stacked along it."""
    now = rules.slice_axis(alike, target)[0]
    found = []
    for axis in range(3):
        if axis == now:
            continue
        factor = _first_change(
            lambda f, a=axis: rules.slice_axis(alike, _times(target, a, f))[0],  # type: ignore[misc]
            farthest=_FARTHEST_FACTOR * max(target) / target[axis],
        )
        if factor is not None:
            found.append((factor, axis))
    if not found:
        return "no coarser axis: the data are 2D"
    factor, axis = min(found)
    changed = rules.slice_axis(alike, _times(target, axis, factor))[0]
    mm, name = target[axis] * factor, rules.FILE_AXES[axis]
    return f"with {mm:.4g} mm along axis {name} (now {target[axis]:.4g}): axis {rules.FILE_AXES[changed]}"


def _nonzero(plan: Plan, fingerprint: Fingerprint) -> str:
    if all(channel.scheme != "zscore" for channel in plan.normalization.value):
        return "with another name of the channel in dataset.json: its scheme"
    now = median(case.relative_size_after_crop for case in fingerprint.cases.values())
    limit = rules.NONZERO_MASK_BELOW
    if now < limit:
        return f"if the crop to nonzero kept {limit:g} of a typical image or more (now {now:.2f}): over all voxels"
    return (
        f"if the crop to nonzero kept less than {limit:g} of a typical image (now {now:.2f}): over nonzero voxels only"
    )


def _recommended(plan: Plan, alike: Sequence[CaseFacts]) -> str:
    now = rules.mean_coherence(alike)[plan.frame.value.slice_axis]
    if "2.5d" not in plan.configurations:
        return "with one channel and three slices or more: 2.5d, where labels of neighbouring slices agree"
    text = f"if labels of neighbouring slices agreed with Dice {{}} {rules.COHERENT:g} (now {now:.2f}): {{}}"
    return text.format("no more than", "2d") if now > rules.COHERENT else text.format("more than", "2.5d")


def _slab_depth(plan: Plan, cases: Sequence[CaseFacts], alike: Sequence[CaseFacts], spacing: SpacingTriple) -> str:
    """Over which distance labels would have to cohere for another depth."""
    frame = plan.frame.value
    slice_mm = spacing[frame.slice_axis]
    shapes = rules.slab_shapes(cases, frame, spacing)

    def depth(factor: float) -> int:
        return rules.slab_depth(alike, frame, shapes, slice_mm / factor)[0]

    found = (_first_change(depth, down=down, farthest=_ANY_FACTOR) for down in (False, True))
    steps = [factor for factor in found if factor is not None]
    if not steps:
        is_short = median(shape[0] for shape in shapes) <= rules.LEAST_SLAB
        return "no distance over which labels cohere: volumes are too short" if is_short else "labels to measure it on"
    factor = steps[0]
    return f"with labels that cohere {factor:.2g} times as far: {depth(factor)}"


def _input_size(facts: Facts, grid: sizes.Grid) -> str:
    """The nearest size of typical slices that wants another input."""
    now = sizes.wanted_input(facts.plane, grid)[0]

    def wanted(vox: int) -> int:
        return sizes.wanted_input(replace(facts.plane, typical_vox=vox), grid)[0]

    typical = facts.plane.typical_vox
    # the input never shrinks with the slices, so the ends of those that want the present one are found by bisection
    known = range(1, 8 * typical + 64)
    larger = typical + bisect_right(known[typical:], now, key=wanted) + 1
    smaller = bisect_left(known[: typical - 1], now, key=wanted)
    words = [f"{wanted(vox)} px for typical slices of {vox} voxels" for vox in (larger, smaller) if vox in known]
    return f"without limits of hardware {now} px for {typical} voxels; " + (", ".join(words) or "for any size")


def _foreground(facts: Facts) -> str:
    limit = rules.RARE_FOREGROUND
    share = facts.num_foreground_slices / max(1, facts.num_slices)
    if share < limit:
        return f"if {limit:.0%} of slices or more held a structure (now {share:.0%}): {rules.FOREGROUND_FRACTION:.2g}"
    return f"if fewer than {limit:.0%} of slices held a structure (now {share:.0%}): {rules.RARE_FOREGROUND_FRACTION:g}"


def _rank(facts: Facts) -> str:
    """The number of labelled slices that another rank begins with."""
    start = max(1, facts.num_foreground_slices)

    def rank(factor: float) -> int:
        return peft.lora_rank(round(start * factor), facts.num_structures)[0]

    more = _first_change(rank, farthest=_ANY_FACTOR)
    factor = _first_change(rank, down=True, farthest=_ANY_FACTOR) if more is None else more
    if factor is None:
        return f"no number of labelled slices: rank {rank(1.0)} is set by the structures"
    slices = round(start * factor)
    return f"with {slices} labelled slices (now {facts.num_foreground_slices}): rank {rank(factor)}"


def _first_change(
    answer: Callable[[float], Any], *, down: bool = False, farthest: float = _FARTHEST_FACTOR
) -> float | None:
    """The factor nearest to 1 at which a rule answers otherwise, to a tenth of a percent; None up to the farthest."""
    now = answer(1.0)
    step = float(_FARTHEST_FACTOR ** ((-1 if down else 1) / _STEPS_OF_SEARCH))
    same, other = 1.0, step
    while answer(other) == now:
        same, other = other, other * step
        if not 1 / farthest <= other <= farthest:
            return None
    while abs(other / same - 1) > 1e-3:
        middle = (same * other) ** 0.5
        same, other = (middle, other) if answer(middle) == now else (same, middle)
    return float(other)


def _times(spacing: SpacingTriple, axis: int, factor: float) -> SpacingTriple:
    z, y, x = (mm * factor if index == axis else mm for index, mm in enumerate(spacing))
    return z, y, x
