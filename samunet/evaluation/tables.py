"""A report as tables: one row per structure to read, one row per case and structure to work with."""

from __future__ import annotations

import csv
import io

from samunet.artifacts.report import COUNTS, SCORES, VOLUMES, EvaluationReport, Interval

CSV_HEADER = ("case", "structure", "label", *SCORES, *VOLUMES, *COUNTS, "reference_file", "prediction_file")
Row = list[str | float | int]


def csv_text(report: EvaluationReport) -> str:
    """One line per case and structure; an empty cell where there is no score."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(CSV_HEADER)
    for case in report.metric_per_case:
        for key, metrics in case.metrics.items():
            values = [getattr(metrics, name) for name in (*SCORES, *VOLUMES, *COUNTS)]
            cells = ["" if value is None else value for value in values]
            writer.writerow([case.case, report.name_of(key), key, *cells, case.reference_file, case.prediction_file])
    return stream.getvalue()


def summary_table(report: EvaluationReport) -> tuple[list[str], list[Row]]:
    """Header and rows: every structure's means with how often its masks were empty, and the foreground mean."""
    with_surface = report.settings is not None and report.settings.surface
    scores = [s for s in SCORES if with_surface or s in ("Dice", "IoU")]
    header = ["structure", "cases", *(_titled(s, report) for s in scores), "both empty", "missed", "invented"]
    rows: list[Row] = []
    for key, means in report.mean.items():
        counts = report.empty_masks[key]
        row: Row = [report.name_of(key), report.mean_interval[key]["Dice"].num_cases]
        row += [_cell(means[score]) for score in scores]
        rows.append([*row, counts.both_empty, counts.missed, counts.invented])
    totals = list(report.empty_masks.values())
    means = report.foreground_mean
    row = ["mean", report.foreground_mean_interval["Dice"].num_cases, *(_cell(means[score]) for score in scores)]
    sums = [sum(getattr(c, name) for c in totals) for name in ("both_empty", "missed", "invented")]
    return header, [*rows, [*row, *sums]]


def interval_text(interval: Interval) -> str:
    """As in "0.871 [0.862, 0.880]"."""
    if interval.value is None:
        return "no score"
    if interval.low is None or interval.high is None:
        return f"{interval.value:.3f}"
    return f"{interval.value:.3f} [{interval.low:.3f}, {interval.high:.3f}]"


def _cell(value: float | None) -> str | float:
    return "-" if value is None else value


def _titled(score: str, report: EvaluationReport) -> str:
    if score == "NSD" and report.settings is not None:
        return f"NSD {report.settings.tolerance_mm:g} mm"
    return f"{score} mm" if score in ("HD", "HD95", "ASSD") else score
