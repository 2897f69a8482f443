"""A plan in words: each decision, its value and reason, the facts it rests on, and what would change it."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from samunet.artifacts.fingerprint import Fingerprint
from samunet.artifacts.method import summarise
from samunet.artifacts.model_spec import get_spec
from samunet.artifacts.plan import Configuration, Decided, Plan, Recipe
from samunet.artifacts.probe import NO_PROBES, Probes
from samunet.core.config import Schema
from samunet.planners.alterations import Place
from samunet.planners.edits import is_planned, places_by_user
from samunet.planners.planner import facts_of_plan
from samunet.planners.rests_on import EDIT, measured, rests_on
from samunet.planners.rules import FILE_AXES
from samunet.planners.schedule import LEAST_CPU_STEPS, cpu_steps
from samunet.planners.what_if import WhatIfs
from samunet.planners.words import ranks, short

WIDTH = 118
_NAME, _VALUE = 20, 26
_ROUNDING_GIB = 0.01
_DETAILED = (("sam", "gpu"), ("none", "cpu"))
TABLE_HEAD = ("weights", "device", "backbone", "trains", "input", "tile", "batch", "steps", "minutes", "rate", "GiB")


@dataclass(frozen=True)
class Row:
    """One decision.

    Args:
        name: Field.
        value: In a few words.
        reason: Why.
        rests_on: Names of the facts it rests on.
        changes: What would change it.
        by_user: Whether the user decided.
        by_rule: What the rule says where the user decided; empty where that is not known.
    """

    name: str
    value: str
    reason: str
    rests_on: tuple[str, ...]
    changes: tuple[str, ...]
    by_user: bool
    by_rule: str = ""


@dataclass(frozen=True)
class Section:
    """Decisions about one thing.

    Args:
        title: What it is about.
        rows: Decisions.
        recipe: Weights and device of a recipe; None of anything else.
    """

    title: str
    rows: tuple[Row, ...]
    recipe: tuple[str, str] | None = None


@dataclass(frozen=True)
class ExplainedConfiguration:
    """A configuration in words.

    Args:
        name: Its name.
        note: Whether it is recommended, and whose it is.
        table: One row of values per recipe, in the order of TABLE_HEAD.
        sections: Its own decisions, then each recipe's.
    """

    name: str
    note: str
    table: tuple[tuple[str, ...], ...]
    sections: tuple[Section, ...]


@dataclass(frozen=True)
class Explanation:
    """A plan in words.

    Args:
        lead: What was planned for what.
        facts: Names and values of the facts.
        data: Decisions about the data.
        configurations: The recommended one first.
    """

    title: str
    lead: tuple[str, ...]
    facts: tuple[tuple[str, str], ...]
    data: Section
    configurations: tuple[ExplainedConfiguration, ...]


def explanation(
    plan: Plan, fingerprint: Fingerprint, changes: WhatIfs | None = None, probes: Probes = NO_PROBES
) -> Explanation:
    """A plan in words.

    Args:
        plan: With its edits marked.
        fingerprint: What it was made from.
        changes: What would change it, by place.
        probes: Those it was made with.
    """
    changes = changes or {}
    recommended = plan.recommended.value
    names = sorted(plan.configurations, key=lambda name: name != recommended)
    return Explanation(
        title=f"Plan of {plan.dataset}",
        lead=tuple(_lead(plan, fingerprint)),
        facts=tuple(measured(plan, fingerprint, probes).items()),
        data=Section("Data", _rows_of(plan, (), changes)),
        configurations=tuple(_explained(plan, name, changes) for name in names),
    )


def explain(
    plan: Plan,
    fingerprint: Fingerprint,
    changes: WhatIfs | None = None,
    *,
    probes: Probes = NO_PROBES,
    recipes: Sequence[tuple[str, str]] = _DETAILED,
) -> str:
    """What was planned and why as plain text, for the recommended configuration.

    Args:
        plan: With its edits marked.
        fingerprint: The facts it was made from.
        changes: What would change it, by place.
        probes: Those it was made with.
        recipes: Kinds of weights and device classes whose recipes are explained field by field, if planned.
    """
    made = explanation(plan, fingerprint, changes, probes)
    chosen = made.configurations[0]
    shown = [section for section in chosen.sections if section.recipe is None or section.recipe in recipes]
    parts = [_wrapped([made.title, *made.lead]), _facts_text(made.facts), _text(made.data)]
    parts += [f"{chosen.name}: {chosen.note}\n" + _table_text(chosen.table), *(_text(section) for section in shown)]
    return "\n\n".join(parts)


def summary(plan: Plan) -> str:
    """The plan in a few lines: configuration, frame, hardware, the user's decisions, and one line per recipe."""
    name = plan.recommended.value
    z = FILE_AXES[plan.frame.value.slice_axis]
    spacing = " x ".join(f"{mm:.4g}" for mm in plan.configuration().spacing.value if mm is not None)
    mirrors = ", ".join(plan.mirror_axes.value) or "none"
    lines = [
        f"{plan.dataset}: {name}, slices along {z}, {spacing} mm in plane, mirror axes: {mirrors}",
        _budget_line(plan),
    ]
    decided = [
        f"{'.'.join(part for part in place if part not in ('configurations', 'recipes'))} = {short(entry.value)}"
        for place, entry in places_by_user(plan).items()
    ]
    if decided:
        lines.append(f"yours: {'; '.join(decided)}")
    return "\n".join([_wrapped(lines), _table_text(_table(plan.configuration()))])


def _lead(plan: Plan, fingerprint: Fingerprint) -> list[str]:
    facts = facts_of_plan(plan, fingerprint)
    lines = [
        f"{_count(len(fingerprint.cases), 'case')}, {_count(facts.num_slices, 'slice')} "
        f"({facts.num_foreground_slices} with a structure), "
        f"{_count(len(plan.label_spec.names), 'structure')}, {_count(len(plan.channel_names), 'channel')}",
        _budget_line(plan),
    ]
    return [*lines, f"left out: {', '.join(plan.left_out)}"] if plan.left_out else lines


def _budget_line(plan: Plan) -> str:
    budget = plan.budget
    return (
        f"for {budget.gpu_memory_gib:g} GiB on a GPU, or {budget.cpu_memory_gib:g} GiB and "
        f"{budget.cpu_minutes:g} minutes on a CPU ({budget.reason or 'as given'})"
    )


def shortages(plan: Plan) -> list[str]:
    """One line for each recipe of the recommended configuration that lacks memory or minutes."""
    found = []
    for weights, devices in plan.configuration().recipes.items():
        for device, recipe in devices.items():
            lacking = "; ".join(_lacking(plan, recipe, device))
            if lacking:
                found.append(f"{weights} on a {device.upper()}: {lacking}")
    return found


def _lacking(plan: Plan, recipe: Recipe, device: str) -> Iterator[str]:
    budget = plan.budget
    there = budget.gpu_memory_gib if device == "gpu" else budget.cpu_memory_gib
    if recipe.memory_gib.value > there + _ROUNDING_GIB:
        yield f"needs about {recipe.memory_gib.value:.1f} GiB, and {there:g} are planned for"
    minutes = recipe.minutes.value
    if device != "cpu" or minutes is None:
        return
    steps = cpu_steps(
        get_spec(recipe.backbone.value),
        recipe.method_parts(),
        recipe.input_size.value,
        plan.label_spec.num_tokens,
        batch=recipe.batch_size.value,
        tile_vox=recipe.tile_vox.value,
        minutes=minutes,
    )
    if steps < LEAST_CPU_STEPS:
        yield f"about {steps} steps fit {minutes:g} minutes, of {LEAST_CPU_STEPS} at least (--minutes changes it)"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _explained(plan: Plan, name: str, changes: WhatIfs) -> ExplainedConfiguration:
    chosen = plan.configurations[name]
    at, by_rules = ("configurations", name), is_planned(plan, name)
    sections = [Section(f"Configuration {name}", _rows_of(chosen, at, changes, by_rules=by_rules))]
    sections += [
        Section(
            f"Recipe for weights '{weights}' on a {device.upper()}",
            _rows_of(recipe, (*at, "recipes", weights, device), changes, by_rules=by_rules),
            (weights, device),
        )
        for weights, devices in chosen.recipes.items()
        for device, recipe in devices.items()
    ]
    note = "recommended" if name == plan.recommended.value else "chosen with -c"
    if chosen.inherits_from is not None:
        note += f"; your own, inherits from {chosen.inherits_from}"
    return ExplainedConfiguration(name, note, _table(chosen), tuple(sections))


def _rows_of(part: Schema, at: Place, changes: WhatIfs, *, by_rules: bool = True) -> tuple[Row, ...]:
    """Every decision of a plan, a configuration or a recipe, without those of the parts below."""
    values = ((name, getattr(part, name)) for name in type(part).model_fields)
    decisions = ((name, value) for name, value in values if isinstance(value, Decided))
    return tuple(_row(name, value, (*at, name), changes, by_rules=by_rules) for name, value in decisions)


def _row(name: str, decided: Decided[Any], place: Place, changes: WhatIfs, *, by_rules: bool) -> Row:
    found = changes.get(place, (EDIT,))
    if decided.by_user:
        found = ('your own: give it back to the rule by deleting its "source" in plans.json',)
    return Row(
        name=name,
        value=short(decided.value),
        reason="; ".join(filter(None, [decided.reason, ranks(decided.value) if name == "encoder" else ""])),
        rests_on=rests_on(place) if by_rules else (),
        changes=found,
        by_user=decided.by_user,
        by_rule="" if not decided.by_user or decided.by_rule is None else short(decided.by_rule),
    )


def _table(chosen: Configuration) -> tuple[tuple[str, ...], ...]:
    return tuple(
        (weights, device, *_summarise(recipe))
        for weights, devices in chosen.recipes.items()
        for device, recipe in devices.items()
    )


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


def _table_text(table: Sequence[tuple[str, ...]]) -> str:
    rows = [TABLE_HEAD, *table]
    widths = [max(len(row[i]) for row in rows) for i in range(len(TABLE_HEAD))]
    return "\n".join("  " + "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def _wrapped(lines: Sequence[str]) -> str:
    return "\n".join(textwrap.fill(line, WIDTH, subsequent_indent="    ") for line in lines)


def _facts_text(facts: Sequence[tuple[str, str]]) -> str:
    hanging = " " * (3 + _NAME)
    lines = [
        textwrap.fill(f"  {name.ljust(_NAME)} {value}", WIDTH, subsequent_indent=hanging)
        for name, value in facts
        if name not in ("weights", "device")
    ]
    return "\n".join(["Facts", *lines])


def _text(section: Section) -> str:
    lines = [section.title]
    hanging = " " * (3 + _NAME + _VALUE)
    for row in section.rows:
        lead = f"  {row.name.ljust(_NAME)}{row.value.ljust(_VALUE)} "
        if len(lead) > len(hanging):
            lines.append(textwrap.fill(lead.rstrip(), WIDTH, subsequent_indent="    "))
            lead = hanging
        lines.append(textwrap.fill(lead + yours(row) + row.reason, WIDTH, subsequent_indent=hanging))
        lines.append(textwrap.fill(f"{hanging}-> {'; '.join(row.changes)}", WIDTH, subsequent_indent=hanging + "   "))
    return "\n".join(lines)


def yours(row: Row) -> str:
    """A mark on what the user decided."""
    if not row.by_user:
        return ""
    return f"[yours; by rule {row.by_rule}] " if row.by_rule else "[yours] "
