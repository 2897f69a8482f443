"""Paired comparison of two evaluations."""

from __future__ import annotations

import numpy as np
import pytest

from samunet.artifacts.report import CaseReport, EvaluationReport, StructureMetrics
from samunet.core.errors import UsageError
from samunet.core.labels import LabelSpec
from samunet.evaluation.aggregate import aggregate
from samunet.evaluation.compare import compare_reports

LABELS = LabelSpec({"liver": (1,)})


def evaluation(
    scores: dict[str, float | None], *, tolerance_mm: float = 1.0, groups: dict[str, str] | None = None
) -> EvaluationReport:
    def metrics(value: float | None) -> StructureMetrics:
        counts = dict.fromkeys(("TP", "FP", "FN", "TN"), 1) | dict.fromkeys(("n_pred", "n_ref"), 2)
        return StructureMetrics(Dice=value, IoU=value, NSD=value, **counts)

    cases = [CaseReport(case=name, metrics={"1": metrics(value)}) for name, value in scores.items()]
    return aggregate(cases, LABELS, tolerance_mm=tolerance_mm, groups=groups)


def test_constant_gain() -> None:
    """A gain of 0.1 in every case is a difference of exactly 0.1, with a small p value."""
    base = {f"case_{i:02d}": 0.5 + 0.01 * i for i in range(20)}
    better = {name: value + 0.1 for name, value in base.items()}
    found = compare_reports(evaluation(better), evaluation(base)).structures["1"]["Dice"]
    assert (found.mean, found.low, found.high) == pytest.approx((0.1, 0.1, 0.1))
    assert found.p_value is not None
    assert found.p_value < 1e-4
    assert found.num_cases == 20


def test_no_difference() -> None:
    """An evaluation against itself differs by 0 with p = 1."""
    one = evaluation({"a": 0.3, "b": 0.6})
    found = compare_reports(one, one).structures["mean"]["Dice"]
    assert (found.mean, found.p_value) == (0.0, 1.0)


def test_noise_has_an_interval_around_zero() -> None:
    """Independent noise of no direction is not called a difference."""
    noise = np.random.default_rng(3).normal(0, 0.05, size=(2, 60))
    first, second = ({str(i): 0.7 + float(v) for i, v in enumerate(row)} for row in noise)
    found = compare_reports(evaluation(first), evaluation(second)).structures["1"]["Dice"]
    assert found.low is not None
    assert found.high is not None
    assert found.low < 0 < found.high


def test_only_common_cases_with_both_scores_count() -> None:
    """Cases of one evaluation only are named; a pair with one score is counted apart."""
    found = compare_reports(evaluation({"a": 0.5, "b": 0.5, "c": 0.9}), evaluation({"a": 0.4, "b": None, "d": 0.1}))
    assert (found.num_common_cases, found.only_here, found.only_there) == (2, ("c",), ("d",))
    dice = found.structures["1"]["Dice"]
    assert (dice.num_cases, dice.num_left_out) == (1, 1)
    assert dice.mean == pytest.approx(0.1)


def test_surface_dice_of_different_tolerances_is_not_compared() -> None:
    """NSD at 1 mm and at 2 mm are different scores."""
    found = compare_reports(evaluation({"a": 0.5}), evaluation({"a": 0.4}, tolerance_mm=2.0))
    assert "NSD" not in found.structures["1"]
    assert "Dice" in found.structures["1"]


def test_nothing_in_common_is_an_error() -> None:
    """Evaluations of different cases cannot be compared."""
    with pytest.raises(UsageError, match="no case"):
        compare_reports(evaluation({"a": 0.5}), evaluation({"b": 0.5}))


def test_scans_of_few_patients_say_little() -> None:
    """Twenty scans of four patients, three of whom gain: interval and p value are those of four."""
    names = [f"case_{i:02d}" for i in range(20)]
    groups = {name: f"patient_{i // 5}" for i, name in enumerate(names)}
    base, better = dict.fromkeys(names, 0.5), {n: 0.42 if i < 5 else 0.6 + 0.001 * i for i, n in enumerate(names)}
    alone, together = (
        compare_reports(evaluation(better, groups=own), evaluation(base)).structures["1"]["Dice"]
        for own in (None, groups)
    )
    assert alone.mean == together.mean
    assert together.low < 0 < alone.low
    assert alone.p_value < 0.01
    assert together.p_value > 0.1
