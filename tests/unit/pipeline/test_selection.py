"""Which trained model answers when only a dataset is named: of the kind asked, in the recommended configuration."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from samunet.artifacts.best import Best, BestModel, CandidateScore
from samunet.artifacts.checkpoint import BaseWeights, Checkpoint, Manifest, write_checkpoint
from samunet.artifacts.method import PromptMethod
from samunet.artifacts.plan import resolve_recipe, save_plan
from samunet.artifacts.report import Interval
from samunet.artifacts.workspace import Workspace
from samunet.core.config import save_schema
from samunet.core.errors import UsageError
from samunet.core.files import write_json
from samunet.core.log import SilentReporter
from samunet.pipeline.candidates import find_models
from samunet.pipeline.selection import choose_model_folder, select_models
from samunet.training.checkpointing import recipe_to_json
from tests.samples import DATASET, description_of, make_plan, make_recipe


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    """A planned dataset, whose recommended configuration is 2d."""
    found = Workspace.locate(workspace=tmp_path, environment={})
    found.plan_file(DATASET).parent.mkdir(parents=True)
    save_plan(make_plan(), found.plan_file(DATASET))
    return found


def train(
    workspace: Workspace, name: str, *, prompts: str = "none", fold: str = "0", base: BaseWeights | None = None
) -> Path:
    """A finished fold of a model, as far as choosing goes."""
    plan = make_plan(recipes={"none": {"cpu": make_recipe(prompts=PromptMethod(kind=prompts))}})
    recipe = resolve_recipe(plan.configuration("2d"), "none", "cpu")
    configuration, preset, kind = name.split("__")
    manifest = Manifest(
        dataset=DATASET,
        configuration=configuration,
        preset=preset,
        fold=fold,
        recipe=recipe_to_json(recipe),
        base=base or BaseWeights(kind=kind),
        seed=0,
        steps=0,
        epochs=0,
        minutes=0,
    )
    folder = workspace.results / DATASET / name
    (folder / f"fold_{fold}").mkdir(parents=True)
    checkpoint = Checkpoint(manifest, plan, description_of(plan), {}, {"weight": torch.zeros(1)})
    write_checkpoint(folder / f"fold_{fold}" / "checkpoint_final.safetensors", checkpoint)
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


@pytest.mark.parametrize("label", ["auto-n5", "auto-n5s3", "samed-c01ab2f"])
def test_a_run_on_a_subset_does_not_stand_in_for_one_on_all_cases(workspace: Workspace, label: str) -> None:
    """Not though it has the recommended configuration, and not where only a configuration is named."""
    whole, part = train(workspace, "2.5d__auto__none"), train(workspace, f"2d__{label}__none")
    told = SilentReporter()
    assert choose_model_folder(workspace, DATASET, reporter=told) == whole
    assert not told.warnings
    with pytest.raises(UsageError, match="configuration 2d is not trained on all cases") as caught:
        choose_model_folder(workspace, DATASET, configuration="2d", reporter=told)
    assert f"--preset {label}" in str(caught.value.todo)
    assert choose_model_folder(workspace, DATASET, preset=label, reporter=told) == part
    assert not told.warnings


def test_the_only_run_on_a_subset_is_taken_and_said(workspace: Workspace) -> None:
    """Where nothing is trained on all cases; of several none is, also if one has the recommended configuration."""
    part, told = train(workspace, "2.5d__auto-n5__none"), SilentReporter()
    assert choose_model_folder(workspace, DATASET, reporter=told) == part
    assert ["2.5d__auto-n5__none was trained on a subset" in text for text in told.warnings] == [True]
    train(workspace, "2d__auto-n10__none")
    with pytest.raises(UsageError, match="several trained models fit") as caught:
        choose_model_folder(workspace, DATASET)
    assert "samunet_find_best_configuration" not in str(caught.value.todo)
    assert choose_model_folder(workspace, DATASET, configuration="2.5d", reporter=told) == part
    assert len(told.warnings) == 2


def found_best(workspace: Workspace, *models: str, folds: tuple[str, ...]) -> None:
    """What a comparison of these folds would have written."""
    dice = Interval(value=0.9, low=0.8, high=1.0)
    best = Best(
        dataset=DATASET,
        models=tuple(BestModel(model=model, folds=folds, identities={}) for model in models),
        reason="",
        candidates=(CandidateScore(models=models, dice=dice, structures={}),),
        folds=folds,
        cases=("a",),
        mirrored=True,
        rule="",
    )
    save_schema(best, workspace.best_file(DATASET))


def test_folds_that_were_finished_since_the_comparison_are_told(workspace: Workspace) -> None:
    """Those that all models have and "all" is not among, with both ways to take them; not where folds are named."""
    for model, folds in (("2d__auto__none", ("0", "1", "2", "all")), ("2.5d__auto__none", ("0", "1", "3"))):
        for fold in folds:
            train(workspace, model, fold=fold)
    options = {"configuration": None, "preset": None, "checkpoint": "final", "postprocess": True, "prompted": False}
    for models, further in (
        (("2d__auto__none",), "fold 1, 2 of it are finished too and not used"),
        (("2d__auto__none", "2.5d__auto__none"), "fold 1 of it is finished too and not used"),
    ):
        found_best(workspace, *models, folds=("0",))
        told = SilentReporter()
        assert select_models(workspace, DATASET, **options, folds=None, reporter=told).folds == ["0"]
        (line,) = [text for text in told.messages if "finished too" in text]
        assert line.startswith(further)
        assert f"samunet_find_best_configuration {DATASET}" in line
        assert "-f 0 1" in line
        told = SilentReporter()
        select_models(workspace, DATASET, **options, folds=["0"], reporter=told)
        assert not any("finished too" in text for text in told.messages)


def test_a_comparison_says_which_folds_start_from_different_weights(workspace: Workspace) -> None:
    """In one line per model, of the folds that are compared."""
    bases = [BaseWeights(kind="sam", file=file, sha256=file) for file in ("a.pth", "a.pth", "b.pth")]
    for fold, base in enumerate(bases):
        folder = train(workspace, "2d__auto__sam", fold=str(fold), base=base) / f"fold_{fold}"
        write_json(folder / "cases.json", {"train": ["x"], "monitor": [], "validation": [f"case_{fold}"]})
    for folds, lines in ((None, 1), (["0", "1"], 0), (["1", "2"], 1)):
        told = SilentReporter()
        find_models(workspace, DATASET, configurations=None, presets=None, folds=folds, reporter=told)
        assert len([text for text in told.warnings if "fold 2 from b.pth" in text]) == len(told.warnings) == lines
