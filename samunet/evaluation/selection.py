"""Which candidate is best, and which component filters help: decided on the same cases, paired.

Every score here is a Dice in which a structure that neither mask holds counts 1: finding nothing where nothing is is
what a choice should reward, and with it every candidate has a score for every case.

Where cases belong together (scans of one patient), certainty is that of whole groups, given as each case's group.

Source: paired percentile bootstrap over cases, Efron & Tibshirani, "An Introduction to the Bootstrap", 1993.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from samunet.artifacts.report import Interval
from samunet.evaluation.aggregate import bootstrap_weights, mean_interval

RULE = (
    "Of the candidates with as many models, the one with the highest mean Dice. More models are taken only where they "
    "are better by more than noise: where the 95 % interval of the paired difference, bootstrapped over cases (whole "
    "groups where there are any), lies above 0. A component filter is taken only on at least 5 cases (groups), where "
    "it gains on average and its interval does not reach below 0; none is tried where voxels may be ignored. A "
    "structure that is rightly found nowhere counts 1."
)
ABSENT = 1.0
LEAST_FILTER_CASES = 5
COMPONENT_PERCENTILES = (5, 25)

Table = NDArray[np.float64]
Groups = Sequence[str] | None
CaseDice = Mapping[str, Mapping[str, float | None]]


def score_table(scores: CaseDice, cases: Sequence[str], structures: Sequence[str]) -> Table:
    """Dice per case and structure, as an array.

    Args:
        scores: Case to structure to Dice; None where neither mask holds it.
        cases: Rows.
        structures: Columns.

    Returns:
        (cases, structures), without gaps.
    """
    rows = [[ABSENT if (value := scores[case][name]) is None else value for name in structures] for case in cases]
    return np.array(rows, dtype=np.float64).reshape(len(cases), len(structures))


def mean_dice(table: Table, groups: Groups = None) -> Interval:
    """Mean over cases of the mean over structures, with its interval."""
    return mean_interval(table.mean(axis=1), bootstrap_weights(len(table), groups=groups))


def paired_gain(ours: Table, theirs: Table, groups: Groups = None) -> Interval:
    """How much better one candidate is than another on the same cases: mean difference, with its interval."""
    return mean_dice(ours - theirs, groups)


def choose(tables: Mapping[str, Table], num_models: Mapping[str, int], groups: Groups = None) -> tuple[str, str]:
    """The candidate to use, and why: the simplest that no other beats by more than noise.

    Args:
        tables: Candidate to its scores (cases, structures); simpler and usual ones first, which wins exact ties.
        num_models: Candidate to the number of models it averages.
        groups: Group of each case.
    """
    chosen, reason = "", ""
    for number in sorted({num_models[name] for name in tables}):
        names = [name for name in tables if num_models[name] == number]
        name = max(names, key=lambda candidate: float(tables[candidate].mean()))
        if not chosen:
            chosen = name
            others = f", the highest of {len(names)}" if len(names) > 1 else ", the only one of its size"
            reason = f"mean Dice {tables[name].mean():.4f} on {len(tables[name])} cases{others}"
            continue
        gain = paired_gain(tables[name], tables[chosen], groups)
        if gain.low is not None and gain.low > 0:
            chosen, reason = name, f"mean Dice {tables[name].mean():.4f}; better than {chosen} by {_text(gain)}"
        else:
            reason += f"; {name} is not better by more than noise: {_text(gain)}"
    return chosen, reason


def size_thresholds(volumes_mm3: Sequence[float]) -> tuple[float, ...]:
    """Volumes below which components might be noise: low percentiles of the references' components, in mm3."""
    if not volumes_mm3:
        return ()
    return tuple(sorted({float(np.percentile(volumes_mm3, share)) for share in COMPONENT_PERCENTILES}))


def too_few_for_filters(num_cases: int, groups: Groups = None) -> str | None:
    """Why so few cases, or groups of them, cannot show that a filter helps; None if they can.

    Args:
        num_cases: Cases.
        groups: Group of each case.
    """
    units, kind = _units(num_cases, groups)
    return f"{units} {kind}; fewer than {LEAST_FILTER_CASES} show nothing" if units < LEAST_FILTER_CASES else None


def filter_helps(before: Table, after: Table, groups: Groups = None) -> tuple[bool, str]:
    """Whether a component filter helps a structure.

    Args:
        before: (cases,) Dice without it.
        after: (cases,) Dice with it.
        groups: Group of each case.

    Returns:
        The decision and the reason.
    """
    if (reason := too_few_for_filters(len(before), groups)) is not None:
        return False, reason
    units, kind = _units(len(before), groups)
    gain = paired_gain(after[:, None], before[:, None], groups)
    helps = gain.value is not None and gain.low is not None and gain.value > 0 and gain.low >= 0
    return helps, f"Dice {_text(gain)} on {units} {kind}"


def _units(num_cases: int, groups: Groups) -> tuple[int, str]:
    """What is counted as independent: cases, or the groups they belong to."""
    if groups is None:
        return num_cases, "case" + "s" * (num_cases != 1)
    number = len(set(groups))
    return number, f"group{'s' * (number != 1)} of cases"


def _text(gain: Interval) -> str:
    if gain.value is None or gain.low is None or gain.high is None:
        return "an unknown margin"
    return f"{gain.value:+.4f} ({gain.low:+.4f} to {gain.high:+.4f})"
