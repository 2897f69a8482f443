"""Two evaluations of the same references, case by case."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from samunet.artifacts.report import SCORES, CaseReport, EvaluationReport, Score
from samunet.core.config import Schema
from samunet.core.errors import UsageError
from samunet.evaluation.aggregate import bootstrap_weights, group_labels, mean_interval


class PairedDifference(Schema):
    """The difference of one score between two evaluations.

    Args:
        mean: Mean over cases of this evaluation's score minus the other's.
        low: Lower bound of its 95 % bootstrap interval over cases (groups); None with fewer than two.
        high: Upper bound.
        p_value: Wilcoxon signed-rank test of cases (means of groups), two-sided; 1 where all differences are 0, None
            without a case.
        num_cases: Cases that have the score in both.
        num_left_out: Cases that have it in only one of the two (both masks empty in the other).
    """

    mean: Score
    low: Score
    high: Score
    p_value: Score
    num_cases: int
    num_left_out: int


class Comparison(Schema):
    """A paired comparison.

    Args:
        structures: Key to score to difference; the key "mean" is each case's mean over its structures.
        num_common_cases: Cases in both evaluations.
        only_here: Cases of this evaluation only.
        only_there: Cases of the other only.
    """

    structures: dict[str, dict[str, PairedDifference]]
    num_common_cases: int
    only_here: tuple[str, ...]
    only_there: tuple[str, ...]


def compare_reports(this: EvaluationReport, other: EvaluationReport) -> Comparison:
    """Compare two evaluations on the cases and structures they share.

    Where this one says which cases belong together, certainty is that of whole groups. NSD is left out where the
    tolerances differ or are not known.

    Raises:
        UsageError: If they share no case or no structure.
    """
    here, there = ({case.case: case for case in report.metric_per_case} for report in (this, other))
    common = sorted(here.keys() & there.keys())
    keys = [key for key in this.mean if key in other.mean]
    if not common or not keys:
        raise UsageError(
            "the two evaluations share no " + ("structure" if common else "case"),
            expected=", ".join(list(this.mean) if common else sorted(here)[:5]),
            found=", ".join(list(other.mean) if common else sorted(there)[:5]),
        )
    groups = group_labels(common, None if this.settings is None else this.settings.groups)
    weights = bootstrap_weights(len(common), groups=groups)
    scores = [score for score in SCORES if score != "NSD" or _same_tolerance(this, other)]
    structures: dict[str, dict[str, PairedDifference]] = {key: {} for key in (*keys, "mean")}
    for score in scores:
        ours, theirs = (np.array([_row(cases[c], keys, score) for c in common]) for cases in (here, there))
        for i, key in enumerate(keys):
            structures[key][score] = _difference(ours[:, i], theirs[:, i], weights, groups)
        both = np.isfinite(ours) & np.isfinite(theirs)
        structures["mean"][score] = _difference(_row_means(ours, both), _row_means(theirs, both), weights, groups)
    return Comparison(
        structures=structures,
        num_common_cases=len(common),
        only_here=tuple(sorted(here.keys() - there.keys())),
        only_there=tuple(sorted(there.keys() - here.keys())),
    )


def _same_tolerance(this: EvaluationReport, other: EvaluationReport) -> bool:
    settings = this.settings, other.settings
    return all(settings) and settings[0].tolerance_mm == settings[1].tolerance_mm  # type: ignore[union-attr]


def _row(case: CaseReport, keys: list[str], score: str) -> list[float]:
    values = [getattr(case.metrics[key], score) for key in keys]
    return [float("nan") if value is None else value for value in values]


def _row_means(values: NDArray[np.float64], where: NDArray[np.bool_]) -> NDArray[np.float64]:
    count = where.sum(axis=1)
    total = np.where(where, values, 0.0).sum(axis=1)
    means: NDArray[np.float64] = np.divide(total, count, out=np.full(len(values), np.nan), where=count > 0)
    return means


def _difference(
    ours: NDArray[np.float64],
    theirs: NDArray[np.float64],
    weights: NDArray[np.float64],
    groups: Sequence[str] | None,
) -> PairedDifference:
    from scipy.stats import wilcoxon

    difference = ours - theirs
    exists = np.isfinite(difference)
    known = difference[exists]
    if groups is not None:
        own = np.array(groups)[exists]
        known = np.array([known[own == group].mean() for group in np.unique(own)])
    p_value: float | None = None
    if known.size:
        p_value = float(wilcoxon(known).pvalue) if np.any(known != 0) else 1.0
    interval = mean_interval(difference, weights)
    return PairedDifference(
        mean=interval.value,
        low=interval.low,
        high=interval.high,
        p_value=p_value,
        num_cases=interval.num_cases,
        num_left_out=int((np.isfinite(ours) != np.isfinite(theirs)).sum()),
    )
