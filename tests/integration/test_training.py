"""Training runs: identical, resumable, refused when they should be."""

from __future__ import annotations

import errno
import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
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
from samunet.inference.predictor import Predictor
from samunet.inference.restore import Restored
from samunet.pipeline.train import TrainingResult, train
from samunet.pipeline.training_run import TrainingRequest
from samunet.training.checkpointing import RunIdentity, checkpoint_file, save_resumable
from samunet.training.data import SliceDataset
from samunet.training.events import FoldEvents
from samunet.training.objective import SemanticObjective
from samunet.training.self_training import LESSONS, SelfTaughtSlices
from samunet.training.trainer import NUM_MILESTONES, Trainer
from samunet.training.validation import VolumeEvaluator
from tests.samples import DATASET, install, make_case, make_plan, make_recipe, prepare


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    """A workspace with a small preprocessed dataset."""
    found = Workspace.locate(workspace=tmp_path, environment={})
    prepare(found)
    return found


def run(workspace: Workspace, *, reporter: SilentReporter | None = None, **changes: object) -> TrainingResult:
    """Train the small dataset for a few steps."""
    values = {"dataset": DATASET, "fold": "0", "weights": "none", "device": "cpu", "num_workers": 0, "seed": 3}
    return train(TrainingRequest(**{**values, **changes}), workspace, reporter=reporter or SilentReporter())  # type: ignore[arg-type]


def tensors(result: TrainingResult, name: str = "final") -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint."""
    return dict(read_checkpoint(checkpoint_file(result.folder, name)).tensors)


def assert_equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    """Both hold the same names with the same bits."""
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


@contextmanager
def interrupted(monkeypatch: pytest.MonkeyPatch, *, after: int) -> Iterator[None]:
    """A run in the block saves its state as often as it may, and is stopped after so many steps."""
    original = Trainer._step

    def stop(self: Trainer, batches):
        if self.state.step == after:
            raise KeyboardInterrupt
        return original(self, batches)

    with monkeypatch.context() as patched:
        patched.setattr("samunet.training.trainer.SAVE_EVERY_SECONDS", 0.0)
        patched.setattr(Trainer, "_step", stop)
        with pytest.raises(KeyboardInterrupt):
            yield


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
    with interrupted(monkeypatch, after=4):
        run(workspace, epochs=3, overwrite=True)
    latest = read_checkpoint(checkpoint_file(whole.folder, "latest")).manifest
    assert (latest.steps, latest.finished) == (4, False)
    torch.manual_seed(99)
    resumed = run(workspace, resume=True, seed=None, num_workers=1)
    assert_equal(tensors(resumed), expected)
    found = [json.loads(line) for line in (resumed.folder / "training_log.jsonl").read_text().splitlines()]
    wanted = [json.loads(line) for line in expected_log]
    assert [row["step"] for row in found] == [row["step"] for row in wanted] == [3, 6, 9]
    assert [row["loss"] for row in found] == [row["loss"] for row in wanted]


def test_a_run_that_draws_random_numbers_continues_to_the_same_result(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
):
    """As with dropout, each step draws from torch's own generator: continuing draws nothing more than going on does."""
    plain = SemanticObjective.loss
    monkeypatch.setattr(SemanticObjective, "loss", lambda *args: plain(*args) * torch.rand(()))
    expected = tensors(run(workspace, epochs=3))
    with interrupted(monkeypatch, after=4):
        run(workspace, epochs=3, overwrite=True)
    assert_equal(tensors(run(workspace, resume=True, seed=None)), expected)


def test_a_run_that_labels_images_itself_continues_to_the_same_result(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
):
    """Stopped between its lessons or within one, it goes on with the labels of the first; they change the result."""
    predicted = Predictor.predict_preprocessed

    def bold(self: Predictor, *args: object, **options: object) -> Restored:
        found = predicted(self, *args, **options)  # type: ignore[arg-type]
        found.labels[:2] = 1  # after so few steps it may find nothing by itself
        return found

    def killed(*_args: object, **_options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Predictor, "predict_preprocessed", bold)
    wanted = {"epochs": 4, "unlabelled": ("imagesTs",)}
    whole = run(workspace, **wanted)
    expected = tensors(whole)
    latest = checkpoint_file(whole.folder, "latest")
    assert read_checkpoint(latest).manifest.state["lessons"] == len(LESSONS)
    with interrupted(monkeypatch, after=7):
        run(workspace, **wanted, overwrite=True)
    assert read_checkpoint(latest).manifest.state["lessons"] == 1
    assert_equal(tensors(run(workspace, **wanted, resume=True, seed=None)), expected)
    with monkeypatch.context() as patched:
        patched.setattr("samunet.training.trainer.SAVE_EVERY_SECONDS", 0.0)
        patched.setattr(SelfTaughtSlices, "teach", killed)
        with pytest.raises(KeyboardInterrupt):
            run(workspace, **wanted, overwrite=True)
    assert_equal(tensors(run(workspace, **wanted, resume=True, seed=None)), expected)
    alone = tensors(run(workspace, epochs=4))
    assert any(not torch.equal(alone[name], expected[name]) for name in expected)


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
    """The run ends with a message in mid-epoch, writes no result, and saves nothing that follows from that loss."""
    plain, calls = SemanticObjective.loss, []

    def loss(*args):
        calls.append(1)
        return plain(*args) * (1.0 if len(calls) < 2 else float("nan"))

    monkeypatch.setattr(SemanticObjective, "loss", loss)
    monkeypatch.setattr("samunet.training.trainer.SAVE_EVERY_SECONDS", 0.0)
    with pytest.raises(TrainingError, match="not a number"):
        run(workspace)
    assert list(workspace.results.rglob("checkpoint_final*")) == []
    latest = next(workspace.results.rglob("checkpoint_latest*"))
    assert read_checkpoint(latest).manifest.steps == 1


def test_a_full_disk_does_not_end_the_training(workspace: Workspace, monkeypatch: pytest.MonkeyPatch):
    """What cannot be written on the way is told once each; the result is written when there is room, or asked for."""
    folder = run(workspace, epochs=1).folder
    kept, left = folder / ".partial-1-checkpoint", folder / ".partial-2-checkpoint"
    reporter = SilentReporter()

    def full(*_, **__):
        kept.touch()
        left.touch()
        os.utime(left, (time.time() - 7200,) * 2)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("samunet.training.trainer.SAVE_EVERY_SECONDS", 0.0)
    with monkeypatch.context() as patched:
        for name in ("progress.append_log", "progress.rewrite_log", "progress.draw_progress", "events.save_resumable"):
            patched.setattr(f"samunet.training.{name}", full)
        result = run(workspace, overwrite=True, reporter=reporter)
    assert read_checkpoint(checkpoint_file(result.folder, "final")).manifest.steps == 6
    told = [line for line in reporter.warnings if "No space left" in line]
    assert [line.split(" failed")[0] for line in told] == ["saving latest", "writing the log and its picture"]
    assert left.exists()
    run(workspace, overwrite=True, epochs=1)
    assert not left.exists()


def test_a_loader_process_ended_by_the_system_is_explained(workspace: Workspace, monkeypatch: pytest.MonkeyPatch):
    """The message names memory, --workers and --c."""
    plain = SliceDataset.__getitem__

    def get(self: SliceDataset, key: tuple[int, int]):
        if key[0] > 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(self, key)

    monkeypatch.setattr(SliceDataset, "__getitem__", get)
    with pytest.raises(TrainingError, match="ended a loader process") as ended:
        run(workspace, num_workers=1)
    assert "--workers" in str(ended.value)
    assert "--c" in str(ended.value)


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
    assert "--lr 1.0" in str(refused.value.found)
    assert "--lr 0.001" in str(refused.value.expected)
    assert "--seed" not in str(refused.value)
    with pytest.raises(UsageError, match="keeps its settings") as refused:
        run(workspace, validate_only=True, epochs=2, cache_embeddings=True)
    assert "--cache-embeddings, --epochs 2" in str(refused.value.found)


def test_the_same_command_continues(workspace: Workspace, monkeypatch: pytest.MonkeyPatch):
    """Flags that say what the run has already are accepted, and a run that patience ended is not trained on."""
    monkeypatch.setattr("samunet.training.validation.VolumeEvaluator.mean_dice", lambda *_, **__: 0.5)
    options = {"fold": "all", "epochs": 9, "patience": 2, "learning_rate": 0.002, "batch_size": 2, "iterations": 2}
    first = run(workspace, augment=False, **options)
    again = run(workspace, augment=False, resume=True, **options)
    assert_equal(tensors(again), tensors(first))
    manifest = read_checkpoint(checkpoint_file(again.folder, "final")).manifest
    assert manifest.epochs == 3
    run(workspace, augment=False, validate_only=True, **options)
    for other in ({"seed": 4}, {"patience": 3}, {"batch_size": 4}, {"iterations": 3}):
        with pytest.raises(UsageError, match="keeps its settings"):
            run(workspace, augment=False, resume=True, **options | other)


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


def test_patience_watches_every_epoch_for_a_tenth_of_it_and_plots_at_milestones(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
):
    """What is only plotted is predicted no more often than without patience; the time given is a share of an epoch."""
    asked: list[tuple[bool, float, float]] = []

    def evaluate(_: FoldEvents, trainer: Trainer, seconds: float, *, plot: bool) -> dict[str, float | None]:
        asked.append((plot, seconds, trainer.elapsed))
        return {"monitor": 0.5}

    monkeypatch.setattr(FoldEvents, "evaluate", evaluate)
    result = run(workspace, fold="all", minutes=0.05, patience=99, processor_clock=True, num_workers=None)
    rows = [json.loads(line) for line in (result.folder / "training_log.jsonl").read_text().splitlines()]
    assert len(asked) == len(rows)
    assert sum(plot for plot, _, _ in asked) <= NUM_MILESTONES
    before = 0.0
    for _, seconds, elapsed in asked:
        assert seconds <= 0.2 * (elapsed - before) + 1e-6
        before = elapsed


def test_patience_without_anything_to_watch_stops_nothing(workspace: Workspace, monkeypatch: pytest.MonkeyPatch):
    """Epochs without a monitor score do not count, which is said once."""
    monkeypatch.setattr("samunet.training.validation.VolumeEvaluator.mean_dice", lambda *_, **__: None)
    reporter = SilentReporter()
    result = run(workspace, fold="all", epochs=3, patience=1, reporter=reporter)
    assert read_checkpoint(checkpoint_file(result.folder, "final")).manifest.epochs == 3
    assert sum("nothing to watch" in line for line in reporter.warnings) == 1


def test_best_stays_the_best_when_a_run_is_killed_after_writing_it(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
):
    """It is saved together with the state; killed between the two, its score still has to be beaten."""
    score = "samunet.training.validation.VolumeEvaluator.mean_dice"
    plain = save_resumable

    def killed(folder: Path, trainer: Trainer, identity: RunIdentity) -> None:
        if trainer.state.step > 0:
            raise KeyboardInterrupt
        plain(folder, trainer, identity)

    with monkeypatch.context() as patched:
        patched.setattr(score, lambda *_, **__: 0.9)
        patched.setattr("samunet.training.events.save_resumable", killed)
        with pytest.raises(KeyboardInterrupt):
            run(workspace, fold="all", epochs=3, patience=9)
    monkeypatch.setattr(score, lambda *_, **__: 0.2)
    result = run(workspace, fold="all", resume=True, seed=None)
    best = read_checkpoint(checkpoint_file(result.folder, "best")).manifest
    assert (best.steps, best.metrics) == (3, {"best_monitor_dice": 0.9})


def test_a_run_with_a_time_limit_is_watched_on_the_same_cases_when_continued(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
):
    """How many are affordable is measured once; other cases would make the scores incomparable."""
    limits: list[int | None] = []

    def mean_dice(self: VolumeEvaluator, *_, **__) -> float:
        limits.append(self.limit)
        self.limit = 2 if self.limit is None else self.limit
        return 0.5

    monkeypatch.setattr(VolumeEvaluator, "mean_dice", mean_dice)
    clock = {"processor_clock": True, "num_workers": None}  # whatever else the machine does
    result = run(workspace, fold="all", minutes=0.03, patience=99, **clock)
    assert limits[:2] == [None, None]
    assert set(limits[2:]) <= {2}
    limits.clear()
    reached = read_checkpoint(checkpoint_file(result.folder, "final")).manifest.minutes
    run(workspace, fold="all", minutes=reached + 0.04, resume=True, seed=None, num_workers=None)
    assert set(limits) == {2}


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
