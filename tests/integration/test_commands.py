"""The commands, from a raw folder to masks and scores, and what they say when something is wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest

from samunet.artifacts.workspace import Workspace
from samunet.cli import evaluate, plan_and_preprocess, predict, train
from samunet.imageio import read_labels
from tests.samples import DATASET, write_dataset

FAST = ["--weights", "none", "--device", "cpu", "--epochs", "1", "--iterations", "2", "--batch-size", "2"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace after planning and training fold 0 by command."""
    folder = tmp_path_factory.mktemp("workspace")
    write_dataset(Workspace.locate(workspace=folder, environment={}))
    assert plan_and_preprocess.main(["-d", "901", "--workspace", str(folder), "--minutes", "1"]) == 0
    assert train.main(["901", "0", *FAST, "--workers", "0", "--workspace", str(folder)]) == 0
    return folder


def images(folder: Path, target: Path) -> Path:
    """A copy of the test images that a test may damage."""
    shutil.copytree(folder / "raw" / DATASET / "imagesTs", target)
    return target


def test_three_commands_give_masks_in_each_images_geometry(trained: Path, tmp_path: Path):
    """Prediction without -c finds the trained configuration; every mask has its image's grid and codes."""
    source = images(trained, tmp_path / "in")
    turned = nibabel.load(source / "case_6_0000.nii.gz").slicer[::-1, :, ::-1]
    nibabel.save(turned, source / "turned_0000.nii.gz")
    code = predict.main(["-i", str(source), "-o", str(tmp_path / "out"), "-d", "901", "--workspace", str(trained)])
    assert code == 0
    for image in source.iterdir():
        mask = nibabel.load(tmp_path / "out" / image.name.replace("_0000", ""))
        original = nibabel.load(image)
        assert mask.shape == original.shape
        assert np.array_equal(mask.affine, original.affine)
        assert mask.header["qform_code"] == original.header["qform_code"]
        assert mask.header["sform_code"] == original.header["sform_code"]
    straight = read_labels(tmp_path / "out" / "case_6.nii.gz").data
    back = read_labels(tmp_path / "out" / "turned.nii.gz").data[:, ::-1, :, ::-1]
    assert np.array_equal(straight, back)


def test_a_bad_image_stops_no_other_and_sets_the_exit_code(trained: Path, tmp_path: Path, capsys):
    """Exit code 1, the other mask is there, one message without a traceback."""
    source = images(trained, tmp_path / "in")
    broken = source / "case_7_0000.nii.gz"
    broken.write_bytes(broken.read_bytes()[:200])
    output = tmp_path / "out"
    code = predict.main(["-i", str(source), "-o", str(output), "-d", "901", "--workspace", str(trained)])
    text = capsys.readouterr()
    assert code == 1
    assert "case_7" in text.err
    assert "Traceback" not in text.err + text.out
    assert {p.name for p in output.iterdir()} == {"case_6.nii.gz", "prediction.json", "quality.json", "quality.csv"}
    report = json.loads((output / "prediction.json").read_text())
    assert [(c["case"], c["status"]) for c in report["cases"]] == [("case_6", "predicted"), ("case_7", "failed")]


def test_continued_prediction_keeps_what_is_there(trained: Path, tmp_path: Path):
    """An existing mask is not computed again; a missing one is."""
    source, output = images(trained, tmp_path / "in"), tmp_path / "out"
    flags = ["-i", str(source), "-o", str(output), "-d", "901", "--workspace", str(trained)]
    assert predict.main(flags) == 0
    kept, lost = output / "case_6.nii.gz", output / "case_7.nii.gz"
    lost.unlink()
    before = kept.stat().st_mtime_ns
    assert predict.main([*flags, "--continue_prediction"]) == 0
    assert kept.stat().st_mtime_ns == before
    assert lost.is_file()


def test_probabilities_agree_with_the_mask(trained: Path, tmp_path: Path):
    """The most probable class of the saved probabilities is the mask's label."""
    source, output = images(trained, tmp_path / "in"), tmp_path / "out"
    model = next((trained / "results" / DATASET).glob("*__auto__none"))
    code = predict.main(["-i", str(source), "-o", str(output), "-m", str(model), "--save_probabilities"])
    assert code == 0
    probabilities = np.load(output / "case_6.npz")["probabilities"]
    labels = read_labels(output / "case_6.nii.gz").data[0]
    assert probabilities.shape == (3, *labels.shape)
    agreement = np.mean(probabilities.argmax(0) == labels)
    assert agreement > 0.999


def test_predictions_are_evaluated_against_their_references(trained: Path, tmp_path: Path, capsys):
    """samunet_evaluate prints a row per structure and the rule for empty masks."""
    source, output = images(trained, tmp_path / "in"), tmp_path / "out"
    assert predict.main(["-i", str(source), "-o", str(output), "-d", "901", "--workspace", str(trained)]) == 0
    reference = trained / "raw" / DATASET / "labelsTs"
    assert evaluate.main([str(reference), str(output)]) == 0
    printed = capsys.readouterr().out
    assert "ball" in printed
    assert "cube" in printed
    assert "empty" in printed
    assert (output / "summary.json").is_file()


def test_a_second_plan_run_changes_nothing(trained: Path):
    """Planning again keeps plan and store; finished cases are not made again."""
    before = {p: p.stat().st_mtime_ns for p in (trained / "preprocessed").rglob("*.b2nd")}
    plan = (trained / "preprocessed" / DATASET / "plans.json").read_bytes()
    assert plan_and_preprocess.main(["-d", "901", "--workspace", str(trained), "--minutes", "1"]) == 0
    assert {p: p.stat().st_mtime_ns for p in (trained / "preprocessed").rglob("*.b2nd")} == before
    assert (trained / "preprocessed" / DATASET / "plans.json").read_bytes() == plan


@pytest.mark.parametrize(
    ("command", "flags", "words"),
    [
        (train, ["901", "0", "-device", "cpu", "--epoch", "3"], "--epochs"),
        (train, ["901", "7", *FAST], "0, 1, 2, 3, 4, all"),
        (train, ["902", "0", *FAST], "no dataset"),
        (train, ["901", "0", *FAST, "-c", "4d"], "2d"),
        (train, ["901", "1", "--device", "cpu", "--weights", "/nowhere.pth"], "/nowhere.pth"),
        (train, ["901", "0", *FAST], "--overwrite"),
        (train, ["901", "0", "--lr", "-1"], "positive"),
        (train, ["901", "0", "--device", "cuda:77", "--weights", "none"], "cpu"),
        (predict, ["-i", "/nowhere", "-o", "x", "-d", "901"], "does not exist"),
        (predict, ["-i", ".", "-o", "x"], "-d DATASET or -m"),
        (predict, ["-i", ".", "-o", "x", "-d", "901", "-f", "3"], "not finished"),
        (predict, ["-i", ".", "-o", "x", "-d", "901", "-devic", "cpu"], "-device"),
    ],
)
def test_wrong_usage_is_one_message_and_exit_code_2(trained: Path, capsys, command, flags, words):
    """What was wrong and what would be right; never a traceback."""
    assert command.main([*flags, "--workspace", str(trained)]) == 2
    text = capsys.readouterr().err
    assert text.startswith("error: ")
    assert words in text
    assert "Traceback" not in text
