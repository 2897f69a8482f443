"""With which other facts the rules about the data, its slices and its channels would decide otherwise."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from statistics import median
from typing import Any

from samunet.artifacts.fingerprint import CaseFacts, Fingerprint
from samunet.artifacts.model_spec import TOKEN_SIZE, get_spec
from samunet.artifacts.plan import Configuration, Plan, Recipe
from samunet.artifacts.plan_parts import STORED
from samunet.core.geometry import ANATOMICAL_AXES, SpacingTriple
from samunet.planners import augmentation, peft, rules, sizes
from samunet.planners.alterations import Place, spaced, times
from samunet.planners.attention import LEAST_CPU_GRID
from samunet.planners.planner import facts_of_plan, per_file_axis
from samunet.planners.recipes import Facts
from samunet.planners.words import short

Sentences = Iterator[tuple[Place, str]]
_STEPS_OF_SEARCH = 40
_FARTHEST_FACTOR = 32.0
_ANY_FACTOR = 1e6
_DIGITS = (3, 4, 6, 9)


def by_facts(plan: Plan, fingerprint: Fingerprint) -> Sentences:
    """The nearest facts at which a rule comes to another answer, where it hangs on one of them.

    Args:
        plan: With its edits marked.
        fingerprint: What it was made from.
    """
    cases = [fingerprint.cases[name] for name in sorted(fingerprint.cases)]
    alike = [case for case in cases if case.codes == plan.frame.value.orientation]
    yield ("target_spacing",), _spacing(cases)
    yield ("frame",), _slice_axis(plan, cases, alike)
    if nonzero := _nonzero(plan, fingerprint):
        yield ("normalization",), nonzero
    yield ("mirror_axes",), _mirror_axes(plan)
    yield ("recommended",), _recommended(plan, cases, alike)
    whole = facts_of_plan(plan, fingerprint)
    for name, chosen in plan.configurations.items():
        start = ("configurations", name)
        is_deep = median(shape[0] for shape in whole.shapes) >= rules.LEAST_SLAB
        yield from _by_edits(chosen, start, len(fingerprint.channel_names), is_deep=is_deep)
        spacing = per_file_axis(plan.frame.value, chosen.spacing.value, plan.target_spacing.value)
        if chosen.slab_depth.value > 1:
            yield (*start, "slab_depth"), _slab_depth(plan, cases, alike, spacing)
        facts = whole if spacing == plan.target_spacing.value else facts_of_plan(plan, fingerprint, configuration=name)
        for weights, devices in chosen.recipes.items():
            for device, recipe in devices.items():
                yield from _of_recipe(facts, recipe, (*start, "recipes", weights, device))


def _by_edits(chosen: Configuration, start: Place, num_channels: int, *, is_deep: bool) -> Sentences:
    """What of a configuration follows from another of its entries, or from other channels."""
    depth, context, channels = chosen.slab_depth.value, chosen.context_slices.value, chosen.channels.value
    if is_deep:
        other = 1 if depth > 1 else rules.LEAST_SLAB
        yield (*start, "depth_overlap"), f"with slab_depth {other}: {short(augmentation.depth_overlap(other)[0])}"
        words = f"with slab_depth {other}: {short(peft.depth_mechanism(other)[0])}"
        for weights, devices in chosen.recipes.items():
            yield from (((*start, "recipes", weights, device, "depth"), words) for device in devices)
        beside = 1 - min(1, context)
        if (found := rules.encoder_channels(num_channels, beside)[0]) != channels:
            yield (*start, "channels"), f"with context_slices {beside}: {found}"
    # a single channel would bring neighbours where slabs are planned
    for number in () if context else (rules.ENCODER_CHANNELS, 2):
        if (found := rules.encoder_channels(number, context)[0]) != channels:
            yield (*start, "channels"), f"with {number} channels: {found}"
            break


def _of_recipe(facts: Facts, recipe: Recipe, at: Place) -> Sentences:
    yield (*at, "input_size"), _input_size(facts, sizes.grid_of(recipe.method_parts()))
    yield (*at, "foreground_fraction"), _foreground(facts)
    encoder = recipe.encoder.value
    if encoder.train == "adapters" and recipe.method_parts().adapter("lora"):
        yield (*at, "encoder"), _rank(facts)
    if at[-2] != "none":
        train = "adapters" if encoder.train == "full" else "full"
        if not encoder.adapters and train == "adapters":
            return
        changed = recipe.method_parts().model_copy(update={"encoder": encoder.model_copy(update={"train": train})})
        yield (*at, "weight_decay"), f"with encoder.train {train}: {short(peft.weight_decay(changed)[0])}"
    if recipe.mirror_views.value > 1:
        yield (*at, "mirror_views"), "with prompts (prompts.kind): 1"
    if recipe.planes.value != STORED:
        yield (*at, "planes"), f"with prompts (prompts.kind): {short(STORED)}"
    if get_spec(recipe.backbone.value).family == "vit" and at[-1] == "cpu":
        below = recipe.input_size.value // TOKEN_SIZE < LEAST_CPU_GRID
        side = LEAST_CPU_GRID * TOKEN_SIZE
        words = f"with input_size {side} or more: folded_global" if below else f"with input_size below {side}: upstream"
        yield (*at, "attention"), words


def _spacing(cases: Sequence[CaseFacts]) -> str:
    """At which ratio of spacings the coarsest axis takes, or no longer takes, its low percentile."""
    spacings, shapes = [case.spacing for case in cases], [case.shape_after_crop for case in cases]
    target = [median(spacing[axis] for spacing in spacings) for axis in range(3)]
    worst = max(range(3), key=lambda axis: target[axis])
    ratio = target[worst] / max(target[axis] for axis in range(3) if axis != worst)

    def scaled(factor: float) -> bool:
        changed = [times(spacing, worst, factor) for spacing in spacings]
        return "percentile" in rules.target_spacing(changed, shapes)[1]

    axis = rules.FILE_AXES[worst]
    # as far as the rule's own ratio, however coarse the axis is (999 mm stand for pictures)
    down = scaled(1.0)
    factor = _first_change(scaled, down=down, farthest=max(_FARTHEST_FACTOR, ratio))
    if factor is None:
        return f"however coarse axis {axis} is, its median: it has a third of the others' voxels or more"
    other = "its median" if down else f"its {rules.LOW_PERCENTILE}th percentile"
    named = _beyond(ratio, factor, scaled, down=down)
    return f"with axis {axis} {named:.9g} times coarser than the others (now {ratio:.4g}): {other}"


def _slice_axis(plan: Plan, cases: Sequence[CaseFacts], alike: Sequence[CaseFacts]) -> str:
    """How long voxels would have to be along another axis for slices to be stacked along it."""
    is_given = plan.target_spacing.by_user
    target = plan.target_spacing.value
    found = []
    for axis in range(3):

        def stacked(factor: float, *, fewer: bool = False, axis: int = axis) -> int:
            if is_given:
                return rules.slice_axis(alike, times(target, axis, factor))[0]
            return _axis_of_spaced(cases, alike, axis, factor, fewer=fewer)

        mm_now = target[axis] if is_given else float(median(case.spacing[axis] for case in cases))
        now = stacked(1.0)
        farthest = _FARTHEST_FACTOR * max(target) / target[axis]
        factor = None if axis == now else _first_change(stacked, farthest=farthest)
        # coarser images of the same extent have fewer voxels: what is named holds for both
        while factor is not None and factor <= farthest:
            mm = _beyond(mm_now, factor, stacked)
            answers = {stacked(mm / mm_now), stacked(mm / mm_now, fewer=True)}
            if len(answers) == 1 and now not in answers:
                found.append((mm / mm_now, mm, mm_now, axis, answers.pop()))
                break
            factor *= 1.1
    if not found:
        return "whatever the spacing: only one axis has a single slice"
    _, mm, mm_now, axis, changed = min(found)
    varies = not is_given and len({case.spacing[axis] for case in cases}) > 1
    words = "a target_spacing of " if is_given else "a median of " if varies else ""
    names = rules.FILE_AXES
    return f"with {words}{mm:.9g} mm along axis {names[axis]} (now {mm_now:.4g}): axis {names[changed]}"


def _axis_of_spaced(
    cases: Sequence[CaseFacts], alike: Sequence[CaseFacts], axis: int, factor: float, *, fewer: bool
) -> int:
    """The slice axis where voxels are longer along an axis, as many as they are or so many fewer."""
    if fewer:
        cases, alike = ([spaced(c, axis, factor, same_extent=True) for c in each] for each in (cases, alike))
    spacings = [case.spacing if fewer else times(case.spacing, axis, factor) for case in cases]
    target, _ = rules.target_spacing(spacings, [case.shape_after_crop for case in cases])
    return rules.slice_axis(alike, target)[0]


def _nonzero(plan: Plan, fingerprint: Fingerprint) -> str | None:
    """What the crop to nonzero would have to keep; None where no scheme asks for it."""
    now = median(case.relative_size_after_crop for case in fingerprint.cases.values())
    limit = rules.NONZERO_MASK_BELOW
    kept = limit if now < limit else limit - 0.01
    changed = {
        name: case.model_copy(update={"relative_size_after_crop": kept}) for name, case in fingerprint.cases.items()
    }
    if rules.normalization(fingerprint.model_copy(update={"cases": changed}))[0] == plan.normalization.value:
        return None
    if now < limit:
        return f"if the crop to nonzero kept {limit:g} of a typical image or more (now {now:.2f}): over all voxels"
    return (
        f"if the crop to nonzero kept less than {limit:g} of a typical image (now {now:.2f}): over nonzero voxels only"
    )


def _mirror_axes(plan: Plan) -> str:
    axis = next((axis for axis in ANATOMICAL_AXES if axis in plan.mirror_axes.value), None)
    if axis is not None:
        return f"with a pair of structures that a {axis} reflection swaps, by name or place: not {axis}"
    return f"without pairs of structures that a reflection swaps: {short(rules.mirror_axes(())[0])}"


def _recommended(plan: Plan, cases: Sequence[CaseFacts], alike: Sequence[CaseFacts]) -> str:
    now = rules.mean_coherence(alike)[plan.frame.value.slice_axis]
    agree = f"labels of neighbouring slices that agree with Dice more than {rules.COHERENT:g}"
    if "2.5d" not in plan.configurations:
        lacking = ["one channel"] * (len(plan.channel_names) > 1)
        slices = median(rules.axis_operation(c, plan.frame.value).reorder(c.shape_after_crop)[0] for c in cases)
        lacking += [f"{rules.LEAST_SLICES} slices or more in a typical volume"] * (slices < rules.LEAST_SLICES)
        return f"with {', '.join([*lacking, agree])} (now {now:.2f}): 2.5d"
    if now > rules.COHERENT:
        return f"with labels of neighbouring slices that agree with Dice {rules.COHERENT:g} or less (now {now:.2f}): 2d"
    return f"with {agree} (now {now:.2f}): 2.5d"


def _slab_depth(plan: Plan, cases: Sequence[CaseFacts], alike: Sequence[CaseFacts], spacing: SpacingTriple) -> str:
    """Over which distance labels would have to cohere for another depth."""
    frame = plan.frame.value
    slice_mm = spacing[frame.slice_axis]
    shapes = rules.slab_shapes(cases, frame, spacing)
    now = rules.coherence_mm(alike, frame)
    start = now or slice_mm / 2

    def depth(factor: float) -> int:
        return rules.slab_depth_of(start * factor, shapes, slice_mm)[0]

    for down in (False, True):
        if (factor := _first_change(depth, down=down, farthest=_ANY_FACTOR)) is not None:
            mm = _beyond(start, factor, depth, down=down)
            words = f"{mm:.9g} mm along the slice axis (now {now:.4g}): {depth(mm / start)}"
            return f"with labels that agree with Dice one half over {words}"
    return "however far labels cohere: volumes are too short for another depth"


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


def _beyond(now: float, factor: float, answer: Callable[[float], Any], *, down: bool = False) -> float:
    """A multiple of a number, in few digits and rounded away from it, at which a rule answers as at the factor."""
    exact = now * factor
    for digits in _DIGITS:
        scale = 10.0 ** (digits - 1 - math.floor(math.log10(exact)))
        rounded = (math.floor if down else math.ceil)(exact * scale) / scale
        if answer(rounded / now) == answer(factor):
            return rounded
    return exact
