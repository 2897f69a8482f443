"""From a raw folder to fingerprint, plan, splits and store, and what a second run keeps."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from samunet.artifacts.plan import load_plan
from samunet.artifacts.workspace import Workspace
from samunet.cli.plan_and_preprocess import main
from samunet.core.errors import ConfigError
from samunet.core.files import write_json
from samunet.core.geometry import Geometry
from samunet.core.log import SilentReporter
from samunet.core.volume import Volume
from samunet.imageio import write_image, write_labels
from samunet.pipeline import explanation as explaining
from samunet.pipeline import plan as module
from samunet.pipeline.plan import VerificationError, plan_and_preprocess
from samunet.pipeline.replan import PREVIOUS_PLAN
from samunet.planners import fingerprint as measuring
from samunet.preprocessing.store import CaseStore

NAME = "Dataset001_Balls"


@pytest.fixture(autouse=True)
def few_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few voxels, and no planning for other budgets."""
    monkeypatch.setattr(measuring, "NUM_SAMPLES_DATASET", 3000)
    monkeypatch.setattr(explaining, "what_ifs", lambda *_: {})


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    """A workspace whose raw folder holds six small cases."""
    folder = tmp_path / "raw" / NAME
    generator = np.random.default_rng(0)
    for index in range(6):
        geometry = Geometry.from_spacing((8, 20, 24), (3.0, 1.0, 1.0))
        labels = np.zeros(geometry.shape, dtype=np.uint8)
        labels[2:6, 5:12, 6:14] = 1
        image = generator.normal(100 + 50 * labels, 10).astype(np.float32)
        write_image(folder / "imagesTr" / f"case_{index}_0000.nii.gz", Volume(image[np.newaxis], geometry))
        write_labels(folder / "labelsTr" / f"case_{index}.nii.gz", labels, geometry=geometry)
    write_json(
        folder / "dataset.json",
        {
            "channel_names": {"0": "MRI"},
            "labels": {"background": 0, "ball": 1},
            "numTraining": 6,
            "file_ending": ".nii.gz",
        },
    )
    return Workspace.locate(workspace=tmp_path, environment={})


def run(workspace: Workspace, **options: object) -> tuple[module.PlanResult, SilentReporter]:
    reporter = SilentReporter()
    result = plan_and_preprocess(workspace.raw / NAME, workspace, reporter=reporter, **options)  # type: ignore[arg-type]
    return result, reporter


def test_everything_is_written(workspace: Workspace) -> None:
    """Fingerprint, plan, dataset.json, splits, a store for slices and one for slabs, and nothing half-written."""
    result, _ = run(workspace)
    files = {path.name for path in result.folder.iterdir()}
    stores = {path.name: path for path in result.stores}
    plans = {"plans.json", "plans_as_planned.json", "plan.html", "plan.md"}
    assert files == {"dataset_fingerprint.json", "dataset.json", "splits_final.json", *plans, *stores}
    for name in ("2d", "2.5d", "3d"):
        store = stores[result.plan.store_key(name)]
        assert len(CaseStore(store, spec=result.plan.store_spec(name)).names()) == 6
    assert len(stores) == 2
    assert len(json.loads(workspace.splits_file(NAME).read_text())) == 5
    assert load_plan(workspace.plan_file(NAME)) == result.plan
    assert not result.failed


def test_a_second_run_reads_no_image(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """With unchanged inputs nothing is verified, measured or planned again."""
    first, _ = run(workspace)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(module, "extract_fingerprint", refuse)
    monkeypatch.setattr(module, "_verify", refuse)
    second, reporter = run(workspace)
    assert second.plan == first.plan
    assert any("fingerprint kept" in message for message in reporter.messages)


def test_an_unedited_plan_follows_the_hardware(workspace: Workspace) -> None:
    """Other memory or minutes plan anew where nothing was edited."""
    run(workspace)
    assert run(workspace, cpu_minutes=7.0)[0].plan.budget.cpu_minutes == 7.0
    assert run(workspace, gpu_memory_gib=40.0)[0].plan.budget.gpu_memory_gib == 40.0


def test_an_invalid_plan_is_refused(workspace: Workspace) -> None:
    """A plan with an unknown key is no reason to plan silently anew."""
    run(workspace)
    file = workspace.plan_file(NAME)
    content = json.loads(file.read_text())
    content["mirror_axis"] = {}
    write_json(file, content)
    with pytest.raises(ConfigError, match="mirror_axes"):
        run(workspace)


def test_a_changed_dataset_is_planned_anew(workspace: Workspace) -> None:
    """A new image makes a new fingerprint and plan; the former plan is kept beside it."""
    first, _ = run(workspace)
    geometry = Geometry.from_spacing((8, 20, 24), (3.0, 1.0, 1.0))
    image = np.full((1, *geometry.shape), 7.0, dtype=np.float32)
    write_image(workspace.raw / NAME / "imagesTr" / "case_0_0000.nii.gz", Volume(image, geometry))
    second, reporter = run(workspace)
    assert second.plan.fingerprint_sha256 != first.plan.fingerprint_sha256
    assert (second.folder / PREVIOUS_PLAN).is_file()
    assert reporter.warnings


def test_bad_cases_stop_or_are_skipped(workspace: Workspace) -> None:
    """Verification stops the run with every finding; --skip-bad-cases goes on and records what was left out."""
    (workspace.raw / NAME / "imagesTr" / "case_2_0000.nii.gz").write_bytes(b"broken")
    with pytest.raises(VerificationError):
        run(workspace)
    assert not workspace.plan_file(NAME).exists()
    result, reporter = run(workspace, skip_bad_cases=True)
    assert result.plan.left_out == ("case_2",)
    assert any("case_2" in warning for warning in reporter.warnings)
    assert len(CaseStore(result.stores[0], spec=result.plan.store_spec("2d")).names()) == 5
    with pytest.raises(VerificationError):
        run(workspace)


def test_splits_follow_the_cases_unless_edited(workspace: Workspace) -> None:
    """Splits made for other cases are made anew; splits edited by hand stay, and are refused if they do not fit."""
    run(workspace)
    file = workspace.splits_file(NAME)
    (workspace.raw / NAME / "labelsTr" / "case_2.nii.gz").write_bytes(b"broken")
    run(workspace, skip_bad_cases=True)
    assert "case_2" not in file.read_text()
    write_json(file, [{"train": ["case_0"], "val": ["case_1"]}])
    run(workspace, skip_bad_cases=True)
    assert len(json.loads(file.read_text())) == 1
    write_json(file, [{"train": ["case_0"], "val": ["case_2"]}])
    with pytest.raises(ConfigError):
        run(workspace, skip_bad_cases=True)


def test_unverified_runs_are_verified_later(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Skipping verification is remembered: the next run verifies."""
    run(workspace, verify=False)
    seen: list[str] = []
    monkeypatch.setattr(module, "_verify", lambda dataset, *_: seen.append(dataset.name) or ())
    run(workspace)
    assert seen == [NAME]


@pytest.mark.parametrize(
    ("broken", "flags", "words"),
    [
        (1, [], "verification found 1 errors"),
        (6, ["--skip-bad-cases"], "no training case is left"),
        (1, ["--no-verify"], "1 of 6 cases could not be measured"),
    ],
)
def test_a_command_that_plans_nothing_exits_with_2(
    workspace: Workspace, capsys: pytest.CaptureFixture[str], broken: int, flags: list[str], words: str
) -> None:
    """Whatever the broken cases stop, no plan is written, and the exit code is not that of some failed cases."""
    for index in range(broken):
        (workspace.raw / NAME / "imagesTr" / f"case_{index}_0000.nii.gz").write_bytes(b"broken")
    assert main(["-d", "1", "--workspace", str(workspace.raw.parent), "-np", "1", *flags]) == 2
    assert words in capsys.readouterr().err
    assert not workspace.plan_file(NAME).exists()


def test_the_command(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    """The command plans every dataset given, explains on demand, and says with its exit code that one is missing."""
    root = str(workspace.raw.parent)
    assert main(["-d", "1", "--workspace", root, "-np", "1", "--explain"]) == 0
    assert "Recipe for weights" in capsys.readouterr().out
    assert main(["-d", "Balls", "77", "--workspace", root, "-np", "1"]) == 2
    captured = capsys.readouterr()
    assert "written:" in captured.out
    assert "no dataset has this id" in captured.err


@pytest.mark.parametrize("flags", [["--skip-bad-cases"], ["--skip-bad-cases", "--no-verify"]])
def test_skipped_cases_give_exit_code_1(
    workspace: Workspace, capsys: pytest.CaptureFixture[str], flags: list[str]
) -> None:
    """The others are planned and preprocessed, verified or not; the exit code says so, again when nothing is new."""
    (workspace.raw / NAME / "imagesTr" / "case_2_0000.nii.gz").write_bytes(b"broken")
    words = ["-d", "1", "--workspace", str(workspace.raw.parent), "-np", "1", *flags]
    for _ in range(2):
        assert main(words) == 1
        written = capsys.readouterr()
        assert "left out of plan and stores: case_2" in written.err
        assert "written:" in written.out
    plan = load_plan(workspace.plan_file(NAME))
    assert plan.left_out == ("case_2",)
    assert len(CaseStore(workspace.store_folder(NAME, plan.store_key("2d")), spec=plan.store_spec("2d")).names()) == 5


def test_memory_that_no_gpu_has_is_refused_before_anything_is_read(
    workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    """One message with the flag, before cases are verified."""
    assert main(["-d", "1", "--workspace", str(workspace.raw.parent), "--gpu-memory", "0.001"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "error: no GPU has so little memory"
    assert any("--gpu-memory" in line for line in lines)
    assert not any("verifying" in line or "not foreseen" in line for line in lines)
