"""What would change a plan: its decisions planned again with other hardware, facts and edits, and beside each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from samunet.artifacts.fingerprint import Fingerprint
from samunet.artifacts.method import Lora
from samunet.artifacts.plan import Decided, Plan, Recipe
from samunet.artifacts.probe import NO_PROBES, Probes
from samunet.planners import sizes
from samunet.planners.alterations import Inputs, Place, Planned, longer, recipes_of
from samunet.planners.edits import PLANNED_CONFIGURATIONS, decisions, is_planned
from samunet.planners.other_facts import Sentences, by_facts
from samunet.planners.rests_on import EDIT, MEMORY, otherwise, rests_on
from samunet.planners.words import short
from samunet.preprocessing.normalization import scheme_for_channel

WhatIfs = Mapping[Place, tuple[str, ...]]
GPU_GIB = (4, 6, 8, 12, 16, 24, 48, 80)
CPU_MINUTES = (5, 10, 20, 30, 60, 120, 240, 480)
CPU_GIB = (2, 4, 8, 16, 32)
SAME = "the same with"
_TIMES_OVER = (8, 64)
_EVERY = 8
_MOST_CASES = 1000
_LONGER = 64
_WIDE_TILT_DEG, _NARROW_DEG = 45.0, 15.0
_BATCH = ("accumulation_steps", "learning_rate", "epochs", "warmup_steps", "ema_decay", "memory_gib")
_OF_CASES = ("batch_size", "epochs", "iterations", "warmup_steps", "ema_decay", "learning_rate")
_OF_SIZE = ("tile_vox", "checkpointing", "memory_gib")
_OF_WEIGHTS = ("backbone", "encoder", "decoder", "attention", "intensity_map", "learning_rate", "weight_decay")
_OF_DEVICE = ("backbone", "decoder", "attention", "precision", "mirror_views", "planes", "iterations")
_OF_CONFIGURATION = ("context_slices", "slab_depth", "channels", "depth_overlap", "depth", "intensity_map", "planes")


def what_ifs(plan: Plan, fingerprint: Fingerprint, probes: Probes = NO_PROBES) -> WhatIfs:
    """What would change each decision, by its place; of each kind of change the nearest that does.

    Args:
        plan: With its edits marked.
        fingerprint: What it was made from.
        probes: Those it was made with.
    """
    inputs, every = Inputs.of(plan, fingerprint, probes), dict(decisions(plan))
    by_rule = {
        place: decided
        for place, decided in every.items()
        if not decided.by_user and (place[0] != "configurations" or is_planned(plan, place[1]))
    }
    found: dict[Place, list[str]] = {place: [] for place in every}
    for place, sentence in [
        *_by_budget(by_rule, inputs),
        *by_facts(plan, fingerprint),
        *_by_data(by_rule, plan, inputs),
        *_by_edits(by_rule, plan, inputs),
        *_beside(by_rule, every),
    ]:
        if place in by_rule and sentence not in found[place]:
            found[place].append(sentence)
    for place, sentences in found.items():
        always = otherwise(place) if place in by_rule else None
        if always is not None:
            sentences.append(always)
        elif all(sentence.startswith(SAME) for sentence in sentences):
            sentences.append(EDIT)
    return {place: tuple(sentences) for place, sentences in found.items()}


def _by_budget(now: Planned, inputs: Inputs) -> Sentences:
    """The nearest larger and smaller hardware that changes a decision of a recipe, or that no GPU tried does."""
    # a GPU's recipes depend on its memory only, so one plan answers for a GPU and for minutes on a CPU
    rungs = list(zip(GPU_GIB, CPU_MINUTES, strict=True))
    both = [inputs.with_budget(gpu_memory_gib=gib, cpu_minutes=minutes).planned() for gib, minutes in rungs]
    memory = [inputs.with_budget(cpu_memory_gib=gib).planned() for gib in CPU_GIB]
    by_gpu, by_minutes, by_memory = (
        dict(zip(rungs, plans, strict=True))
        for rungs, plans in ((GPU_GIB, both), (CPU_MINUTES, both), (CPU_GIB, memory))
    )
    budget = inputs.budget
    for place, decided in now.items():
        if "recipes" not in place or place[-1] == "minutes":
            continue
        if place[-2] == "gpu":
            changes = list(_nearest(place, decided, budget.gpu_memory_gib, by_gpu, "GiB"))
            yield from changes
            if not changes and MEMORY["gpu"] in rests_on(place):
                yield place, f"{SAME} {', '.join(map(str, GPU_GIB[:-1]))} and {GPU_GIB[-1]} GiB"
        else:
            yield from _nearest(place, decided, budget.cpu_minutes, by_minutes, "minutes")
            yield from _nearest(place, decided, budget.cpu_memory_gib, by_memory, "GiB")


def _nearest(
    place: Place, decided: Decided[Any], now: float, plans: Mapping[int, Planned], unit: str
) -> Iterator[tuple[Place, str]]:
    above = sorted(size for size in plans if size > now)
    below = sorted((size for size in plans if size < now), reverse=True)
    for sizes_in_order in (above, below):
        for size in sizes_in_order:
            if _differs(plans[size].get(place), decided):
                yield place, f"with {size:g} {unit}: {_changed(plans[size][place], decided)}"
                break


def _by_data(now: Planned, plan: Plan, inputs: Inputs) -> Sentences:
    """What other cases, channels, pairs of structures and tilts change."""
    number = len(inputs.fingerprint.cases)
    more = [(f"the dataset {k} times over", inputs.times_over(k)) for k in _TIMES_OVER if number * k <= _MOST_CASES]
    yield from _first(now, _OF_CASES, more)
    if number > 1:
        yield from _first(now, _OF_CASES, [(f"every {_EVERY}th case only", inputs.every(_EVERY))])
    axis = plan.frame.value.slice_axis
    if all(case.shape[axis] > 1 for case in inputs.fingerprint.cases.values()):
        words = f"{_LONGER} times as many slices in each volume"
        yield from _first(now, ("mirror_views",), [(words, inputs.with_cases(lambda c: longer(c, axis, _LONGER)))])
    name = "MRI" if scheme_for_channel(plan.channel_names[0]) == "ct" else "CT"
    words = f"channel {plan.channel_names[0]} named {name} in dataset.json"
    yield from _first(now, ("normalization", "intensity_map"), [(words, inputs.with_first_channel(name))])
    swapped = ("a left and a right structure that mirroring swaps", inputs.with_mirror_pair())
    if inputs.fingerprint.mirror_pairs:
        swapped = ("no structures that mirroring swaps", inputs.without_mirror_pairs())
    yield from _first(now, ("augmentation", "mirror_views", "planes"), [swapped])
    angles = [d.value.rotation_deg for place, d in now.items() if place[-1] == "augmentation"]
    tilt = _WIDE_TILT_DEG if all(angle <= _NARROW_DEG for angle in angles) else 0.0
    tilted = inputs.with_cases(lambda c: c.model_copy(update={"tilt_deg": tilt}))
    yield from _first(now, ("augmentation",), [(f"cases that lie {tilt:g} degrees obliquely", tilted)])


def _by_edits(now: Planned, plan: Plan, inputs: Inputs) -> Sentences:
    """What the next values of a recipe's own entries change in its others."""
    for field, names, following in (
        ("batch_size", _BATCH, _next_batches),
        ("input_size", _OF_SIZE, _next_inputs),
        ("encoder", ("learning_rate",), _next_ranks),
    ):
        for index in range(2):
            values = {
                place: values[index]
                for place, recipe in recipes_of(plan).items()
                if len(values := following(recipe, plan.configurations[place[0]].slab_depth.value)) > index
            }
            edited = inputs.with_edits({place: {field: value} for place, (value, _) in values.items()}).planned()
            for place, decided in now.items():
                if len(place) != 6 or place[-1] not in names:
                    continue
                at = place[1], place[3], place[4]
                if at in values and _differs(edited.get(place), decided):
                    yield place, f"with {values[at][1]}: {_changed(edited[place], decided)}"


Following = Callable[[Recipe, int], Sequence[tuple[Any, str]]]


def _next_batches(recipe: Recipe, depth: int) -> Sequence[tuple[Any, str]]:
    """Twice the slices of a step, and half of them in whole slabs."""
    batch = recipe.batch_size.value
    return [(b, f"batch_size {b}") for b in (2 * batch, batch // 2 // depth * depth) if b > 0]


def _next_inputs(recipe: Recipe, depth: int) -> Sequence[tuple[Any, str]]:
    """The next larger and the next smaller input that is planned."""
    del depth
    grid, size = sizes.grid_of(recipe.method_parts()), recipe.input_size.value
    every = [*reversed(grid.smaller(grid.largest))]
    larger, smaller = [s for s in every if s > size][:1], [s for s in every if s < size][-1:]
    return [(s, f"input_size {s}") for s in (*larger, *smaller)]


def _next_ranks(recipe: Recipe, depth: int) -> Sequence[tuple[Any, str]]:
    """Twice and half the rank of the encoder's LoRA, in all blocks."""
    del depth
    encoder = recipe.encoder.value
    lora = next((adapter for adapter in encoder.adapters if isinstance(adapter, Lora)), None)
    if lora is None:
        return ()
    found = []
    for rank in (2 * lora.rank, lora.rank // 2):
        changed = lora.model_copy(update={"rank": rank, "ranks": None})
        adapters = tuple(changed if adapter is lora else adapter for adapter in encoder.adapters)
        if rank:
            found.append((encoder.model_copy(update={"adapters": adapters}), f"LoRA's rank {rank}"))
    return found


def _beside(now: Planned, every: Planned) -> Sentences:
    """What the plan's own recipes for other weights and devices, and its other configurations, hold instead."""
    for place, decided in now.items():
        if place[0] != "configurations":
            continue
        name, *rest = place[1:]
        if place[-1] in _OF_CONFIGURATION:
            others = {f"in {other}": ("configurations", other, *rest) for other in PLANNED_CONFIGURATIONS}
            yield from _others(place, decided, every, others)
        if len(place) != 6:
            continue
        weights, device = place[3], place[4]
        if place[-1] in _OF_DEVICE:
            other = "cpu" if device == "gpu" else "gpu"
            yield from _others(place, decided, every, {f"on a {other.upper()}": (*place[:4], other, place[5])})
        if place[-1] in _OF_WEIGHTS:
            kinds = dict.fromkeys(p[3] for p in every if len(p) == 6 and p[1] == name)
            others = {f"with weights {kind}": (*place[:3], kind, *place[4:]) for kind in kinds if kind != weights}
            yield from _others(place, decided, every, others)


def _others(place: Place, decided: Decided[Any], every: Planned, others: Mapping[str, Place]) -> Sentences:
    """The values at other places that differ, each once."""
    seen = set()
    for words, other in others.items():
        if other != place and _differs(every.get(other), decided):
            value = _changed(every[other], decided)
            if value not in seen:
                yield place, f"{words}: {value}"
            seen.add(value)


def _first(now: Planned, names: Sequence[str], altered: Sequence[tuple[str, Inputs]]) -> Sentences:
    """Of alterations in order, the first that changes each decision of these names."""
    plans = [(words, inputs.planned()) for words, inputs in altered]
    for place, decided in now.items():
        if place[-1] not in names:
            continue
        for words, plan in plans:
            if _differs(plan.get(place), decided):
                yield place, f"with {words}: {_changed(plan[place], decided)}"
                break


def _differs(other: Decided[Any] | None, decided: Decided[Any]) -> bool:
    return other is not None and other.value != decided.value


def _changed(other: Decided[Any], decided: Decided[Any]) -> str:
    """The other value in words; where these do not tell the two apart, that other numbers are in it."""
    words = short(other.value)
    return words if words != short(decided.value) else "of other numbers"
