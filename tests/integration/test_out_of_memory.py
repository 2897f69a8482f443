"""Memory that runs out in training: one line, no lost step, the same result."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from samunet.artifacts.checkpoint import Manifest, read_checkpoint, write_checkpoint
from samunet.artifacts.plan import strip_reasons
from samunet.artifacts.workspace import Workspace
from samunet.core.errors import OutOfMemoryError
from samunet.core.log import SilentReporter
from samunet.inference.sliding import SlidingPredictor
from samunet.pipeline.train import TrainingResult, train
from samunet.pipeline.training_run import TrainingRequest
from samunet.training.checkpointing import checkpoint_file
from samunet.training.fallback import Footprint, predicted_gib
from samunet.training.objective import SemanticObjective
from tests.samples import DATASET, make_plan, make_recipe, prepare

PLENTY = (1000.0, "planted")


def prepared(folder: Path, **changes: object) -> Workspace:
    """A workspace with a small preprocessed dataset and a recipe with changes."""
    found = Workspace.locate(workspace=folder, environment={})
    prepare(found, make_plan(recipes={"none": {"cpu": make_recipe(**changes)}}))
    return found


@pytest.fixture(autouse=True)
def plenty_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine's own memory decides nothing."""
    monkeypatch.setattr("samunet.pipeline.train.cpu_memory", lambda: PLENTY)


def run(
    workspace: Workspace, reporter: SilentReporter | None = None, *, resume: bool = False, **changes: object
) -> TrainingResult:
    """Train fold "all" of the small dataset."""
    values = {"dataset": DATASET, "fold": "all", "weights": "none", "device": "cpu", "num_workers": 0}
    values |= {"resume": True} if resume else {"seed": 3, "overwrite": True}
    return train(TrainingRequest(**{**values, **changes}), workspace, reporter=reporter or SilentReporter())  # type: ignore[arg-type]


class Shortage:
    """An objective's forwards, some of which run out of memory at their end, when statistics have moved.

    Args:
        monkeypatch: Puts it in place.
        fails: Numbers of the forwards (from 1) that do.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *fails: int) -> None:
        self.calls, self.fails = 0, set(fails)
        for name in ("loss", "sums"):
            monkeypatch.setattr(SemanticObjective, name, self._failing(getattr(SemanticObjective, name)))

    def _failing(self, original):
        def forward(objective, model, batch):
            result = original(objective, model, batch)
            self.calls += 1
            if self.calls in self.fails:
                torch.rand(7)
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nDetails")
            return result

        return forward


def tensors(result: TrainingResult) -> dict[str, Tensor]:
    """The final tensors."""
    return dict(read_checkpoint(checkpoint_file(result.folder, "final")).tensors)


def manifest(folder: Path, name: str = "latest") -> Manifest:
    """A checkpoint's manifest."""
    return read_checkpoint(checkpoint_file(folder, name)).manifest


def rows(result: TrainingResult) -> list[dict[str, object]]:
    """The training log."""
    return [json.loads(line) for line in (result.folder / "training_log.jsonl").read_text().splitlines()]


def said(reporter: SilentReporter) -> list[str]:
    """Lines about memory."""
    return [
        line for line in [*reporter.messages, *reporter.warnings] if "memory ran out" in line or "of memory" in line
    ]


def test_a_run_that_ran_out_of_memory_ends_as_if_it_had_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """With batch norm that trains: checkpointing goes on, no step is lost, statistics and result agree bit for bit."""
    workspace = prepared(tmp_path)
    whole = run(workspace)
    expected, steps = tensors(whole), [row["step"] for row in rows(whole)]
    assert any("running_mean" in name for name in expected)
    shortage, reporter = Shortage(monkeypatch, 2), SilentReporter()
    result = run(workspace, reporter)
    found = tensors(result)
    assert shortage.calls == 7
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    assert said(reporter) == ["memory ran out at step 2: checkpointing on; going on"]
    assert [row["step"] for row in rows(result)] == steps
    assert [(row["parts"], row["checkpointing"]) for row in rows(result)] == [(1, True)] * 2
    final = manifest(result.folder, "final")
    assert (final.state["parts"], final.state["checkpointing"], final.recipe["checkpointing"]) == (1, True, False)


def test_a_step_is_cut_where_checkpointing_is_not_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A ViT falls back twice in one step, again in a later one, and learns the same up to rounding."""
    workspace = prepared(tmp_path, backbone="vit_xs", iterations=2)
    expected = tensors(run(workspace))
    reporter = SilentReporter()
    Shortage(monkeypatch, 1, 2, 7)
    result = run(workspace, reporter)
    assert said(reporter) == [
        "memory ran out at step 1: checkpointing on; going on",
        "memory ran out at step 1: a step in 2 parts; going on",
        "memory ran out at step 2: a step in 4 parts; going on",
    ]
    found = tensors(result)
    assert manifest(result.folder).steps == 4
    assert manifest(result.folder).recipe["accumulation_steps"] == 1
    difference = max(float((expected[name] - found[name]).abs().max()) for name in expected)
    assert 0 < difference < 2e-4


def test_a_resumed_run_starts_as_small_as_it_had_to_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Parts and checkpointing are in the state; without them, as older runs have it, the plan's hold."""
    workspace = prepared(tmp_path, backbone="vit_xs", iterations=2)
    with monkeypatch.context() as patch:
        Shortage(patch, 2, 3)
        folder = run(workspace).folder
    resumed = run(workspace, resume=True, epochs=3)
    assert [(row["parts"], row["checkpointing"]) for row in rows(resumed)] == [(2, True)] * 3
    latest = read_checkpoint(checkpoint_file(folder, "latest"))
    for name in ("parts", "checkpointing"):
        latest.manifest.state.pop(name)
    write_checkpoint(checkpoint_file(folder, "latest"), latest)
    older = run(workspace, resume=True, epochs=4)
    assert [(row["parts"], row["checkpointing"]) for row in rows(older)] == [(2, True)] * 3 + [(1, False)]


def test_where_nothing_helps_the_run_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The error says what to do, and --c goes on from the very step to the same result."""
    workspace = prepared(tmp_path)
    expected = tensors(run(workspace))
    with monkeypatch.context() as patch:
        Shortage(patch, *range(5, 99))
        with pytest.raises(OutOfMemoryError, match="ran out") as failed:
            run(workspace)
    assert "--c" in str(failed.value)
    assert "Details" not in str(failed.value)
    folder = next(workspace.results.rglob("checkpoint_latest*")).parent
    assert manifest(folder).steps == 4
    found = tensors(run(workspace, resume=True))
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []


def test_an_evaluation_that_runs_out_of_memory_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Training goes on with its own weights, not the averaged ones, to the same result; one warning says so."""
    workspace = prepared(tmp_path, backbone="vit_xs", iterations=2)
    expected = tensors(run(workspace))
    calls: list[bool] = []

    def refuse(*_: object, **_options: object) -> dict[str, float | None]:
        calls.append(True)
        raise RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)\nDetails")

    monkeypatch.setattr("samunet.training.events.FoldEvents.evaluate", refuse)
    reporter = SilentReporter()
    result = run(workspace, reporter)
    found = tensors(result)
    assert calls
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    assert [line.split(" (")[0] for line in reporter.warnings if "memory" in line] == [
        f"memory ran out while evaluating after step {2 * (index + 1)}" for index in range(len(calls))
    ]
    assert all("Details" not in line for line in reporter.warnings)


class NarrowPrediction:
    """Predictions on a device that holds so many slices at once; forwards are counted by their slices."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
        self.seen: list[int] = []
        original = SlidingPredictor._average

        def average(predictor: SlidingPredictor, image: Tensor, valid: Tensor, depth: int) -> Tensor:
            self.seen.append(len(image))
            if len(image) > most:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nDetails")
            return original(predictor, image, valid, depth)

        monkeypatch.setattr(SlidingPredictor, "_average", average)
        monkeypatch.setattr("samunet.inference.room.available_gib", lambda _: PLENTY[0])


def test_an_evaluation_takes_as_few_slices_at_once_as_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """It is not skipped: two lines, scores, and later evaluations start with what fitted."""
    workspace = prepared(tmp_path, backbone="vit_xs", iterations=2)
    narrow, reporter = NarrowPrediction(monkeypatch, 2), SilentReporter()
    result = run(workspace, reporter, fold="0")
    lines = [line for line in said(reporter) if "predicting" in line]
    shown = [line.split(": ")[1] for line in lines]
    halved = ["4 slices at once instead of 8; going on", "2 slices at once instead of 4; going on"]
    # the evaluations of the run with one predictor after the other, then the validation of its result
    assert shown == halved * 2
    assert narrow.seen[:2] == [6, 4]
    assert [slices for slices in narrow.seen if slices > 2] == [6, 4, 6, 4]
    assert all(row["validation"] is not None for row in rows(result))
    assert not [line for line in reporter.warnings if "memory" in line]


def test_an_evaluation_of_which_not_one_slice_fits_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Training goes on, as where memory runs out elsewhere in an evaluation."""
    workspace = prepared(tmp_path, backbone="vit_xs", iterations=2)
    NarrowPrediction(monkeypatch, 0)
    reporter = SilentReporter()
    result = run(workspace, reporter, fold="0")
    assert manifest(result.folder).steps == 4
    skipped = [line for line in reporter.warnings if "skipped; training goes on" in line]
    assert skipped
    assert all("Tried to allocate 2 GiB." in line and "Details" not in line for line in skipped)


def test_validation_and_prediction_fit_where_they_did_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Every validation case of a fold is predicted and scored with as few slices at once as fit."""
    workspace = prepared(tmp_path, backbone="vit_xs", iterations=1, epochs=1)
    narrow = NarrowPrediction(monkeypatch, 1)
    result = run(workspace, fold="0")
    assert result.report is not None
    assert len(result.report.metric_per_case) == 2
    assert result.report.missing_predictions == ()
    assert narrow.seen[-1] == 1


def test_an_update_that_runs_out_of_memory_says_where_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Half an update is never saved: the error names the step whose checkpoint is there, and --c goes on from it."""
    workspace = prepared(tmp_path, backbone="vit_xs", iterations=2)
    expected = tensors(run(workspace))
    original, calls = torch.optim.AdamW.step, []

    def failing(optimizer, closure=None):
        calls.append(original(optimizer, closure))
        if len(calls) == 2:
            raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED")
        return calls[-1]

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", failing)
        with pytest.raises(OutOfMemoryError, match="from step 0 with --c"):
            run(workspace)
    found = tensors(run(workspace, resume=True))
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []


def test_memory_that_is_short_on_a_cpu_is_seen_before_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What helps is done in advance with one line; where nothing is enough, one warning says so."""
    workspace = prepared(tmp_path, backbone="vit_xs", input_size=448, iterations=1, epochs=1)
    recipe = strip_reasons(make_recipe(backbone="vit_xs", input_size=448), "none", "cpu", slab_depth=1)
    enough = predicted_gib(recipe, 3, Footprint(1, True))
    monkeypatch.setattr("samunet.training.trainer.Trainer.run", lambda trainer: trainer.state)
    monkeypatch.setattr("samunet.pipeline.train.cpu_memory", lambda: (enough, "planted"))
    reporter = SilentReporter()
    result = run(workspace, reporter)
    (line,) = said(reporter)
    assert line.endswith(f"{enough:.1f} are there (planted): checkpointing on; going on")
    assert manifest(result.folder, "final").state["checkpointing"] is True
    monkeypatch.setattr("samunet.pipeline.train.cpu_memory", lambda: (0.1, "planted"))
    reporter = SilentReporter()
    run(workspace, reporter)
    assert len(said(reporter)) == len(reporter.warnings) == 1
    assert "checkpointing on and a step in 4 parts" in reporter.warnings[0]
