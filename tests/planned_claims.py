"""The sentences of a plan about what would change it, and the plans that are made under their conditions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from samunet.artifacts.fingerprint import CaseFacts, MirrorPair
from samunet.artifacts.plan import Decided, Plan
from samunet.core.geometry import SpacingTriple
from samunet.planners.alterations import Inputs, Place, Planned
from samunet.planners.edits import ConfigurationEdits, decisions
from samunet.planners.explain import Row, explanation
from samunet.planners.what_if import what_ifs
from samunet.planners.words import short

PAIR = MirrorPair(first="left", second="right", axis="left-right", evidence="name")
_FRAME = ("frame", "target_spacing")


class Claims:
    """The sentences of one plan, and the plans under their conditions."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs, self.plan = inputs, inputs.plan()
        self.now: Planned = dict(decisions(self.plan))
        self.rows = dict(_rows(self.plan, inputs))
        self.others: dict[tuple[Any, ...], Planned] = {}

    def under(self, key: tuple[Any, ...], altered: Callable[[], Inputs]) -> Planned:
        """Every decision under a condition, planned once."""
        if key not in self.others:
            self.others[key] = dict(decisions(altered().plan()))
        return self.others[key]

    def kept(self, altered: Inputs, *, spacing: SpacingTriple | None = None) -> Inputs:
        """Altered facts in the plan's own frame and target spacing, or in the frame of cases of another spacing."""
        values = {name: self.now[name,].value for name in _FRAME}
        if spacing is not None:
            values["frame"] = values["frame"].model_copy(update={"spacing": spacing})
        choices = {name: Decided[Any](value=value, reason="kept", source="user") for name, value in values.items()}
        return replace(altered, edits=replace(altered.edits, choices={**altered.edits.choices, **choices}))

    def with_cases(self, change: Callable[[CaseFacts], CaseFacts]) -> Inputs:
        cases = {name: change(case) for name, case in self.inputs.fingerprint.cases.items()}
        return self.of_cases(cases)

    def of_cases(self, cases: Mapping[str, CaseFacts]) -> Inputs:
        return replace(self.inputs, fingerprint=self.inputs.fingerprint.model_copy(update={"cases": dict(cases)}))

    def edited(self, place: Place, field: str, value: Any, words: str) -> Planned:
        """The plan with one entry of a configuration edited."""
        before = self.inputs.edits.of(place[1])
        edit = {field: Decided[Any](value=value, reason="edited", source="user")}
        configurations = {**self.inputs.edits.configurations, place[1]: _with_choices(before, edit)}
        edits = replace(self.inputs.edits, configurations=configurations)
        return self.under((words, place[1]), lambda: replace(self.inputs, edits=edits))

    def edited_recipes(self, field: str, value_of: Callable[[Place], Any], words: str, named: str = "") -> Planned:
        """The plan with one entry edited in every recipe of which a sentence says it, as recipes do not meet."""
        places = {
            place[1:5]: place
            for place, row in self.rows.items()
            if len(place) == 6 and any(sentence.startswith(f"with {named or words}:") for sentence in row.changes)
        }
        edits = {(at[0], at[2], at[3]): {field: value_of(place)} for at, place in places.items()}
        return self.under((words,), lambda: self.inputs.with_edits(edits))

    @property
    def axis(self) -> int:
        return self.plan.frame.value.slice_axis


def _with_choices(before: ConfigurationEdits, edit: dict[str, Decided[Any]]) -> ConfigurationEdits:
    return replace(before, choices={**before.choices, **edit})


def _rows(plan: Plan, inputs: Inputs) -> Iterator[tuple[Place, Row]]:
    found = what_ifs(plan, inputs.fingerprint, inputs.probes)
    made = explanation(plan, inputs.fingerprint, found, inputs.probes)
    yield from (((row.name,), row) for row in made.data.rows)
    for configuration in made.configurations:
        for section in configuration.sections:
            at = ("configurations", configuration.name, *(("recipes", *section.recipe) if section.recipe else ()))
            yield from (((*at, row.name), row) for row in section.rows)


def becomes(claims: Claims, place: Place, other: Planned, words: str, *rests_on: str) -> bool:
    """Whether a decision is another one in another plan, the one in these words, and the facts are named."""
    value, now = other[place].value, claims.now[place].value
    same_words = short(value) == short(now)
    named = words == "of other numbers" if same_words else words == short(value)
    return value != now and named and set(rests_on) <= set(claims.rows[place].rests_on)


def of_channels(inputs: Inputs, names: tuple[str, ...]) -> Inputs:
    """As many channels as names, each like the first where it is new."""
    content: dict[str, Any] = {"channel_names": names}
    for field in ("foreground_intensities", "zscore_ranges"):
        values = getattr(inputs.fingerprint, field)
        content[field] = tuple((*values, *[values[0]] * len(names))[: len(names)])
    described_as = {str(index): name for index, name in enumerate(names)}
    description = inputs.description.model_copy(update={"channel_names": described_as})
    return replace(inputs, fingerprint=inputs.fingerprint.model_copy(update=content), description=description)
