"""Odd datasets through every stage: planned, preprocessed, trained for two steps, predicted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from samunet.artifacts.plan import ResolvedRecipe, load_plan, save_plan
from samunet.artifacts.plan_parts import STORED
from samunet.artifacts.workspace import Workspace
from samunet.core.log import SilentReporter
from samunet.inference import predictor as predictor_module
from samunet.inference.predictor import Predictor
from samunet.inference.sliding import SlidingOptions, SlidingPredictor
from samunet.pipeline.plan import plan_and_preprocess
from samunet.pipeline.train import TrainingResult, train
from samunet.pipeline.training_run import TrainingRequest
from tests.edge_datasets import EDGE_DATASETS, EdgeDataset
from tests.golden.edge_plans import few_samples

DATASET = "Dataset950_Edge"
SIDE = 64


def prepare(root: Path, name: str, configuration: str | None = None) -> tuple[Workspace, EdgeDataset]:
    """Plan and preprocess an edge dataset, then plan smaller by hand: 64 pixels, four slices a step or two slabs."""
    workspace = Workspace.locate(workspace=root, environment={})
    dataset = EDGE_DATASETS[name]()
    folder = dataset.write(workspace.raw / DATASET)
    chosen = None if configuration is None else (configuration,)
    with few_samples():
        result = plan_and_preprocess(folder, workspace, cpu_minutes=1, configurations=chosen, reporter=SilentReporter())
    assert not result.failed
    content = load_plan(workspace.plan_file(DATASET)).model_dump(mode="json")
    for planned in content["configurations"].values():
        depth = planned["slab_depth"]["value"]
        for recipe in (recipe for devices in planned["recipes"].values() for recipe in devices.values()):
            recipe["input_size"]["value"] = SIDE
            recipe["batch_size"]["value"] = 4 if depth == 1 else 2 * depth
            recipe["accumulation_steps"]["value"] = 1
            recipe["mirror_views"]["value"] = 2
    save_plan(type(result.plan).model_validate(content), workspace.plan_file(DATASET))
    return workspace, dataset


def run(workspace: Workspace, fold: str, configuration: str | None = None) -> TrainingResult:
    """Two steps of training from random weights, and the fold's validation."""
    asked = TrainingRequest(
        DATASET,
        fold,
        configuration=configuration,
        weights="none",
        device="cpu",
        epochs=1,
        iterations=2,
        num_workers=0,
        mirror=False,
    )
    return train(asked, workspace, reporter=SilentReporter())


def check_prediction(result: TrainingResult, dataset: EdgeDataset, index: int) -> Predictor:
    """A fresh model segments a case with the planned labels and finite probabilities."""
    predictor = Predictor.from_folder(result.folder.parent, device="cpu")
    image, labels = dataset.cases[index]
    found = predictor.predict(image, with_probabilities=True)
    assert found.labels.shape == labels.shape
    known = {value for values in predictor.plan.label_spec.names.values() for value in values}
    assert set(np.unique(found.labels)) <= {0, *known}
    assert found.probabilities is not None
    assert np.isfinite(found.probabilities).all()
    return predictor


CASES: list[Any] = [
    pytest.param("two_cases", "0", None, id="two_cases"),
    pytest.param("three_slices", "0", "3d", id="three_slices-3d"),
    pytest.param("four_channels", "0", None, id="four_channels"),
    pytest.param("colour_pictures", "0", None, id="colour_pictures"),
    pytest.param("constant_images", "0", None, id="constant_images"),
    pytest.param("all_ignore_slices", "0", None, id="all_ignore_slices"),
    pytest.param("one_case", "all", None, id="one_case"),
    pytest.param("cubic_with_sides", "0", None, id="cubic_with_sides"),
]


@pytest.mark.parametrize(("name", "fold", "configuration"), CASES)
def test_edge_datasets_train_and_predict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, fold: str, configuration: str | None
) -> None:
    """Nothing fails, a case is segmented on its own grid, with the overlaps and views of the plan."""
    seen: list[SlidingOptions] = []

    def recording(models: Any, recipe: ResolvedRecipe, options: SlidingOptions, **others: Any) -> SlidingPredictor:
        seen.append(options)
        return SlidingPredictor(models, recipe, options, **others)

    monkeypatch.setattr(predictor_module, "SlidingPredictor", recording)
    workspace, dataset = prepare(tmp_path, name, configuration)
    result = run(workspace, fold, configuration)
    predictor = check_prediction(result, dataset, len(dataset.cases) - 1)
    assert predictor.recipe.input_size == SIDE
    assert predictor.recipe.slab_depth == (3 if configuration == "3d" else 1)
    assert seen[-1].depth_overlap == predictor.configuration.depth_overlap.value
    assert seen[-1].mirror_views == predictor.recipe.mirror_views == 2
    assert predictor.recipe.planes == (("slices", "rows") if name == "cubic_with_sides" else STORED)
    if name == "colour_pictures":
        assert predictor.recipe.augmentation.rotation_deg == 180
