"""One recipe: a method on a backbone at the size, batch and schedule that the facts and the budget allow."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from samunet.artifacts.fingerprint import Fingerprint
from samunet.artifacts.method import Fusion, Method, PromptMethod
from samunet.artifacts.model_spec import STOCK_TOKENS, SamSpec, get_spec
from samunet.artifacts.plan import (
    Budget,
    ChannelNormalization,
    Decay,
    DeviceClass,
    LossWeights,
    WeightsKind,
)
from samunet.artifacts.plan_parts import Planes
from samunet.artifacts.probe import NO_PROBES, Probes
from samunet.core.config import parse_schema
from samunet.core.geometry import Triple
from samunet.planners import augmentation, memory, peft, planes, rules, schedule, sizes
from samunet.planners.attention import attention_kind
from samunet.planners.batches import BATCH_CAP, largest_step, least_batch, splits, trains_batch_norm
from samunet.planners.edits import Reasoned
from samunet.planners.ranks import usable_probe

CPU_INPUT_CAP = 448
_FITTED = ("input_size", "batch_size")
_PLANNED_AROUND = (*_FITTED, "iterations", "epochs", "planes")


@dataclass(frozen=True)
class Facts:
    """What all recipes of a plan are derived from.

    Args:
        fingerprint: The dataset's facts.
        normalization: Per channel.
        shapes: Voxels (slices, rows, columns) per case at target spacing.
        plane: In-plane sizes.
        num_tokens: Mask tokens.
        num_structures: Structures.
        num_slices: Slices of all cases.
        num_foreground_slices: Those that hold a structure.
        augmentation: How images are varied, with its reason.
        mirrors: Whether images may be mirrored along slices, rows and columns.
        planes: Axes across which slices can be cut, with the reason.
        budget: Hardware planned for.
        probes: What samunet_probe measured.
        tile_overlap: Fraction by which neighbouring tiles overlap in prediction.
        depth_overlap: Fraction by which slabs overlap in prediction; None: the rule's for their depth.
    """

    fingerprint: Fingerprint
    normalization: Sequence[ChannelNormalization]
    shapes: list[Triple]
    plane: sizes.InPlane
    num_tokens: int
    num_structures: int
    num_slices: int
    num_foreground_slices: int
    augmentation: Reasoned
    mirrors: Sequence[bool]
    planes: Reasoned
    budget: Budget
    probes: Probes = NO_PROBES
    tile_overlap: float = sizes.TILE_OVERLAP
    depth_overlap: float | None = None


@dataclass(frozen=True)
class Wish:
    """What a recipe is to hold whatever the facts: the plan's own choice, or a preset's.

    Args:
        weights: Kind of weights.
        device: Class of device.
        backbone: Image encoder, with its reason.
        parts: Parts of the method by name, each with its reason.
        slab_depth: Slices per slab.
        intensity_map: Instead of the one the weights ask for.
        fixed: Values of other fields, each with its reason; sizes and numbers of steps are planned around.
        pinned: Values of other fields that all else is planned around.
        probed_px: Encoder input at which the probe behind the ranks was made; None without one.
    """

    weights: WeightsKind
    device: DeviceClass
    backbone: Reasoned
    parts: dict[str, Reasoned]
    slab_depth: int = 1
    intensity_map: Reasoned | None = None
    fixed: dict[str, Reasoned] | None = None
    pinned: Mapping[str, Reasoned] = field(default_factory=dict)
    probed_px: int | None = None

    @cached_property
    def method(self) -> Method:
        """The method of the parts."""
        return parse_schema(Method, {name: value for name, (value, _) in self.parts.items()})

    def given(self, name: str) -> Reasoned | None:
        """A value that all else is planned around, with its reason; None if the rule decides."""
        if name not in self.pinned and name in _PLANNED_AROUND:
            return (self.fixed or {}).get(name)
        return self.pinned.get(name)

    def encoder_at(self, input_size: int) -> Reasoned:
        """What trains of the encoder, with a word where its ranks were probed at another input size than this."""
        encoder, reason = self.parts["encoder"]
        has_ranks = any(getattr(adapter, "ranks", None) is not None for adapter in encoder.adapters)
        if not has_ranks or self.probed_px in (None, input_size):
            return encoder, reason
        return encoder, f"{reason}; probed at {self.probed_px} px, used at {input_size} px"


@dataclass(frozen=True)
class _Fit:
    """An input size with a tile and a batch that fit memory and minutes."""

    load: memory.Load
    batch: int
    parts: int
    tile_reason: str
    batch_reason: str
    attention_reason: str


def automatic(
    facts: Facts,
    weights: WeightsKind,
    device: DeviceClass,
    *,
    configuration: str,
    slab_depth: int = 1,
    backbone: Reasoned | None = None,
    from_random: bool = False,
) -> Wish:
    """What samunet itself chooses for a kind of weights on a class of device.

    Args:
        facts: Of the dataset.
        weights: Kind of weights.
        device: Class of device.
        configuration: Planned for.
        slab_depth: Slices per slab; more than one brings depth attention.
        backbone: Image encoder, with its reason, instead of samunet's own choice.
        from_random: Whether the weights were pretrained from random ones: then all of them go on training and images
            come as they are stored, as there is no knowledge of SAM's to keep.
    """
    taught: WeightsKind = "none" if from_random else weights
    depth = peft.depth_mechanism(slab_depth)
    backbone = backbone or peft.backbone(weights, device)
    probe, left_aside = usable_probe(
        facts.probes, facts.fingerprint, configuration=configuration, weights=weights, backbone=backbone[0]
    )
    parts = {
        "encoder": peft.encoder_method(
            taught,
            facts.num_foreground_slices,
            facts.num_structures,
            depth=depth[0],
            probe=probe,
            left_aside=left_aside,
        ),
        "depth": depth,
        "decoder": peft.decoder_method(taught, device),
        "prompts": (PromptMethod(), "all structures are found without a prompt"),
        "fusion": (Fusion(), "SAM's own mask decoder"),
    }
    if not from_random:
        return Wish(weights, device, backbone, parts, slab_depth, probed_px=None if probe is None else probe.input_size)
    rate = {"learning_rate": peft.learning_rate_from_random()}
    return Wish(weights, device, backbone, parts, slab_depth, _intensities(facts, taught), fixed=rate)


def plan_recipe(facts: Facts, wish: Wish) -> dict[str, Any]:
    """A recipe's content: every field with its value and reason."""
    fixed = wish.fixed or {}
    method, device = wish.method, wish.device
    spec = get_spec(wish.backbone[0])
    fit, size_reason = _fit(facts, wish, spec)
    steps, steps_reason, minutes = _steps(facts, fit, device)
    iterations, epochs, steps = _epochs(wish, steps)
    cut, views = _views(facts, wish, fit, steps)
    content = {name: decided(part) for name, part in wish.parts.items()} | {
        "encoder": decided(wish.encoder_at(fit.load.input_size)),
        "backbone": decided(wish.backbone),
        "input_size": valued(fit.load.input_size, size_reason),
        "tile_vox": valued(fit.load.tile_vox, fit.tile_reason),
        "attention": valued(fit.load.attention, fit.attention_reason),
        "intensity_map": decided(wish.intensity_map or _intensities(facts, wish.weights)),
        "loss": valued(
            LossWeights(estimated_iou=1.0),
            "cross-entropy and Dice alike, as nnU-Net; the estimate of a mask's IoU trains apart from the masks",
        ),
        "learning_rate": decided(peft.learning_rate(method, weights=wish.weights, batch=fit.batch)),
        "weight_decay": decided(peft.weight_decay(method)),
        "warmup_steps": decided(schedule.warmup_steps(steps)),
        "decay": valued(Decay(), "nnU-Net's polynomial"),
        "batch_size": valued(fit.batch, fit.batch_reason),
        "accumulation_steps": valued(fit.parts, _parts_reason(fit)),
        "iterations": valued(iterations, "optimizer steps per epoch, after which progress is logged"),
        "epochs": valued(epochs, steps_reason),
        "minutes": minutes,
        "precision": valued(*_precision(device)),
        "checkpointing": valued(
            fit.load.checkpointing, "blocks keep only their input" if fit.load.checkpointing else "memory suffices"
        ),
        "ema_decay": decided(schedule.ema_decay(steps)),
        "augmentation": decided(facts.augmentation),
        "foreground_fraction": decided(rules.foreground_fraction(facts.num_slices, facts.num_foreground_slices)),
        "planes": decided(cut),
        "mirror_views": decided(views),
        "memory_gib": valued(
            memory.memory_gib(fit.load), f"predicted peak; planned for {_memory(facts, device):.1f} GiB"
        ),
    }
    return content | {name: decided(given) for name, given in fixed.items() if name not in _FITTED}


def _fit(facts: Facts, wish: Wish, spec: SamSpec) -> tuple[_Fit, str]:
    """The largest input not above the wanted that fits, and why it is that one."""
    device, minutes = wish.device, facts.budget.cpu_minutes
    grid = sizes.grid_of(wish.method)
    wanted, wanted_reason = sizes.wanted_input(facts.plane, grid)
    given = wish.given("input_size")
    if given is not None:
        fit = _fit_size(facts, wish, spec, given[0], given[0], must_fit=True)
        assert fit is not None
        is_free = device == "cpu" and wish.given("batch_size") is None
        return (_fewer_slices(facts, wish, fit) if is_free else fit), given[1]
    limits: list[str] = []
    for size in grid.smaller(wanted):
        is_smallest = size == grid.smallest
        if device == "cpu" and size > CPU_INPUT_CAP and minutes <= schedule.DEFAULT_CPU_MINUTES:
            limits = [
                f"{size} px is more than a CPU's {CPU_INPUT_CAP} in up to {schedule.DEFAULT_CPU_MINUTES:g} minutes"
            ]
            continue
        fit = _fit_size(facts, wish, spec, size, wanted, must_fit=is_smallest)
        if fit is None:
            limits = [f"{size} px does not fit {_memory(facts, device):.1f} GiB"]
            continue
        if device == "gpu":
            break
        fit = fit if wish.given("batch_size") else _fewer_slices(facts, wish, fit)
        steps = _cpu_steps(facts, fit)
        if steps >= grid.least_steps:
            break
        if is_smallest:
            few = steps < schedule.LEAST_CPU_STEPS
            limits += [
                f"even that leaves {steps} steps in {minutes:g} minutes (at least {schedule.LEAST_CPU_STEPS})"
            ] * few
            break
        limits = [f"{size} px leaves {steps} steps in {minutes:g} CPU minutes (at least {grid.least_steps})"]
    assert fit is not None
    return fit, "; ".join([wanted_reason, *limits])


def _fit_size(facts: Facts, wish: Wish, spec: SamSpec, size: int, wanted: int, *, must_fit: bool) -> _Fit | None:
    """Tile, slices per step and fall-backs (checkpointing before accumulation in parts) at one input size."""
    device, depth = wish.device, wish.slab_depth
    side, tile_reason = wish.given("tile_vox") or sizes.tile(
        facts.plane,
        size,
        wanted=wanted,
        grid=sizes.grid_of(wish.method),
        overlap=facts.tile_overlap,
        few_steps=device == "cpu",
    )
    least = least_batch(spec, wish.method, depth)
    batch, reason = _batch(wish, least, sizes.five_percent(facts.shapes, side))
    attention, attention_reason = wish.given("attention") or attention_kind(spec, size, device)
    load = memory.Load(
        spec,
        size,
        side,
        STOCK_TOKENS if wish.method.promptable else facts.num_tokens,
        batch,
        wish.method,
        slab_depth=depth,
        precision=(wish.given("precision") or _precision(device))[0],
        attention=attention,
        checkpointing=(wish.given("checkpointing") or (False, ""))[0],
    )
    budget = _memory(facts, device)
    at_once = _at_once(load, budget, batch)
    # Batch norm that trains sees too few slices in small parts, so there checkpointing comes before any part.
    is_normed = trains_batch_norm(spec, wish.method)
    if at_once < (batch if is_normed else min(batch, least)) and not wish.given("checkpointing"):
        load = replace(load, checkpointing=True)
        at_once = _at_once(load, budget, batch)
    ways = splits(batch // depth, least // depth if is_normed else 1, is_fixed=wish.given("batch_size") is not None)
    if at_once < (needed := min(ways)[0] * depth):
        if not must_fit:
            return None
        at_once = needed
        reason += f"; even {needed} slice{'s' * (needed > 1)} at once may need more than the {budget:.1f} GiB planned"
    part, parts, samples = largest_step(ways, at_once // depth)
    if samples * depth < batch:
        reason += f"; {samples * depth} instead of {batch}, as no part of a step may have fewer than {least}"
        batch = samples * depth
    if given := wish.given("accumulation_steps"):
        parts = given[0]
        part = math.ceil(batch // depth / parts)
    load = replace(load, slices=part * depth, accumulates=parts > 1)
    return _Fit(load, batch, parts, tile_reason, reason, attention_reason)


def _at_once(load: memory.Load, budget: float, batch: int) -> int:
    """Slices of a forward, in whole slabs, that fit."""
    return memory.largest_batch(load, budget_gib=budget, cap=batch) // load.slab_depth * load.slab_depth


def _batch(wish: Wish, least: int, share: int) -> Reasoned:
    """Slices per step: a multiple of the slab's depth."""
    depth, cap = wish.slab_depth, BATCH_CAP[wish.device]
    given = wish.given("batch_size")
    if given is not None:
        return max(1, round(given[0] / depth)) * depth, given[1]
    batch = max(least, min(cap, share) // depth * depth)
    reason = f"{cap} at most on a {wish.device.upper()}, 5 % of the dataset are {share} slices, {least} at least"
    return batch, reason + (f"; whole slabs of {depth}" if depth > 1 else "")


def _largest_part(batch: int, parts: int, depth: int) -> int:
    """Slices of the largest part when a batch's slabs are split evenly."""
    return math.ceil(batch // depth / parts) * depth


def _fewer_slices(facts: Facts, wish: Wish, fit: _Fit) -> _Fit:
    """Halve the slices per step while the CPU minutes hold too few steps."""
    depth = wish.slab_depth
    least = least_batch(fit.load.spec, wish.method, depth)
    while _cpu_steps(facts, fit) < schedule.LEAST_CPU_STEPS and fit.batch // 2 // depth * depth >= least:
        batch = fit.batch // 2 // depth * depth
        parts = min(fit.parts, batch // depth)
        load = replace(fit.load, slices=_largest_part(batch, parts, depth), accumulates=parts > 1)
        reason = f"{fit.batch_reason}; halved from {fit.batch} so that more steps fit the minutes"
        fit = replace(fit, load=load, batch=batch, parts=parts, batch_reason=reason)
    return fit


def _steps(facts: Facts, fit: _Fit, device: DeviceClass) -> tuple[int, str, dict[str, Any]]:
    if device == "gpu":
        steps, reason = schedule.dataset_steps(
            facts.num_foreground_slices,
            fit.batch,
            tiles_per_slice=sizes.tiles_per_slice(facts.shapes, fit.load.tile_vox),
        )
        return steps, reason, valued(None, "on a GPU the steps decide")
    minutes = facts.budget.cpu_minutes
    steps = max(1, _cpu_steps(facts, fit))
    rate = schedule.cpu_images_per_second(
        fit.load.spec,
        fit.load.method,
        fit.load.input_size,
        facts.num_tokens,
        batch=fit.batch,
        tile_vox=fit.load.tile_vox,
    )
    reason = (
        f"about {steps} steps fit {minutes:g} minutes at an estimated {rate:.1f} slices per second on two CPU threads"
    )
    return steps, reason, valued(minutes, "the CPU budget; the schedule runs on elapsed time")


def _epochs(wish: Wish, steps: int) -> tuple[int, int, int]:
    """Iterations per epoch, epochs and all steps."""
    iterations, epochs = schedule.epochs(steps, on_cpu=wish.device == "cpu")
    per_epoch, number = wish.given("iterations"), wish.given("epochs")
    if per_epoch is not None:
        iterations, epochs = per_epoch[0], max(1, math.ceil(steps / per_epoch[0]))
    if number is None:
        return iterations, epochs, steps
    return iterations, number[0], iterations * number[0]


def _cpu_steps(facts: Facts, fit: _Fit) -> int:
    load = fit.load
    return schedule.cpu_steps(
        load.spec,
        load.method,
        load.input_size,
        facts.num_tokens,
        batch=fit.batch,
        tile_vox=load.tile_vox,
        minutes=facts.budget.cpu_minutes,
    )


def _views(facts: Facts, wish: Wish, fit: _Fit, steps: int) -> tuple[Reasoned, Reasoned]:
    """Across which axes slices are cut, and how many mirrored views prediction averages."""
    device, promptable = wish.device, wish.method.promptable

    def seconds(chosen: Planes) -> float:
        return planes.seconds_per_view(
            fit.load, facts.shapes, chosen, fit.batch, facts.num_tokens, facts.tile_overlap, facts.depth_overlap
        )

    cut = wish.given("planes") or planes.of_recipe(
        facts.planes,
        device=device,
        promptable=promptable,
        slab_depth=wish.slab_depth,
        passes=planes.passes(steps, fit.batch, facts.shapes, fit.load.tile_vox),
        seconds=seconds(facts.planes[0]),
    )
    time, mirrors = seconds(cut[0]), planes.most_mirrors(facts.mirrors, cut[0])
    return cut, augmentation.mirror_views(device=device, promptable=promptable, mirrors=mirrors, seconds=time)


def _intensities(facts: Facts, weights: WeightsKind) -> Reasoned:
    fingerprint = facts.fingerprint
    return rules.intensity_map(
        weights, facts.normalization, fingerprint.foreground_intensities, fingerprint.zscore_ranges
    )


def _memory(facts: Facts, device: DeviceClass) -> float:
    return facts.budget.gpu_memory_gib if device == "gpu" else facts.budget.cpu_memory_gib


def _precision(device: DeviceClass) -> tuple[str, str]:
    if device == "gpu":
        return "bf16", "halves activations at the range of float32"
    return "fp32", "CPUs gain little from less"


def _parts_reason(fit: _Fit) -> str:
    if fit.parts == 1:
        return "all slices at once"
    return f"{fit.load.slices} slice{'s' * (fit.load.slices > 1)} at once fit the memory"


def valued(value: Any, reason: str) -> dict[str, Any]:
    """A decision as content of a plan."""
    return {"value": value, "reason": reason}


def decided(decision: Reasoned) -> dict[str, Any]:
    """A rule's answer as content of a plan."""
    return valued(*decision)
