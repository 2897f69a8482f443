"""A model's judgement of its own masks: calibrated after training, written beside masks."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from samunet.artifacts.plan import Plan
from samunet.artifacts.quality import (
    CALIBRATION_FILE,
    QUALITY_FILE,
    QUALITY_TABLE,
    Calibration,
    CalibrationFit,
    CaseQuality,
    Flag,
    Observation,
    QualityReport,
    StructureQuality,
    StructureSigns,
)
from samunet.artifacts.report import EvaluationReport
from samunet.artifacts.store import CaseRecord
from samunet.artifacts.workspace import fold_folder
from samunet.core.config import load_schema, save_schema
from samunet.core.errors import ConfigError
from samunet.core.files import write_text
from samunet.core.geometry import Geometry
from samunet.core.log import Reporter
from samunet.core.volume import Volume
from samunet.evaluation.calibration import LEAST_CASES, estimate_dice, fit_calibration
from samunet.inference.ensemble import EnsemblePredictor
from samunet.inference.familiarity import (
    TrainingFacts,
    intensity_ranges,
    training_facts,
    unfamiliar_image,
    unfamiliar_mask,
)
from samunet.inference.predictor import Predictor
from samunet.inference.restore import Restored
from samunet.pipeline.selection import checkpoint_identity
from samunet.preprocessing.store import CaseStore

LOOK_FIRST_SHARE = 0.2
MOST_LISTED = 20
MOST_PRINTED = 5
CSV_HEADER = ("case", "structure", "dice", "low", "high", "volume_ml", "flags")


@dataclass(frozen=True)
class SeenMask:
    """What is kept of a case that was predicted.

    Args:
        geometry: The image's grid.
        record: What preprocessing recorded.
        volumes_ml: Per structure the volume of the mask as written.
        signs: Per structure what the model says about it.
    """

    geometry: Geometry
    record: CaseRecord
    volumes_ml: Mapping[str, float]
    signs: Mapping[str, StructureSigns]


class MaskWatch:
    """Collects what predictions say about their masks; given to ``predict_cases`` to be told.

    Args:
        plan: What the label values mean.
    """

    def __init__(self, plan: Plan) -> None:
        self._labels = plan.label_spec
        self.seen: dict[str, SeenMask] = {}

    def __call__(self, name: str, volume: Volume, prepared: Any, restored: Restored) -> None:
        """Remember one case."""
        first = prepared[0] if isinstance(prepared, list) else prepared
        counts = np.bincount(restored.labels.ravel(), minlength=max(self._labels.values) + 1)
        voxels = {structure: int(counts[list(values)].sum()) for structure, values in self._labels.names.items()}
        volumes = {name: number * volume.geometry.voxel_volume_mm3 / 1000 for name, number in voxels.items()}
        said = restored.signs or {}
        signs = {n: said[n] if n in said and number else StructureSigns(voxels=0) for n, number in voxels.items()}
        self.seen[name] = SeenMask(volume.geometry, first.record, volumes, signs)


def write_calibration(
    folder: Path,
    store: Path,
    trained: Collection[str],
    channels: Sequence[str],
    *,
    reporter: Reporter,
    watch: MaskWatch | None = None,
    report: EvaluationReport | None = None,
) -> Calibration:
    """Calibrate a fold's model on its validation cases, and write what it says beside its checkpoint.

    Args:
        folder: Of the fold.
        store: Of the training cases.
        trained: Names of the training cases.
        channels: Names of the channels.
        reporter: Told how well the estimates do.
        watch: Was told of the validation cases; None without any that were predicted without prompts.
        report: Their true scores.
    """
    opened = CaseStore(store)
    records = [opened.record(name) for name in trained]
    seen = () if watch is None or report is None else observations(watch.seen, report)
    fits = fit_calibration(seen)
    calibration = Calibration(
        identity=checkpoint_identity(folder.parent, folder.name.removeprefix("fold_")),
        fits=fits,
        reason=_reason(fits, seen),
        intensities=intensity_ranges(records, channels),
        observations=tuple(seen),
    )
    save_schema(calibration, folder / CALIBRATION_FILE)
    reporter.info(f"estimates of Dice: {calibration.reason}")
    return calibration


def observations(seen: Mapping[str, SeenMask], report: EvaluationReport) -> tuple[Observation, ...]:
    """Masks that are not empty, with their true Dice."""
    made = []
    for case in report.metric_per_case:
        signs = seen[case.case].signs if case.case in seen else {}
        for key, metrics in case.metrics.items():
            name = report.name_of(key)
            if name in signs and signs[name].expected is not None and metrics.Dice is not None:
                made.append(Observation(case=case.case, structure=name, dice=metrics.Dice, signs=signs[name]))
    return tuple(made)


def _reason(fits: Sequence[CalibrationFit], seen: Sequence[Observation]) -> str:
    cases = len({one.case for one in seen})
    if not fits:
        if not seen:
            return "not calibrated: no masks of validation cases that were made without prompts"
        return f"not calibrated: masks of {cases} validation cases, and it takes {LEAST_CASES}"
    error = next(fit.error for fit in fits if fit.structure is None)
    return f"calibrated on {len(seen)} masks of {cases} validation cases, mean error {error:.3f} when held out"


@dataclass(frozen=True)
class Judge:
    """Turns what models say into estimates, and says what is unfamiliar.

    Args:
        plan: Of the models.
        facts: Of their training.
        fits: Per model, where it is calibrated.
        note: How, or why not.
    """

    plan: Plan
    facts: TrainingFacts
    fits: tuple[tuple[CalibrationFit, ...], ...]
    note: str

    @classmethod
    def of(
        cls, predictor: Predictor | EnsemblePredictor, folders: Sequence[Path], *, checkpoint: str, prompted: bool
    ) -> Judge:
        """The judge of loaded models, with the calibrations beside their checkpoints."""
        places = [(folder, fold) for folder in folders for fold in predictor.folds]
        found = [_read_calibration(folder, fold) for folder, fold in places]
        usable = [own for own in found if own is not None]
        intensities = usable[0].intensities if usable else ()
        facts = training_facts(predictor.fingerprint, predictor.plan, intensities)
        if prompted or checkpoint != "final":
            why = "prompts were given" if prompted else f"they are of {checkpoint} checkpoints, and only final ones are"
            return cls(predictor.plan, facts, (), f"not calibrated: {why}")
        fits = tuple(own.fits for own in usable if own.fits)
        notes = list(dict.fromkeys(own.reason for own in usable))
        missing = "not calibrated: no calibration beside the checkpoint; samunet_train --val makes one"
        return cls(predictor.plan, facts, fits, "; ".join(notes) or missing)

    def case(self, name: str, seen: SeenMask) -> CaseQuality:
        """The estimates and flags of one case."""
        flags = unfamiliar_image(self.facts, seen.geometry, seen.record, self.plan)
        structures, values = {}, []
        for structure, signs in seen.signs.items():
            structures[structure] = self._structure(structure, signs, seen.volumes_ml[structure])
            flag = unfamiliar_mask(self.facts, structure, seen.volumes_ml[structure])
            flags += [] if flag is None else [flag]
            value = structures[structure].dice
            if value is None and self.facts.usual(structure):
                value = 0.0
            values += [] if value is None else [value]
        return CaseQuality(case=name, lowest=min(values) if values else None, structures=structures, flags=tuple(flags))

    def _structure(self, structure: str, signs: StructureSigns, volume_ml: float) -> StructureQuality:
        """The mean of the estimates by every model's own calibration."""
        each = [estimate_dice(fits, structure, signs) for fits in self.fits or ((),)]
        columns = [[value for value in column if value is not None] for column in zip(*each, strict=True)]
        dice, low, high = (round(sum(c) / len(c), 4) if len(c) == len(each) else None for c in columns)
        return StructureQuality(dice=dice, low=low, high=high, volume_ml=round(volume_ml, 6), signs=signs)


def save_quality(
    judge: Judge, watch: MaskWatch, output: Path, *, model: str, kept: Collection[str], reporter: Reporter
) -> QualityReport:
    """Write estimates and flags of all masks of a folder as JSON and CSV, and say which to look at first.

    Args:
        judge: Of the models.
        watch: Was told of the masks.
        output: Folder of the masks.
        model: As in prediction.json.
        kept: Cases whose masks an earlier run made: what it wrote about them is kept.
        reporter: Told the summary.
    """
    cases = {name: judge.case(name, seen) for name, seen in watch.seen.items()}
    former = {case.case: case for case in _former(output / QUALITY_FILE) if case.case in kept}
    ordered = tuple(case for _, case in sorted((former | cases).items()))
    report = QualityReport(
        dataset=judge.plan.dataset,
        model=model,
        calibrated=bool(judge.fits),
        note=judge.note,
        look_first=look_first(ordered),
        cases=ordered,
    )
    save_schema(report, output / QUALITY_FILE)
    write_text(output / QUALITY_TABLE, csv_text(ordered))
    if ordered:
        reporter.info(summary(report))
    return report


def look_first(cases: Sequence[CaseQuality]) -> tuple[str, ...]:
    """The fifth of the cases with the lowest estimates and all that are flagged, lowest estimate first, at most 20."""
    order = sorted(cases, key=lambda case: math.inf if case.lowest is None else case.lowest)
    number = math.ceil(LOOK_FIRST_SHARE * len(order))
    chosen = [case.case for place, case in enumerate(order) if place < number or case.flags]
    return tuple(chosen[:MOST_LISTED])


def csv_text(cases: Sequence[CaseQuality]) -> str:
    """One line per case and structure; an empty cell where there is no estimate."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(CSV_HEADER)
    for case in cases:
        for name, own in case.structures.items():
            numbers = ["" if value is None else value for value in (own.dice, own.low, own.high, own.volume_ml)]
            writer.writerow([case.case, name, *numbers, "; ".join(map(str, case.flags))])
    return stream.getvalue()


def summary(report: QualityReport) -> str:
    """In a few words: how sure, and which cases to look at."""
    by_name = {case.case: case for case in report.cases}
    shown = [_phrase(by_name[name]) for name in report.look_first[:MOST_PRINTED]]
    more = len(report.look_first) - len(shown)
    rest = f" and {more} more" if more > 0 else ""
    return f"estimated Dice in {QUALITY_FILE} ({report.note}); look first at {'; '.join(shown)}{rest}"


def _phrase(case: CaseQuality) -> str:
    value = "nothing found" if case.lowest is None else f"{case.lowest:.2f}"
    number = len(case.flags)
    if not number:
        return f"{case.case} {value}"
    return f"{case.case} {value}, unfamiliar: {_short(case.flags[0])}{f' and {number - 1} more' if number > 1 else ''}"


def _short(flag: Flag) -> str:
    return f"{flag.fact} {flag.found} (training {flag.training})"


def _read_calibration(folder: Path, fold: str) -> Calibration | None:
    """The calibration of a fold's final checkpoint; None where there is none, or it is of another training."""
    file = fold_folder(folder, fold) / CALIBRATION_FILE
    if not file.is_file():
        return None
    calibration = load_schema(Calibration, file)
    return calibration if calibration.identity == checkpoint_identity(folder, fold) else None


def _former(file: Path) -> tuple[CaseQuality, ...]:
    """What an earlier run wrote; nothing if it cannot be read."""
    try:
        return load_schema(QualityReport, file).cases if file.is_file() else ()
    except ConfigError:
        return ()
