"""Which trained model answers when only a dataset is named: of the kind asked, in the recommended configuration."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from samunet.artifacts.checkpoint import BaseWeights, Checkpoint, Manifest, write_checkpoint
from samunet.artifacts.method import PromptMethod
from samunet.artifacts.plan import resolve_recipe, save_plan
from samunet.artifacts.workspace import Workspace
from samunet.core.errors import UsageError
from samunet.pipeline.selection import choose_model_folder
from samunet.training.checkpointing import recipe_to_json
from tests.samples import DATASET, description_of, make_plan, make_recipe


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    """A planned dataset, whose recommended configuration is 2d."""
    found = Workspace.locate(workspace=tmp_path, environment={})
    found.plan_file(DATASET).parent.mkdir(parents=True)
    save_plan(make_plan(), found.plan_file(DATASET))
    return found


def train(workspace: Workspace, name: str, *, prompts: str = "none") -> Path:
    """A finished fold of a model, as far as choosing goes."""
    plan = make_plan(recipes={"none": {"cpu": make_recipe(prompts=PromptMethod(kind=prompts))}})
    recipe = resolve_recipe(plan.configuration("2d"), "none", "cpu")
    configuration, preset, kind = name.split("__")
    manifest = Manifest(
        dataset=DATASET,
        configuration=configuration,
        preset=preset,
        fold="0",
        recipe=recipe_to_json(recipe),
        base=BaseWeights(kind=kind),
        seed=0,
        steps=0,
        epochs=0,
        minutes=0,
    )
    folder = workspace.results / DATASET / name
    (folder / "fold_0").mkdir(parents=True)
    checkpoint = Checkpoint(manifest, plan, description_of(plan), {}, {"weight": torch.zeros(1)})
    write_checkpoint(folder / "fold_0" / "checkpoint_final.safetensors", checkpoint)
    return folder


def test_prompts_choose_among_the_models_that_take_some(workspace: Workspace) -> None:
    """Beside models that segment by themselves, in another configuration than the recommended one too."""
    own = train(workspace, "2d__auto__none")
    prompted = train(workspace, "2.5d__med_sa__none", prompts="box")
    assert choose_model_folder(workspace, DATASET, prompted=True) == prompted
    assert choose_model_folder(workspace, DATASET) == own
    other = train(workspace, "2d__medsam__none", prompts="box")
    assert choose_model_folder(workspace, DATASET, prompted=True) == other
    assert choose_model_folder(workspace, DATASET) == own


def test_without_a_model_of_the_kind_the_others_are_offered(workspace: Workspace) -> None:
    """So that what refuses the prompts, or their absence, can say what the model is."""
    own = train(workspace, "2d__auto__none")
    assert choose_model_folder(workspace, DATASET, prompted=True) == own


def test_a_checkpoint_that_cannot_be_read_is_no_model_of_the_kind(workspace: Workspace) -> None:
    """The other one is taken."""
    own = train(workspace, "2d__auto__none")
    damaged = train(workspace, "2d__samed__none")
    (damaged / "fold_0" / "checkpoint_final.safetensors").write_bytes(b"half")
    assert choose_model_folder(workspace, DATASET) == own


def test_several_that_fit_are_named_with_what_tells_them_apart(workspace: Workspace) -> None:
    """Models that differ in their weights alone are told apart by their folder only."""
    for name in ("2d__auto__none", "2d__auto__sam"):
        train(workspace, name)
    with pytest.raises(UsageError, match=r"several trained models fit") as caught:
        choose_model_folder(workspace, DATASET)
    assert caught.value.todo is not None
    assert caught.value.todo.startswith("choose with -m FOLDER")
    train(workspace, "2d__samed__sam")
    with pytest.raises(UsageError) as caught:
        choose_model_folder(workspace, DATASET)
    assert "--preset NAME" in str(caught.value.todo)
    assert choose_model_folder(workspace, DATASET, preset="samed").name == "2d__samed__sam"
