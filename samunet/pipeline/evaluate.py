"""Predictions against references: files in, one report out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from samunet.artifacts.report import SUMMARY_FILE, TABLE_FILE, CaseReport, EvaluationReport, save_report
from samunet.core.errors import DataError, SamunetError, UsageError
from samunet.core.files import write_text
from samunet.core.labels import LabelSpec
from samunet.core.log import Reporter, SilentReporter
from samunet.datasets.raw import explicit_cases, load_description
from samunet.datasets.splits import load_splits
from samunet.distributed.casewise import map_cases
from samunet.evaluation.aggregate import aggregate
from samunet.evaluation.case import DEFAULT_TOLERANCE_MM, case_report, evaluate_case
from samunet.evaluation.surface import ROUNDING_MM
from samunet.evaluation.tables import csv_text
from samunet.imageio import MISMATCH_VOX, ending_of, read_geometry, read_labels

Pair = tuple[str, Path, Path | None]
_NAMES_SHOWN = 5
_WIDE_TOLERANCE_VOX = 4
_WORK_WORTH_PROCESSES = 5e8  # voxels x structures x cases: some ten seconds


def evaluate(
    pairs: Sequence[Pair],
    *,
    labels: LabelSpec,
    tolerance_mm: float = DEFAULT_TOLERANCE_MM,
    processes: int = 1,
    reporter: Reporter | None = None,
    surface: bool = True,
    unmatched: Sequence[str] = (),
    groups: Mapping[str, str] | None = None,
) -> EvaluationReport:
    """Score label files. A missing or unusable file stops no other case and is listed in the report.

    Args:
        pairs: Case name, reference file, prediction file; None where there is no prediction.
        labels: What the values mean.
        tolerance_mm: Tolerance of the normalized surface Dice.
        processes: Worker processes.
        reporter: Told about progress and about what could not be evaluated.
        surface: Whether to measure surface distances.
        unmatched: Predictions without a reference, to be listed.
        groups: Case to group (patient), whose cases belong together.
    """
    reporter = reporter or SilentReporter()
    present = [(case, ref, pred) for case, ref, pred in pairs if pred is not None and pred.is_file()]
    found = {case for case, _, _ in present}
    missing = [case for case, _, _ in pairs if case not in found]
    outcomes = map_cases(
        partial(_evaluate_files, labels=labels, tolerance_mm=tolerance_mm, surface=surface),
        present,
        processes=processes,
        reporter=reporter,
        what="evaluate",
        name_of=_name_of,
    )
    report = aggregate(
        [outcome.result for outcome in outcomes if outcome.result is not None],
        labels,
        tolerance_mm=tolerance_mm,
        surface=surface,
        missing=missing,
        failed={outcome.name: str(outcome.error) for outcome in outcomes if outcome.error is not None},
        unmatched=unmatched,
        groups=groups,
    )
    _warn(report, reporter)
    if surface:
        _warn_tolerance(report, tolerance_mm, reporter)
    return report


def save_evaluation(report: EvaluationReport, folder: Path) -> tuple[Path, Path]:
    """Write summary.json and summary.csv into a folder, and return their paths."""
    summary, table = folder / SUMMARY_FILE, folder / TABLE_FILE
    save_report(report, summary)
    write_text(table, csv_text(report))
    return summary, table


def label_files(folder: Path, *, ending: str | None = None) -> dict[str, Path]:
    """Case name to label file of a folder, sorted; with ``ending`` only files that have it.

    Raises:
        UsageError: If the folder does not exist, or two files belong to the same case.
    """
    if not folder.is_dir():
        raise UsageError("the folder does not exist", file=folder)
    files: dict[str, Path] = {}
    for file in sorted(folder.iterdir()):
        own = ending_of(file)
        if not own or file.name.startswith(".") or not file.is_file() or (ending and own != ending.lower()):
            continue
        case = file.name[: -len(own)]
        if case in files:
            raise UsageError(
                "two label files belong to the same case", found=f"{files[case].name}, {file.name}", file=folder
            )
        files[case] = file
    return files


def match(references: Mapping[str, Path], predictions: Path) -> tuple[list[Pair], list[str]]:
    """Find each reference's prediction by case name: with the reference's file ending, else with any other.

    Returns:
        One pair per reference, and the names of the prediction files that belong to no reference.

    Raises:
        UsageError: If the folder does not exist or holds no prediction of any reference.
    """
    if not predictions.is_dir():
        raise UsageError("the folder of the predictions does not exist", file=predictions)
    files = {f.name: f for f in sorted(predictions.iterdir()) if ending_of(f) and not f.name.startswith(".")}
    pairs: list[Pair] = []
    for case, reference in sorted(references.items()):
        candidates = [f for f in files.values() if f.name[: -len(ending_of(f))] == case]
        candidates.sort(key=lambda f: ending_of(f) != ending_of(reference))
        pairs.append((case, reference, candidates[0] if candidates else None))
    if not any(prediction for _, _, prediction in pairs):
        raise UsageError(
            "the folder holds no prediction of any reference",
            file=predictions,
            expected=_some([reference.name for reference in references.values()]),
            found=_some(list(files)) or "no label file",
            todo="give the reference folder first and the prediction folder second",
        )
    unmatched = [f.name for f in files.values() if f.name[: -len(ending_of(f))] not in references]
    return pairs, unmatched


def dataset_references(folder: Path, predictions: Path) -> dict[str, Path]:
    """The label files of a raw dataset that a folder of predictions should answer.

    Of labelsTr and labelsTs, those count of which at least one case is predicted, and then with all their cases.

    Raises:
        ConfigError: If dataset.json is malformed.
    """
    parts = _label_parts(folder)
    predicted = {f.name[: -len(ending_of(f))] for f in predictions.glob("*") if ending_of(f)}
    chosen = {case: file for part in parts if predicted & part.keys() for case, file in part.items()}
    return chosen or {case: file for part in parts for case, file in part.items()}


def fold_references(folder: Path, splits: Path, fold: int) -> dict[str, Path]:
    """The label files of a fold's validation cases, whether predicted or not.

    Args:
        folder: Raw dataset.
        splits: Its splits_final.json.
        fold: Counted from 0.

    Raises:
        ConfigError: If dataset.json or the splits are malformed, or the splits name cases without a label file.
        UsageError: If there is no such fold.
    """
    known = {case: file for part in _label_parts(folder) for case, file in part.items()}
    folds = load_splits(splits, known)
    if not 0 <= fold < len(folds):
        raise UsageError("this fold does not exist", expected=f"0 to {len(folds) - 1}", found=str(fold), file=splits)
    return {case: known[case] for case in folds[fold].val}


def _label_parts(folder: Path) -> list[dict[str, Path]]:
    """Case name to label file, of training (explicit lists before labelsTr) and of labelsTs."""
    description = load_description(folder / "dataset.json")
    listed = {case.name: case.label for case in explicit_cases(folder, description.dataset or {}) if case.label}
    parts = [listed] if listed else []
    for name in ("labelsTr", "labelsTs"):
        if (folder / name).is_dir() and (name == "labelsTs" or not listed):
            parts.append(label_files(folder / name, ending=description.file_ending))
    return parts


def suggest_processes(pairs: Sequence[Pair], labels: LabelSpec, *, limit: int) -> int:
    """One process where starting more takes longer than the work, judged by the first readable reference."""
    for _, reference, _ in pairs:
        try:
            voxels = math.prod(read_geometry(reference).shape)
        except SamunetError:
            continue
        return limit if voxels * len(pairs) * (1 + len(labels.names)) > _WORK_WORTH_PROCESSES else 1
    return 1


def labels_from_references(files: Sequence[Path], *, processes: int = 1, reporter: Reporter | None = None) -> LabelSpec:
    """One structure per value above 0 that stands in the references, named after it.

    Raises:
        DataError: If there is none.
    """
    outcomes = map_cases(
        _values_of,
        list(files),
        processes=processes,
        reporter=reporter or SilentReporter(),
        what="find labels",
        name_of=_file_name,
    )
    values = sorted({value for outcome in outcomes for value in outcome.result or () if value > 0})
    if not values:
        raise DataError(
            "no reference holds a label above 0",
            found=str(next((o.error for o in outcomes if o.error is not None), f"{len(files)} files")),
            todo="name the structures with --dataset-json",
        )
    return LabelSpec({str(value): (value,) for value in values})


def _evaluate_files(
    pair: tuple[str, Path, Path], *, labels: LabelSpec, tolerance_mm: float, surface: bool
) -> CaseReport:
    """Read and score one case."""
    case, reference_file, prediction_file = pair
    reference = read_labels(reference_file, case=case)
    prediction = read_labels(prediction_file, case=case)
    if not reference.geometry.matches(prediction.geometry, tolerance_vox=MISMATCH_VOX):
        raise DataError(
            "reference and prediction lie on different grids",
            case=case,
            expected=f"{reference_file}: {_describe(reference.geometry)}",
            found=f"{prediction_file}: {_describe(prediction.geometry)}",
            todo="predictions must have the reference's grid: shape, spacing, origin and direction",
        )
    if unknown := labels.undeclared_in(reference.data):
        raise DataError(
            "the reference holds label values that are not declared",
            case=case,
            file=reference_file,
            expected=f"the declared values {_some([str(value) for value in labels.values])}",
            found=_some([str(value) for value in unknown]),
            todo="name the dataset.json that fits the references with --dataset-json, or correct the file",
        )
    metrics = evaluate_case(
        reference.data[0],
        prediction.data[0],
        labels=labels,
        geometry=reference.geometry,
        tolerance_mm=tolerance_mm,
        surface=surface,
    )
    return case_report(
        case,
        metrics,
        labels,
        reference_file=reference_file,
        prediction_file=prediction_file,
        spacing=reference.geometry.spacing,
        undeclared_values=labels.undeclared_in(prediction.data),
        num_ignored=labels.num_ignored(reference.data),
    )


def _describe(geometry: Any) -> str:
    spacing = " x ".join(f"{s:.4g}" for s in geometry.spacing)
    origin = ", ".join(f"{x:.4g}" for x in geometry.affine[:3, 3])
    codes = "".join(geometry.codes)
    return f"shape {geometry.shape}, spacing {spacing} mm (Z, Y, X), axes {codes}, origin ({origin})"


def _warn(report: EvaluationReport, reporter: Reporter) -> None:
    """Name what is in no mean, and values nothing was done with."""
    if report.missing_predictions:
        names = report.missing_predictions
        reporter.warn(f"no prediction for {len(names)} of the references, in no mean: {_some(names)}")
    for message in report.failed_cases.values():
        reporter.warn(f"not evaluated, in no mean: {message}")
    if report.unmatched_predictions:
        reporter.warn(f"predictions without a reference, not evaluated: {_some(report.unmatched_predictions)}")
    odd = [case for case in report.metric_per_case if case.undeclared_values]
    if odd:
        values = sorted({value for case in odd for value in case.undeclared_values})
        cases = _some([case.case for case in odd])
        reporter.warn(f"predicted values that no label declares counted as background: {values} in {cases}")


def _warn_tolerance(report: EvaluationReport, tolerance_mm: float, reporter: Reporter) -> None:
    """Say when a tolerance in mm does not suit the voxels, so that the surface Dice says little."""
    finest = [min(case.spacing) for case in report.metric_per_case if case.spacing is not None]
    if not finest:
        return
    if tolerance_mm > _WIDE_TOLERANCE_VOX * max(finest):
        found = f"more than {_WIDE_TOLERANCE_VOX} voxels of {max(finest):.3g} mm, where almost any surface agrees"
    elif tolerance_mm + ROUNDING_MM < min(finest):
        found = f"less than a voxel of {min(finest):.3g} mm, where only surfaces that coincide agree"
    else:
        return
    reporter.warn(f"the surface Dice's tolerance of {tolerance_mm:g} mm is {found}: consider --tolerance")


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_NAMES_SHOWN])
    return f"{shown} and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else shown


def _name_of(pair: tuple[str, Path, Path]) -> str:
    return pair[0]


def _file_name(file: Path) -> str:
    return file.name


def _values_of(file: Path) -> tuple[int, ...]:
    return tuple(int(value) for value in np.unique(read_labels(file).data))
