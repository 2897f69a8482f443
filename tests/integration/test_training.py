"""Training runs: identical, resumable, refused when they should be."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from samunet.artifacts.checkpoint import read_checkpoint
from samunet.artifacts.workspace import Workspace
from samunet.core.errors import CheckpointError, SamunetError, TrainingError, UsageError
from samunet.core.files import write_json
from samunet.core.log import SilentReporter
from samunet.imageio import read_labels, write_image, write_labels
from samunet.pipeline.train import TrainingResult, train
from samunet.pipeline.training_run import TrainingRequest
from samunet.training.checkpointing import checkpoint_file
from samunet.training.trainer import Trainer
from tests.samples import DATASET, install, make_case, make_plan, make_recipe, prepare


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    """A workspace with a small preprocessed dataset."""
    found = Workspace.locate(workspace=tmp_path, environment={})
    prepare(found)
    return found


def run(workspace: Workspace, **changes: object) -> TrainingResult:
    """Train the small dataset for a few steps."""
    values = {"dataset": DATASET, "fold": "0", "weights": "none", "device": "cpu", "num_workers": 0, "seed": 3}
    return train(TrainingRequest(**{**values, **changes}), workspace, reporter=SilentReporter())  # type: ignore[arg-type]


def tensors(result: TrainingResult, name: str = "final") -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint."""
    return dict(read_checkpoint(checkpoint_file(result.folder, name)).tensors)


def assert_equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    """Both hold the same names with the same bits."""
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def test_two_runs_with_one_seed_are_identical_and_another_seed_is_not(workspace: Workspace):
    """Final tensors agree bit for bit, with another number of workers too."""
    first = tensors(run(workspace))
    second = tensors(run(workspace, overwrite=True, num_workers=1))
    other = tensors(run(workspace, overwrite=True, seed=4))
    assert_equal(first, second)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_an_interrupted_run_continues_to_the_same_result(workspace: Workspace, monkeypatch: pytest.MonkeyPatch):
    """A run stopped in its second epoch, inside an epoch, ends with the tensors of an uninterrupted one."""
    whole = run(workspace, epochs=3)
    expected, expected_log = tensors(whole), (whole.folder / "training_log.jsonl").read_text().splitlines()
    monkeypatch.setattr("samunet.training.trainer.SAVE_EVERY_SECONDS", 0.0)
    original = Trainer._step

    def stop_at_step_4(self: Trainer, batches):
        if self.state.step == 4:
            self._save("latest")
            raise KeyboardInterrupt
        return original(self, batches)

    monkeypatch.setattr(Trainer, "_step", stop_at_step_4)
    with pytest.raises(KeyboardInterrupt):
        run(workspace, epochs=3, overwrite=True)
    monkeypatch.setattr(Trainer, "_step", original)
    latest = read_checkpoint(checkpoint_file(whole.folder, "latest")).manifest
    assert (latest.steps, latest.finished) == (4, False)
    torch.manual_seed(99)
    resumed = run(workspace, resume=True, seed=None, num_workers=1)
    assert_equal(tensors(resumed), expected)
    steps = [json.loads(line)["step"] for line in (resumed.folder / "training_log.jsonl").read_text().splitlines()]
    assert steps == [json.loads(line)["step"] for line in expected_log] == [3, 6, 9]


def test_every_kind_of_input_trains_and_predicts(tmp_path: Path):
    """Regions with an ignore label, two channels, parts of a step, bfloat16 and recomputed blocks, all in one run."""
    workspace = Workspace.locate(workspace=tmp_path, environment={})
    folder = workspace.raw / DATASET
    labels = {"background": 0, "whole": [1, 2], "core": 2, "ignore": 3}
    for index in range(5):
        volume, values = make_case(index)
        values = np.where((values == 0) & (volume.data[0] > 115), 3, values)
        for channel in range(2):
            write_image(
                folder / "imagesTr" / f"case_{index}_{channel:04d}.nii.gz", volume.with_data(volume.data + channel)
            )
        write_labels(folder / "labelsTr" / f"case_{index}.nii.gz", values, geometry=volume.geometry)
    description = {"channel_names": {"0": "T1", "1": "T2"}, "labels": labels, "regions_class_order": [1, 2]}
    write_json(folder / "dataset.json", {**description, "numTraining": 5, "file_ending": ".nii.gz"})
    recipe = make_recipe(precision="bf16", accumulation_steps=2, checkpointing=True)
    plan = make_plan(
        labels=labels,
        regions_class_order=(1, 2),
        channel_names=("T1", "T2"),
        recipes={"none": {"cpu": recipe}},
    )
    install(workspace, plan, folder)
    result = run(workspace, iterations=2, epochs=1)
    assert result.report is not None
    assert set(result.report.structures.values()) == {"whole", "core"}
    assert result.report.complete
    rows = (result.folder / "training_log.jsonl").read_text().splitlines()
    assert 0 < json.loads(rows[0])["loss"] < 10
    mask = read_labels(next((result.folder / "validation").glob("*.nii.gz"))).data
    assert set(np.unique(mask)) <= {0, 1, 2}


def test_patience_needs_cases_to_watch(workspace: Workspace):
    """A fold too small for a monitor subset refuses --patience instead of stopping at random."""
    with pytest.raises(UsageError, match="no cases to watch"):
        run(workspace, patience=2)


def test_a_stale_mask_never_passes_for_a_new_one(workspace: Workspace, monkeypatch: pytest.MonkeyPatch):
    """Where a validation case fails, the mask of an earlier run is gone and the report is incomplete."""
    first = run(workspace)
    assert first.report is not None
    assert first.report.complete

    def fail(*_, **__):
        raise ValueError("planted")

    monkeypatch.setattr("samunet.inference.predictor.Predictor.preprocess", fail)
    again = run(workspace, validate_only=True, seed=None)
    assert again.report is not None
    assert not again.report.complete
    assert list((again.folder / "validation").glob("*.nii.gz")) == []


def test_a_loss_that_is_no_number_stops_the_run(workspace: Workspace, monkeypatch: pytest.MonkeyPatch):
    """The run ends with a message and writes no result."""
    monkeypatch.setattr(
        "samunet.training.objective.segmentation_loss", lambda logits, *_, **__: logits.sum() * float("nan")
    )
    with pytest.raises(TrainingError, match="not a number"):
        run(workspace)
    assert list(workspace.results.rglob("checkpoint_final*")) == []


def test_a_run_leaves_everything_it_promises(workspace: Workspace):
    """Checkpoint with plan and provenance, log, picture, cases, masks and a summary with nnU-Net's keys."""
    result = run(workspace)
    manifest = read_checkpoint(checkpoint_file(result.folder, "final")).manifest
    assert manifest.finished
    assert (manifest.steps, manifest.base.kind, manifest.fold) == (6, "none", "0")
    assert manifest.provenance["packages"]["torch"]
    assert manifest.recipe["backbone"] == "vit_t_xs"
    names = {path.name for path in result.folder.iterdir()}
    assert {"training_log.jsonl", "progress.png", "cases.json", "validation", "checkpoint_latest.safetensors"} <= names
    summary = json.loads((result.folder / "validation" / "summary.json").read_text())
    assert {"foreground_mean", "mean", "metric_per_case"} <= summary.keys()
    split = json.loads((result.folder / "cases.json").read_text())
    assert len(summary["metric_per_case"]) == len(split["validation"])
    assert set(split["train"]).isdisjoint(split["validation"])


def test_an_existing_run_is_neither_overwritten_nor_continued_unasked(workspace: Workspace):
    """A second fresh run refuses and names both ways out; nothing of the first is touched."""
    result = run(workspace)
    before = checkpoint_file(result.folder, "final").stat().st_mtime_ns
    with pytest.raises(UsageError, match="there is a run here already") as refused:
        run(workspace)
    assert "--c" in str(refused.value)
    assert "--overwrite" in str(refused.value)
    assert checkpoint_file(result.folder, "final").stat().st_mtime_ns == before


def test_a_run_that_cannot_start_costs_nothing(workspace: Workspace):
    """--overwrite with weights that are not there leaves the finished run as it was."""
    result = run(workspace)
    before = {path: path.stat().st_mtime_ns for path in result.folder.rglob("*")}
    with pytest.raises(SamunetError):
        run(workspace, overwrite=True, device="cuda:99")
    with pytest.raises(SamunetError):
        run(workspace, overwrite=True, weights="none:/nowhere")
    assert {path: path.stat().st_mtime_ns for path in result.folder.rglob("*")} == before


def test_a_finished_run_can_be_prolonged_but_not_changed(workspace: Workspace):
    """--c with more epochs goes on where it ended, finding its weights by itself; other settings are refused."""
    first = run(workspace)
    longer = run(workspace, resume=True, epochs=4, weights="auto", seed=None)
    manifest = read_checkpoint(checkpoint_file(longer.folder, "final")).manifest
    assert longer.folder == first.folder
    assert (manifest.steps, manifest.seed) == (12, 3)
    rows = [json.loads(line) for line in (longer.folder / "training_log.jsonl").read_text().splitlines()]
    assert any("validation" in row for row in rows if row["step"] > 6)
    with pytest.raises(UsageError, match="keeps its settings") as refused:
        run(workspace, resume=True, learning_rate=1.0)
    assert "--lr, --seed" in str(refused.value)


def test_continuing_without_a_run_says_so(workspace: Workspace):
    """--c without a checkpoint is an error with the file's name."""
    with pytest.raises(CheckpointError, match="does not exist"):
        run(workspace, resume=True, seed=None)


def test_validation_alone_repeats_the_result(workspace: Workspace):
    """--val predicts and scores again from the final checkpoint only."""
    first = run(workspace)
    again = run(workspace, validate_only=True, seed=None)
    assert first.report is not None
    assert again.report is not None
    assert again.report.foreground_mean == first.report.foreground_mean


def test_fold_all_trains_on_everything_and_validates_nothing(workspace: Workspace):
    """There is no report, and all cases but the monitored one are trained on."""
    result = run(workspace, fold="all")
    split = json.loads((result.folder / "cases.json").read_text())
    assert result.report is None
    assert len(split["train"]) + len(split["monitor"]) == 6
    assert split["validation"] == []


def test_a_time_limit_ends_the_run_and_the_steps_are_recorded(workspace: Workspace):
    """The schedule runs on elapsed time; the steps reached stand in the manifest and can be replayed."""
    result = run(workspace, minutes=0.05)
    manifest = read_checkpoint(checkpoint_file(result.folder, "final")).manifest
    assert manifest.minutes >= 0.05
    assert manifest.steps > 0
    rows = [json.loads(line) for line in (result.folder / "training_log.jsonl").read_text().splitlines()]
    assert 0 < rows[0]["progress"] <= rows[-1]["progress"] <= 1
    assert rows[-1]["step"] == manifest.steps


def test_patience_stops_early(workspace: Workspace, monkeypatch: pytest.MonkeyPatch):
    """Without a better monitor score for the given epochs the run ends, and says so."""
    monkeypatch.setattr("samunet.training.validation.VolumeEvaluator.mean_dice", lambda *_, **__: 0.5)
    result = run(workspace, fold="all", epochs=9, patience=2)
    manifest = read_checkpoint(checkpoint_file(result.folder, "final")).manifest
    assert manifest.epochs == 3


def test_rank_is_refused_where_nothing_reads_it(workspace: Workspace):
    """--rank with a recipe that has no LoRA is an error, not silently ignored."""
    with pytest.raises(UsageError, match="no low-rank adapters"):
        run(workspace, rank=8)


def test_the_clock_is_a_part_of_the_run(workspace: Workspace):
    """The manifest says which one counted; continuing keeps it, and refuses the other one."""
    result = run(workspace, minutes=0.02, processor_clock=True, num_workers=None)
    assert read_checkpoint(checkpoint_file(result.folder, "final")).manifest.clock == "processor"
    resumed = run(workspace, minutes=0.03, resume=True, seed=None, num_workers=None)
    assert read_checkpoint(checkpoint_file(resumed.folder, "final")).manifest.clock == "processor"
    result = run(workspace, iterations=1, epochs=1, overwrite=True)
    assert read_checkpoint(checkpoint_file(result.folder, "final")).manifest.clock == "wall"
    with pytest.raises(UsageError, match="keeps its clock"):
        run(workspace, epochs=2, resume=True, seed=None, processor_clock=True)
