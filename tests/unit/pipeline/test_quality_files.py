"""What is said of a folder's masks: which to look at first, and whether their estimates are calibrated."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from samunet.artifacts.quality import CalibrationFit, CaseQuality, Flag, StructureSigns
from samunet.core.log import SilentReporter
from samunet.inference.familiarity import TrainingFacts
from samunet.inference.restore import Restored
from samunet.pipeline.quality import Judge
from samunet.pipeline.quality_files import QualityLog, look_first
from samunet.preprocessing.pipeline import preprocess_case
from tests.samples import make_case, make_plan

ODD = Flag(fact="spacing of slices in mm", found="5", training="1 to 1")


def case(name: str, lowest: float | None, *, flagged: bool = False) -> CaseQuality:
    """A case with an estimate, flagged or not."""
    return CaseQuality(case=name, lowest=lowest, structures={}, flags=(ODD,) if flagged else ())


def test_flagged_cases_come_first_and_none_is_cut() -> None:
    """Thirty flagged cases that models are sure of stand before all others, and twenty of those follow."""
    sure = [case(f"sure{index:02}", 0.9 + index / 1000, flagged=True) for index in range(30)]
    plain = [case(f"plain{index:03}", 0.3 + index / 1000) for index in range(200)]
    listed = look_first([*plain, *sure])
    assert listed[:30] == tuple(one.case for one in sure)
    assert listed[30:] == tuple(f"plain{index:03}" for index in range(20))


def test_the_fifth_with_the_lowest_estimates_is_listed() -> None:
    """A flagged case among them is listed once; nothing found and nothing missed comes last."""
    cases = [case("best", 0.9), case("low", 0.2), case("odd", 0.1, flagged=True), case("empty", None)]
    cases += [case(f"good{index}", 0.8) for index in range(6)]
    assert look_first(cases) == ("odd", "low")
    assert look_first([case("empty", None, flagged=True), case("low", 0.2)]) == ("empty", "low")


def test_estimates_without_a_fit_for_their_signs_are_not_called_calibrated(tmp_path: Path) -> None:
    """A structure that lacks the sign which the only fit reads says so, and so do the file and its note."""
    fit = CalibrationFit(
        structure=None, signs=("iou_head",), weights=(1.0,), offset=0.0, low=-0.1, high=0.1, error=0.1, num_masks=9
    )
    plan, (volume, labels) = make_plan(), make_case(0)
    prepared = preprocess_case(volume, None, plan=plan, configuration="2d", name="a")
    signs = {
        "ball": StructureSigns(voxels=int((labels == 1).sum()), expected=0.8, iou_head=0.7),
        "cube": StructureSigns(voxels=int((labels == 2).sum()), expected=0.8),
    }
    judge = Judge(plan, TrainingFacts(), ((fit,),), "calibrated on nine masks")
    log = QualityLog(judge, tmp_path, model="m", kept=(), reporter=SilentReporter())
    log("a", volume, prepared, Restored(np.asarray(labels), signs=signs))
    report = log.close(["a"])
    assert {name: own.calibrated for name, own in report.cases[0].structures.items()} == {"ball": True, "cube": False}
    assert not report.calibrated
    assert "1 of 2 estimates are not calibrated" in report.note


def test_a_folder_is_not_called_calibrated_while_one_of_its_models_is_not(tmp_path: Path) -> None:
    """Also where no mask has an estimate that could show it."""
    one = CalibrationFit(
        structure=None, signs=("expected",), weights=(1.0,), offset=0.0, low=-0.1, high=0.1, error=0.1, num_masks=9
    )
    for fits, expected in ((((one,),), True), (((one,), ()), False), ((), False)):
        judge = Judge(make_plan(), TrainingFacts(), fits, "as it says")
        report = QualityLog(judge, tmp_path, model="m", kept=(), reporter=SilentReporter()).close([])
        assert (report.calibrated, report.note) == (expected, "as it says")
