"""samunet_pretrain on phantoms: from images to weights that samunet_train takes, interrupted and not."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from samunet.artifacts.checkpoint import read_checkpoint
from samunet.artifacts.model_spec import get_spec
from samunet.artifacts.pretraining import read_pretrained, write_pretrained
from samunet.artifacts.workspace import Workspace
from samunet.cli import pretrain as command
from samunet.core.errors import UsageError, WeightsError
from samunet.core.files import read_json, sha256_file, write_json
from samunet.core.log import SilentReporter
from samunet.models.weights import as_base, locate_weights
from samunet.pipeline.plan import plan_and_preprocess
from samunet.pipeline.pretrain import PretrainingRequest, PretrainingResult, pretrain
from samunet.pipeline.pretrained import labels_read, tell_what_was_seen
from samunet.pipeline.train import train
from samunet.pipeline.training_run import TrainingRequest
from samunet.planners.peft import FROM_SCRATCH_RATE
from samunet.preprocessing.store import CaseStore
from samunet.training import pretraining
from samunet.training.checkpointing import checkpoint_file
from samunet.training.trainer import Trainer
from tests.samples import DATASET, write_dataset

SECOND = "Dataset902_Others"
BACKBONES = ("vit_xs", "vit_t_xs")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batch norm's statistics are measured on few images."""
    monkeypatch.setattr(pretraining, "STATISTICS_BATCHES", 2)


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A workspace with two planned datasets."""
    workspace = Workspace.locate(workspace=tmp_path_factory.mktemp("pretraining"), environment={})
    folder = write_dataset(workspace, num_train=5)
    shutil.copytree(folder, workspace.raw / SECOND)
    for file in (workspace.raw / SECOND).rglob("case_*"):
        file.rename(file.with_name(file.name.replace("case", "other")))
    for name in (DATASET, SECOND):
        result = plan_and_preprocess(
            workspace.raw / name, workspace, cpu_minutes=1, configurations=["2d"], reporter=SilentReporter()
        )
        assert not result.failed
    return workspace


def run(
    workspace: Workspace, results: Path, *, reporter: SilentReporter | None = None, **changes: object
) -> PretrainingResult:
    values: dict[str, object] = {
        "datasets": (DATASET,),
        "configuration": "2d",
        "weights": "none",
        "backbone": "vit_t_xs",
        "device": "cpu",
        "iterations": 5,
        "epochs": 1,
        "batch_size": 2,
        "num_workers": 0,
    }
    own = replace(workspace, results=results)
    return pretrain(PretrainingRequest(**values | changes), own, reporter=reporter or SilentReporter())


def len_of(workspace: Workspace, result: PretrainingResult, case: str) -> int:
    """Slices of a case in the one store of a run."""
    (store,) = result.about.datasets[0].images
    return CaseStore(workspace.store_folder(DATASET, store)).record(case).store_shape[0]


def fine_tune(workspace: Workspace, results: Path, file: Path, *, reporter: SilentReporter | None = None) -> Path:
    """Two steps from a file of weights, without naming its backbone; returns the fold's folder."""
    request = TrainingRequest(
        DATASET,
        "0",
        configuration="2d",
        weights=str(file),
        device="cpu",
        epochs=1,
        iterations=2,
        num_workers=0,
        mirror=False,
    )
    return train(request, replace(workspace, results=results), reporter=reporter or SilentReporter()).folder


@pytest.mark.parametrize("backbone", BACKBONES)
def test_an_encoder_is_pretrained_and_trained_from(planned: Workspace, tmp_path: Path, backbone: str) -> None:
    """Five steps, then two of samunet_train that find the backbone by themselves; every encoder tensor is loaded."""
    result = run(planned, tmp_path, backbone=backbone)
    about = result.about
    assert (about.objective, about.kind, about.backbone, about.from_random) == ("masked_images", "ssl", backbone, True)
    assert (about.steps, about.base.kind, about.masking is not None) == (5, "none", True)
    assert about.sha256 == sha256_file(result.file) == read_json(result.file.with_suffix(".json"))["sha256"]
    assert len(about.datasets[0].training_cases) == 5
    assert not about.datasets[0].labels_read
    tensors = load_file(result.file)
    assert all(name.startswith("image_encoder.") for name in tensors)
    reporter = SilentReporter()
    folder = fine_tune(planned, tmp_path, result.file, reporter=reporter)
    manifest = read_checkpoint(checkpoint_file(folder, "final")).manifest
    assert manifest.base.sha256 == about.sha256
    assert manifest.base.rest is None
    assert manifest.resolved_recipe.backbone == backbone
    assert manifest.resolved_recipe.method.encoder.train == "full"
    assert manifest.resolved_recipe.learning_rate == FROM_SCRATCH_RATE
    assert manifest.resolved_recipe.intensity_map.kind == "identity"
    assert not [key for key in manifest.load_report["missing"] if key.startswith("image_encoder.")]
    assert manifest.load_report["unexpected"] == []
    assert any("images, not the labels, of 1 of the 1 validation cases" in text for text in reporter.messages)
    assert (result.file.with_name("reconstruction.png")).is_file()


@pytest.mark.parametrize("backbone", ["vit_t_xs"])
def test_an_interrupted_run_ends_bit_identical(
    planned: Workspace, tmp_path: Path, backbone: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after the second of three epochs and continued with --c, the weights are those of an unbroken run."""
    whole = run(planned, tmp_path / "whole", backbone=backbone, iterations=2, epochs=3)
    after_epoch = Trainer._after_epoch

    def killed(trainer: Trainer, row: dict[str, object]) -> None:
        after_epoch(trainer, row)
        if trainer.state.step == 4:
            trainer._save("latest")
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "_after_epoch", killed)
        with pytest.raises(KeyboardInterrupt):
            run(planned, tmp_path / "broken", backbone=backbone, iterations=2, epochs=3)
    with pytest.raises(UsageError, match="keeps its settings"):
        run(planned, tmp_path / "broken", backbone=backbone, epochs=3, resume=True, iterations=2, seed=1)
    broken = run(planned, tmp_path / "broken", backbone=backbone, iterations=2, epochs=3, resume=True)
    assert broken.about.steps == 6
    first, second = load_file(whole.file), load_file(broken.file)
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def test_images_without_labels_get_a_store_of_their_own_and_what_is_left_out_is_not_seen(
    planned: Workspace, tmp_path: Path
) -> None:
    """Images of imagesTs and of a folder are preprocessed without labels; named and validation cases are in no list."""
    loose = tmp_path / "loose"
    shutil.copytree(planned.raw / DATASET / "imagesTs", loose)
    result = run(
        planned,
        tmp_path,
        images=("imagesTr", "imagesTs", str(loose)),
        left_out=("case_2",),
        left_out_fold="1",
        epochs=1,
    )
    seen = result.about.datasets[0]
    validation = read_json(planned.splits_file(DATASET))[1]["val"]
    assert set(seen.left_out) == {"case_2", *validation}
    assert set(seen.training_cases) == {f"case_{i}" for i in range(5)} - set(seen.left_out)
    unlabelled = [cases for store, cases in seen.images.items() if store.startswith("unlabelled_")]
    assert unlabelled == [("case_5", "case_6"), ("case_5", "case_6")]
    for store in seen.images:
        labels = list((planned.store_folder(DATASET, store) / "labels").glob("*.b2nd"))
        assert bool(labels) == store.startswith("slices_")
    with pytest.raises(UsageError, match="no such cases"):
        run(planned, tmp_path, cases=("case_0", "nobody"), name="other")


def test_a_folds_images_are_left_out_of_every_folder(planned: Workspace, tmp_path: Path) -> None:
    """Copies of imagesTr given as a folder are the same cases; how many are left out, and were not, is said."""
    copies = tmp_path / "copies"
    shutil.copytree(planned.raw / DATASET / "imagesTr", copies)
    reporter = SilentReporter()
    options: dict[str, object] = {"images": (str(copies),), "iterations": 1}
    result = run(planned, tmp_path, left_out_fold="0", reporter=reporter, **options)
    (cases,) = result.about.datasets[0].images.values()
    assert set(cases) == {f"case_{i}" for i in range(5)} - set(read_json(planned.splits_file(DATASET))[0]["val"])
    assert any(f"{copies}: 1 of 5 images are left out" in text for text in reporter.messages)
    slices = sum(len_of(planned, result, case) for case in cases)
    length = f"{slices} tiles of slices, each seen about {2 / slices:.2g} times"
    assert any(length in text for text in reporter.messages)
    assert any(f"--epochs {-(-slices // 2)} makes it one" in text for text in reporter.warnings)
    assert any(f"pretrained 1 steps ({2 / slices:.2g} passes" in text for text in reporter.messages)
    seen = run(planned, tmp_path, name="all", **options)
    told = SilentReporter()
    fine_tune(planned, tmp_path, seen.file, reporter=told)
    assert any("images, not the labels, of 1 of the 1 validation cases" in text for text in told.messages)


def test_images_that_lack_a_label_are_seen_and_no_others_dropped_unsaid(tmp_path: Path) -> None:
    """Of imagesTr as it is: those without a label, but not one with a wrong label; of its folder: all.

    A fold's patients stay out, whether their images have labels or not.
    """
    workspace = Workspace.locate(workspace=tmp_path, environment={})
    folder = write_dataset(workspace, num_train=6)
    (folder / "labelsTr" / "case_4.nii.gz").unlink()
    (folder / "labelsTr" / "case_5.nii.gz").unlink()
    (folder / "labelsTr" / "case_3.nii.gz").write_bytes(b"no label")
    groups = {f"case_{index}": f"patient_{index % 5}" for index in range(6)}
    write_json(folder / "case_groups.json", groups)
    plan_and_preprocess(folder, workspace, cpu_minutes=1, configurations=["2d"], skip_bad_cases=True)
    once: dict[str, object] = {"iterations": 1, "overwrite": True}
    reporter = SilentReporter()
    seen = run(workspace, tmp_path, reporter=reporter, **once).about.datasets[0]
    assert seen.training_cases == ("case_0", "case_1", "case_2")
    assert seen.all_cases == {f"case_{index}" for index in (0, 1, 2, 4, 5)}
    assert any("2 of 6 images have no label and are seen too" in text for text in reporter.messages)
    (line,) = [text for text in reporter.messages if "as planning left them out" in text]
    assert "1 of 6 images are not seen" in line
    assert f"the folder {folder / 'imagesTr'} in place of imagesTr" in line
    path = str(folder / "imagesTr")
    seen = run(workspace, tmp_path, images=(path, "imagesTr"), **once).about.datasets[0]
    assert seen.all_cases == {f"case_{index}" for index in range(6)}
    assert read_json(workspace.splits_file(DATASET))[0]["val"] == ["case_0"]
    seen = run(workspace, tmp_path, images=("imagesTr", path), left_out_fold="0", **once).about.datasets[0]
    assert set(seen.left_out) == {"case_0", "case_5"}
    assert seen.all_cases == {f"case_{index}" for index in range(1, 5)}
    told = SilentReporter()
    seen = run(workspace, tmp_path, supervised=True, name="prompts", reporter=told, **once).about.datasets[0]
    assert seen.all_cases == {"case_0", "case_1", "case_2"}
    assert any("3 of 6 images are not seen, as planning left them out" in text for text in told.messages)


def test_labels_are_not_read_unless_asked_for(planned: Workspace, tmp_path: Path) -> None:
    """Masked images are learnt from a store whose label files are gone."""
    own = replace(planned, preprocessed=tmp_path / "preprocessed")
    shutil.copytree(planned.preprocessed, own.preprocessed)
    for file in own.preprocessed.rglob("labels/*.b2nd"):
        file.unlink()
    assert run(own, tmp_path / "results", epochs=1, iterations=1).about.steps == 1


@pytest.mark.parametrize("backbone", ["vit_t_xs"])
def test_supervised_on_two_datasets_gives_a_whole_sam(planned: Workspace, tmp_path: Path, backbone: str) -> None:
    """Prompts for structures of both datasets; the file has all parts, and training from it misses nothing."""
    reporter = SilentReporter()
    result = run(
        planned,
        tmp_path,
        datasets=(DATASET, SECOND),
        backbone=backbone,
        supervised=True,
        reporter=reporter,
        iterations=2,
    )
    assert any(f"{DATASET}, {SECOND}: labels of every case are read" in text for text in reporter.warnings)
    assert [part.name for part in result.about.datasets] == [DATASET, SECOND]
    assert all(part.labels_read for part in result.about.datasets)
    parts = {name.split(".")[0] for name in load_file(result.file)}
    assert parts == {"image_encoder", "prompt_encoder", "mask_decoder"}
    told = SilentReporter()
    folder = fine_tune(planned, tmp_path, result.file, reporter=told)
    manifest = read_checkpoint(checkpoint_file(folder, "final")).manifest
    assert manifest.load_report["missing"] == []
    assert any("taught with the labels of 1 of the 1 validation cases" in text for text in told.warnings)
    cases = read_json(folder / "cases.json")
    assert cases["labels_seen"] == cases["validation"]
    calibration = read_json(folder / "quality.json")
    assert calibration["observations"] == []
    assert "without 1 whose labels taught the weights" in calibration["reason"]
    clean = run(
        planned,
        tmp_path,
        datasets=(DATASET, SECOND),
        backbone=backbone,
        supervised=True,
        iterations=1,
        left_out_fold="0",
        name="clean",
    )
    told = SilentReporter()
    part: dict[str, object] = {"datasets": (DATASET, SECOND), "left_out": ("case_0",), "name": "part"}
    run(planned, tmp_path, backbone=backbone, supervised=True, iterations=1, reporter=told, **part)
    assert [text for text in told.warnings if text.startswith(f"{SECOND}: labels of every case are read")]
    assert not any(DATASET in text for text in told.warnings)
    told = SilentReporter()
    folder = fine_tune(planned, tmp_path / "clean", clean.file, reporter=told)
    assert not told.warnings
    assert "labels_seen" not in read_json(folder / "cases.json")


def test_weights_continue_from_weights_and_remember_where_they_come_from(planned: Workspace, tmp_path: Path) -> None:
    """A second run starts from the first one's encoder; a decoder that SAM never taught is random, and said so."""
    first = run(planned, tmp_path, iterations=1)
    second = run(planned, tmp_path, weights=str(first.file), backbone=None, iterations=1, name="second")
    assert second.about.base.sha256 == first.about.sha256
    assert second.about.from_random
    assert second.about.learning_rate == first.about.learning_rate
    about = read_pretrained(second.file)
    assert about is not None
    assert about.backbone == "vit_t_xs"
    located = locate_weights(str(second.file), get_spec("vit_t_xs"), offline=True)
    assert located is not None
    assert (located.kind, located.rest) == ("ssl", None)
    other = run(planned, tmp_path, iterations=1, seed=9, name="other")
    with pytest.raises(UsageError, match="keeps its settings"):
        run(planned, tmp_path, weights=str(other.file), backbone=None, iterations=1, name="second", resume=True)
    with pytest.raises(UsageError, match="keeps its settings"):
        run(planned, tmp_path, weights="auto", backbone="vit_xs", iterations=1, name="second", resume=True)
    again = run(planned, tmp_path, weights="auto", backbone=None, iterations=1, name="second", resume=True)
    assert (again.about.steps, again.about.from_random) == (1, True)
    with pytest.raises(WeightsError, match="another backbone"):
        locate_weights(str(second.file), get_spec("vit_xs"), offline=True)


def test_labels_stay_known_when_an_earlier_stage_is_gone(planned: Workspace, tmp_path: Path) -> None:
    """What taught the first stage stands in the second one's file; without that, the broken chain is told."""
    options: dict[str, object] = {"iterations": 1, "supervised": True}
    second: dict[str, object] = {"datasets": (SECOND,), "backbone": None}
    first = run(planned, tmp_path, name="first", **options)
    then = run(planned, tmp_path, name="then", weights=str(first.file), **options | second)
    run(planned, tmp_path, name="first", left_out_fold="0", overwrite=True, **options)
    base = as_base(locate_weights(str(then.file), get_spec("vit_t_xs"), offline=True))
    assert labels_read(base, DATASET) == {f"case_{index}" for index in range(5)}
    with pytest.raises(UsageError, match="the weights that it begins with"):
        run(planned, tmp_path, name="first", weights=str(first.file), overwrite=True, **options)
    first.file.unlink()
    told = SilentReporter()
    tell_what_was_seen(base, DATASET, ["case_0"], told)
    assert any("labels of 1 of the 1 validation cases" in text for text in told.warnings)
    assert not any("not known" in text for text in told.warnings)
    older = write_pretrained(then.file, load_file(then.file), then.about.model_copy(update={"earlier": None}))
    told = SilentReporter()
    tell_what_was_seen(base.model_copy(update={"sha256": older.sha256}), DATASET, ["case_0"], told)
    assert any("not known" in text and str(first.file) in text for text in told.warnings)
    third = run(planned, tmp_path, name="third", weights=str(then.file), reporter=told, **options | second)
    assert third.about.earlier is not None
    assert third.about.earlier.lost == (str(first.file),)


def test_the_command_reads_its_flags(planned: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run by command, the refusal of a second one on top of it, and supervised images without labels refused."""
    words = ["-d", str(planned.raw / DATASET), "-c", "2d", "--weights", "none", "--backbone", "vit_xs"]
    words += ["--device", "cpu", "--iterations", "1", "--epochs", "1", "--workers", "0", "--batch-size", "2"]
    words += ["--raw", str(planned.raw), "--preprocessed", str(planned.preprocessed), "--results", str(tmp_path)]
    assert command.main([*words, "--cases", "case_0,case_1", "--name", "mine"]) == 0
    assert "2 cases" in capsys.readouterr().out
    assert read_pretrained(tmp_path / "pretrained" / "mine" / "weights.safetensors") is not None
    assert command.main([*words, "--name", "mine"]) == 2
    assert "--c continues it" in capsys.readouterr().err
    assert command.main([*words, "--supervised", "--images", "imagesTs"]) == 2
