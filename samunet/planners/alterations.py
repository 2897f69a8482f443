"""What a plan is made from, altered in one thing, so that planning again shows what hangs on it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from samunet.artifacts.dataset import DatasetDescription
from samunet.artifacts.fingerprint import CaseFacts, Fingerprint, MirrorPair
from samunet.artifacts.plan import Budget, Decided, Plan, Recipe
from samunet.artifacts.probe import NO_PROBES, Probes
from samunet.core.errors import ConfigError
from samunet.core.geometry import ANATOMICAL_AXES, SpacingTriple, Triple
from samunet.planners.edits import NO_EDITS, ConfigurationEdits, Edits, decisions, edits_of
from samunet.planners.planner import described, make_plan

Place = tuple[str, ...]
Planned = dict[Place, Decided[Any]]
RecipePlace = tuple[str, str, str]
_PAIR = ("left of a pair", "right of a pair")


@dataclass(frozen=True)
class Inputs:
    """All that a plan is made from.

    Args:
        fingerprint: The dataset's facts.
        description: Its dataset.json.
        budget: The hardware to plan for.
        probes: What samunet_probe measured.
        edits: What the user decided.
    """

    fingerprint: Fingerprint
    description: DatasetDescription
    budget: Budget
    probes: Probes = NO_PROBES
    edits: Edits = NO_EDITS

    @classmethod
    def of(cls, plan: Plan, fingerprint: Fingerprint, probes: Probes = NO_PROBES) -> Inputs:
        """What a plan was made from, its edits included."""
        return cls(fingerprint, described(plan), plan.budget, probes, edits_of(plan))

    def plan(self) -> Plan:
        """Plan from these.

        Raises:
            ConfigError: If what the user decided does not go with the rest.
        """
        return make_plan(self.fingerprint, self.description, self.budget, probes=self.probes, edits=self.edits)

    def planned(self) -> Planned:
        """Every decision by its place; none where no plan is possible."""
        try:
            return dict(decisions(self.plan()))
        except ConfigError:
            return {}

    def with_budget(self, **changes: float) -> Inputs:
        """Other hardware, by the names of the budget's fields."""
        return replace(self, budget=self.budget.model_copy(update=changes))

    def with_cases(self, change: Callable[[CaseFacts], CaseFacts]) -> Inputs:
        """Every case changed alike."""
        cases = {name: change(case) for name, case in self.fingerprint.cases.items()}
        return self._with_facts(cases=cases)

    def times_over(self, times: int) -> Inputs:
        """Every case so many times."""
        cases = {f"{name}~{copy}": c for name, c in self.fingerprint.cases.items() for copy in range(times)}
        return self._with_facts(cases=cases)

    def every(self, step: int) -> Inputs:
        """Only the first of so many cases, by name."""
        names = sorted(self.fingerprint.cases)[::step]
        return self._with_facts(cases={name: self.fingerprint.cases[name] for name in names})

    def with_first_channel(self, name: str) -> Inputs:
        """The first channel of another name."""
        names = (name, *self.fingerprint.channel_names[1:])
        described_as = {str(index): each for index, each in enumerate(names)}
        altered = self._with_facts(channel_names=names)
        return replace(altered, description=self.description.model_copy(update={"channel_names": described_as}))

    def with_mirror_pair(self) -> Inputs:
        """A left and a right structure beside the pairs that there are."""
        pair = MirrorPair(first=_PAIR[0], second=_PAIR[1], axis=ANATOMICAL_AXES[0], evidence="name")
        return self._with_facts(mirror_pairs=(*self.fingerprint.mirror_pairs, pair))

    def without_mirror_pairs(self) -> Inputs:
        """No pairs of structures that a reflection would swap."""
        return self._with_facts(mirror_pairs=())

    def with_edits(self, edits: Mapping[RecipePlace, Mapping[str, Any]]) -> Inputs:
        """Decisions of recipes (configuration, weights, device) edited beside those that are."""
        configurations = dict(self.edits.configurations)
        for (name, weights, device), values in edits.items():
            before = configurations.get(name, ConfigurationEdits())
            choices = {**before.recipes.get((weights, device), {}), **_chosen(values)}
            configurations[name] = replace(before, recipes={**before.recipes, (weights, device): choices})
        return replace(self, edits=replace(self.edits, configurations=configurations))

    def _with_facts(self, **changes: Any) -> Inputs:
        altered = self.fingerprint.model_copy(update=changes)
        probes = self.probes.carried_over(self.fingerprint, altered)
        return replace(self, fingerprint=altered, probes=probes)


def recipes_of(plan: Plan) -> dict[RecipePlace, Recipe]:
    """Every recipe of a plan by configuration, weights and device."""
    return {
        (name, weights, device): recipe
        for name, chosen in plan.configurations.items()
        for weights, devices in chosen.recipes.items()
        for device, recipe in devices.items()
    }


def spaced(case: CaseFacts, axis: int, factor: float, *, same_extent: bool = False) -> CaseFacts:
    """A case whose voxels are longer along an axis.

    Args:
        case: Facts of the case.
        axis: Of the file.
        factor: How much longer.
        same_extent: Whether the image then has so many fewer voxels, and not as many.
    """
    changes: dict[str, Any] = {"spacing": times(case.spacing, axis, factor)}
    if same_extent:
        changes["shape"] = _fewer(case.shape, axis, factor)
        changes["shape_after_crop"] = _fewer(case.shape_after_crop, axis, factor)
    return case.model_copy(update=changes)


def longer(case: CaseFacts, axis: int, factor: int) -> CaseFacts:
    """A case with so many times as many slices along an axis, as many of them with a structure.

    Args:
        case: Facts of the case.
        axis: Of the file.
        factor: Times as many.
    """
    names = ("shape", "shape_after_crop", "num_foreground_slices")
    return case.model_copy(update={name: _fewer(getattr(case, name), axis, 1 / factor) for name in names})


def times(spacing: SpacingTriple, axis: int, factor: float) -> SpacingTriple:
    """A spacing with one axis scaled."""
    z, y, x = (mm * factor if index == axis else mm for index, mm in enumerate(spacing))
    return z, y, x


def _fewer(shape: Triple, axis: int, factor: float) -> Triple:
    sides: Sequence[int] = [max(min(n, 1), round(n / factor)) if i == axis else n for i, n in enumerate(shape)]
    return sides[0], sides[1], sides[2]


def _chosen(values: Mapping[str, Any]) -> dict[str, Decided[Any]]:
    return {name: Decided[Any](value=value, reason="altered", source="user") for name, value in values.items()}
