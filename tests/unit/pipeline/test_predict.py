"""What a prediction run leaves in its folder besides masks: which prompts they answer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from samunet.artifacts.prediction import PredictionReport
from samunet.artifacts.quality import QualityReport
from samunet.core.config import load_schema
from samunet.core.errors import UsageError
from samunet.core.files import sha256_file
from samunet.core.log import SilentReporter
from samunet.inference.predictor import Predictor
from samunet.pipeline.evaluate import label_files
from samunet.pipeline.predict import ORACLE_MARK, PredictionRequest, predict
from tests.unit.inference.test_familiarity import case_facts
from tests.unit.inference.test_prompted import (
    OPERATIONS,
    PointedModel,
    blob,
    box_around,
    plan_for,
    predictor_for,
    written_images,
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One image, prompts for it under a user's and an oracle's name, and a promptable model."""
    (tmp_path / "in").mkdir()
    written_images(tmp_path / "in", ("one",))
    known = box_around(OPERATIONS[17].apply(blob()), "ball").model_dump(mode="json", exclude_none=True)
    for name, entries in (("prompts", [known]), ("oracle_box_tight_seed0", [known, known])):
        (tmp_path / f"{name}.json").write_text(json.dumps({"one": entries}))
    monkeypatch.setattr(Predictor, "from_folder", lambda *_, **__: predictor_for(plan_for(), PointedModel()))
    return tmp_path


def run(folder: Path, name: str, **options: object) -> PredictionReport:
    request = PredictionRequest(folder / "in", folder / "out", folder / "model", prompts=folder / name, **options)  # type: ignore[arg-type]
    predict(request, reporter=SilentReporter())
    return load_schema(PredictionReport, folder / "out" / "prediction.json")


def test_the_report_names_the_prompts_file(folder: Path) -> None:
    """Name and hash are those of the file; a user's prompts are no oracle and leave no mark."""
    used = run(folder, "prompts.json").prompts
    assert used is not None
    assert (used.file, used.sha256) == ("prompts.json", sha256_file(folder / "prompts.json"))
    assert not used.oracle
    assert not (folder / "out" / ORACLE_MARK).exists()


def test_a_folder_of_oracle_predictions_says_so(folder: Path) -> None:
    """A file beside the masks names the prompts; it is no label file, and goes once other prompts are answered."""
    used = run(folder, "oracle_box_tight_seed0.json").prompts
    assert used is not None
    assert used.oracle
    mark = folder / "out" / ORACLE_MARK
    assert used.file in mark.read_text()
    assert used.sha256 in mark.read_text()
    assert set(label_files(folder / "out")) == {"one"}
    run(folder, "prompts.json")
    assert not mark.exists()


def test_a_structure_that_is_not_prompted_is_not_missing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All training cases have both structures and the prompts point at one: only that one is judged."""
    training = case_facts()["structures"]["ball"]
    predictor = predictor_for(plan_for(), PointedModel())
    predictor.fingerprint = {"cases": {"0": case_facts(structures={"ball": training, "cube": training})}}
    monkeypatch.setattr(Predictor, "from_folder", lambda *_, **__: predictor)
    run(folder, "prompts.json")
    report = load_schema(QualityReport, folder / "out" / "quality.json")
    (case,) = report.cases
    assert list(case.structures) == ["ball"]
    assert "cube" not in [flag.fact for flag in case.flags]
    assert case.lowest == case.structures["ball"].dice
    assert not report.calibrated
    assert "prompts were given" in report.note


def test_masks_of_other_prompts_are_not_kept(folder: Path) -> None:
    """A prediction is continued with the same prompts only, and never where nothing says which they were."""
    run(folder, "oracle_box_tight_seed0.json")
    kept = run(folder, "oracle_box_tight_seed0.json", resume=True)
    assert [case.status for case in kept.cases] == ["kept"]
    with pytest.raises(UsageError, match=r"prompts: prompts\.json"):
        run(folder, "prompts.json", resume=True)
    with pytest.raises(UsageError, match="propagation of prompts: no"):
        run(folder, "oracle_box_tight_seed0.json", resume=True, propagate=False)
    assert run(folder, "oracle_box_tight_seed0.json", resume=True).prompts == kept.prompts
    (folder / "out" / "prediction.json").unlink()
    with pytest.raises(UsageError, match="nothing says"):
        run(folder, "prompts.json", resume=True)


def test_no_file_is_left_out_silently(folder: Path) -> None:
    """An image whose files are unclear has failed, with all that is wrong; files of other endings are warned of."""
    for name in ("two_0000.nii.gz", "two_0001.nii.gz", "three.mha"):
        (folder / "in" / name).touch()
    reporter = SilentReporter()
    request = PredictionRequest(folder / "in", folder / "out", folder / "model", prompts=folder / "prompts.json")
    report = predict(request, reporter=reporter)
    assert [(case.case, case.status) for case in report.cases] == [("one", "predicted"), ("two", "failed")]
    assert "two_0001.nii.gz" in (report.cases[1].problem or "")
    assert any("three.mha" in warning for warning in reporter.warnings)
