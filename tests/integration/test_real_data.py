"""The three commands on a few cases of each real dataset, no setting touched but the length of training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest
from PIL import Image

from samunet.artifacts.plan import load_plan
from samunet.cli import plan_and_preprocess, predict, train

DATASETS = ("Dataset004_Hippocampus", "Dataset021_SunnybrookLV", "Dataset022_MouseBrain", "Dataset023_CurvasCT2D")
NUM_CASES = 5


def few_cases(source: Path, target: Path) -> Path:
    """A dataset folder with the first cases of another, those of different groups first."""
    description = json.loads((source / "dataset.json").read_text())
    ending = description["file_ending"]
    labels = sorted((source / "labelsTr").glob(f"*{ending}"))
    names = [path.name.removesuffix(ending) for path in labels]
    groups = source / "case_groups.json"
    if groups.is_file():
        by_group = json.loads(groups.read_text())
        first = {by_group[name]: name for name in reversed(names)}
        names = sorted(first.values())[:NUM_CASES]
        (target / "imagesTr").mkdir(parents=True)
        (target / groups.name).write_text(json.dumps({name: by_group[name] for name in names}))
    for name in names[:NUM_CASES]:
        for folder, suffix in (("imagesTr", "_0000"), ("labelsTr", "")):
            (target / folder).mkdir(parents=True, exist_ok=True)
            shutil.copy(source / folder / f"{name}{suffix}{ending}", target / folder)
    description["numTraining"] = NUM_CASES
    (target / "dataset.json").write_text(json.dumps(description))
    return target


@pytest.mark.parametrize("name", DATASETS)
def test_a_real_dataset_runs_through_and_masks_keep_their_geometry(shared_data: Path, tmp_path: Path, name: str):
    """Plan, train two steps, predict: each mask has its image's grid, and each decision has a reason."""
    if not (shared_data / name).is_dir():
        pytest.skip(f"no {name} at {shared_data}")
    raw = few_cases(shared_data / name, tmp_path / "raw" / name)
    workspace = ["--workspace", str(tmp_path)]
    assert plan_and_preprocess.main(["-d", name, "--minutes", "10", *workspace]) == 0
    plan = load_plan(tmp_path / "preprocessed" / name / "plans.json")
    fast = ["--weights", "none", "--device", "cpu", "--epochs", "1", "--iterations", "2", "--batch-size", "2"]
    assert train.main([name, "0", *fast, "--disable_tta", *workspace]) == 0
    output = tmp_path / "masks"
    code = predict.main(
        ["-i", str(raw / "imagesTr"), "-o", str(output), "-d", name, "--disable_tta", "--device", "cpu", *workspace]
    )
    assert code == 0
    images = sorted((raw / "imagesTr").iterdir())
    assert len(images) == NUM_CASES
    for image in images:
        mask = output / image.name.replace("_0000", "")
        if plan.file_ending == ".png":
            assert Image.open(mask).size == Image.open(image).size
            continue
        written, source = nibabel.load(mask), nibabel.load(image)
        assert written.shape == source.shape
        assert np.array_equal(written.affine, source.affine)
        for code_name in ("qform_code", "sform_code"):
            assert written.header[code_name] == source.header[code_name]
    for configuration in plan.configurations.values():
        for devices in configuration.recipes.values():
            for recipe in devices.values():
                assert all(len(getattr(recipe, field).reason) > 5 for field in type(recipe).model_fields)
