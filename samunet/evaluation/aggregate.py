"""Means over cases, with bootstrap intervals.

Cases are the unit of resampling: a resample draws whole cases with replacement, and all structures of a drawn case
come with it, so the interval of the foreground mean respects that structures of one case are not independent. Where
cases belong together (scans of one patient), a resample draws whole groups.

Source: percentile bootstrap, Efron & Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13; of groups,
Davison & Hinkley, "Bootstrap Methods and their Application", 1997, section 3.8.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from samunet.artifacts.report import (
    METRICS,
    SCORES,
    CaseReport,
    EvaluationReport,
    Interval,
    PairCounts,
    Settings,
    structure_keys,
)
from samunet.core.labels import LabelSpec
from samunet.evaluation.case import DEFAULT_TOLERANCE_MM
from samunet.evaluation.policy import EMPTY_RULE, emptiness

CONFIDENCE = 0.95
RESAMPLES = 2000
BOOTSTRAP_SEED = 12345

Array = NDArray[np.float64]


def aggregate(
    cases: Sequence[CaseReport],
    labels: LabelSpec,
    *,
    tolerance_mm: float = DEFAULT_TOLERANCE_MM,
    surface: bool = True,
    missing: Sequence[str] = (),
    failed: Mapping[str, str] | None = None,
    unmatched: Sequence[str] = (),
    groups: Mapping[str, str] | None = None,
) -> EvaluationReport:
    """Summarise cases. Pairs without a score (both masks empty) are left out of every mean, and counted.

    Args:
        cases: Evaluated cases, each with every structure of ``labels``.
        labels: The structures.
        tolerance_mm: What the cases' surface Dice was computed with; recorded.
        surface: Whether surface distances were computed; recorded.
        missing: Cases without a prediction.
        failed: Cases that could not be evaluated, with the reason.
        unmatched: Predictions without a reference.
        groups: Case to group (patient), whose cases are resampled together.
    """
    cases = sorted(cases, key=lambda c: c.case)
    keys = {key: name for name, key in structure_keys(labels).items()}
    tables = {metric: _table(cases, tuple(keys), metric) for metric in METRICS}
    names = [case.case for case in cases]
    labels_of = group_labels(names, groups)
    weights = bootstrap_weights(len(cases), groups=labels_of)
    by_structure = {metric: nan_mean(table, axis=0) for metric, table in tables.items()}
    return EvaluationReport(
        foreground_mean={metric: _mean(means) for metric, means in by_structure.items()},
        mean={key: {metric: by_structure[metric][i] for metric in METRICS} for i, key in enumerate(keys)},
        metric_per_case=tuple(cases),
        structures=keys,
        foreground_mean_interval={score: _foreground_interval(tables[score], weights) for score in SCORES},
        mean_interval={
            key: {score: mean_interval(tables[score][:, i], weights) for score in SCORES} for i, key in enumerate(keys)
        },
        case_mean={score: mean_interval(nan_mean(tables[score], axis=1), weights) for score in SCORES},
        empty_masks={key: _count_empty(cases, key) for key in keys},
        missing_predictions=tuple(sorted(missing)),
        failed_cases=dict(failed or {}),
        unmatched_predictions=tuple(sorted(unmatched)),
        rule=EMPTY_RULE,
        settings=Settings(
            tolerance_mm=tolerance_mm,
            surface=surface,
            confidence=CONFIDENCE,
            resamples=RESAMPLES,
            seed=BOOTSTRAP_SEED,
            groups=None if labels_of is None else dict(zip(names, labels_of, strict=True)),
        ),
        versions=_versions(),
    )


def nan_mean(values: Array, *, axis: int) -> Array:
    """Mean over the values that exist; NaN where none does (numpy's nanmean would warn)."""
    exists = np.isfinite(values)
    count = exists.sum(axis=axis)
    total = np.where(exists, values, 0.0).sum(axis=axis)
    means: Array = np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)
    return means


def group_labels(cases: Sequence[str], groups: Mapping[str, str] | None) -> list[str] | None:
    """The group of each case, in order; a case without one stands for itself. None where there are no groups."""
    return [groups.get(case, case) for case in cases] if groups else None


def bootstrap_weights(
    num_cases: int, *, groups: Sequence[str] | None = None, resamples: int = RESAMPLES, seed: int = BOOTSTRAP_SEED
) -> Array:
    """How often each case is drawn: (resamples, num_cases), the same for the same seed.

    Args:
        num_cases: Cases.
        groups: Group of each case, as :func:`group_labels` gives them: as many groups are drawn as there are, each
            with all its cases. None: every case is its own.
        resamples: Draws.
        seed: Of the draws.

    Returns:
        Without a row where there is a single group of several cases: it says nothing about other groups.
    """
    if num_cases == 0:
        return np.zeros((resamples, 0))
    units = list(range(num_cases)) if groups is None else list(groups)
    place = {unit: index for index, unit in enumerate(dict.fromkeys(units))}
    if len(place) == 1 and num_cases > 1:
        return np.zeros((0, num_cases))
    generator = np.random.default_rng(seed)
    drawn = generator.multinomial(len(place), np.full(len(place), 1 / len(place)), size=resamples)
    return drawn[:, [place[unit] for unit in units]].astype(np.float64)


def resampled_means(values: Array, weights: Array) -> Array:
    """The mean of each resample.

    Args:
        values: (cases, columns), NaN where there is no score.
        weights: (resamples, cases).

    Returns:
        (resamples, columns); NaN where a resample holds no case with a score.
    """
    exists = np.isfinite(values)
    count = weights @ exists.astype(np.float64)
    total = weights @ np.where(exists, values, 0.0)
    means: Array = np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)
    return means


def mean_interval(values: Array, weights: Array) -> Interval:
    """The mean of one score over cases, with its percentile interval.

    Args:
        values: (cases,), NaN where there is no score.
        weights: (resamples, cases) from :func:`bootstrap_weights`.
    """
    num = int(np.isfinite(values).sum())
    value = float(nan_mean(values[:, None], axis=0)[0])
    return _interval(value, resampled_means(values[:, None], weights)[:, 0], num)


def _foreground_interval(table: Array, weights: Array) -> Interval:
    """The mean over structures of their means over cases, with its interval."""
    num = int(np.isfinite(table).any(axis=1).sum())
    value = _mean(nan_mean(table, axis=0))
    return _interval(value, nan_mean(resampled_means(table, weights), axis=1), num)


def _interval(value: float, draws: Array, num_cases: int) -> Interval:
    drawn = draws[np.isfinite(draws)]
    if num_cases < 2 or drawn.size == 0:
        return Interval(value=value, num_cases=num_cases)
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(drawn, [tail, 100 - tail])
    return Interval(value=value, low=float(low), high=float(high), num_cases=num_cases)


def _mean(values: Array) -> float:
    return float(nan_mean(values[:, None], axis=0)[0])


def _table(cases: Sequence[CaseReport], keys: Sequence[str], metric: str) -> Array:
    """(cases, structures) values of one metric, NaN for None."""
    rows = [[getattr(case.metrics[key], metric) for key in keys] for case in cases]
    return np.array(rows, dtype=np.float64).reshape(len(cases), len(keys))


def _count_empty(cases: Sequence[CaseReport], key: str) -> PairCounts:
    states = [emptiness(case.metrics[key].n_ref, case.metrics[key].n_pred) for case in cases]
    return PairCounts(
        num_cases=len(cases),
        both_empty=states.count("both_empty"),
        missed=states.count("missed"),
        invented=states.count("invented"),
    )


def _versions() -> dict[str, str]:
    import scipy

    from samunet import __version__

    return {"samunet": __version__, "numpy": np.__version__, "scipy": scipy.__version__}
