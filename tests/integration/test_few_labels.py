"""Runs on subsets of the cases and on scribbles, by command and on phantoms."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from samunet.artifacts.workspace import Workspace
from samunet.cli import plan_and_preprocess, train
from samunet.core.files import read_json, write_json
from samunet.core.log import SilentReporter
from samunet.imageio import read_labels, write_image, write_labels
from samunet.pipeline.train import train as train_run
from samunet.pipeline.training_run import TrainingRequest
from samunet.preprocessing.store import CaseStore
from samunet.training.data import SliceDataset
from tests.samples import DATASET, LABELS, install, make_case, make_plan, make_recipe, write_dataset

FAST = [
    "--weights",
    "none",
    "--device",
    "cpu",
    "--epochs",
    "1",
    "--iterations",
    "2",
    "--batch-size",
    "2",
    "--disable_tta",
]


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with a planned dataset of eight cases, two of each patient."""
    folder = tmp_path_factory.mktemp("workspace")
    raw = write_dataset(Workspace.locate(workspace=folder, environment={}), num_train=10)
    groups = {f"case_{index}": f"patient_{index // 2}" for index in range(10)}
    write_json(raw / "case_groups.json", {**groups, **{f"again_{name}": group for name, group in groups.items()}})
    assert plan_and_preprocess.main(["-d", "901", "--workspace", str(folder), "--minutes", "1"]) == 0
    return folder


def run(folder: Path, *flags: str) -> int:
    return train.main(["901", "0", *FAST, "--workers", "0", "--workspace", str(folder), *flags])


def runs(folder: Path) -> dict[str, dict]:
    """Recorded cases by name of the model folder."""
    return {file.parent.parent.name: read_json(file) for file in (folder / "results").rglob("cases.json")}


def test_subsets_are_nested_recorded_and_in_folders_of_their_own(planned: Path, capsys: pytest.CaptureFixture[str]):
    """Two of four lie within four, patients whole; subsets.json and cases.json say which, the folder says how many."""
    assert run(planned, "--num-cases", "2") == 0
    assert "2 training cases, drawn with seed 12345" in capsys.readouterr().out
    assert run(planned, "--num-cases", "5", "--subset-seed", "12345") == 0
    recorded = {name.split("__")[1]: cases for name, cases in runs(planned).items()}
    two, five = set(recorded["auto-n2"]["train"]), set(recorded["auto-n5"]["train"])
    assert two < five
    assert (len(two), len(five)) == (2, 4)
    assert {int(name[-1]) // 2 for name in two} == {int(min(two)[-1]) // 2}
    assert recorded["auto-n5"]["subset"]["wanted"] == 5
    assert recorded["auto-n5"]["monitor"] == []
    orders = read_json(planned / "preprocessed" / DATASET / "subsets.json")["orders"]
    assert [(entry["fold"], entry["seed"]) for entry in orders] == [("0", 12345)]
    assert set(recorded["auto-n2"]["validation"]).isdisjoint(five)


def test_a_subset_run_continues_only_on_its_own_cases(planned: Path, capsys: pytest.CaptureFixture[str]):
    """--c finds the run by its number of cases, and refuses when the order on disk is another by now."""
    assert run(planned, "--num-cases", "4", "--subset-seed", "3") == 0
    flags = [
        "901",
        "0",
        "--disable_tta",
        "--weights",
        "none",
        "--device",
        "cpu",
        "--workers",
        "0",
        "--workspace",
        str(planned),
    ]
    again = [*flags, "--num-cases", "4", "--subset-seed", "3", "--c"]
    assert train.main([*again, "--epochs", "2"]) == 0
    file = planned / "preprocessed" / DATASET / "subsets.json"
    content = file.read_text()
    edited = json.loads(content)
    edited["orders"][-1]["groups"].reverse()
    write_json(file, edited)
    assert train.main(again) == 2
    assert "other cases than are asked for now" in capsys.readouterr().err
    file.write_text(content)


def test_cases_are_named_and_wrong_words_are_refused(planned: Path, capsys: pytest.CaptureFixture[str]):
    """--cases takes training cases of the fold; validation cases, two choices and a seed alone end with 2."""
    split = read_json(planned / "preprocessed" / DATASET / "splits_final.json")[0]
    chosen = split["train"][:3]
    assert run(planned, "--cases", ",".join(chosen)) == 0
    assert sorted(chosen) in [cases["train"] for cases in runs(planned).values()]
    for flags in (["--cases", split["val"][0]], ["--cases", "x", "--num-cases", "2"], ["--subset-seed", "1"]):
        assert run(planned, *flags) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_images_without_labels_are_learnt_from_and_validation_cases_are_not(
    planned: Path, capsys: pytest.CaptureFixture[str]
):
    """--unlabelled imagesTr takes the fold's other training cases and their labels from the run, never from disk."""
    before = {file: file.read_bytes() for file in (planned / "raw").rglob("*.nii.gz")}
    flags = ["--num-cases", "2", "--unlabelled", "imagesTr"]
    assert run(planned, *flags, "--epochs", "4", "--lr", "0.01") == 0
    said = capsys.readouterr().out
    assert "6 without labels" in said
    assert said.count("of 6 images without labels") == 2
    recorded = {name.split("__")[1]: cases for name, cases in runs(planned).items()}["auto-unlabelled-n2"]
    split = read_json(planned / "preprocessed" / DATASET / "splits_final.json")[0]
    assert sorted([*recorded["unlabelled"], *recorded["train"]]) == sorted(split["train"])
    made = sorted((planned / "results").rglob("own_labels/lesson_*/labels/*.b2nd"))
    assert {file.stem for file in made} <= set(recorded["unlabelled"])
    assert {file: file.read_bytes() for file in before} == before


def test_images_of_other_folders_are_learnt_from(planned: Path, capsys: pytest.CaptureFixture[str]):
    """Images of imagesTs and a folder are preprocessed first, without labels; such a run has its own folder.

    Further scans of the patients that validate it are left out, as case_groups.json knows them. It goes on when the
    folder is gone.
    """
    folder = planned / "more"
    folder.mkdir()
    split = read_json(planned / "preprocessed" / DATASET / "splits_final.json")[0]
    again = f"again_{split['train'][0]}"
    for name in ("new", again, f"again_{split['val'][0]}"):
        write_image(folder / f"{name}_0000.nii.gz", make_case(77)[0])
    flags = ["--num-cases", "2", "--unlabelled", "imagesTs", str(folder)]
    assert run(planned, *flags) == 0
    assert "4 without labels" in capsys.readouterr().out
    (recorded,) = [cases for name, cases in runs(planned).items() if "-unlabelled" in name and "new" in str(cases)]
    assert recorded["unlabelled"] == [again, "case_10", "case_11", "new"]
    shutil.rmtree(folder)
    longer = ["901", "0", *flags, "--epochs", "2", "--c", "--weights", "none", "--workspace", str(planned)]
    assert train.main(longer) == 0
    told = capsys.readouterr()
    assert "continuing" in told.out
    assert "not there any more" not in told.out + told.err
    assert recorded in runs(planned).values()
    for store in (planned / "preprocessed" / DATASET).glob("unlabelled_*"):
        if "new" in {file.stem for file in store.rglob("*.b2nd")}:
            shutil.rmtree(store)
    assert train.main([*longer, "--epochs", "3"]) == 0
    assert "not there any more" in "".join(capsys.readouterr())


def test_training_cases_that_are_all_to_be_ignored_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """One among others is said to teach nothing; a run that has no other ends with one message."""
    workspace = Workspace.locate(workspace=tmp_path, environment={})
    folder = write_dataset(workspace, num_train=6)
    description = read_json(folder / "dataset.json")
    write_json(folder / "dataset.json", description | {"labels": {**description["labels"], "ignore": 3}})
    empty = make_case(1)[1] * 0 + 3
    write_labels(folder / "labelsTr" / "case_1.nii.gz", empty, geometry=make_case(1)[0].geometry)
    assert plan_and_preprocess.main(["-d", "901", "--workspace", str(tmp_path), "--minutes", "1"]) == 0
    split = read_json(tmp_path / "preprocessed" / DATASET / "splits_final.json")
    fold = str(next(number for number, part in enumerate(split) if "case_1" in part["train"]))
    words = ["901", fold, *FAST, "--workers", "0", "--workspace", str(tmp_path)]
    capsys.readouterr()
    assert train.main([*words, "--cases", "case_1"]) == 2
    told = capsys.readouterr()
    assert "nothing to learn from" in told.err
    assert "case_1" in told.err
    assert "Traceback" not in told.err
    other = next(name for name in split[int(fold)]["train"] if name != "case_1")
    assert train.main([*words, "--cases", f"case_1,{other}"]) == 0
    told = capsys.readouterr()
    assert "1 of 2 training cases teach nothing" in told.out + told.err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--unlabelled", "imagesTr"], "the run has the labels of all"),
        (["--unlabelled", "nowhere"], "nowhere"),
        (["--num-cases", "2", "--unlabelled", "imagesTr", "--set", "prompts.kind=box"], "nothing points at"),
    ],
)
def test_images_that_cannot_be_learnt_from_are_refused(
    planned: Path, capsys: pytest.CaptureFixture[str], flags: list[str], said: str
):
    """Where none is left, where there is no folder, and where a run could not label them: one message."""
    assert run(planned, *flags, "--overwrite") == 2
    errors = capsys.readouterr().err
    assert said in errors
    assert "Traceback" not in errors


def scribbled(labels: np.ndarray, seed: int) -> np.ndarray:
    """Everything ignored but one stroke of background and one within each structure, on every second slice."""
    rng = np.random.default_rng(seed)
    strokes = np.full_like(labels, 3)
    for index in range(0, len(labels), 2):
        for value in (0, 1, 2):
            rows = np.flatnonzero((labels[index] == value).any(1))
            if len(rows):
                row = int(rng.choice(rows))
                columns = np.flatnonzero(labels[index, row] == value)[:8]
                strokes[index, row, columns] = value
    return strokes


def test_scribbles_train_to_masks(tmp_path: Path):
    """From strokes on half of the slices, without a number that is none, to whole masks far better than nothing."""
    workspace = Workspace.locate(workspace=tmp_path, environment={})
    folder = workspace.raw / DATASET
    truth = {}
    for index in range(6):
        volume, labels = make_case(index)
        truth[f"case_{index}"] = labels
        write_image(folder / "imagesTr" / f"case_{index}_0000.nii.gz", volume)
        write_labels(folder / "labelsTr" / f"case_{index}.nii.gz", scribbled(labels, index), geometry=volume.geometry)
    labels_json = {**LABELS, "ignore": 3}
    description = {"channel_names": {"0": "MRI"}, "labels": labels_json, "numTraining": 6, "file_ending": ".nii.gz"}
    write_json(folder / "dataset.json", description)
    recipe = make_recipe(iterations=20, epochs=2, batch_size=8, warmup_steps=5, learning_rate=3e-3, mirror_views=1)
    plan = make_plan(labels=labels_json, recipes={"none": {"cpu": recipe}})
    install(workspace, plan, folder)
    store = workspace.store_folder(DATASET, plan.store_key("2d"))
    record = CaseStore(store).record("case_0")
    assert record.valid_slices == (0, 2, 4)
    request = TrainingRequest(DATASET, "0", weights="none", device="cpu", num_workers=0, seed=3)
    result = train_run(request, workspace, reporter=SilentReporter())
    rows = [json.loads(line) for line in (result.folder / "training_log.jsonl").read_text().splitlines()]
    assert all(np.isfinite(row["loss"]) for row in rows)
    assert rows[-1]["loss"] < rows[0]["loss"]
    found = []
    for mask in (result.folder / "validation").glob("*.nii.gz"):
        predicted, labels = read_labels(mask).data[0], truth[mask.name.removesuffix(".nii.gz")]
        found += [
            2 * ((predicted == v) & (labels == v)).sum() / ((predicted == v).sum() + (labels == v).sum())
            for v in (1, 2)
        ]
    assert np.mean(found) > 0.3, found


def test_slices_without_a_stroke_are_never_drawn(tmp_path: Path):
    """In a hundred samples of a scribbled case every one has a voxel that is known."""
    workspace = Workspace.locate(workspace=tmp_path, environment={})
    folder = workspace.raw / DATASET
    volume, labels = make_case(0)
    for index in range(2):
        write_image(folder / "imagesTr" / f"case_{index}_0000.nii.gz", volume)
        write_labels(folder / "labelsTr" / f"case_{index}.nii.gz", scribbled(labels, 0), geometry=volume.geometry)
    labels_json = {**LABELS, "ignore": 3}
    description = {"channel_names": {"0": "MRI"}, "labels": labels_json, "numTraining": 2, "file_ending": ".nii.gz"}
    write_json(folder / "dataset.json", description)
    plan = make_plan(labels=labels_json)
    install(workspace, plan, folder)
    store = workspace.store_folder(DATASET, plan.store_key("2d"))
    from samunet.artifacts.plan import resolve_recipe

    recipe = resolve_recipe(plan.configuration("2d"), "none", "cpu")
    slices = SliceDataset(CaseStore(store), ["case_0"], plan=plan, recipe=recipe, context=0, seed=1, augment=False)
    known = [(slices[0, index][2] >= 0).any() for index in range(100)]
    assert all(known)
