"""What a model's judgement is made from: masks of known Dice, every model's calibration, and what was looked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from samunet.artifacts.prompts import Prompt
from samunet.artifacts.quality import (
    CALIBRATION_FILE,
    Calibration,
    CalibrationFit,
    FactRange,
    StructureQuality,
    StructureSigns,
)
from samunet.artifacts.report import CaseReport
from samunet.core.config import save_schema
from samunet.core.geometry import Geometry
from samunet.core.log import SilentReporter
from samunet.imageio import write_labels
from samunet.inference.ensemble import EnsemblePredictor
from samunet.inference.familiarity import TrainingFacts
from samunet.pipeline import quality
from samunet.pipeline.evaluate import evaluate
from samunet.pipeline.quality import Judge, MaskWatch, SeenMask, not_whole, write_calibration
from samunet.preprocessing.pipeline import preprocess_case
from samunet.preprocessing.store import STORE_FILE
from tests.planted import planted_predictor
from tests.samples import LABELS, make_case, make_plan

IGNORED = 3
USUAL = TrainingFacts(
    volumes={
        name: FactRange(fact=f"volume of {name} in ml", low=1, high=2, least=0.8, most=2.5) for name in ("ball", "cube")
    },
    presence={"ball": (5, 5), "cube": (5, 5)},
)


def fit(*signs: str, offset: float = 0.0) -> CalibrationFit:
    """A fit for any structure that adds up signs."""
    numbers = {"offset": offset, "low": -0.5, "high": 0.5, "error": 0.1, "num_masks": 9}
    return CalibrationFit(structure=None, signs=signs, weights=(1.0,) * len(signs), **numbers)


def seen(volumes_ml: dict[str, float], **signs: float) -> SeenMask:
    """A mask with these volumes; of those that are not empty the models say the same."""
    volume, _ = make_case(0)
    record = preprocess_case(volume, None, plan=make_plan(), configuration="2d", name="a").record
    said = {n: StructureSigns(voxels=9, **signs) if ml else StructureSigns(voxels=0) for n, ml in volumes_ml.items()}
    return SeenMask(volume.geometry, record, volumes_ml, said)


def calibrated(
    folder: Path, monkeypatch: pytest.MonkeyPatch, *, whole: int, scribbled: int, **options: Any
) -> Calibration:
    """A calibration on so many cases with whole references and with strokes, each mask predicted one row off."""
    plan = make_plan(labels={**LABELS, "ignore": IGNORED})
    watch, pairs = MaskWatch(plan), []
    for index in range(whole + scribbled):
        reference = np.zeros((4, 12, 12), np.uint8)
        reference[1:3, 3:8, 3:8] = 1
        mask = np.roll(reference, 1, axis=1)
        if index >= whole:
            reference[:, :, 5:] = IGNORED
        name, grid = f"case_{index}", Geometry.from_spacing(reference.shape, (1.0, 1.0, 1.0))
        files = folder / f"{name}.nii.gz", folder / f"{name}_mask.nii.gz"
        for file, labels in zip(files, (reference, mask), strict=True):
            write_labels(file, labels, geometry=grid)
        pairs.append((name, *files))
        watch.seen[name] = seen({"ball": 0.05, "cube": 0.0}, expected=0.7 + index / 100)
    monkeypatch.setattr(quality, "checkpoint_identity", lambda *_: "of this training")
    report = evaluate(pairs, labels=plan.label_spec)
    (folder / "fold_0").mkdir()
    (folder / STORE_FILE).touch()
    arguments: dict[str, Any] = {"watch": watch, "report": report, "reporter": SilentReporter()} | options
    return write_calibration(folder / "fold_0", folder, (), (), **arguments)


def test_the_dice_of_strokes_calibrates_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where voxels may be ignored, masks of wholly labelled cases are observed and no others; the note says so."""
    found = calibrated(tmp_path, monkeypatch, whole=5, scribbled=2)
    assert [one.case for one in found.observations] == [f"case_{index}" for index in range(5)]
    assert [one.dice for one in found.observations] == pytest.approx([0.8] * 5)
    assert found.fits
    assert "5 masks of 5 validation cases, without 2 whose references ignore voxels, mean error" in found.reason


def test_too_few_whole_cases_are_no_calibration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Strokes make up for none of those that lack; a case that taught the weights is told of once."""
    seen_in_pretraining = ("case_0", "case_6")
    found = calibrated(tmp_path, monkeypatch, whole=5, scribbled=3, labels_seen=seen_in_pretraining)
    assert found.fits == ()
    assert found.reason == (
        "not calibrated: masks of 4 validation cases, without 2 whose labels taught the weights and 2 whose references "
        "ignore voxels, and it takes 5"
    )


def test_nothing_is_said_of_strokes_where_prompts_made_the_masks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then no mask is observed anyway."""
    found = calibrated(tmp_path, monkeypatch, whole=5, scribbled=2, watch=None)
    assert found.reason == "not calibrated: no masks of validation cases that were made without prompts"


def test_a_case_whose_ignored_voxels_nobody_counted_is_not_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reports of nnU-Net do not say."""
    labels = make_plan(labels={**LABELS, "ignore": IGNORED}).label_spec
    calibrated(tmp_path, monkeypatch, whole=1, scribbled=1)
    pairs = [(n, tmp_path / f"{n}.nii.gz", tmp_path / f"{n}_mask.nii.gz") for n in ("case_0", "case_1")]
    report = evaluate(pairs, labels=labels)
    assert not_whole(report) == {"case_1"}
    assert {case.case: case.num_ignored for case in report.metric_per_case} == {"case_0": 0, "case_1": 4 * 12 * 7}
    unknown = CaseReport(case="unknown", metrics={})
    assert not_whole(report.model_copy(update={"metric_per_case": (unknown,)})) == {"unknown"}


def pointed(*labels: str | int) -> tuple[Prompt, ...]:
    """Prompts at structures."""
    return tuple(Prompt(label=label, points=((1, 1, 1),), space="voxel_ijk") for label in labels)


@pytest.mark.parametrize("label", ["ball", 1])
def test_what_no_prompt_points_at_is_not_judged(label: str | int) -> None:
    """A structure that nobody asked for is not missing, and the lowest estimate is of those that were."""
    mask = seen({"ball": 1.5, "cube": 0.0}, expected=0.9)
    judge = Judge(make_plan(), USUAL, (), "not calibrated: prompts were given", {"a": pointed(label, label)})
    case = judge.case("a", mask)
    assert list(case.structures) == ["ball"]
    assert case.flags == ()
    assert case.lowest == 0.9
    without = Judge(make_plan(), USUAL, (), "not calibrated").case("a", mask)
    assert [flag.fact for flag in without.flags] == ["cube"]
    assert without.lowest == 0.0


def test_what_a_prompt_points_at_is_judged_case_by_case() -> None:
    """An odd volume and an empty mask of prompted structures are flagged, each only in the case that asks for it."""
    prompts = {"both": pointed("cube", "ball"), "one": pointed("cube")}
    judge = Judge(make_plan(), USUAL, (), "not calibrated: prompts were given", prompts)
    mask = seen({"ball": 9.0, "cube": 0.0}, expected=0.9)
    both, one = (judge.case(name, mask) for name in prompts)
    assert list(both.structures) == ["ball", "cube"]
    assert [flag.fact for flag in both.flags] == ["volume of ball in ml", "cube"]
    assert [flag.fact for flag in one.flags] == ["cube"]
    assert (both.lowest, one.lowest) == (0.0, 0.0)


def test_an_estimate_is_calibrated_only_if_every_model_is() -> None:
    """One of three models without a fit: the mean of the others' estimates, without an interval that none promises."""
    fits = ((fit("expected"),), (fit("expected", offset=0.1),), ())
    mask = seen({"ball": 1.5, "cube": 1.5}, expected=0.6)
    judge = Judge(make_plan(), TrainingFacts(), fits, "some are")
    assert not judge.calibrated
    own = judge.case("a", mask).structures["ball"]
    assert (own.dice, own.low, own.high, own.calibrated) == (0.65, None, None, False)
    every = Judge(make_plan(), TrainingFacts(), fits[:2], "all are")
    assert every.calibrated
    own = every.case("a", mask).structures["ball"]
    assert own.calibrated
    assert (own.dice, own.low, own.high) == (0.65, pytest.approx(0.475), pytest.approx(0.825))


def test_a_model_without_calibration_is_not_dropped_from_an_ensemble(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One calibrated model of two vouches for no mask that both made; the note says how many are not."""
    own = Calibration(identity="of this training", fits=(fit("expected", offset=0.1),), reason="calibrated on 9 masks")
    save_schema(own, tmp_path / "first" / "fold_0" / CALIBRATION_FILE)
    monkeypatch.setattr(quality, "checkpoint_identity", lambda *_: "of this training")
    ensemble = EnsemblePredictor([planted_predictor(make_plan()) for _ in range(2)])
    mask = seen({"ball": 1.5, "cube": 0.0}, expected=0.6)

    def judged(*names: str) -> tuple[Judge, StructureQuality]:
        folders = [tmp_path / name for name in names]
        judge = Judge.of(ensemble, folders, checkpoint="final", reporter=SilentReporter())
        return judge, judge.case("a", mask).structures["ball"]

    judge, found = judged("first", "second")
    assert (found.dice, found.low, found.calibrated) == (0.7, None, False)
    assert "1 of 2 models are not calibrated, so estimates are means over the others, without intervals" in judge.note
    judge, found = judged("first", "first")
    assert (found.dice, found.calibrated, judge.note) == (0.7, True, "calibrated on 9 masks")
    judge, found = judged("second", "second")
    assert (found.dice, found.calibrated, judge.note) == (0.6, False, quality._MISSING)


def test_a_model_without_a_fit_for_the_signs_leaves_the_structure_uncalibrated() -> None:
    """A calibration that reads a sign which this mask lacks is none for it."""
    judge = Judge(make_plan(), TrainingFacts(), ((fit("expected"),), (fit("agreement"),)), "all are")
    assert judge.calibrated
    own = judge.case("a", seen({"ball": 1.5, "cube": 0.0}, expected=0.6)).structures
    assert (own["ball"].dice, own["ball"].low, own["ball"].calibrated) == (0.6, None, False)
    assert (own["cube"].dice, own["cube"].calibrated) == (None, False)
