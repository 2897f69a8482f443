"""Composes the rules into a plan: every decision with its reason, for every kind of weights and class of device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any, get_args

from samunet.artifacts.dataset import DatasetDescription
from samunet.artifacts.fingerprint import Fingerprint
from samunet.artifacts.model_spec import SIZE_STEP, SamSpec, get_spec
from samunet.artifacts.plan import (
    Budget,
    ChannelNormalization,
    DeviceClass,
    EncoderTuning,
    Frame,
    Plan,
    WeightsKind,
)
from samunet.core.config import parse_schema
from samunet.core.geometry import Triple
from samunet.planners import memory, peft, rules, schedule, sizes

BATCH_CAP: dict[DeviceClass, int] = {"gpu": 24, "cpu": 8}
LEAST_BATCH = 4
LEAST_BATCH_NORM = 8
CPU_INPUT_CAP = 448


@dataclass(frozen=True)
class _Facts:
    """What all recipes of a plan are derived from."""

    fingerprint: Fingerprint
    normalization: Sequence[ChannelNormalization]
    shapes: list[Triple]
    plane: sizes.InPlane
    num_tokens: int
    num_structures: int
    num_slices: int
    num_foreground_slices: int
    budget: Budget


@dataclass(frozen=True)
class _Fit:
    """An input size with a tile and a batch that fit memory and minutes."""

    load: memory.Load
    batch: int
    parts: int
    tile_reason: str
    batch_reason: str


def make_plan(fingerprint: Fingerprint, description: DatasetDescription, budget: Budget) -> Plan:
    """Decide everything about a dataset; the same facts and budget always give the same plan.

    Args:
        fingerprint: The dataset's facts.
        description: Its dataset.json.
        budget: The hardware to plan for.
    """
    cases = [fingerprint.cases[name] for name in sorted(fingerprint.cases)]
    spacing = rules.target_spacing([c.spacing for c in cases], [c.shape_after_crop for c in cases])
    frame = rules.frame(fingerprint, spacing[0])
    normalization = rules.normalization(fingerprint)
    facts = _gather(fingerprint, description, budget, frame[0], spacing[0], normalization[0])
    axis = frame[0].slice_axis
    coherence = rules.mean_coherence([c for c in cases if c.codes == frame[0].orientation])[axis]
    neighbours = rules.allows_neighbours(len(fingerprint.channel_names), facts.shapes)
    in_plane = _in_plane(frame[0], spacing[0])
    recipes = _recipes(facts)
    content = {
        "dataset": fingerprint.dataset,
        "fingerprint_sha256": fingerprint.facts_sha256,
        "channel_names": fingerprint.channel_names,
        "file_ending": description.file_ending,
        "labels": description.labels,
        "regions_class_order": description.regions_class_order,
        "frame": _decided(frame),
        "target_spacing": _decided(spacing),
        "normalization": _decided(normalization),
        "mirror_axes": _decided(rules.mirror_axes(fingerprint.mirror_pairs)),
        "configurations": {
            name: _configuration(context, len(fingerprint.channel_names), in_plane, recipes)
            for name, context in (("2d", 0), ("2.5d", 1))
            if context == 0 or neighbours
        },
        "recommended": _decided(rules.recommended(coherence, frame[0].spacing[axis], has_neighbours=neighbours)),
        "budget": budget,
        "left_out": fingerprint.left_out,
    }
    return parse_schema(Plan, content)


def _gather(
    fingerprint: Fingerprint,
    description: DatasetDescription,
    budget: Budget,
    frame: Frame,
    spacing: tuple[float, float, float],
    normalization: Sequence[ChannelNormalization],
) -> _Facts:
    cases = [fingerprint.cases[name] for name in sorted(fingerprint.cases)]
    in_plane = _in_plane(frame, spacing)
    shapes = rules.canonical_shapes(cases, frame, in_plane)
    longer = sorted(max(rows, columns) for _, rows, columns in shapes)
    axis = frame.slice_axis
    planar = [a for a in range(3) if a != axis]
    widths: dict[str, list[float]] = {}
    for case in cases:
        for name, structure in case.structures.items():
            widths.setdefault(name, []).append(structure.width_mm)
    plane = sizes.InPlane(
        typical_vox=round(median(longer)),
        largest_vox=longer[-1],
        width_vox=min((median(w) for w in widths.values()), default=0.0) / max(in_plane),
        resolution=median(min(case.effective_resolution[a] for a in planar) for case in cases),
    )
    labels = description.label_spec
    return _Facts(
        fingerprint=fingerprint,
        normalization=normalization,
        shapes=shapes,
        plane=plane,
        num_tokens=labels.num_tokens,
        num_structures=labels.num_foreground,
        num_slices=sum(shape[0] for shape in shapes),
        num_foreground_slices=sum(
            min(case.num_foreground_slices[axis], shape[0]) for case, shape in zip(cases, shapes, strict=True)
        ),
        budget=budget,
    )


def _configuration(
    context: int, num_channels: int, in_plane: tuple[float, float], recipes: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    return {
        "spacing": _value((None, *in_plane), "slices keep each case's own distance; in plane nnU-Net's target spacing"),
        "context_slices": _value(context, "neighbours as channels" if context else "single slices"),
        "slab_depth": _value(1, "slices are predicted on their own; depth attention is another configuration's"),
        "channels": _decided(rules.encoder_channels(num_channels, context)),
        "tile_overlap": _value(sizes.TILE_OVERLAP, "nnU-Net's half, where slices are tiled at all"),
        "recipes": recipes,
    }


def _recipes(facts: _Facts) -> dict[str, dict[str, Any]]:
    return {
        weights: {device: _recipe(facts, weights, device) for device in get_args(DeviceClass)}
        for weights in get_args(WeightsKind)
    }


def _recipe(facts: _Facts, weights: WeightsKind, device: DeviceClass) -> dict[str, Any]:
    backbone = peft.backbone(weights, device)
    tuning = peft.encoder_tuning(weights)
    rank = peft.lora_rank(facts.num_foreground_slices, facts.num_structures, tuning[0])
    spec = get_spec(backbone[0])
    wanted, wanted_reason = sizes.wanted_input(facts.plane)
    fit, limits = _fit(facts, spec, tuning[0], rank[0], device, wanted)
    steps, steps_reason, minutes = _steps(facts, fit, device)
    iterations, epochs = schedule.epochs(steps, on_cpu=device == "cpu")
    checkpointing = fit.load.checkpointing
    return {
        "backbone": _decided(backbone),
        "input_size": _value(fit.load.input_size, "; ".join([wanted_reason, *limits])),
        "tile_vox": _value(fit.load.tile_vox, fit.tile_reason),
        "encoder_tuning": _decided(tuning),
        "lora_rank": _decided(rank),
        "lora_targets": _decided(peft.lora_targets(tuning[0])),
        "intensity_map": _decided(_intensities(facts, weights)),
        "learning_rate": _decided(peft.learning_rate(tuning[0], weights=weights, rank=rank[0], batch=fit.batch)),
        "weight_decay": _decided(peft.weight_decay(tuning[0])),
        "warmup_steps": _decided(schedule.warmup_steps(steps)),
        "batch_size": _value(fit.batch, fit.batch_reason),
        "accumulation_steps": _value(fit.parts, _parts_reason(fit)),
        "iterations": _value(iterations, "optimizer steps per epoch, after which progress is logged"),
        "epochs": _value(epochs, steps_reason),
        "minutes": minutes,
        "precision": _value(*_precision(device)),
        "checkpointing": _value(checkpointing, "blocks keep only their input" if checkpointing else "memory suffices"),
        "ema_decay": _decided(schedule.ema_decay(steps)),
        "foreground_fraction": _decided(rules.foreground_fraction(facts.num_slices, facts.num_foreground_slices)),
        "memory_gib": _value(
            memory.memory_gib(fit.load), f"predicted peak; planned for {_memory(facts, device):.1f} GiB"
        ),
    }


def _fit(
    facts: _Facts, spec: SamSpec, tuning: EncoderTuning, rank: int, device: DeviceClass, wanted: int
) -> tuple[_Fit, list[str]]:
    """The largest input not above the wanted that fits, and one sentence for the last larger one that does not."""
    limits: list[str] = []
    minutes = facts.budget.cpu_minutes
    for size in sizes.smaller_inputs(wanted):
        is_smallest = size == SIZE_STEP
        if device == "cpu" and size > CPU_INPUT_CAP and minutes <= schedule.DEFAULT_CPU_MINUTES:
            limits = [
                f"{size} px is more than a CPU's {CPU_INPUT_CAP} in up to {schedule.DEFAULT_CPU_MINUTES:g} minutes"
            ]
            continue
        fit = _fit_size(facts, spec, tuning, rank, device, size, wanted, must_fit=is_smallest)
        if fit is None:
            limits = [f"{size} px does not fit {_memory(facts, device):.1f} GiB"]
            continue
        if device == "gpu":
            return fit, limits
        fit = _fewer_slices(facts, fit)
        steps = _cpu_steps(facts, fit)
        if steps >= schedule.LEAST_CPU_STEPS or is_smallest:
            return fit, limits
        limits = [f"{size} px leaves {steps} steps in {minutes:g} CPU minutes (at least {schedule.LEAST_CPU_STEPS})"]
    raise AssertionError("the smallest input is always taken")


def _fit_size(
    facts: _Facts,
    spec: SamSpec,
    tuning: EncoderTuning,
    rank: int,
    device: DeviceClass,
    size: int,
    wanted: int,
    *,
    must_fit: bool,
) -> _Fit | None:
    """Tile, slices per step and fall-backs (checkpointing before accumulation in parts) at one input size."""
    side, tile_reason = sizes.tile(facts.plane, size, wanted=wanted)
    least = _least_batch(spec, tuning)
    share = sizes.five_percent(facts.shapes, side)
    batch = max(least, min(BATCH_CAP[device], share))
    precision = _precision(device)[0]
    load = memory.Load(spec, size, side, facts.num_tokens, batch, tuning, rank, precision=precision)
    budget = _memory(facts, device)
    at_once = memory.largest_batch(load, budget_gib=budget, cap=batch)
    if at_once < min(batch, least):
        load = replace(load, checkpointing=True)
        at_once = memory.largest_batch(load, budget_gib=budget, cap=batch)
    if at_once < (least if least == LEAST_BATCH_NORM else 1) and not must_fit:
        return None
    reason = (
        f"{BATCH_CAP[device]} at most on a {device.upper()}, 5 % of the dataset are {share} slices, {least} at least"
    )
    if at_once == 0:
        reason += f"; even one slice at once may need more than the {budget:.1f} GiB planned for"
    parts = math.ceil(batch / max(1, at_once))
    return _Fit(replace(load, slices=math.ceil(batch / parts)), batch, parts, tile_reason, reason)


def _least_batch(spec: SamSpec, tuning: EncoderTuning) -> int:
    """Batch norm that trains needs eight slices for its statistics; all else takes four for a steady gradient."""
    return LEAST_BATCH_NORM if spec.family == "tiny_vit" and tuning == "full" else LEAST_BATCH


def _fewer_slices(facts: _Facts, fit: _Fit) -> _Fit:
    """Halve the slices per step while the CPU minutes hold too few steps."""
    least = _least_batch(fit.load.spec, fit.load.tuning)  # type: ignore[arg-type]
    while _cpu_steps(facts, fit) < schedule.LEAST_CPU_STEPS and fit.batch // 2 >= least:
        batch = fit.batch // 2
        parts = min(fit.parts, batch)
        load = replace(fit.load, slices=math.ceil(batch / parts))
        reason = f"halved from {fit.batch} so that more steps fit the minutes"
        fit = replace(fit, load=load, batch=batch, parts=parts, batch_reason=reason)
    return fit


def _steps(facts: _Facts, fit: _Fit, device: DeviceClass) -> tuple[int, str, dict[str, Any]]:
    if device == "gpu":
        steps, reason = schedule.dataset_steps(facts.num_foreground_slices, fit.batch)
        return steps, reason, _value(None, "on a GPU the steps decide")
    minutes = facts.budget.cpu_minutes
    steps = max(1, _cpu_steps(facts, fit))
    rate = schedule.cpu_images_per_second(fit.load.spec, fit.load.input_size, facts.num_tokens)
    reason = (
        f"about {steps} steps fit {minutes:g} minutes at an estimated {rate:.1f} slices per second on two CPU threads"
    )
    return steps, reason, _value(minutes, "the CPU budget; the schedule runs on elapsed time")


def _cpu_steps(facts: _Facts, fit: _Fit) -> int:
    load = fit.load
    minutes = facts.budget.cpu_minutes
    return schedule.cpu_steps(load.spec, load.input_size, facts.num_tokens, batch=fit.batch, minutes=minutes)


def _intensities(facts: _Facts, weights: WeightsKind) -> tuple[Any, str]:
    fingerprint = facts.fingerprint
    return rules.intensity_map(
        weights, facts.normalization, fingerprint.foreground_intensities, fingerprint.zscore_ranges
    )


def _in_plane(frame: Frame, spacing: tuple[float, float, float]) -> tuple[float, float]:
    rows, columns = (spacing[axis] for axis in range(3) if axis != frame.slice_axis)
    return rows, columns


def _memory(facts: _Facts, device: DeviceClass) -> float:
    return facts.budget.gpu_memory_gib if device == "gpu" else facts.budget.cpu_memory_gib


def _precision(device: DeviceClass) -> tuple[str, str]:
    if device == "gpu":
        return "bf16", "halves activations at the range of float32"
    return "fp32", "CPUs gain little from less"


def _parts_reason(fit: _Fit) -> str:
    if fit.parts == 1:
        return "all slices at once"
    return f"{fit.load.slices} slice{'s' * (fit.load.slices > 1)} at once fit the memory"


def _value(value: Any, reason: str) -> dict[str, Any]:
    return {"value": value, "reason": reason}


def _decided(decision: tuple[Any, str]) -> dict[str, Any]:
    return _value(*decision)
