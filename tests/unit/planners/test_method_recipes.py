"""Changes of the planned method: what depends on it is planned anew, what was edited by hand stays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from samunet.artifacts.checkpoint import BaseWeights
from samunet.artifacts.method import DecoderMethod, DepthAttention, Lora, Method
from samunet.artifacts.plan import ChannelNormalization, Decided, IntensityMap, Plan, Recipe, ResolvedRecipe
from samunet.artifacts.pretraining import Pretrained, write_pretrained
from samunet.artifacts.workspace import Workspace
from samunet.cli.train import method_change
from samunet.core.config import save_schema
from samunet.core.errors import ConfigError, UsageError
from samunet.pipeline.training_run import TrainingRequest, resolve
from samunet.planners import peft
from samunet.planners.method_recipes import (
    automatic_recipe,
    changed_recipe,
    preset_recipe,
    rank_changes,
    with_changes,
)
from samunet.planners.planner import make_plan
from samunet.planners.presets import PRESETS
from tests import planning_facts as facts
from tests.samples import decided

FINGERPRINT = facts.fingerprint([facts.case()] * 6)
WEIGHTS, DEVICE = "sam", "gpu"
WIDE = {"encoder.adapters.0.targets": ["q", "k", "v", "o"]}


@pytest.fixture(scope="module")
def plan() -> Plan:
    """Planned for slices, and for slabs."""
    return make_plan(FINGERPRINT, facts.description(), facts.budget())


def own(plan: Plan, configuration: str = "2d") -> Recipe:
    return plan.configuration(configuration).recipes[WEIGHTS][DEVICE]


def changed(plan: Plan, recipe: Recipe | None = None, configuration: str = "2d", **asked: Any) -> Recipe:
    return changed_recipe(
        recipe or own(plan, configuration),
        plan,
        FINGERPRINT,
        configuration=configuration,
        weights=WEIGHTS,
        device=DEVICE,
        **{"changes": {}, **asked},
    )


@pytest.mark.parametrize("asked", [{"rank": 16}, {"changes": {"encoder.adapters.0.rank": 16}}, {"changes": WIDE}])
def test_the_learning_rate_follows_rank_and_targets(plan: Plan, asked: dict[str, Any]) -> None:
    """More rank or more targets lower it as the rule says, and nothing of the schedule moves."""
    before, after = own(plan), changed(plan, **asked)
    rate, reason = peft.learning_rate(after.method_parts(), weights=WEIGHTS, batch=after.batch_size.value)
    assert (after.learning_rate.value, after.learning_rate.reason) == (rate, reason)
    assert rate < before.learning_rate.value
    assert after.epochs == before.epochs
    assert after.input_size == before.input_size


def test_without_a_change_nothing_changes(plan: Plan) -> None:
    """An empty change gives the recipe itself, reasons included."""
    assert changed(plan) == own(plan)


def test_another_way_of_training_is_planned_anew(plan: Plan) -> None:
    """A whole encoder instead of adapters takes a small rate and another decay."""
    after = changed(plan, changes={"encoder": {"train": "full"}})
    assert after.learning_rate.value == 1e-4
    assert after.weight_decay.value == 0.05


def test_what_was_edited_by_hand_stays(plan: Plan) -> None:
    """An edited rate, length and size survive; the batch is planned around the edited size."""
    edits = {"learning_rate": decided(3e-3), "epochs": decided(7), "input_size": decided(448)}
    edited = own(plan).model_copy(update=edits)
    after = changed(plan, edited, rank=16)
    assert after.method_parts().adapter("lora").rank == 16
    for field in edits:
        assert getattr(after, field) == getattr(edited, field)
    assert after.tile_vox == edited.tile_vox


def normalized(plan: Plan, **recipes: Any) -> Plan:
    """The plan with a window from 0 to 1 as the own normalization of configuration 2d, and other recipes there."""
    window = (ChannelNormalization(scheme="window_to_01", lower=-160.0, upper=240.0),)
    own_one = plan.configurations["2d"].model_copy(update={"normalization": decided(window), **recipes})
    return plan.model_copy(update={"configurations": {**plan.configurations, "2d": own_one}})


def intensities(plan: Plan, weights: str, device: str = "gpu", preset: str = "", **asked: Any) -> IntensityMap:
    """What a recipe that is no planned one maps stored intensities to."""
    common = {"configuration": "2d", "weights": weights, "device": device, **asked}
    if preset:
        return preset_recipe(PRESETS[preset], plan, FINGERPRINT, **common).intensity_map.value
    return automatic_recipe(plan, FINGERPRINT, backbone="vit_t", changes={}, **common).intensity_map.value


def test_intensities_are_those_of_the_weights_asked_for(plan: Plan) -> None:
    """A configuration of its own normalization gives each kind its own map, of what is stored there."""
    edited = normalized(plan)
    assert intensities(edited, "none").kind == "identity"
    assert intensities(edited, "mobile_sam") == IntensityMap(kind="sam_pixels", lower=(0.0,), upper=(1.0,))
    assert intensities(edited, "medsam", preset="samed") == IntensityMap(kind="unit", lower=(0.0,), upper=(1.0,))
    assert intensities(edited, "mobile_sam", from_random=True).kind == "identity"


def test_intensities_need_no_recipe_of_the_plan(plan: Plan) -> None:
    """Nor one for this class of device."""
    recipes = plan.configurations["2d"].recipes
    for left in ({}, {"sam": {"cpu": recipes["sam"]["cpu"]}}):
        assert intensities(normalized(plan, recipes=left), "sam", preset="samed").kind == "sam_pixels"


def test_a_map_that_comes_with_the_configuration_or_the_user_is_kept(plan: Plan) -> None:
    """MedSAM's scaling of every slice for all weights, the user's map for the weights it was given for."""
    for weights in ("none", "mobile_sam"):
        assert intensities(plan, weights, configuration="2d_medsam").kind == "unit_per_slice"
    mine = IntensityMap(kind="sam_pixels", lower=(-3.0,), upper=(3.0,))
    recipes = plan.configurations["2d"].recipes
    marked = Decided(value=mine, reason="I know", source="user")
    changed_sam = recipes["sam"]["gpu"].model_copy(update={"intensity_map": marked})
    edited = normalized(plan, recipes={**recipes, "sam": {**recipes["sam"], "gpu": changed_sam}})
    assert intensities(edited, "sam", preset="samed") == mine
    assert intensities(edited, "medsam", preset="samed").kind == "unit"
    assert intensities(edited, "sam", "cpu", preset="samed") != mine


@pytest.mark.parametrize("change", [{"depth.kind": "none"}, {"depth": {"kind": "none"}}])
def test_slabs_without_a_path_over_depth_are_refused(plan: Plan, change: dict[str, Any]) -> None:
    """As a word or as an object, and the message says what to change."""
    with pytest.raises(ConfigError, match="would not see each other") as caught:
        changed(plan, configuration="3d", changes=change)
    assert "--set depth.kind=attention" in str(caught.value)


def test_random_weights_need_a_method_that_trains_everything(plan: Plan) -> None:
    """Adapters on random weights are refused before anything is built."""
    recipe = plan.configuration("2d").recipes["none"]["gpu"]
    asked = {"encoder": {"train": "adapters", "adapters": [{"kind": "lora"}]}}
    with pytest.raises(ConfigError, match="--weights none"):
        changed_recipe(recipe, plan, FINGERPRINT, configuration="2d", weights="none", device="gpu", changes=asked)


def test_a_rank_that_is_set_holds_in_every_block() -> None:
    """Ranks per block would hide it; given together, both are taken as they are."""
    probed = PRESETS["samed"].method.model_dump(mode="json")
    probed["encoder"]["adapters"][0]["ranks"] = [2] * 12
    method = Method.model_validate(probed)
    assert with_changes(method, {"encoder.adapters.0.rank": 8}).adapter("lora") == Lora(rank=8)
    assert with_changes(method, {}, rank=8).adapter("lora") == Lora(rank=8)
    both = {"encoder.adapters.0.ranks": [3] * 12, "encoder.adapters.0.rank": 3}
    assert with_changes(method, both).adapter("lora").ranks == (3,) * 12
    with pytest.raises(UsageError, match="no low-rank adapters"):
        with_changes(PRESETS["sam_decoder"].method, {}, rank=8)


def test_one_rank_holds_in_encoder_and_decoder() -> None:
    """Where both have low-rank updates both take it, where only the decoder has them it does; else it stays."""
    both = with_changes(PRESETS["samed_s"].method, {}, rank=8)
    assert (both.adapter("lora").rank, both.decoder.rank) == (8, 8)
    assert with_changes(PRESETS["finetune_sam_vit_b_decoder_lora"].method, {}, rank=8).decoder.rank == 8
    assert with_changes(PRESETS["samed"].method, {}, rank=8).decoder.rank == 4


def test_one_rank_is_short_for_its_changes() -> None:
    """The changes that it stands for give the same method, also where ranks per block were given."""
    for name, before in (("samed_s", {}), ("samed", {"encoder.adapters.0.ranks": [2] * 12}), ("ma_sam", {})):
        method = with_changes(PRESETS[name].method, before)
        assert with_changes(method, rank_changes(method, 16)) == with_changes(PRESETS[name].method, before, 16)


def test_what_cannot_be_set_is_told_in_the_words_of_the_command_line() -> None:
    """One message with the value and what to give instead; there is no file to correct."""
    change = dict([method_change("encoder.adapters.0.blocks=[]")])
    with pytest.raises(ConfigError) as caught:
        with_changes(PRESETS["samed"].method, change)
    text = str(caught.value)
    assert text.count("blocks: an empty list names no block") == 1
    assert "--set" in text
    assert "file" not in text


def test_another_kind_starts_from_its_own_defaults() -> None:
    """Values of the former kind do not stand in its way; values given with it hold."""
    ma_sam = PRESETS["ma_sam"].method
    assert with_changes(ma_sam, {"depth.kind": "attention"}).depth == DepthAttention()
    asked = {"encoder.adapters.0.kind": "lora", "encoder.adapters.0.rank": 2}
    assert with_changes(PRESETS["sam_adapter"].method, {"encoder.adapters.0.kind": "lora"}).adapter("lora") == Lora()
    with pytest.raises(ConfigError, match="no such choice"):
        with_changes(PRESETS["sam_adapter"].method, asked)
    corrected = with_changes(PRESETS["med_sa"].method, {"prompts.kind": "points"}).prompts
    assert corrected.corrections == 1


def test_the_command_line_replans_unless_a_rate_is_given(plan: Plan, tmp_path: Path) -> None:
    """--rank and --set reach the rule for the plan's method, for presets and on another backbone; --lr wins."""
    workspace = Workspace.locate(workspace=tmp_path, environment={})
    save_schema(FINGERPRINT, workspace.fingerprint_file(plan.dataset))

    def rate(**asked: Any) -> float:
        request = TrainingRequest(plan.dataset, "0", configuration="2d", **asked)
        return resolve(request, plan, "2d", "cpu", workspace).learning_rate

    for asked in ({}, {"preset": "samed"}, {"backbone": "vit_l"}):
        assert rate(**asked, rank=16) < rate(**asked)
        assert rate(**asked, changes=WIDE) < rate(**asked)
        assert rate(**asked, rank=16, learning_rate=2e-3) == 2e-3


def test_presets_see_pretrained_random_weights_as_they_were_pretrained(plan: Plan, tmp_path: Path) -> None:
    """Intensities as stored, not SAM's; what would leave the decoder random that the file lacks is refused."""
    workspace = Workspace.locate(workspace=tmp_path, environment={})
    save_schema(FINGERPRINT, workspace.fingerprint_file(plan.dataset))
    values = {"kind": "ssl", "backbone": "vit_b", "input_size": 64, "base": BaseWeights(kind="none"), "datasets": ()}
    values |= {"steps": 1, "minutes": 1, "batch_size": 2, "learning_rate": 1e-3, "seed": 0, "from_random": True}
    files = {}
    for objective in ("masked_images", "supervised"):
        files[objective] = str(tmp_path / f"{objective}.safetensors")
        about = Pretrained(objective=objective, **values)
        write_pretrained(Path(files[objective]), {"image_encoder.neck.0.weight": torch.zeros(1)}, about)

    def recipe(objective: str, **asked: Any) -> ResolvedRecipe:
        request = TrainingRequest(plan.dataset, "0", configuration="2d", weights=f"ssl:{files[objective]}", **asked)
        return resolve(request, plan, "2d", "cpu", workspace)

    assert recipe("masked_images", preset="samed").intensity_map.kind == "identity"
    assert recipe("masked_images").intensity_map.kind == "identity"
    for asked in ({"preset": "samed_s"}, {"changes": {"decoder.train": "lora"}}):
        with pytest.raises(ConfigError, match="does not go with these weights") as caught:
            recipe("masked_images", **asked)
        assert "set decoder.train to full" in str(caught.value)
        assert recipe("supervised", **asked).method.decoder.train == "lora"


def test_a_decoder_that_the_weights_lack_trains_whole(plan: Plan, tmp_path: Path) -> None:
    """On a CPU the plan trains LoRA in the decoder; where the file holds none, all of it, and other changes stay."""
    workspace = Workspace.locate(workspace=tmp_path, environment={})
    save_schema(FINGERPRINT, workspace.fingerprint_file(plan.dataset))
    values = {"kind": "ssl", "input_size": 64, "datasets": (), "steps": 1, "minutes": 1, "batch_size": 2}
    values |= {"learning_rate": 1e-3, "seed": 0, "from_random": False, "base": BaseWeights(kind="ssl", file="gone")}

    def recipe(objective: str, backbone: str, **asked: Any) -> ResolvedRecipe:
        file = tmp_path / f"{objective}_{backbone}.safetensors"
        about = Pretrained(objective=objective, backbone=backbone, **values)
        write_pretrained(file, {"image_encoder.neck.0.weight": torch.zeros(1)}, about)
        request = TrainingRequest(plan.dataset, "0", configuration="2d", weights=f"ssl:{file}", **asked)
        return resolve(request, plan, "2d", "cpu", workspace)

    for backbone in ("vit_b", "vit_xs"):
        held, lacking = recipe("supervised", backbone), recipe("masked_images", backbone)
        assert (held.method.decoder.train, lacking.method.decoder.train) == ("lora", "full")
        assert lacking.learning_rate < held.learning_rate
        changed = recipe("masked_images", backbone, changes={"encoder.adapters.0.rank": 6})
        assert (changed.method.adapter("lora").rank, changed.method.decoder.train) == (6, "full")


@pytest.mark.parametrize("changes", [{"prompts.kind": "box"}, {"fusion.kind": "unet", "decoder.train": "none"}])
def test_prompts_and_unets_take_the_place_of_a_planned_side_path(plan: Plan, changes: dict[str, Any]) -> None:
    """Whoever asks for these alone gets them; whoever asks for a side path beside them is told that it has no place."""
    planned = plan.configuration("2d").recipes["none"]["cpu"].method_parts()
    assert planned.decoder.upsampler == "side_path"
    assert with_changes(planned, changes).decoder.upsampler == "sam"
    assert with_changes(planned, {"decoder.path_width": 8}).decoder.upsampler == "side_path"
    for asked in ({"decoder.upsampler": "side_path"}, {"decoder.path_width": 8}, {"decoder.deep_supervision": True}):
        with pytest.raises(ConfigError, match=r"decoder\.upsampler to sam|decoder to"):
            with_changes(planned, {**changes, **asked})


@pytest.mark.parametrize("upsampler", ["sam", "progressive"])
def test_another_upsampler_takes_the_place_of_a_planned_side_path(plan: Plan, upsampler: str) -> None:
    """One change is enough; a field of the path that is asked for beside it is refused."""
    planned = plan.configuration("2d").recipes["none"]["cpu"].method_parts()
    changes = {"decoder.upsampler": upsampler}
    assert with_changes(planned, changes).decoder == DecoderMethod(train="full", upsampler=upsampler)
    with pytest.raises(ConfigError, match="path_width is read by the side path only"):
        with_changes(planned, {**changes, "decoder.path_width": 8})


@pytest.mark.parametrize(
    ("changes", "upsampler"),
    [
        ({"decoder": {"train": "full"}}, "sam"),
        ({"fusion.kind": "unet", "decoder": {"train": "none"}}, "sam"),
        ({"prompts": {"kind": "box"}}, "sam"),
        ({"prompts": {}}, "side_path"),
        ({"fusion": {"width": 32}}, "side_path"),
    ],
)
def test_whole_parts_may_be_given(plan: Plan, changes: dict[str, Any], upsampler: str) -> None:
    """Of a part that is given whole, what it does not name is its default."""
    planned = plan.configuration("2d").recipes["none"]["cpu"].method_parts()
    assert with_changes(planned, changes).decoder.upsampler == upsampler


@pytest.mark.parametrize("part", ["decoder", "prompts", "fusion"])
def test_a_part_that_is_no_object_is_refused(plan: Plan, part: str) -> None:
    """It is one error that names the part."""
    planned = plan.configuration("2d").recipes["none"]["cpu"].method_parts()
    with pytest.raises(ConfigError, match=part):
        with_changes(planned, {part: "box"})
