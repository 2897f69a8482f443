"""Every sentence about what would change a plan is true: the plan that is made under its condition says so."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from samunet.artifacts.fingerprint import CaseFacts
from samunet.artifacts.plan import Decided
from samunet.planners.alterations import Inputs
from samunet.planners.edits import ConfigurationEdits, Edits
from samunet.planners.rests_on import CONSTANT, MINUTES
from tests import planning_facts as facts
from tests.claim_checks import holds
from tests.golden import edge_plans
from tests.planned_claims import PAIR, Claims

COHERENT = {"organ": facts.structure(coherence_mm=(12.0, 9.0, 9.0))}
RARE = {"organ": facts.structure(width_mm=3.0, coherence=(0.2, 0.9, 0.8), coherence_mm=(1.0, 6.0, 6.0))}
COLOUR = ("rgb_to_0_1",) * 3


def _inputs(
    cases: list[CaseFacts], *, channels: tuple[str, ...] = ("MRI",), pairs: Any = (), **budget: float
) -> Inputs:
    known = facts.fingerprint(cases, channels=channels, pairs=pairs)
    return Inputs(known, facts.description(channels=channels), facts.budget(**budget))


def _edge(name: str) -> Inputs:
    return Inputs(*edge_plans.facts_of(name), facts.budget(**edge_plans.BUDGET))


def _thick() -> Inputs:
    thin, thick = (facts.case(shape=(20, 240, 240), spacing=(mm, 1.0, 1.0)) for mm in (5.0, 8.0))
    return _inputs([thin, thin, *[thick] * 8])


def _oblique() -> Inputs:
    case = facts.case(shape=(300, 400, 350), spacing=(0.8, 0.7, 0.7), structures=COHERENT, tilt=40.0)
    return _inputs([case] * 40, channels=("CT",), pairs=(PAIR,), gpu=24.0, cpu=3.0, minutes=240.0)


def _edited() -> Inputs:
    """The user has decided on spacing, a batch, and a configuration of their own."""
    whole = _inputs([facts.case(shape=(30, 240, 240), spacing=(5, 1, 1), structures=COHERENT)] * 10)
    plan = whole.plan()
    batch = {("sam", "gpu"): {"batch_size": Decided[Any](value=6, reason="mine", source="user")}}
    spacing = Decided[Any](value=(4.0, 1.5, 1.5), reason="mine", source="user")
    own = plan.configurations["2d"].model_copy(update={"inherits_from": None})
    edits = Edits({"target_spacing": spacing}, {"2.5d": ConfigurationEdits(recipes=batch)}, {"mine": own})
    return replace(whole, edits=edits)


PLANS: dict[str, Callable[[], Inputs]] = {
    "volumes": lambda: _inputs([facts.case(shape=(30, 240, 240), spacing=(5, 1, 1), structures=COHERENT)] * 10),
    "small hardware": lambda: _inputs(
        [facts.case(shape=(40, 300, 300), structures=COHERENT)] * 8, gpu=3.0, cpu=2.0, minutes=20.0
    ),
    "many oblique slices, mirror pairs": _oblique,
    "few slices": lambda: _inputs([facts.case(shape=(2, 60, 50), spacing=(4, 1, 1))] * 3),
    "tiny volumes that do not cohere": lambda: _inputs(
        [facts.case(shape=(36, 26, 20), structures=RARE)] * 4, minutes=2.0
    ),
    "other thicknesses": _thick,
    "pictures": lambda: _inputs([facts.case(shape=(1, 768, 1024), spacing=(999, 1, 1))] * 30),
    "edits": _edited,
    "colour_pictures": lambda: _edge("colour_pictures"),
    "four_channels": lambda: _edge("four_channels"),
    "huge_pictures": lambda: _edge("huge_pictures"),
    "tenfold_spacing": lambda: _edge("tenfold_spacing"),
    "label_in_one_case": lambda: _edge("label_in_one_case"),
}


@pytest.mark.parametrize("name", PLANS)
def test_every_sentence_is_true(name: str) -> None:
    """Each is of a kind that is known here, and the plan that is made under its condition has the value it names."""
    claims = Claims(PLANS[name]())
    for place, row in claims.rows.items():
        if row.by_user:
            continue
        for sentence in row.changes:
            assert holds(claims, place, sentence), f"{'.'.join(place)} = {row.value}: {sentence}"
    _rests_on_hardware(claims)
    _constants_are_constant(claims)


def _rests_on_hardware(claims: Claims) -> None:
    """Whatever any plan for other hardware changes names that hardware."""
    kinds = {"cpu_minutes": MINUTES, "gpu_memory_gib": "GPU memory", "cpu_memory_gib": "CPU memory"}
    checked = 0
    for key, other in claims.others.items():
        if key[0] not in kinds:
            continue
        for place, row in claims.rows.items():
            if not row.by_user and place in other and other[place].value != claims.now[place].value:
                assert kinds[key[0]] in row.rests_on, f"{'.'.join(place)} changes with {key}"
                checked += 1
    assert checked > 20


def _constants_are_constant(claims: Claims) -> None:
    """What nothing in the data or the hardware changes is the same in every plan that any sentence led to."""
    for place, row in claims.rows.items():
        if CONSTANT in row.changes:
            values = {str(other[place].value) for other in claims.others.values() if place in other}
            assert values <= {str(claims.now[place].value)}, ".".join(place)
