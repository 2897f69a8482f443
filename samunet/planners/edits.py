"""What the user decided in plans.json, and how a rule's answer gives way to it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from samunet.artifacts.plan import Configuration, Decided, Plan, Recipe
from samunet.core.config import Schema

Reasoned = tuple[Any, str]
Choices = Mapping[str, Decided[Any]]
PLANNED_CONFIGURATIONS = ("2d", "2.5d", "3d", "2d_medsam")


@dataclass(frozen=True)
class ConfigurationEdits:
    """The user's decisions in one configuration.

    Args:
        choices: Of the configuration itself, by field.
        recipes: Of its recipes: (weights, device) to field.
    """

    choices: Choices = field(default_factory=dict)
    recipes: Mapping[tuple[str, str], Choices] = field(default_factory=dict)


@dataclass(frozen=True)
class Edits:
    """The user's decisions in a plan.

    Args:
        choices: About the data, by field.
        configurations: In each configuration.
        own: Configurations that the user added, complete, by name.
    """

    choices: Choices = field(default_factory=dict)
    configurations: Mapping[str, ConfigurationEdits] = field(default_factory=dict)
    own: Mapping[str, Configuration] = field(default_factory=dict)

    def of(self, configuration: str) -> ConfigurationEdits:
        """Those in one configuration."""
        return self.configurations.get(configuration, ConfigurationEdits())


NO_EDITS = Edits()


def edits_of(plan: Plan) -> Edits:
    """What of a plan, with its edits marked, the user decided."""
    return Edits(
        choices=_choices(plan),
        configurations={name: _of_configuration(chosen) for name, chosen in plan.configurations.items()},
        own={name: chosen for name, chosen in plan.configurations.items() if name not in PLANNED_CONFIGURATIONS},
    )


def root_of(name: str, own: Mapping[str, Configuration]) -> str:
    """The first configuration in a chain of parents that is not the user's, or that inherits from none."""
    while name in own and (parent := own[name].inherits_from) is not None:
        name = parent
    return name


def is_planned(plan: Plan, configuration: str) -> bool:
    """Whether rules decide in a configuration: in one that is planned, or that inherits from one that is."""
    own = {name: chosen for name, chosen in plan.configurations.items() if name not in PLANNED_CONFIGURATIONS}
    root = root_of(configuration, own)
    return root in plan.configurations and root not in own


def decisions(plan: Plan) -> Iterator[tuple[tuple[str, ...], Decided[Any]]]:
    """Every decision of a plan with its place."""
    yield from _decided(plan, ())


def places_by_user(plan: Plan) -> dict[tuple[str, ...], Decided[Any]]:
    """The user's decisions with their places; those a configuration inherits are named at its parent only."""
    found = {place: decided for place, decided in decisions(plan) if decided.by_user}
    return {place: decided for place, decided in found.items() if not _inherited(place, decided, plan, found)}


def settled(rule: Reasoned, edit: Decided[Any] | None) -> dict[str, Any]:
    """A decision as content of a plan: the rule's, or the user's with what the rule says."""
    if edit is None:
        return {"value": rule[0], "reason": rule[1]}
    return {"value": edit.value, "reason": edit.reason, "source": "user", "by_rule": rule[0]}


class Settling:
    """Takes decisions one after the other, the user's before the rule's, and keeps them as content of a plan."""

    def __init__(self, edits: Choices) -> None:
        self.content: dict[str, Any] = {}
        self._edits = edits

    def __call__(self, name: str, rule: Reasoned) -> Any:
        """Settle a field and return its value."""
        self.content[name] = settled(rule, self._edits.get(name))
        return self.content[name]["value"]


def _choices(part: Schema) -> dict[str, Decided[Any]]:
    values = ((name, getattr(part, name)) for name in type(part).model_fields)
    return {name: value for name, value in values if isinstance(value, Decided) and value.by_user}


def _of_configuration(chosen: Configuration) -> ConfigurationEdits:
    recipes = {
        (weights, device): _choices(recipe)
        for weights, devices in chosen.recipes.items()
        for device, recipe in devices.items()
    }
    return ConfigurationEdits(_choices(chosen), {place: edits for place, edits in recipes.items() if edits})


def _decided(part: Any, place: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Decided[Any]]]:
    if isinstance(part, Decided):
        yield place, part
    elif isinstance(part, Plan | Configuration | Recipe):
        for name in type(part).model_fields:
            yield from _decided(getattr(part, name), (*place, name))
    elif isinstance(part, dict):
        for name, below in part.items():
            yield from _decided(below, (*place, str(name)))


def _inherited(
    place: tuple[str, ...], decided: Decided[Any], plan: Plan, found: Mapping[tuple[str, ...], Decided[Any]]
) -> bool:
    if place[0] != "configurations":
        return False
    parent = plan.configurations[place[1]].inherits_from
    above = None if parent is None else found.get(("configurations", parent, *place[2:]))
    return above is not None and above.value == decided.value
