"""A plan as text: each decision, its value and its reason."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

from samunet.artifacts.fingerprint import Fingerprint
from samunet.artifacts.method import summarise, summarise_encoder
from samunet.artifacts.plan import Decided, Plan, Recipe
from samunet.planners.rules import FILE_AXES

WIDTH = 118
_NAME, _VALUE = 20, 26
_DETAILED = (("sam", "gpu"), ("none", "cpu"))
_SUMMARY = ("backbone", "trains", "input", "tile", "batch", "steps", "minutes", "rate", "GiB")


def explain(plan: Plan, fingerprint: Fingerprint, *, recipes: Sequence[tuple[str, str]] = _DETAILED) -> str:
    """What was planned and why, for the recommended configuration.

    Args:
        plan: The plan.
        fingerprint: The facts it was made from.
        recipes: Kinds of weights and device classes whose recipes are explained field by field.
    """
    chosen = plan.configuration()
    sections = [_header(plan, fingerprint), _data(plan), _configuration(plan)]
    sections.append(_table(plan))
    for weights, device in recipes:
        recipe = chosen.recipes.get(weights, {}).get(device)  # type: ignore[call-overload]
        if recipe is not None:
            sections.append(_recipe(weights, device, recipe))
    return "\n\n".join(sections)


def summary(plan: Plan) -> str:
    """The plan in a few lines: configuration, frame, and one line per recipe."""
    name = plan.recommended.value
    z = FILE_AXES[plan.frame.value.slice_axis]
    spacing = " x ".join(f"{mm:.4g}" for mm in plan.configuration().spacing.value if mm is not None)
    mirrors = ", ".join(plan.mirror_axes.value) or "none"
    head = f"{plan.dataset}: {name}, slices along {z}, {spacing} mm in plane, mirror axes: {mirrors}"
    return f"{head}\n{_table(plan)}"


def _header(plan: Plan, fingerprint: Fingerprint) -> str:
    axis = plan.frame.value.slice_axis
    cases = fingerprint.cases.values()
    slices = sum(case.shape[axis] for case in cases)
    labelled = sum(case.num_foreground_slices[axis] for case in cases)
    lines = [
        f"Plan of {plan.dataset}",
        f"{_count(len(fingerprint.cases), 'case')}, {_count(slices, 'slice')} ({labelled} with a structure), "
        f"{_count(len(plan.label_spec.names), 'structure')}, {_count(len(plan.channel_names), 'channel')}",
        f"for {plan.budget.gpu_memory_gib:g} GiB on a GPU, or {plan.budget.cpu_memory_gib:g} GiB and "
        f"{plan.budget.cpu_minutes:g} minutes on a CPU ({plan.budget.reason or 'as given'})",
    ]
    if plan.left_out:
        lines.append(f"left out: {', '.join(plan.left_out)}")
    return "\n".join(textwrap.fill(line, WIDTH, subsequent_indent="    ") for line in lines)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _data(plan: Plan) -> str:
    frame = plan.frame.value
    pairs: list[tuple[str, Any, str]] = [
        ("slices along", f"{FILE_AXES[frame.slice_axis]} of {'-'.join(frame.orientation)}", plan.frame.reason),
        (
            "target spacing",
            " x ".join(f"{v:.4g}" for v in plan.target_spacing.value) + " mm",
            plan.target_spacing.reason,
        ),
        ("normalization", ", ".join(n.scheme for n in plan.normalization.value), plan.normalization.reason),
        ("mirror axes", ", ".join(plan.mirror_axes.value) or "none", plan.mirror_axes.reason),
    ]
    return _rows("Data", pairs)


def _configuration(plan: Plan) -> str:
    chosen = plan.configuration()
    pairs: list[tuple[str, Any, str]] = [
        ("recommended", plan.recommended.value, plan.recommended.reason),
        (
            "spacing",
            " x ".join("own" if v is None else f"{v:.4g}" for v in chosen.spacing.value),
            chosen.spacing.reason,
        ),
        ("channels", chosen.channels.value, chosen.channels.reason),
        ("tile overlap", chosen.tile_overlap.value, chosen.tile_overlap.reason),
    ]
    others = [name for name in plan.configurations if name != plan.recommended.value]
    if others:
        pairs.append(("also planned", ", ".join(others), "choose with -c"))
    return _rows(f"Configuration {plan.recommended.value}", pairs)


def _table(plan: Plan) -> str:
    rows: list[tuple[str, ...]] = [("weights", "device", *_SUMMARY)]
    for weights, devices in plan.configuration().recipes.items():
        rows += [(weights, device, *_summarise(recipe)) for device, recipe in devices.items()]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  " + "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def _summarise(recipe: Recipe) -> tuple[str, ...]:
    minutes = recipe.minutes.value
    parts = recipe.accumulation_steps.value
    return (
        recipe.backbone.value,
        summarise(recipe.method_parts()),
        f"{recipe.input_size.value} px",
        f"{recipe.tile_vox.value} vox",
        f"{recipe.batch_size.value}" + (f" in {parts} parts" if parts > 1 else ""),
        f"{recipe.iterations.value * recipe.epochs.value}",
        "-" if minutes is None else f"{minutes:g}",
        f"{recipe.learning_rate.value:g}",
        f"{recipe.memory_gib.value:.1f}" + (" checkpointed" if recipe.checkpointing.value else ""),
    )


def _recipe(weights: str, device: str, recipe: Recipe) -> str:
    pairs = []
    for name in type(recipe).model_fields:
        decided: Decided[Any] = getattr(recipe, name)
        pairs.append((name, _short(name, recipe), decided.reason))
    return _rows(f"Recipe for weights '{weights}' on a {device.upper()}", pairs)


def _short(name: str, recipe: Recipe) -> Any:
    """A value in a few words."""
    value = getattr(recipe, name).value
    if name == "encoder":
        return summarise_encoder(value)
    if name in ("depth", "prompts", "fusion", "intensity_map"):
        return value.kind
    if name == "decoder":
        return value.train
    if name == "loss":
        return f"{value.cross_entropy:g} CE + {value.dice:g} Dice"
    return f"{value.kind} {value.power:g}" if name == "decay" else value


def _rows(title: str, pairs: Sequence[tuple[str, Any, str]]) -> str:
    lines = [title]
    for name, value, reason in pairs:
        text = ", ".join(map(str, value)) if isinstance(value, tuple) else f"{value}"
        lead = f"  {name.ljust(_NAME)}{text.ljust(_VALUE)} "
        hanging = " " * (3 + _NAME + _VALUE)
        if len(lead) > len(hanging):
            lines.append(lead.rstrip())
            lead = hanging
        lines.append(textwrap.fill(lead + reason, WIDTH, subsequent_indent=hanging, drop_whitespace=True))
    return "\n".join(lines)
