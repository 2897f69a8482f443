"""The result of an evaluation: summary.json, a superset of nnU-Net's file of that name.

Scores that do not exist (both masks empty, surface distances not asked for) are None, null in JSON. Every field that
nnU-Net does not write has a default, so its own summary.json loads too and can be compared with ours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from samunet.core.config import Schema, load_schema, save_schema
from samunet.core.geometry import SpacingTriple
from samunet.core.labels import LabelSpec

REPORT_VERSION = 1
SUMMARY_FILE = "summary.json"
TABLE_FILE = "summary.csv"

COUNTS = ("TP", "FP", "FN", "TN", "n_pred", "n_ref")
VOLUMES = ("volume_ref_mm3", "volume_pred_mm3")
OVERLAP_SCORES = ("Dice", "IoU")
SURFACE_SCORES = ("NSD", "HD", "HD95", "ASSD")
SCORES = (*OVERLAP_SCORES, *SURFACE_SCORES)
METRICS = (*SCORES, *VOLUMES, *COUNTS)


def _finite_or_none(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


Score = Annotated[float | None, BeforeValidator(_finite_or_none)]


class StructureMetrics(Schema):
    """How well one structure of one case was found. Names of nnU-Net's keys are nnU-Net's.

    Args:
        Dice: 2 TP / (2 TP + FP + FN).
        IoU: TP / (TP + FP + FN).
        TP: Voxels in both masks; ignored voxels count nowhere.
        FP: Voxels of the prediction only.
        FN: Voxels of the reference only.
        TN: Voxels of neither.
        n_pred: Voxels of the prediction.
        n_ref: Voxels of the reference.
        volume_ref_mm3: Volume of the reference.
        volume_pred_mm3: Volume of the prediction.
        NSD: Normalized surface Dice at the report's tolerance.
        HD: Hausdorff distance in mm.
        HD95: The larger of the two directed 95th percentiles in mm.
        ASSD: Average symmetric surface distance in mm.
    """

    Dice: Score
    IoU: Score
    TP: int
    FP: int
    FN: int
    TN: int
    n_pred: int
    n_ref: int
    volume_ref_mm3: Score = None
    volume_pred_mm3: Score = None
    NSD: Score = None
    HD: Score = None
    HD95: Score = None
    ASSD: Score = None


class CaseReport(Schema):
    """All structures of one case.

    Args:
        case: Case name; taken from the reference's file name where it is missing (nnU-Net's files).
        reference_file: Reference, "" for arrays.
        prediction_file: Prediction, "" for arrays.
        metrics: Per structure, under nnU-Net's key: its value, or the tuple of a region's values.
        spacing: Millimetres along (Z, Y, X); None in nnU-Net's files.
        undeclared_values: Values in the prediction that no label declares; they counted as background.
        num_ignored: Voxels that the reference ignores. With any, scores are those of the voxels that carry a label, not
            of the whole mask; None where nobody counted them (nnU-Net's files).
    """

    case: str = ""
    reference_file: str = ""
    prediction_file: str = ""
    metrics: dict[str, StructureMetrics]
    spacing: SpacingTriple | None = None
    undeclared_values: tuple[int, ...] = ()
    num_ignored: int | None = None

    @model_validator(mode="before")
    @classmethod
    def _name_case(cls, content: Any) -> Any:
        if isinstance(content, Mapping) and not content.get("case"):
            return {**content, "case": Path(str(content.get("reference_file", ""))).name.split(".", 1)[0]}
        return content


class Interval(Schema):
    """A mean over cases with its bootstrap interval.

    Args:
        value: The mean; None without a case that has a score.
        low: Lower bound; None with fewer than two cases.
        high: Upper bound.
        num_cases: Cases that have a score.
    """

    value: Score
    low: Score = None
    high: Score = None
    num_cases: int = 0


class PairCounts(Schema):
    """How often masks of one structure were empty.

    Args:
        num_cases: Cases evaluated.
        both_empty: Neither reference nor prediction has it: no score.
        missed: Only the reference has it: the worst scores.
        invented: Only the prediction has it: the worst scores.
    """

    num_cases: int
    both_empty: int
    missed: int
    invented: int


class Settings(Schema):
    """What the numbers depend on beside the masks.

    Args:
        tolerance_mm: Tolerance of NSD.
        surface: Whether surface distances were computed.
        confidence: Of the bootstrap intervals.
        resamples: Bootstrap resamples over cases, or over groups of cases.
        seed: Of the resampling.
        groups: Case to group, where cases belong together.
    """

    tolerance_mm: float
    surface: bool
    confidence: float
    resamples: int
    seed: int
    groups: dict[str, str] | None = None


class EvaluationReport(Schema):
    """The evaluation of one set of predictions.

    Args:
        foreground_mean: Per metric, the mean over structures of their means over cases (nnU-Net's definition, with
            structures that have no score left out).
        mean: Per structure and metric, the mean over the cases that have a score.
        metric_per_case: Every case.
        structures: Key in ``mean`` and in the cases to the structure's name.
        foreground_mean_interval: ``foreground_mean`` of the scores, with intervals.
        mean_interval: ``mean`` of the scores, with intervals.
        case_mean: Per score, the mean over cases of each case's mean over its structures, with interval.
        empty_masks: Per structure, how often a mask was empty.
        missing_predictions: Cases with a reference but no prediction; they are in no mean.
        failed_cases: Cases that could not be evaluated, with the reason; they are in no mean.
        unmatched_predictions: Predictions without a reference.
        rule: The rule for empty masks, in words.
        settings: Tolerance, confidence and seed; None in nnU-Net's own files.
        versions: Of samunet, numpy and scipy.
    """

    version: int = REPORT_VERSION
    foreground_mean: dict[str, Score]
    mean: dict[str, dict[str, Score]]
    metric_per_case: tuple[CaseReport, ...]
    structures: dict[str, str] = Field(default_factory=dict)
    foreground_mean_interval: dict[str, Interval] = Field(default_factory=dict)
    mean_interval: dict[str, dict[str, Interval]] = Field(default_factory=dict)
    case_mean: dict[str, Interval] = Field(default_factory=dict)
    empty_masks: dict[str, PairCounts] = Field(default_factory=dict)
    missing_predictions: tuple[str, ...] = ()
    failed_cases: dict[str, str] = Field(default_factory=dict)
    unmatched_predictions: tuple[str, ...] = ()
    rule: str = ""
    settings: Settings | None = None
    versions: dict[str, str] = Field(default_factory=dict)

    @property
    def complete(self) -> bool:
        """Whether every reference was evaluated."""
        return not self.missing_predictions and not self.failed_cases

    def name_of(self, key: str) -> str:
        """The structure's name behind a key; the key itself where no name is known."""
        return self.structures.get(key, key)


def label_key(values: tuple[int, ...]) -> str:
    """nnU-Net's key of a structure: "2" for a label, "(1, 2)" for a region."""
    return str(values[0]) if len(values) == 1 else str(tuple(values))


def structure_keys(labels: LabelSpec) -> dict[str, str]:
    """Structure name to its key in a report, in dataset.json order."""
    return {name: label_key(values) for name, values in labels.names.items()}


def load_report(path: Path) -> EvaluationReport:
    """Read a summary.json, ours or nnU-Net's."""
    return load_schema(EvaluationReport, path)


def save_report(report: EvaluationReport, path: Path) -> None:
    """Write summary.json."""
    save_schema(report, path)
