"""Planning again where a plan exists: what the user decided stays, and is said."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from samunet.artifacts.dataset import DatasetDescription
from samunet.artifacts.fingerprint import Fingerprint
from samunet.artifacts.plan import Budget, Decided, Plan, load_plan, save_plan
from samunet.artifacts.plan_document import BY_HAND, read_record, record_file
from samunet.artifacts.probe import Probes
from samunet.core.errors import ConfigError
from samunet.core.files import read_json
from samunet.core.log import Reporter
from samunet.planners.edits import PLANNED_CONFIGURATIONS, decisions, edits_of, places_by_user
from samunet.planners.hardware import ASSUMED_GPU_GIB, detect_budget
from samunet.planners.planner import make_plan
from samunet.planners.words import short

PREVIOUS_PLAN = "plans_previous.json"
_MOST_NAMED = 12
_BUDGET_WORDS = {"gpu_memory_gib": "GPU memory", "cpu_memory_gib": "CPU memory", "cpu_minutes": "CPU minutes"}


def plan_again(
    file: Path,
    fingerprint: Fingerprint,
    description: DatasetDescription,
    probes: Probes,
    hardware: Mapping[str, float | None],
    reporter: Reporter,
) -> Plan:
    """The plan for present facts and hardware around the edits of the plan on disk, written if it differs from it.

    Args:
        file: The plan on disk.
        fingerprint: The dataset's facts.
        description: Its dataset.json.
        probes: What samunet_probe measured.
        hardware: Budget by field, where it is given now.
        reporter: Told what the user decided, and which rules have come to another answer.

    Raises:
        ConfigError: If the plan on disk is not valid, or its edits do not go with the rest.
    """
    existing = _read(file, fingerprint, description, probes)
    belongs = _belongs(existing, fingerprint, description, probes)
    budget = _budget(existing.budget, _edited_figures(file, existing.budget), hardware)
    plan = make_plan(fingerprint, description, budget, probes=probes, edits=edits_of(existing))
    if belongs:
        plan = plan.model_copy(update={"left_out": existing.left_out})
    else:
        file.replace(previous := file.with_name(PREVIOUS_PLAN))
        reporter.warn(f"the facts have changed since it was planned: planned anew, the former plan is {previous}")
    _tell(existing, plan, reporter, is_new=not belongs or budget != existing.budget)
    if plan != existing or not file.is_file() or not _has_record(file):
        save_plan(plan, file, as_planned=True)
    return plan


def discard_plan(file: Path, reporter: Reporter) -> None:
    """Move a plan aside so that a new one is made without its edits, and say which they were."""
    previous = file.with_name(PREVIOUS_PLAN)
    try:
        plan = load_plan(file, edited=True)
    except ConfigError as error:
        reporter.warn(f"plans.json could not be read and is now {previous}: {error.problem}")
    else:
        edits = _words_of(plan)
        if edits:
            reporter.warn(f"edits are discarded; the plan with them is now {previous}\n" + _listed(edits))
    file.replace(previous)
    record_file(file).unlink(missing_ok=True)


def _read(file: Path, fingerprint: Fingerprint, description: DatasetDescription, probes: Probes) -> Plan:
    """The plan on disk with its edits marked; where no copy tells them, they are what the rules would not say."""
    existing = load_plan(file, edited=True)
    if _has_record(file) or not _belongs(existing, fingerprint, description, probes):
        return existing
    by_rule = make_plan(fingerprint, description, existing.budget, probes=probes)
    return load_plan(file, edited=True, record=by_rule.model_dump(mode="json"))


def _has_record(file: Path) -> bool:
    """Whether the copy of a plan that tells its edits is there."""
    return read_record(file, read_json(file)) is not None


def _edited_figures(file: Path, existing: Budget) -> set[str]:
    """Which figures of the budget on disk were edited and still have the reason of the former ones."""
    parts = {name: _part(existing, words) for name, words in _BUDGET_WORDS.items()}
    # only one figure is ever assumed
    edited = {n for n, part in parts.items() if "assumed" in part and getattr(existing, n) != ASSUMED_GPU_GIB}
    written = (read_record(file, read_json(file)) or {}).get("budget", {})
    if written.get("reason") == existing.reason:
        edited |= {name for name in _BUDGET_WORDS if written.get(name) != getattr(existing, name)}
    return edited


def _budget(existing: Budget, edited: Collection[str], hardware: Mapping[str, float | None]) -> Budget:
    """The budget with what is given now, and with what is found now where it was only assumed.

    Args:
        existing: On disk.
        edited: Figures of it that are no longer those that its reason is about.
        hardware: What is given now, by figure.
    """
    parts = {n: f"{words} {BY_HAND}" if n in edited else _part(existing, words) for n, words in _BUDGET_WORDS.items()}
    assumed = {n for n, part in parts.items() if "assumed" in part and getattr(existing, n) == ASSUMED_GPU_GIB}
    given = {name for name, value in hardware.items() if value is not None}
    unsettled = assumed | {name for name in given if hardware[name] != getattr(existing, name)}
    if not unsettled and not edited:
        return existing
    found = detect_budget(**hardware) if unsettled else existing
    # what is given, even if it is the assumed value, is no assumption any more
    changed = {name: getattr(found, name) for name in unsettled}
    parts |= {name: _part(found, _BUDGET_WORDS[name]) for name in changed}
    return existing.model_copy(update={**changed, "reason": "; ".join(filter(None, parts.values()))})


def _part(budget: Budget, words: str) -> str:
    """What a budget's reason says of one of its figures."""
    return next((part for part in budget.reason.split("; ") if part.startswith(words)), "")


def _belongs(plan: Plan, fingerprint: Fingerprint, description: DatasetDescription, probes: Probes) -> bool:
    """Whether a plan was made from these facts and this dataset.json."""
    order = description.regions_class_order
    return (
        plan.fingerprint_sha256 == fingerprint.facts_sha256
        and plan.probes_sha256 == probes.facts_sha256
        and plan.labels == description.labels
        and plan.regions_class_order == (None if order is None else tuple(order))
        and plan.file_ending == description.file_ending
    )


def _tell(existing: Plan, plan: Plan, reporter: Reporter, *, is_new: bool) -> None:
    """Say which edits were kept, which rules disagree with them by now, and what else is another decision."""
    edits = _words_of(plan)
    if edits:
        reporter.info(f"{plan.dataset}: plan kept, with its edits; all else is planned around them\n" + _listed(edits))
    elif not is_new:
        reporter.info(f"{plan.dataset}: plan kept")
    before = dict(decisions(existing))
    known = {place: d for place, d in decisions(plan) if place in before}
    moved = [
        f"{_name(place)}: {short(now.value)}, the rule said {short(before[place].by_rule)} and now {short(now.by_rule)}"
        for place, now in known.items()
        if now.by_user and before[place].by_rule not in (None, now.by_rule)
    ]
    if moved:
        reporter.warn("rules have come to another answer than when these were edited:\n" + _listed(moved))
    lost = [name for name in existing.configurations if name not in plan.configurations]
    if lost:
        reporter.warn(f"not planned any more, as the data do not allow it: {', '.join(lost)}")
    orphans = [
        name
        for name, chosen in existing.configurations.items()
        if chosen.inherits_from is not None
        and name in plan.configurations
        and plan.configurations[name].inherits_from is None
    ]
    if orphans:
        reporter.warn(f"kept as they were, as what they inherit from is not planned any more: {', '.join(orphans)}")
    other = [
        f"{_name(place)}: {short(now.value)} instead of {short(before[place].value)}"
        for place, now in known.items()
        if not now.by_user and now.value != before[place].value
    ]
    if other:
        reporter.info(f"{len(other)} decisions differ from the former plan:\n" + _listed(other))


def _words_of(plan: Plan) -> list[str]:
    """The user's decisions, one line each; configurations of the user's own in one line."""
    chosen = plan.configurations
    own = {name: chosen[name].inherits_from for name in chosen if name not in PLANNED_CONFIGURATIONS}
    whole = [name for name, parent in own.items() if parent is None]
    named = [
        f"{_name(place)} = {short(decided.value)}{_by_rule(decided)}"
        for place, decided in places_by_user(plan).items()
        if not (place[0] == "configurations" and place[1] in whole)
    ]
    children = [f"configuration {name}, which inherits from {parent}" for name, parent in own.items() if parent]
    return [*named, *children, *(f"configuration {name}" for name in whole)]


def _by_rule(decided: Decided[object]) -> str:
    return "" if decided.by_rule is None else f" (by rule {short(decided.by_rule)})"


def _name(place: tuple[str, ...]) -> str:
    return ".".join(part for part in place if part not in ("configurations", "recipes"))


def _listed(lines: list[str]) -> str:
    shown = [f"  - {line}" for line in lines[:_MOST_NAMED]]
    return "\n".join(shown + ([f"  - and {len(lines) - _MOST_NAMED} more"] if len(lines) > _MOST_NAMED else []))
