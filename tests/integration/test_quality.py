"""Estimates of Dice from training to the folder of masks, and the training of SAM's IoU head."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from samunet.artifacts.checkpoint import read_checkpoint
from samunet.artifacts.plan import LossWeights
from samunet.artifacts.quality import Calibration, QualityReport
from samunet.artifacts.workspace import Workspace
from samunet.core.config import load_schema
from samunet.core.files import read_json, write_json
from samunet.core.geometry import Geometry
from samunet.core.log import SilentReporter
from samunet.core.volume import Volume
from samunet.datasets.raw import load_raw_dataset
from samunet.imageio import read_labels, read_volume, write_image
from samunet.inference.ensemble import EnsemblePredictor
from samunet.inference.predictor import Predictor
from samunet.models.segmentation import ESTIMATOR
from samunet.pipeline.evaluate import label_files
from samunet.pipeline.predict import PredictionRequest, predict
from samunet.pipeline.quality import Judge
from samunet.pipeline.train import train
from samunet.pipeline.training_run import TrainingRequest
from samunet.planners.fingerprint import extract_fingerprint
from samunet.training.checkpointing import checkpoint_file
from tests.samples import DATASET, install, make_plan, make_recipe, write_dataset

MODEL = "2d__auto__none"
ESTIMATED = LossWeights(estimated_iou=1.0)


def trained(root: Path, loss: LossWeights, fold: str = "0", *, mirror: bool = True) -> Path:
    """The fold folder of a small run with five validation cases, hardly trained, so that masks are busy."""
    workspace = Workspace.locate(workspace=root, environment={})
    recipe = make_recipe(loss=loss, iterations=2, epochs=1, learning_rate=1e-5)
    plan = make_plan(recipes={"none": {"cpu": recipe}})
    folder = write_dataset(workspace, num_train=8)
    install(workspace, plan, folder)
    fingerprint = extract_fingerprint(load_raw_dataset(folder), processes=1, reporter=SilentReporter())
    write_json(workspace.fingerprint_file(DATASET), fingerprint.model_dump(mode="json"))
    names = [f"case_{index}" for index in range(8)]
    write_json(workspace.splits_file(DATASET), [{"train": names[:3], "val": names[3:]}])
    request = TrainingRequest(DATASET, fold, weights="none", device="cpu", num_workers=0, seed=3, mirror=mirror)
    return train(request, workspace, reporter=SilentReporter()).folder


@pytest.fixture(scope="module")
def fold(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that trains its IoU head."""
    return trained(tmp_path_factory.mktemp("workspace"), ESTIMATED)


def test_the_iou_head_learns_and_nothing_else_changes(fold: Path, tmp_path: Path) -> None:
    """After training with and without its loss all tensors but the head's are equal bit for bit; the head's moved."""
    with_loss = read_checkpoint(checkpoint_file(fold, "final")).tensors
    without = read_checkpoint(checkpoint_file(trained(tmp_path, LossWeights(), mirror=False), "final")).tensors
    assert with_loss.keys() == without.keys()
    differing = {name for name in without if not torch.equal(without[name], with_loss[name])}
    assert differing
    assert all(name.startswith(ESTIMATOR) for name in differing)


def predicted(fold: Path, output: Path, **options: object) -> tuple[QualityReport, SilentReporter]:
    """What is written beside the masks of the test images."""
    source = fold.parents[3] / "raw" / DATASET / "imagesTs"
    reporter = SilentReporter()
    request = PredictionRequest(source, output, fold.parent, device="cpu", **options)  # type: ignore[arg-type]
    predict(request, reporter=reporter)
    return load_schema(QualityReport, output / "quality.json"), reporter


def test_a_run_is_calibrated_on_its_validation_cases(fold: Path) -> None:
    """Every validated mask is an observation with the Dice of summary.json and all signs; fits come of them."""
    calibration = load_schema(Calibration, fold / "quality.json")
    summary = read_json(fold / "validation" / "summary.json")
    true = {
        (case["case"], summary["structures"][key]): metrics["Dice"]
        for case in summary["metric_per_case"]
        for key, metrics in case["metrics"].items()
    }
    assert calibration.observations
    for seen in calibration.observations:
        assert seen.dice == pytest.approx(true[seen.case, seen.structure])
        signs = seen.signs.model_dump()
        assert signs.pop("models_agree") is None
        assert all(value is not None for value in signs.values())
    assert {seen.case for seen in calibration.observations} <= {f"case_{index}" for index in range(3, 8)}
    assert len(calibration.intensities) == 6


def test_the_quality_file_holds_what_the_masks_hold(fold: Path, tmp_path: Path) -> None:
    """Volumes are those of the files, estimates lie in their intervals, the sums are those of the probabilities."""
    report, reporter = predicted(fold, tmp_path, save_probabilities=True)
    assert [case.case for case in report.cases] == sorted(label_files(tmp_path))
    assert sorted(path.name for path in tmp_path.glob("*.nii.gz")) == [f"{case.case}.nii.gz" for case in report.cases]
    for case in report.cases:
        mask = read_labels(tmp_path / f"{case.case}.nii.gz")
        p = np.load(tmp_path / f"{case.case}.npz")["probabilities"].astype(np.float64)
        for value, (name, own) in enumerate(case.structures.items(), start=1):
            inside = mask.data[0] == value
            assert own.volume_ml == pytest.approx(inside.sum() * 2 / 1000)
            assert own.signs.voxels == inside.sum()
            if not inside.any():
                assert own.dice is None
                assert any(flag.fact == name for flag in case.flags)
                continue
            expected = 2 * p[value][inside].sum() / (inside.sum() + p[value].sum())
            assert own.signs.expected == pytest.approx(expected, abs=2e-3)
            assert own.low is None or own.low <= own.dice <= own.high
    by_name = {case.case: case for case in report.cases}
    assert [by_name[name] for name in report.look_first] == sorted(
        (by_name[name] for name in report.look_first), key=lambda case: (not case.flags, case.lowest)
    )
    assert sum(line.startswith("estimated Dice") for line in reporter.messages) == 1
    rows = list(csv.DictReader((tmp_path / "quality.csv").open()))
    assert len(rows) == 2 * len(report.cases)
    assert float(rows[0]["volume_ml"]) == report.cases[0].structures["ball"].volume_ml


def test_estimates_change_no_mask(fold: Path, tmp_path: Path) -> None:
    """The same labels come out whether or not signs are asked for."""
    predicted(fold, tmp_path)
    predictor = Predictor.from_folder(fold.parent, device="cpu")
    for file in sorted((fold.parents[3] / "raw" / DATASET / "imagesTs").glob("*.nii.gz")):
        plain = predictor.predict(read_volume([file]))
        assert plain.signs is None
        assert np.array_equal(plain.labels, read_labels(tmp_path / file.name.replace("_0000", "")).data[0])


def test_an_unfamiliar_image_is_flagged_and_predicted(fold: Path, tmp_path: Path) -> None:
    """Three times the gain and voxels of another size: a mask all the same, and first to be looked at."""
    source = fold.parents[3] / "raw" / DATASET / "imagesTs"
    (tmp_path / "in").mkdir()
    for index, file in enumerate(sorted(source.glob("*.nii.gz"))):
        volume = read_volume([file])
        odd = volume.with_data(volume.data * 30) if index == 0 else volume
        write_image(tmp_path / "in" / file.name, odd)
    request = PredictionRequest(tmp_path / "in", tmp_path / "out", fold.parent, device="cpu")
    assert not predict(request, reporter=SilentReporter()).failed
    report = load_schema(QualityReport, tmp_path / "out" / "quality.json")
    facts = [{flag.fact for flag in case.flags} for case in report.cases]
    assert "median of MRI, raw" in facts[0]
    assert "median of MRI, raw" not in facts[1]
    assert report.cases[0].case in report.look_first


def test_images_are_compared_with_the_cases_that_trained(fold: Path) -> None:
    """Of the fingerprint's eight cases the three of the fold's training count; all where nothing says who trained."""
    predictor = Predictor.from_folder(fold.parent, device="cpu")
    assert len(predictor.fingerprint["cases"]) == 8
    assert judge_of(predictor, fold.parent).facts.presence["cube"][1] == 3
    assert judge_of(predictor, fold.parent.with_name("elsewhere")).facts.presence["cube"][1] == 8


def judge_of(predictor: Predictor | EnsemblePredictor, *folders: Path) -> Judge:
    """The judge of loaded models."""
    return Judge.of(predictor, folders, checkpoint="final", reporter=SilentReporter())


def test_intensities_are_those_of_the_model_whose_preprocessing_is_compared(fold: Path, tmp_path: Path) -> None:
    """Where the first model of a pair has no calibration, the other's intensities are not taken for its own."""
    other = tmp_path / fold.parent.name
    shutil.copytree(fold, other / fold.name)
    (other / fold.name / "quality.json").unlink()
    first, second = (Predictor.from_folder(folder, device="cpu") for folder in (other, fold.parent))
    judge = judge_of(EnsemblePredictor([first, second]), other, fold.parent)
    assert judge.facts.intensities == ()
    assert [bool(fits) for fits in judge.fits] == [False, True]
    assert not judge.calibrated
    assert "no readable calibration beside the checkpoint" in judge.note
    assert "1 of 2 models are not calibrated, so estimates are means over the others" in judge.note
    assert len(judge_of(EnsemblePredictor([second, first]), fold.parent, other).facts.intensities) == 6


def test_one_model_of_an_ensemble_is_on_the_device_at_a_time(fold: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each wakes before its turn and rests after it, also when it fails."""
    members = [Predictor.from_folder(fold.parent, device="cpu") for _ in range(2)]
    awake: list[int] = []
    predict, wake, rest = Predictor.predict_prepared, Predictor.wake, Predictor.rest
    seen = []

    def watched(self: Predictor, *args: object, **kwargs: object) -> object:
        seen.append(list(awake))
        if len(seen) > 2:
            raise MemoryError
        return predict(self, *args, **kwargs)

    monkeypatch.setattr(Predictor, "wake", lambda self: (awake.append(members.index(self)), wake(self))[1])
    monkeypatch.setattr(Predictor, "rest", lambda self: (awake.remove(members.index(self)), rest(self))[1])
    monkeypatch.setattr(Predictor, "predict_prepared", watched)
    ensemble = EnsemblePredictor(members)
    image = np.random.default_rng(0).random((1, 12, 20, 20), dtype=np.float32)
    volume = Volume(image, Geometry.from_spacing(image.shape[1:], (1.0, 1.0, 1.0)))
    ensemble.predict(volume)
    with pytest.raises(MemoryError):
        ensemble.predict(volume)
    assert seen == [[0], [1], [0]]
    assert awake == []


def test_kept_masks_keep_their_estimates(fold: Path, tmp_path: Path) -> None:
    """A continued prediction writes the same file again."""
    first, _ = predicted(fold, tmp_path)
    (tmp_path / f"{first.cases[0].case}.nii.gz").unlink()
    assert predicted(fold, tmp_path, resume=True)[0] == first


def test_without_validation_cases_it_says_so(tmp_path: Path) -> None:
    """Fold all has nothing to calibrate on: the estimate is the expected Dice, without an interval."""
    folder = trained(tmp_path, LossWeights(), fold="all")
    calibration = load_schema(Calibration, folder / "quality.json")
    assert calibration.fits == ()
    report, _ = predicted(folder, tmp_path / "out")
    assert not report.calibrated
    assert "not calibrated" in report.note
    for own in (own for case in report.cases for own in case.structures.values()):
        assert own.dice is None or own.dice == pytest.approx(own.signs.expected, abs=1e-4)
        assert own.low is None


def test_another_training_takes_the_calibration_away(fold: Path, tmp_path: Path) -> None:
    """A calibration is only used with the checkpoint it was made for."""
    model = tmp_path / "a" / "b" / "c" / fold.parent.name
    shutil.copytree(fold.parent, model)
    (tmp_path / "in").mkdir()
    source = fold.parents[3] / "raw" / DATASET / "imagesTs" / "case_8_0000.nii.gz"
    shutil.copy(source, tmp_path / "in")
    request = PredictionRequest(tmp_path / "in", tmp_path / "out", model, device="cpu")
    for identity, calibrated in ((None, True), ("of another one", False)):
        if identity is not None:
            content = read_json(model / fold.name / "quality.json")
            write_json(model / fold.name / "quality.json", content | {"identity": identity})
        predict(request, reporter=SilentReporter())
        assert load_schema(QualityReport, tmp_path / "out" / "quality.json").calibrated is calibrated
