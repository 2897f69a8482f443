"""An interrupted prediction goes on with the same models only, and keeps what it knew about its masks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from samunet.artifacts.best import ComponentFilter
from samunet.artifacts.plan import ChannelNormalization
from samunet.artifacts.quality import QualityReport
from samunet.core.config import load_schema
from samunet.core.errors import ConfigError, UsageError
from samunet.core.files import read_json
from samunet.core.log import SilentReporter
from samunet.imageio import read_labels, write_image
from samunet.inference.predictor import Predictor
from samunet.pipeline.predict import PredictionRequest, predict
from tests.planted import PlantedModel, planted_predictor
from tests.samples import decided, make_case, make_plan

CASES = ("a", "b", "c")
LABELS: dict[str, Any] = {"background": 0, "ball": 1}


def predictor(*, seed: int = 0, mirror: bool = True) -> Predictor:
    """A model whose answer is known; another seed is another training."""
    as_it_is = {"normalization": decided((ChannelNormalization(scheme="none"),))}
    made = planted_predictor(make_plan(labels=LABELS).model_copy(update=as_it_is), mirror=mirror)
    made._manifests = [own.model_copy(update={"seed": seed}) for own in made._manifests]
    return made


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three images, and a model that is loaded wherever one is asked for."""
    for index, name in enumerate(CASES):
        volume, labels = make_case(index)
        volume.data[0] = 45 + 10 * (labels == 1)
        volume.data[0, 5, 28, 1] = 60
        write_image(tmp_path / "in" / f"{name}_0000.nii.gz", volume)
    loads(monkeypatch)
    return tmp_path


def loads(monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
    """From here on this model is loaded."""
    monkeypatch.setattr(Predictor, "from_folder", lambda *_, **__: predictor(**options))


def run(folder: Path, **options: Any) -> SilentReporter:
    """A prediction, and what it said."""
    reporter = SilentReporter()
    model = folder / options.pop("model", "2d__auto__none")
    predict(PredictionRequest(folder / "in", folder / "out", model, **options), reporter=reporter)
    return reporter


def interrupt(folder: Path, monkeypatch: pytest.MonkeyPatch, *, at: str = "c", **options: Any) -> None:
    """A prediction that ends when it comes to a case."""
    original = Predictor.predict_prepared

    def interrupted(self: Predictor, case: Any, **arguments: Any) -> Any:
        if case.record.name == at:
            raise KeyboardInterrupt
        return original(self, case, **arguments)

    monkeypatch.setattr(Predictor, "predict_prepared", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(folder, **options)
    monkeypatch.setattr(Predictor, "predict_prepared", original)


def statuses(folder: Path) -> list[str]:
    return [case["status"] for case in read_json(folder / "out" / "prediction.json")["cases"]]


def test_an_interrupted_run_is_continued_with_all_its_estimates(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Estimates of the masks that were made before are those of a run in one go, and what made them stands there."""
    run(folder)
    whole = load_schema(QualityReport, folder / "out" / "quality.json")
    interrupt(folder, monkeypatch)
    out = folder / "out"
    assert statuses(folder) == ["pending"] * 3
    assert sorted(path.name for path in out.glob("*.nii.gz")) == ["a.nii.gz", "b.nii.gz"]
    assert not (out / "quality.json").exists()
    with next(out.glob("quality.partial*")).open("a") as stream:
        stream.write('{"case": "c", "low')
    assert run(folder, resume=True).warnings == []
    assert statuses(folder) == ["kept", "kept", "predicted"]
    assert load_schema(QualityReport, out / "quality.json") == whole
    assert list(out.glob("quality.partial*")) == []


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"model": "2.5d__auto__none"}, "2.5d__auto__none"),
        ({"checkpoint": "best"}, "checkpoint: best"),
        ({"mirror": False}, "mirrored views: not averaged"),
        ({"filters": (ComponentFilter(structure="ball", kind="largest"),)}, "ball: largest"),
    ],
)
def test_masks_made_in_another_way_are_not_kept(
    folder: Path, monkeypatch: pytest.MonkeyPatch, changed: dict[str, Any], named: str
) -> None:
    """Also not those of a run that was interrupted; one message says what differs and what to do."""
    interrupt(folder, monkeypatch)
    before = (folder / "out" / "a.nii.gz").read_bytes()
    with pytest.raises(UsageError, match="made in another way") as error:
        run(folder, resume=True, **changed)
    assert named in str(error.value)
    assert "another -o" in str(error.value)
    assert (folder / "out" / "a.nii.gz").read_bytes() == before


def test_masks_of_another_training_are_not_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same folder trained again is another model; so is one of which nothing is said."""
    run(folder)
    loads(monkeypatch, seed=1)
    with pytest.raises(UsageError, match="made in another way"):
        run(folder, resume=True)
    loads(monkeypatch)
    run(folder, resume=True)
    (folder / "out" / "prediction.json").unlink()
    with pytest.raises(UsageError, match="nothing says what made"):
        run(folder, resume=True)


def test_what_another_model_left_does_not_pass_for_an_interrupted_runs(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that starts anew over old masks and is interrupted leaves none of those; all are made on resuming."""
    run(folder, model="2.5d__auto__none")
    interrupt(folder, monkeypatch, at="a")
    assert list((folder / "out").glob("*.nii.gz")) == []
    run(folder, resume=True)
    assert statuses(folder) == ["predicted"] * 3


def test_a_mask_of_an_image_that_came_later_is_predicted_anew(folder: Path) -> None:
    """A mask that the run to be continued knows nothing of is not kept."""
    run(folder)
    file = folder / "out" / "prediction.json"
    report = read_json(file)
    file.write_text(json.dumps(report | {"cases": [case for case in report["cases"] if case["case"] != "b"]}))
    run(folder, resume=True)
    assert statuses(folder) == ["kept", "predicted", "kept"]


def test_kept_masks_without_an_estimate_are_named(folder: Path) -> None:
    """A report of quality that cannot be read costs estimates, which is said, and no mask."""
    run(folder)
    (folder / "out" / "quality.json").write_text("{")
    (warning,) = run(folder, resume=True).warnings
    assert "3 masks are kept that have no estimate" in warning
    assert "a, b, c" in warning


def test_a_damaged_calibration_is_told_before_predicting(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One message names the file, before the first mask; all masks are made, and say that they are not calibrated."""
    damaged = folder / "2d__auto__none" / "fold_0" / "quality.json"
    damaged.parent.mkdir(parents=True)
    damaged.write_text('{"identity": 3')
    told: list[bool] = []
    original = SilentReporter.warn

    def warn(self: SilentReporter, message: str) -> None:
        told.append((folder / "out").exists())
        original(self, message)

    monkeypatch.setattr(SilentReporter, "warn", warn)
    (message,) = run(folder).warnings
    assert str(damaged) in message
    assert told == [False]
    report = load_schema(QualityReport, folder / "out" / "quality.json")
    assert not report.calibrated
    assert len(report.cases) == 3
    assert {case.structures["ball"].calibrated for case in report.cases} == {False}


def test_estimates_say_that_filters_come_after_them(folder: Path) -> None:
    """Volumes are of the filtered masks, estimates of those before, and the file says so."""
    run(folder)
    plain = load_schema(QualityReport, folder / "out" / "quality.json")
    run(folder, filters=(ComponentFilter(structure="ball", kind="size", least_mm3=50.0),))
    cleaned = load_schema(QualityReport, folder / "out" / "quality.json")
    assert "before component filters" in cleaned.note
    assert "before component filters" not in plain.note
    pairs = [
        (one.structures["ball"], two.structures["ball"]) for one, two in zip(plain.cases, cleaned.cases, strict=True)
    ]
    assert all(before.dice == after.dice for before, after in pairs)
    assert all(before.dice is not None for before, _ in pairs)
    assert all(before.volume_ml > after.volume_ml for before, after in pairs)
    for case in cleaned.cases:
        voxels = np.count_nonzero(read_labels(folder / "out" / f"{case.case}.nii.gz").data)
        assert case.structures["ball"].volume_ml == pytest.approx(voxels * 2 / 1000)


def test_an_unreadable_report_is_no_plan_to_make_again(folder: Path) -> None:
    """Continuing over a damaged prediction.json is refused with what to do about it here."""
    run(folder)
    (folder / "out" / "prediction.json").write_text("{")
    with pytest.raises(UsageError, match="nothing says what made") as error:
        run(folder, resume=True)
    assert not isinstance(error.value, ConfigError)
    assert "plan again" not in str(error.value)


def test_masks_of_images_that_changed_are_made_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another image under the same name is predicted; so is every image where a report does not say what it read."""
    interrupt(folder, monkeypatch)
    volume, _ = make_case(7)
    volume.data[0] = 45
    write_image(folder / "in" / "a_0000.nii.gz", volume)
    said = run(folder, resume=True).warnings
    assert statuses(folder) == ["predicted", "kept", "predicted"]
    assert any("predicted again: a" in line for line in said)
    assert not read_labels(folder / "out" / "a.nii.gz").data.any()
    report = read_json(folder / "out" / "prediction.json")
    for case in report["cases"]:
        case.pop("source")
    (folder / "out" / "prediction.json").write_text(json.dumps(report))
    run(folder, resume=True)
    assert statuses(folder) == ["predicted"] * 3


def test_a_case_whose_logits_are_not_finite_fails(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No mask is made of NaN: the case fails with the precision and device, the others go on."""
    answer = PlantedModel.forward

    def spoiled(self: PlantedModel, images: Tensor) -> Tensor:
        logits = answer(self, images)
        return torch.where(images.max() > 64, logits.log(), logits)

    monkeypatch.setattr(PlantedModel, "forward", spoiled)
    volume, _ = make_case(2)
    volume.data[0] = 70
    write_image(folder / "in" / "c_0000.nii.gz", volume)
    run(folder)
    assert statuses(folder) == ["predicted", "predicted", "failed"]
    problem = read_json(folder / "out" / "prediction.json")["cases"][2]["problem"]
    assert "not finite" in problem
    assert "fp32 on cpu" in problem
    assert not (folder / "out" / "c.nii.gz").exists()
