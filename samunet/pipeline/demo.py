"""The whole way on generated phantoms: plan, train, predict, evaluate, pictures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from samunet.artifacts.dataset import RawDataset
from samunet.artifacts.report import EvaluationReport
from samunet.artifacts.workspace import Workspace
from samunet.core.log import Reporter
from samunet.datasets.baseline import fit_threshold_prior
from samunet.datasets.phantoms import write_phantom_dataset
from samunet.datasets.raw import load_raw_dataset
from samunet.evaluation.aggregate import aggregate
from samunet.evaluation.case import case_report, evaluate_case
from samunet.evaluation.pictures import draw_overlay
from samunet.imageio import read_labels, read_volume
from samunet.pipeline.evaluate import evaluate, save_evaluation
from samunet.pipeline.plan import plan_and_preprocess
from samunet.pipeline.predict import PredictionRequest, predict
from samunet.pipeline.train import train
from samunet.pipeline.training_run import TrainingRequest

DATASET = "Dataset900_Phantoms"


@dataclass(frozen=True)
class DemoResult:
    """What the demo made.

    Args:
        report: Evaluation of the held-out phantoms.
        baseline: The same for intensity thresholds with a location prior.
        pictures: Overlay pictures.
        masks: Folder of predicted masks.
    """

    report: EvaluationReport
    baseline: EvaluationReport
    pictures: tuple[Path, ...]
    masks: Path


def run_demo(
    folder: Path, *, minutes: float, num_train: int, num_test: int, processes: int, device: str, reporter: Reporter
) -> DemoResult:
    """Generate phantoms, run the three commands on them, score the held-out ones.

    Args:
        folder: Workspace to fill; phantoms and preprocessed cases that exist are used again.
        minutes: Training time.
        num_train: Training phantoms.
        num_test: Held-out phantoms.
        processes: For preprocessing and evaluation.
        device: Where to train.
        reporter: Who is told.
    """
    workspace = Workspace.locate(workspace=folder, environment={})
    raw = workspace.raw / DATASET
    if not (raw / "dataset.json").is_file():
        reporter.info(f"1/4 generating {num_train} training and {num_test} held-out phantoms in {raw}")
        write_phantom_dataset(raw, num_train=num_train, num_test=num_test)
    reporter.info("2/4 samunet_plan_and_preprocess")
    plan_and_preprocess(raw, workspace, processes=processes, cpu_minutes=minutes, reporter=reporter)
    reporter.info(f"3/4 samunet_train on all {num_train} phantoms, random weights, {minutes:g} minutes")
    request = TrainingRequest(DATASET, "all", weights="none", device=device, minutes=minutes, overwrite=True)
    trained = train(request, workspace, reporter=reporter)
    reporter.info("4/4 samunet_predict and samunet_evaluate on the held-out phantoms")
    masks = folder / "predictions"
    predict(PredictionRequest(raw / "imagesTs", masks, trained.folder.parent, device=device), reporter=reporter)
    dataset = load_raw_dataset(raw)
    report = _evaluate(dataset, masks, processes, reporter)
    return DemoResult(report, _baseline(dataset), _draw(dataset, masks, folder / "pictures"), masks)


def _evaluate(dataset: RawDataset, masks: Path, processes: int, reporter: Reporter) -> EvaluationReport:
    ending = dataset.description.file_ending
    references = dataset.folder / "labelsTs"
    pairs = [(c.name, references / f"{c.name}{ending}", masks / f"{c.name}{ending}") for c in dataset.test]
    report = evaluate(pairs, labels=dataset.labels, processes=processes, reporter=reporter)
    save_evaluation(report, masks)
    return report


def _baseline(dataset: RawDataset) -> EvaluationReport:
    """Score thresholds with a location prior, fitted on the same training phantoms."""
    training = [
        (read_volume(case.images), read_labels(case.label).data[0])
        for case in dataset.training
        if case.label is not None
    ]
    prior = fit_threshold_prior(training)
    reports = []
    for case in dataset.test:
        volume = read_volume(case.images)
        reference = read_labels(_reference(dataset, case.name)).data[0]
        metrics = evaluate_case(
            reference, prior.predict(volume), labels=dataset.labels, geometry=volume.geometry, surface=False
        )
        reports.append(case_report(case.name, metrics, dataset.labels))
    return aggregate(reports, dataset.labels, surface=False)


def _draw(dataset: RawDataset, masks: Path, folder: Path) -> tuple[Path, ...]:
    pictures = []
    for case in dataset.test:
        volume = read_volume(case.images)
        path = folder / f"{case.name}.png"
        draw_overlay(
            path,
            volume.data[0],
            read_labels(masks / f"{case.name}{dataset.description.file_ending}").data[0],
            labels=dataset.labels,
            spacing=volume.geometry.spacing,
            slice_axis=0,
            reference=read_labels(_reference(dataset, case.name)).data[0],
            title=case.name,
        )
        pictures.append(path)
    return tuple(pictures)


def _reference(dataset: RawDataset, case: str) -> Path:
    return dataset.folder / "labelsTs" / f"{case}{dataset.description.file_ending}"
