"""Means over cases, their intervals, and what is counted instead of scored."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from samunet.artifacts.report import (
    CaseReport,
    EvaluationReport,
    StructureMetrics,
    load_report,
    save_report,
)
from samunet.core.labels import LabelSpec
from samunet.evaluation.aggregate import aggregate, bootstrap_weights, group_labels, mean_interval
from samunet.evaluation.policy import EMPTY_RULE
from samunet.evaluation.tables import CSV_HEADER, csv_text, summary_table

LABELS = LabelSpec({"liver": (1,), "tumour": (2,)})


def metrics(dice: float, *, n_ref: int = 10, n_pred: int = 10, hd95: float = 1.0) -> StructureMetrics:
    tp = 0 if np.isnan(dice) else round(dice * (n_ref + n_pred) / 2)
    overlap = {"Dice": dice, "IoU": dice / (2 - dice), "NSD": dice, "HD": hd95, "HD95": hd95, "ASSD": hd95}
    counts = {"TP": tp, "FP": n_pred - tp, "FN": n_ref - tp, "TN": 1000, "n_ref": n_ref, "n_pred": n_pred}
    return StructureMetrics(**overlap, **counts, volume_ref_mm3=float(n_ref), volume_pred_mm3=float(n_pred))


def nothing() -> StructureMetrics:
    return metrics(float("nan"), n_ref=0, n_pred=0, hd95=float("nan"))


def case(name: str, liver: StructureMetrics, tumour: StructureMetrics) -> CaseReport:
    return CaseReport(
        case=name,
        reference_file=f"labelsTr/{name}.nii.gz",
        prediction_file=f"out/{name}.nii.gz",
        metrics={"1": liver, "2": tumour},
    )


@pytest.fixture
def report() -> EvaluationReport:
    """Three cases: the tumour is right once, missed once and absent once."""
    cases = [
        case("c", metrics(0.7), nothing()),
        case("a", metrics(0.9), metrics(0.8)),
        case("b", metrics(0.8), metrics(0.0, n_pred=0, hd95=50.0)),
    ]
    return aggregate(cases, LABELS, tolerance_mm=2.0, missing=["d"], failed={"e": "truncated"}, unmatched=["x.mha"])


def test_means_leave_out_pairs_without_score(report: EvaluationReport) -> None:
    """A structure's mean is over its scored cases; the foreground mean is over structures."""
    assert report.mean["1"]["Dice"] == pytest.approx(0.8)
    assert report.mean["2"]["Dice"] == pytest.approx(0.4)
    assert report.mean["2"]["HD95"] == pytest.approx(25.5)
    assert report.foreground_mean["Dice"] == pytest.approx(0.6)
    assert report.mean["1"]["n_ref"] == pytest.approx(10)


def test_case_mean_differs_from_foreground_mean(report: EvaluationReport) -> None:
    """The mean over cases of each case's mean is another number, and has its own entry."""
    assert report.case_mean["Dice"].value == pytest.approx((0.85 + 0.4 + 0.7) / 3)


def test_empty_masks_are_counted(report: EvaluationReport) -> None:
    """Absent and missed structures are told apart."""
    tumour = report.empty_masks["2"]
    assert (tumour.num_cases, tumour.both_empty, tumour.missed, tumour.invented) == (3, 1, 1, 0)
    assert report.mean_interval["2"]["Dice"].num_cases == 2
    assert report.rule == EMPTY_RULE


def test_what_was_not_evaluated_is_listed(report: EvaluationReport) -> None:
    """Missing, failed and unmatched cases are named and make the report incomplete."""
    assert report.missing_predictions == ("d",)
    assert report.failed_cases == {"e": "truncated"}
    assert report.unmatched_predictions == ("x.mha",)
    assert not report.complete
    assert [c.case for c in report.metric_per_case] == ["a", "b", "c"]


def test_summary_has_nnunets_keys_and_null_for_no_score(report: EvaluationReport, tmp_path: Path) -> None:
    """The file holds every key of nnU-Net's summary.json, is strict JSON, and loads back equal."""
    file = tmp_path / "summary.json"
    save_report(report, file)

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} in the file")

    content = json.loads(file.read_text(), parse_constant=refuse)
    nnunet = {"Dice", "IoU", "TP", "FP", "FN", "TN", "n_pred", "n_ref"}
    assert {"foreground_mean", "mean", "metric_per_case"} <= content.keys()
    assert nnunet <= content["foreground_mean"].keys()
    assert content["mean"].keys() == {"1", "2"}
    assert nnunet <= content["mean"]["2"].keys()
    entry = content["metric_per_case"][2]
    assert {"metrics", "reference_file", "prediction_file"} <= entry.keys()
    assert nnunet <= entry["metrics"]["2"].keys()
    assert entry["metrics"]["2"]["Dice"] is None
    assert load_report(file) == report


def test_nnunets_own_summary_loads(tmp_path: Path) -> None:
    """A file with nnU-Net's keys only, NaN included, is read; cases are named after their reference."""
    scores = {"Dice": float("nan"), "IoU": 0.5, "TP": 1, "FP": 1, "FN": 0, "TN": 7, "n_pred": 2, "n_ref": 1}
    content = {
        "foreground_mean": scores,
        "mean": {"1": scores},
        "metric_per_case": [
            {"metrics": {"1": scores}, "prediction_file": "/p/a_b.nii.gz", "reference_file": "/r/a_b.nii.gz"}
        ],
    }
    file = tmp_path / "summary.json"
    file.write_text(json.dumps(content))
    loaded = load_report(file)
    assert loaded.metric_per_case[0].case == "a_b"
    assert loaded.metric_per_case[0].metrics["1"].Dice is None
    assert loaded.metric_per_case[0].metrics["1"].IoU == 0.5


def test_intervals_hold_the_mean_and_are_reproducible() -> None:
    """Two runs give the same interval; it holds the mean and covers about what theory says."""
    values = np.random.default_rng(0).normal(0.8, 0.1, size=200)
    first, second = (mean_interval(values, bootstrap_weights(200)) for _ in range(2))
    assert first == second
    assert first.low is not None
    assert first.high is not None
    assert first.value is not None
    assert first.low < first.value < first.high
    half = 1.96 * values.std() / np.sqrt(200)
    assert first.high - first.low == pytest.approx(2 * half, rel=0.1)


def test_interval_agrees_with_scipy() -> None:
    """The percentile interval is scipy's, up to the noise of resampling."""
    from scipy.stats import bootstrap

    values = np.random.default_rng(1).beta(8, 2, size=40)
    ours = mean_interval(values, bootstrap_weights(40))
    theirs = bootstrap((values,), np.mean, method="percentile", n_resamples=5000, rng=np.random.default_rng(2))
    assert ours.low == pytest.approx(theirs.confidence_interval.low, abs=0.005)
    assert ours.high == pytest.approx(theirs.confidence_interval.high, abs=0.005)


def test_one_case_has_a_mean_but_no_interval() -> None:
    """A single case says nothing about the spread."""
    single = aggregate([case("a", metrics(0.9), nothing())], LABELS)
    assert single.foreground_mean["Dice"] == pytest.approx(0.9)
    interval = single.foreground_mean_interval["Dice"]
    assert (interval.value, interval.low, interval.high) == (pytest.approx(0.9), None, None)
    assert single.mean["2"]["Dice"] is None


def test_no_case_at_all_is_a_report_without_scores() -> None:
    """With nothing evaluated every mean is absent instead of an exception."""
    empty = aggregate([], LABELS, missing=["a"])
    assert empty.foreground_mean["Dice"] is None
    assert empty.metric_per_case == ()


def test_csv_has_a_line_per_case_and_structure(report: EvaluationReport) -> None:
    """Names, keys and empty cells where there is no score."""
    lines = csv_text(report).splitlines()
    assert lines[0] == ",".join(CSV_HEADER)
    assert len(lines) == 1 + 3 * 2
    assert lines[1].startswith("a,liver,1,0.9,")
    assert lines[6].startswith("c,tumour,2,,,,,,,0.0,0.0,0,0,0,1000,0,0,")


def test_table_shows_every_structure_and_the_mean(report: EvaluationReport) -> None:
    """The last row is the foreground mean, the header names the tolerance."""
    header, rows = summary_table(report)
    assert "NSD 2 mm" in header
    assert [row[0] for row in rows] == ["liver", "tumour", "mean"]
    assert rows[-1][header.index("missed")] == 1


def test_groups_are_drawn_whole() -> None:
    """Every resample holds the cases of a group equally often; one group alone gives no resample at all."""
    weights = bootstrap_weights(6, groups=["a", "a", "b", "b", "b", "c"])
    assert np.array_equal(weights[:, 0], weights[:, 1])
    assert np.array_equal(weights[:, 2], weights[:, 4])
    assert set(weights[:, [0, 2, 5]].sum(axis=1)) == {3.0}
    assert not np.array_equal(weights[:, 0], weights[:, 2])
    assert len(bootstrap_weights(3, groups=["a"] * 3)) == 0
    assert np.array_equal(bootstrap_weights(3, groups=["x", "y", "z"]), bootstrap_weights(3))
    assert group_labels(["x", "y"], {"x": "a"}) == ["a", "y"]
    assert group_labels(["x", "y"], None) is None
