"""Planning again: edits stay, are said and planned around; stores made before an edit are never used after it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from samunet.artifacts.plan import Plan, load_plan
from samunet.artifacts.plan_document import record_file
from samunet.artifacts.workspace import Workspace
from samunet.cli import plan_and_preprocess as command
from samunet.cli import train
from samunet.core.errors import ConfigError, DataError, StoreError
from samunet.core.files import read_json, write_json
from samunet.core.log import SilentReporter
from samunet.core.volume import Volume
from samunet.datasets.raw import load_raw_dataset
from samunet.imageio import write_image
from samunet.pipeline import explanation as explaining
from samunet.pipeline import stores
from samunet.pipeline.plan import plan_and_preprocess
from samunet.pipeline.replan import PREVIOUS_PLAN
from samunet.pipeline.stores import check_planned_around, open_store
from samunet.planners import fingerprint as measuring
from samunet.planners import hardware
from samunet.preprocessing import pipeline as processing
from samunet.preprocessing.store import CaseStore
from tests.samples import DATASET, make_case, write_dataset

RECIPE = ("configurations", "2d", "recipes", "none", "cpu")


@pytest.fixture(autouse=True)
def little_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few voxels, no planning for other budgets, and always the same memory."""
    monkeypatch.setattr(hardware, "cpu_memory", lambda: (8.0, "given"))
    monkeypatch.setattr(hardware, "_gpu_memory", lambda: (hardware.ASSUMED_GPU_GIB, "assumed"))
    monkeypatch.setattr(measuring, "NUM_SAMPLES_DATASET", 3000)
    monkeypatch.setattr(explaining, "what_ifs", lambda *_: {})


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    """A planned and preprocessed dataset of six small cases."""
    found = Workspace.locate(workspace=tmp_path, environment={})
    write_dataset(found, num_train=6, num_test=0)
    run(found)
    return found


def run(workspace: Workspace, **options: Any) -> tuple[Plan, SilentReporter]:
    reporter = SilentReporter()
    result = plan_and_preprocess(
        workspace.raw / DATASET, workspace, reporter=reporter, configurations=("2d",), verify=False, **options
    )
    assert not result.failed
    return result.plan, reporter


def edit(workspace: Workspace, *place: str, value: Any) -> None:
    """Change an entry of plans.json as a user would."""
    file = workspace.plan_file(DATASET)
    content = read_json(file)
    parent = content
    for key in place[:-1]:
        parent = parent[key]
    parent[place[-1]] = value
    write_json(file, content)


def recipe(plan: Plan, configuration: str = "2d") -> Any:
    return plan.configurations[configuration].recipes["none"]["cpu"]


def training(workspace: Workspace, *flags: str) -> int:
    root = str(workspace.raw.parent)
    fast = [
        "--weights",
        "none",
        "--device",
        "cpu",
        "--epochs",
        "1",
        "--iterations",
        "1",
        "--batch-size",
        "2",
        "--workers",
        "0",
    ]
    return train.main(["901", "0", "--workspace", root, *fast, "--disable_tta", *flags])


def opened(workspace: Workspace, plan: Plan) -> CaseStore:
    """The store of 2d as training opens it for all cases."""
    dataset = load_raw_dataset(workspace.raw / DATASET)
    return open_store(plan, "2d", dataset, workspace, cases=[case.name for case in dataset.training])


def said(reporter: SilentReporter) -> str:
    return "\n".join(reporter.messages)


def warned(reporter: SilentReporter) -> str:
    return "\n".join(reporter.warnings)


def test_an_edit_survives_and_is_said(workspace: Workspace) -> None:
    """It is marked, planned around, named with the rule's answer, and shown as the user's on the page."""
    before = load_plan(workspace.plan_file(DATASET))
    edit(workspace, *RECIPE, "input_size", "value", value=448)
    edit(workspace, "mirror_axes", value={"value": [], "reason": "because"})
    for _ in range(2):
        plan, reporter = run(workspace)
        assert (recipe(plan).input_size.value, plan.mirror_axes.reason) == (448, "because")
        assert recipe(plan).input_size.by_rule == recipe(before).input_size.value
        assert recipe(plan).memory_gib.value > recipe(before).memory_gib.value
        assert f"2d.none.cpu.input_size = 448 (by rule {recipe(before).input_size.value})" in said(reporter)
    assert "decisions differ" not in said(reporter)
    assert load_plan(workspace.plan_file(DATASET)) == plan
    folder = workspace.preprocessed_folder(DATASET)
    assert "[yours; by rule" in (folder / "plan.html").read_text()
    assert "[yours; by rule" in (folder / "plan.md").read_text()


def test_edits_stay_with_other_hardware_and_a_rule_that_disagrees_is_named(workspace: Workspace) -> None:
    """All else follows the hardware; a rule whose answer has moved since the edit is warned of."""
    edit(workspace, *RECIPE, "epochs", "value", value=3)
    edit(workspace, *RECIPE, "learning_rate", "value", value=0.01)
    first, _ = run(workspace)
    plan, reporter = run(workspace, cpu_minutes=2.0, gpu_memory_gib=40.0)
    assert (plan.budget.cpu_minutes, plan.budget.gpu_memory_gib) == (2.0, 40.0)
    assert recipe(plan).epochs.value == 3
    assert "rules have come to another answer" in warned(reporter)
    now = recipe(plan).epochs.by_rule
    assert f"the rule said {recipe(first).epochs.by_rule} and now {now}" in warned(reporter)
    assert "learning_rate" not in warned(reporter)


def test_hardware_that_was_assumed_is_looked_for_again(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan made without a GPU is planned for the one that is there by now; what was given or found stays."""
    assert "GPU memory assumed" in run(workspace)[0].budget.reason
    monkeypatch.setattr(hardware, "_gpu_memory", lambda: (24.0, "of the smallest GPU found here"))
    monkeypatch.setattr(hardware, "cpu_memory", lambda: (99.0, "planted"))
    budget = run(workspace)[0].budget
    assert (budget.gpu_memory_gib, budget.cpu_memory_gib) == (24.0, 8.0)
    assert budget.reason == "GPU memory of the smallest GPU found here; CPU memory given; CPU minutes default"
    monkeypatch.setattr(hardware, "_gpu_memory", lambda: (80.0, "planted"))
    assert run(workspace)[0].budget == budget


def test_assumed_hardware_that_is_then_given_is_no_assumption(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the figure is the assumed one, and one that was edited is none either."""
    run(workspace, gpu_memory_gib=hardware.ASSUMED_GPU_GIB)
    monkeypatch.setattr(hardware, "_gpu_memory", lambda: (24.0, "planted"))
    budget = run(workspace)[0].budget
    assert budget.gpu_memory_gib == hardware.ASSUMED_GPU_GIB
    assert "GPU memory as given" in budget.reason
    edit(workspace, "budget", value={**budget.model_dump(), "gpu_memory_gib": 12.0, "reason": "GPU memory assumed"})
    assert run(workspace)[0].budget.gpu_memory_gib == 12.0


def test_an_edited_budget_says_that_it_is(workspace: Workspace) -> None:
    """Its reason is not that of the figure that was there before, in any later run; the others keep theirs."""
    before = load_plan(workspace.plan_file(DATASET)).budget
    edit(workspace, "budget", "gpu_memory_gib", value=24.0)
    for _ in range(2):
        budget = run(workspace)[0].budget
        assert budget.gpu_memory_gib == 24.0
        assert budget.reason == before.reason.replace("GPU memory assumed", "GPU memory set by hand")
    edit(workspace, "budget", "gpu_memory_gib", value=hardware.ASSUMED_GPU_GIB)
    assert "GPU memory set by hand" in run(workspace)[0].budget.reason
    edit(workspace, "budget", value={**budget.model_dump(), "cpu_minutes": 7.0, "reason": "as my colleague has it"})
    assert run(workspace)[0].budget.reason == "as my colleague has it"


def test_an_edited_budget_is_told_without_the_copy(workspace: Workspace) -> None:
    """Another figure than the one that is always assumed cannot have been assumed."""
    edit(workspace, "budget", "gpu_memory_gib", value=24.0)
    record_file(workspace.plan_file(DATASET)).unlink()
    budget = run(workspace)[0].budget
    assert (budget.gpu_memory_gib, "GPU memory set by hand" in budget.reason) == (24.0, True)


def test_giving_an_edit_back(workspace: Workspace) -> None:
    """Without its source it is the rule's again."""
    edit(workspace, *RECIPE, "input_size", "value", value=448)
    run(workspace)
    content = read_json(workspace.plan_file(DATASET))
    entry = content["configurations"]["2d"]["recipes"]["none"]["cpu"]["input_size"]
    by_rule = entry["by_rule"]
    del entry["source"]
    write_json(workspace.plan_file(DATASET), content)
    plan, reporter = run(workspace)
    assert recipe(plan).input_size.value == by_rule
    assert "input_size: " in said(reporter)


def test_overwriting_discards_edits_and_says_which(workspace: Workspace) -> None:
    """Each is named, the plan with them is kept aside, and the new plan is the rules'."""
    before = load_plan(workspace.plan_file(DATASET))
    edit(workspace, *RECIPE, "input_size", "value", value=448)
    edit(workspace, "configurations", "mine", value={"inherits_from": "2d"})
    plan, reporter = run(workspace, overwrite_plan=True)
    assert plan.configurations == before.configurations
    assert "2d.none.cpu.input_size = 448" in warned(reporter)
    assert "configuration mine, which inherits from 2d" in warned(reporter)
    assert (
        load_plan(workspace.preprocessed_folder(DATASET) / PREVIOUS_PLAN).configurations.keys()
        > before.configurations.keys()
    )
    assert "discarded" not in warned(run(workspace, overwrite_plan=True)[1])


def test_a_plan_that_cannot_be_read_is_overwritten_too(workspace: Workspace) -> None:
    """--overwrite-plan is the way out of a broken file."""
    workspace.plan_file(DATASET).write_text("{")
    with pytest.raises(ConfigError, match="not valid JSON"):
        run(workspace)
    plan, reporter = run(workspace, overwrite_plan=True)
    assert "could not be read" in warned(reporter)
    assert load_plan(workspace.plan_file(DATASET)) == plan


def test_edits_survive_changed_images(workspace: Workspace) -> None:
    """The facts are measured again, the plan is made anew around the edit, and the former plan is kept."""
    edit(workspace, *RECIPE, "input_size", "value", value=448)
    volume, _ = make_case(77)
    write_image(workspace.raw / DATASET / "imagesTr" / "case_0_0000.nii.gz", volume)
    plan, reporter = run(workspace)
    assert recipe(plan).input_size.value == 448
    assert "facts have changed" in warned(reporter)
    assert (workspace.preprocessed_folder(DATASET) / PREVIOUS_PLAN).is_file()


def test_plans_of_before_edits_were_recorded_keep_them(workspace: Workspace) -> None:
    """Without the copy, an edit is what the rules would not say of the same facts."""
    edit(workspace, *RECIPE, "input_size", "value", value=448)
    record_file(workspace.plan_file(DATASET)).unlink()
    plan, _ = run(workspace)
    assert recipe(plan).input_size.by_user
    assert not recipe(plan).epochs.by_user
    assert record_file(workspace.plan_file(DATASET)).is_file()


def test_an_impossible_edit_is_one_error(workspace: Workspace) -> None:
    """Field, what is expected and what is found, and exit code 2; nothing on disk changes."""
    edit(workspace, *RECIPE, "batch_size", "value", value="many")
    content = workspace.plan_file(DATASET).read_text()
    with pytest.raises(ConfigError) as caught:
        run(workspace)
    words = ("configurations.2d.recipes.none.cpu.batch_size.value", "valid integer", "found 'many'", "plans.json")
    assert all(word in str(caught.value) for word in words)
    assert workspace.plan_file(DATASET).read_text() == content


def test_pages_are_written_once_per_plan(workspace: Workspace) -> None:
    """A run that changes nothing leaves them; a page that is missing is made."""
    pages = [workspace.preprocessed_folder(DATASET) / name for name in ("plan.html", "plan.md")]
    before = [page.stat().st_mtime_ns for page in pages]
    run(workspace)
    assert [page.stat().st_mtime_ns for page in pages] == before
    pages[0].unlink()
    run(workspace)
    assert pages[0].is_file()


def test_own_configurations_train_at_once_and_survive(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    """With another input size a child shares the store, trains with -c NAME, and its checkpoint holds it whole."""
    from samunet.artifacts.checkpoint import read_checkpoint

    changes = {"none": {"cpu": {"input_size": {"value": 96}}}}
    edit(workspace, "configurations", "coarse", value={"inherits_from": "2d", "recipes": changes})
    assert training(workspace, "-c", "coarse") == 0
    assert "96 px" in capsys.readouterr().out
    (final,) = workspace.results.glob(f"{DATASET}/coarse__*/fold_0/checkpoint_final.safetensors")
    checkpoint = read_checkpoint(final)
    assert checkpoint.manifest.recipe["input_size"] == 96
    assert recipe(checkpoint.plan, "coarse").input_size.by_user
    assert recipe(checkpoint.plan, "coarse").tile_vox == recipe(checkpoint.plan).tile_vox
    plan, reporter = run(workspace)
    assert "configuration coarse, which inherits from 2d" in said(reporter)
    assert recipe(plan, "coarse").input_size.value == 96
    written = read_json(workspace.plan_file(DATASET))["configurations"]["coarse"]
    assert written["inherits_from"] == "2d"
    assert set(written) <= {"inherits_from", "recipes"}
    assert plan.store_key("coarse") == plan.store_key("2d")


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("normalization",), {"value": [{"scheme": "rescale_to_01"}], "reason": "mine"}),
        (("target_spacing",), {"value": [2.0, 1.5, 1.5], "reason": "mine"}),
        (("configurations", "2d", "spacing"), {"value": [None, 1.5, 1.5], "reason": "mine"}),
    ],
)
def test_edits_that_stores_depend_on_are_never_trained_with_the_old_store(
    workspace: Workspace, capsys: pytest.CaptureFixture[str], place: tuple[str, ...], value: Any
) -> None:
    """Training names the edit and the command; after that command it uses another store."""
    before = load_plan(workspace.plan_file(DATASET)).store_key("2d")
    edit(workspace, *place, value=value)
    assert training(workspace, "-c", "2d") == 2
    error = capsys.readouterr().err
    assert f"samunet_plan_and_preprocess -d {DATASET} -c 2d" in error
    assert place[-1] in error
    assert "Traceback" not in error
    plan, _ = run(workspace)
    assert plan.store_key("2d") != before
    check_planned_around(plan, "2d")
    assert len(opened(workspace, plan).names()) == 6


def test_a_store_of_another_plan_is_named_and_not_used(
    workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    """A plan for which nothing is preprocessed says which stores there are, and what to run."""
    edit(workspace, "normalization", value={"value": [{"scheme": "rescale_to_01"}], "reason": "mine"})
    record_file(workspace.plan_file(DATASET)).unlink()
    assert training(workspace, "-c", "2d") == 2
    error = capsys.readouterr().err
    there = [file.parent.name for file in workspace.preprocessed_folder(DATASET).glob("*/store.json")]
    assert there[0] in error
    assert f"samunet_plan_and_preprocess -d {DATASET} -c 2d" in error


def test_a_changed_image_is_not_trained_from_the_old_store(
    workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    """Training refuses and names the case; preprocessing redoes that case only, and then it trains."""
    file = workspace.raw / DATASET / "imagesTr" / "case_2_0000.nii.gz"
    volume, _ = make_case(2)
    write_image(file, Volume(volume.data + np.float32(50), volume.geometry))
    assert training(workspace, "-c", "2d") == 2
    error = capsys.readouterr().err
    assert "have changed since preprocessing" in error
    assert "case_2" in error
    assert "case_3" not in error
    assert f"samunet_plan_and_preprocess -d {DATASET} -c 2d" in error
    plan, reporter = run(workspace)
    store = CaseStore(workspace.store_folder(DATASET, plan.store_key("2d")), spec=plan.store_spec("2d"))
    assert "5 of 6 cases are already preprocessed" in said(reporter)
    assert store.record("case_2").source_sha256 != store.record("case_3").source_sha256
    assert training(workspace, "-c", "2d") == 0


def brighten(workspace: Workspace, name: str = "case_2") -> None:
    """Another image of the same grid, so that facts change but no store's key."""
    volume, _ = make_case(2)
    image = volume.with_data(volume.data + np.float32(50))
    write_image(workspace.raw / DATASET / "imagesTr" / f"{name}_0000.nii.gz", image)


def test_a_store_that_was_not_redone_is_stale_whatever_else_was(
    workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    """An image changes and only 2d is preprocessed again: 3d still holds the former voxels, and says so."""
    folder = workspace.raw / DATASET
    both = plan_and_preprocess(folder, workspace, configurations=("2d", "3d"), verify=False).plan
    brighten(workspace)
    plan, _ = run(workspace)
    assert plan.store_key("3d") == both.store_key("3d")
    assert len(opened(workspace, plan).names()) == 6
    assert training(workspace, "-c", "3d", "--batch-size", "4") == 2
    error = capsys.readouterr().err
    assert "have changed since preprocessing" in error
    assert "case_2" in error
    plan_and_preprocess(folder, workspace, configurations=("3d",), verify=False)
    dataset = load_raw_dataset(folder)
    assert len(open_store(plan, "3d", dataset, workspace, cases=["case_2"]).names()) == 6


def test_a_case_that_could_not_be_preprocessed_again_is_stale(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its former voxels are still in the store, of which the other cases are used."""
    original = processing.preprocess_case

    def failing(*arguments: Any, name: str, **others: Any) -> Any:
        if name == "case_2":
            raise DataError("planted")
        return original(*arguments, name=name, **others)

    brighten(workspace)
    monkeypatch.setattr(processing, "preprocess_case", failing)
    folder = workspace.raw / DATASET
    result = plan_and_preprocess(folder, workspace, configurations=("2d",), verify=False)
    assert list(result.failed) == ["case_2"]
    assert "case_2" in CaseStore(result.stores[0]).names()
    with pytest.raises(StoreError, match="case_2"):
        opened(workspace, result.plan)
    dataset = load_raw_dataset(folder)
    assert open_store(result.plan, "2d", dataset, workspace, cases=["case_1", "case_3"])


def test_a_stores_files_are_not_read_to_find_them_unchanged(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names, sizes and times are enough where preprocessing wrote them down."""
    monkeypatch.setattr(stores, "source_hash", lambda _: pytest.fail("read"))
    assert len(opened(workspace, load_plan(workspace.plan_file(DATASET))).names()) == 6


def test_touched_files_with_the_same_content_are_no_change(workspace: Workspace) -> None:
    """Copying a dataset changes times, not images."""
    for file in (workspace.raw / DATASET / "imagesTr").iterdir():
        os.utime(file, (1, 1))
    assert len(opened(workspace, load_plan(workspace.plan_file(DATASET))).names()) == 6


def test_changed_labels_are_not_trained_with_the_old_plan(
    workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another dataset.json has to be planned for first."""
    file = workspace.raw / DATASET / "dataset.json"
    content = read_json(file)
    content["labels"] = {"background": 0, "ball": 2, "cube": 1}
    write_json(file, content)
    assert training(workspace, "-c", "2d") == 2
    assert "not those that were planned for" in capsys.readouterr().err


def test_the_command_says_what_it_kept(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    """The command line tells of kept and of discarded edits, and explains what would change a decision."""
    edit(workspace, *RECIPE, "input_size", "value", value=448)
    flags = ["-d", "901", "--workspace", str(workspace.raw.parent), "-np", "1", "-c", "2d", "--no-verify"]
    assert command.main([*flags, "--explain"]) == 0
    shown = capsys.readouterr().out
    assert "input_size = 448" in shown
    assert " minutes: " in shown
    assert command.main([*flags, "--overwrite-plan"]) == 0
    assert "edits are discarded" in capsys.readouterr().err
