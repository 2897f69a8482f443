"""A model's judgement of its own masks: calibrated after training, applied to what it predicts."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from samunet.artifacts.plan import Plan
from samunet.artifacts.prompts import CasePrompts, prompted_structure
from samunet.artifacts.quality import (
    CALIBRATION_FILE,
    Calibration,
    CalibrationFit,
    CaseQuality,
    Observation,
    StructureQuality,
    StructureSigns,
)
from samunet.artifacts.report import EvaluationReport
from samunet.artifacts.store import CaseRecord
from samunet.artifacts.workspace import fold_folder
from samunet.core.config import load_schema, save_schema
from samunet.core.errors import ConfigError
from samunet.core.geometry import Geometry
from samunet.core.labels import LabelSpec
from samunet.core.log import Reporter
from samunet.core.volume import Volume
from samunet.evaluation.calibration import LEAST_CASES, count_units, estimate_dice, fit_calibration
from samunet.inference.ensemble import EnsemblePredictor
from samunet.inference.familiarity import (
    TrainingFacts,
    intensity_ranges,
    training_facts,
    unfamiliar_image,
    unfamiliar_mask,
    widest,
)
from samunet.inference.predictor import Predictor
from samunet.inference.restore import Restored
from samunet.pipeline.selection import checkpoint_identity
from samunet.pipeline.training_run import CASES_FILE, RunCases
from samunet.preprocessing.store import CaseStore

_MISSING = "not calibrated: no readable calibration beside the checkpoint; samunet_train --val makes one"


@dataclass(frozen=True)
class SeenMask:
    """What is kept of a case that was predicted.

    Args:
        geometry: The image's grid.
        record: What preprocessing recorded.
        volumes_ml: Per structure the volume of the mask as written.
        signs: Per structure what the models say about it, before component filters.
    """

    geometry: Geometry
    record: CaseRecord
    volumes_ml: Mapping[str, float]
    signs: Mapping[str, StructureSigns]


def seen_mask(labels: LabelSpec, volume: Volume, prepared: Any, restored: Restored) -> SeenMask:
    """What is kept of a case.

    Args:
        labels: Meaning of the label values.
        volume: The image.
        prepared: What preprocessing made of it; of several models the first one's is taken.
        restored: The mask as it will be written, with what the models say about it.
    """
    first = prepared[0] if isinstance(prepared, list) else prepared
    counts = np.bincount(restored.labels.ravel(), minlength=max(labels.values) + 1)
    voxels = {structure: int(counts[list(values)].sum()) for structure, values in labels.names.items()}
    volumes = {name: number * volume.geometry.voxel_volume_mm3 / 1000 for name, number in voxels.items()}
    said = restored.signs or {}
    signs = {n: said[n] if n in said and number else StructureSigns(voxels=0) for n, number in voxels.items()}
    return SeenMask(volume.geometry, first.record, volumes, signs)


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
        self.seen[name] = seen_mask(self._labels, volume, prepared, restored)


def write_calibration(
    folder: Path,
    store: Path,
    trained: Collection[str],
    channels: Sequence[str],
    *,
    reporter: Reporter,
    watch: MaskWatch | None = None,
    report: EvaluationReport | None = None,
    groups: Mapping[str, str] | None = None,
    labels_seen: Collection[str] = (),
) -> Calibration:
    """Calibrate a fold's model on its validation cases, and write what it says beside its checkpoint.

    Cases with ignored voxels are left out: only the Dice of their labelled voxels is known, not that of the mask.

    Args:
        folder: Of the fold.
        store: Of the training cases.
        trained: Names of the training cases.
        channels: Names of the channels.
        reporter: Told how well the estimates do.
        watch: Was told of the validation cases; None without any that were predicted without prompts.
        report: Their true scores.
        groups: Case to group.
        labels_seen: Validation cases whose labels taught the weights: their masks say nothing about others.
    """
    opened = CaseStore(store)
    records = [opened.record(name) for name in trained]
    judged = None if watch is None else report
    made = () if watch is None or judged is None else observations(watch.seen, judged)
    ignoring = () if judged is None else not_whole(judged).difference(labels_seen)
    seen = tuple(one for one in made if one.case not in labels_seen)
    left_out = {"whose labels taught the weights": len(labels_seen), "whose references ignore voxels": len(ignoring)}
    fits = fit_calibration(seen, groups)
    calibration = Calibration(
        identity=checkpoint_identity(folder.parent, folder.name.removeprefix("fold_")),
        fits=fits,
        reason=_reason(fits, seen, groups, left_out),
        intensities=intensity_ranges(records, channels),
        observations=seen,
    )
    save_schema(calibration, folder / CALIBRATION_FILE)
    reporter.info(f"estimates of Dice: {calibration.reason}")
    return calibration


def observations(seen: Mapping[str, SeenMask], report: EvaluationReport) -> tuple[Observation, ...]:
    """Masks that are not empty, with their true Dice; none of cases with ignored voxels, where it is not known."""
    made, unknown = [], not_whole(report)
    for case in report.metric_per_case:
        signs = seen[case.case].signs if case.case in seen and case.case not in unknown else {}
        for key, metrics in case.metrics.items():
            name = report.name_of(key)
            if name in signs and signs[name].expected is not None and metrics.Dice is not None:
                made.append(Observation(case=case.case, structure=name, dice=metrics.Dice, signs=signs[name]))
    return tuple(made)


def not_whole(report: EvaluationReport) -> frozenset[str]:
    """Cases of which not every voxel is known to be labelled: their scores are not those of the whole mask."""
    return frozenset(case.case for case in report.metric_per_case if case.num_ignored != 0)


def _reason(
    fits: Sequence[CalibrationFit],
    seen: Sequence[Observation],
    groups: Mapping[str, str] | None,
    left_out: Mapping[str, int],
) -> str:
    cases = f"{len({one.case for one in seen})} validation cases"
    units = count_units((one.case for one in seen), groups)
    cases += f" of {units} groups" if groups else ""
    without = " and ".join(f"{number} {which}" for which, number in left_out.items() if number)
    cases += f", without {without}" if without else ""
    if not fits:
        if not seen and not without:
            return "not calibrated: no masks of validation cases that were made without prompts"
        return f"not calibrated: masks of {cases}, and it takes {LEAST_CASES}{' groups' if groups else ''}"
    error = next(fit.error for fit in fits if fit.structure is None)
    return f"calibrated on {len(seen)} masks of {cases}, mean error {error:.3f} when held out"


@dataclass(frozen=True)
class Judge:
    """Turns what models say into estimates, and says what is unfamiliar.

    Args:
        plan: Of the models.
        facts: Of their training.
        fits: Per model (each fold of each), empty where it is not calibrated; none where no estimate is to be.
        note: How, or why not.
        prompts: Per case what was pointed at, the only structures that are judged; None: masks were made without.
    """

    plan: Plan
    facts: TrainingFacts
    fits: tuple[tuple[CalibrationFit, ...], ...]
    note: str
    prompts: Mapping[str, CasePrompts] | None = None

    @property
    def calibrated(self) -> bool:
        """Whether every model is."""
        return bool(self.fits) and all(self.fits)

    @classmethod
    def of(
        cls,
        predictor: Predictor | EnsemblePredictor,
        folders: Sequence[Path],
        *,
        checkpoint: str,
        prompts: Mapping[str, CasePrompts] | None = None,
        filtered: bool = False,
        reporter: Reporter,
    ) -> Judge:
        """The judge of loaded models, with the calibrations beside their checkpoints.

        Args:
            predictor: The models.
            folders: Theirs, in the same order.
            checkpoint: Which of their checkpoints.
            prompts: Per case what they are asked to segment, where they are given prompts.
            filtered: Whether components are removed from their masks.
            reporter: Told of a file that cannot be read; it then counts as missing, and masks are made.
        """
        members = predictor.predictors if isinstance(predictor, EnsemblePredictor) else [predictor]
        found = [
            [_read_calibration(folder, fold, reporter) for fold in member.folds]
            for folder, member in zip(folders, members, strict=True)
        ]
        facts = _facts(members[0], folders[0], found[0], reporter)
        remark = "; estimates are of the masks before component filters, volumes of those written" if filtered else ""
        if prompts is not None:
            return cls(predictor.plan, facts, (), f"not calibrated: prompts were given{remark}", prompts)
        if checkpoint != "final":
            why = f"they are of {checkpoint} checkpoints, and only final ones are"
            return cls(predictor.plan, facts, (), f"not calibrated: {why}{remark}")
        every = [own for part in found for own in part]
        fits = tuple(() if own is None else own.fits for own in every)
        notes = list(dict.fromkeys(_MISSING if own is None else own.reason for own in every))
        if any(fits) and not all(fits):
            lacking = f"{fits.count(())} of {len(fits)} models are not calibrated"
            notes.append(f"{lacking}, so estimates are means over the others, without intervals")
        return cls(predictor.plan, facts, fits, "; ".join(notes) + remark)

    def case(self, name: str, seen: SeenMask) -> CaseQuality:
        """The estimates and flags of one case."""
        flags = unfamiliar_image(self.facts, seen.geometry, seen.record, self.plan)
        structures, values = {}, []
        for structure in self._judged(name):
            structures[structure] = self._structure(structure, seen.signs[structure], seen.volumes_ml[structure])
            flag = unfamiliar_mask(self.facts, structure, seen.volumes_ml[structure])
            flags += [] if flag is None else [flag]
            value = structures[structure].dice
            if value is None and self.facts.usual(structure):
                value = 0.0
            values += [] if value is None else [value]
        return CaseQuality(case=name, lowest=min(values) if values else None, structures=structures, flags=tuple(flags))

    def _judged(self, case: str) -> list[str]:
        """The structures that the models looked for: all, or those that the prompts of a case point at."""
        labels = self.plan.label_spec
        if self.prompts is None:
            return list(labels.names)
        asked = {prompted_structure(entry.label, labels) for entry in self.prompts[case]}
        return [structure for structure in labels.names if structure in asked]

    def _structure(self, structure: str, signs: StructureSigns, volume_ml: float) -> StructureQuality:
        """The mean of the estimates by the models' own calibrations, with an interval where all of them have one."""
        each = [estimate_dice(fits, structure, signs) for fits in self.fits or ((),)]
        sure = [estimate for estimate in each if estimate[1] is not None]
        calibrated = len(sure) == len(each)
        dice, low, high = (_mean(column) for column in zip(*(sure or each), strict=True))
        return StructureQuality(
            dice=dice,
            low=low if calibrated else None,
            high=high if calibrated else None,
            calibrated=calibrated,
            volume_ml=round(volume_ml, 6),
            signs=signs,
        )


def _mean(values: Sequence[float | None]) -> float | None:
    """Of all; None where one is missing."""
    known = [value for value in values if value is not None]
    return round(sum(known) / len(known), 4) if known and len(known) == len(values) else None


def _facts(
    member: Predictor, folder: Path, calibrations: Sequence[Calibration | None], reporter: Reporter
) -> TrainingFacts:
    """What the cases were like that a model's folds were trained on; what cannot be read is told and left out.

    Args:
        member: The model whose preprocessing the images are compared after.
        folder: Its own.
        calibrations: Of its folds.
        reporter: Told of what cannot be read.
    """
    intensities = widest([own.intensities for own in calibrations if own is not None])
    try:
        files = [fold_folder(folder, fold) / CASES_FILE for fold in member.folds]
        parts = [RunCases.read(file).trained for file in files if file.is_file()]
        cases = {name for part in parts for name in part} if len(parts) == len(files) else None
        return training_facts(member.fingerprint, member.plan, intensities, cases=cases)
    except ConfigError as error:
        reporter.warn(f"images are not compared with the training cases: {error}")
        return TrainingFacts(intensities=intensities)


def _read_calibration(folder: Path, fold: str, reporter: Reporter) -> Calibration | None:
    """The calibration of a fold's final checkpoint; None where there is none, or it is of another training."""
    file = fold_folder(folder, fold) / CALIBRATION_FILE
    if not file.is_file():
        return None
    try:
        calibration = load_schema(Calibration, file)
    except ConfigError as error:
        error.todo = "masks are made, their estimates are not calibrated; samunet_train --val writes the file anew"
        reporter.warn(str(error))
        return None
    return calibration if calibration.identity == checkpoint_identity(folder, fold) else None
