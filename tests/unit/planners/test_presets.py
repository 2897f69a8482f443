"""Presets: which there are, what they fix, and what the plan decides for them."""

from __future__ import annotations

import pytest

from samunet.artifacts.method import Method
from samunet.artifacts.plan import Plan, Recipe
from samunet.core.errors import ConfigError, UsageError
from samunet.planners.planner import make_plan
from samunet.planners.method_recipes import automatic_recipe, preset_recipe, with_changes
from samunet.planners.presets import PRESETS, get_preset
from tests import planning_facts as facts

FINGERPRINT = facts.fingerprint([facts.case()] * 6)
ROWS = ("sam_decoder", "sam_zero_shot", "medsam", "sam_adapter", "samed", "samed_s", "samed_h", "med_sa", "ma_sam", "nnsam")


@pytest.fixture(scope="module")
def plan() -> Plan:
    return make_plan(FINGERPRINT, facts.description(), facts.budget())


def recipe(plan: Plan, name: str, configuration: str | None = None, **options: object) -> Recipe:
    preset = get_preset(name)
    chosen = configuration or preset.configuration or "2d"
    values = {"weights": preset.weights, "device": "gpu", **options}
    return preset_recipe(preset, plan, FINGERPRINT, configuration=chosen, **values)  # type: ignore[arg-type]


def test_all_rows_are_there() -> None:
    """The rows of the field and all 18 of the finetune-SAM study are presets."""
    assert set(ROWS) <= set(PRESETS)
    study = [name for name in PRESETS if name.startswith("finetune_sam_")]
    assert len(study) == 18
    assert {PRESETS[name].backbone for name in study} == {"vit_h", "vit_b", "vit_t"}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_keeps_its_method_and_takes_its_size_from_the_plan(plan: Plan, name: str) -> None:
    """Method and backbone are the preset's; with the published recipe the input size is too."""
    planned, published = recipe(plan, name), recipe(plan, name, published=True)
    assert planned.method_parts() == PRESETS[name].method
    assert planned.backbone.value == PRESETS[name].backbone
    assert planned.input_size.value % 224 == 0
    assert published.input_size.value == PRESETS[name].published.input_size
    assert published.learning_rate.value == PRESETS[name].published.learning_rate
    depth = plan.configuration(PRESETS[name].configuration or "2d").slab_depth.value
    assert published.batch_size.value % depth == 0
    assert planned.batch_size.value % depth == 0


def test_slabs_need_a_method_with_depth(plan: Plan) -> None:
    """A slice-wise method on slabs is refused; one with depth also runs on single slices."""
    with pytest.raises(ConfigError, match="slices one by one"):
        recipe(plan, "samed", "3d")
    assert recipe(plan, "ma_sam", "2d").depth.value.kind == "convolution"


def test_medsam_keeps_its_intensities(plan: Plan) -> None:
    """It is trained on its own store, whose slices are scaled to [0, 1], and refused on another."""
    assert recipe(plan, "medsam").intensity_map.value.kind == "unit_per_slice"
    assert plan.store_key("2d_medsam") != plan.store_key("2d")
    assert plan.normalization_of("2d_medsam")[0].scheme == "percentiles_to_01"
    with pytest.raises(ConfigError, match="own intensities"):
        recipe(plan, "medsam", "2d")


def test_a_budget_is_kept_by_checkpointing_and_parts(plan: Plan) -> None:
    """The published batch of a large backbone is split and checkpointed where the GPU is small."""
    small = plan.model_copy(update={"budget": facts.budget(gpu=6)})
    chosen = recipe(small, "samed_h", published=True)
    assert chosen.checkpointing.value
    assert chosen.accumulation_steps.value > 1
    assert chosen.batch_size.value == 24


def test_changes_of_a_method() -> None:
    """Any value can be changed by its path; paths that do not exist and impossible results are refused."""
    samed = PRESETS["samed"].method
    changed = with_changes(samed, {"encoder.adapters.0.rank": 16, "decoder.train": "lora"})
    assert changed.adapter("lora").rank == 16
    assert changed.decoder.train == "lora"
    assert with_changes(samed, {}) == samed
    with pytest.raises(ConfigError, match="no such choice"):
        with_changes(samed, {"encoder.adapters.1.rank": 2})
    with pytest.raises(ConfigError, match="no such choice"):
        with_changes(samed, {"encoder.rank": 2})
    with pytest.raises(ConfigError, match="set encoder.train to adapters"):
        with_changes(samed, {"encoder.train": "frozen"})


def test_the_plans_own_method_on_another_backbone(plan: Plan) -> None:
    """Another backbone is planned anew: size, batch and learning rate are its own."""
    chosen = automatic_recipe(
        plan, FINGERPRINT, configuration="2d", weights="sam", device="gpu", backbone="vit_h", changes={}
    )
    assert chosen.backbone.value == "vit_h"
    assert isinstance(chosen.method_parts(), Method)
    assert chosen.method_parts() == plan.configuration("2d").recipes["sam"]["gpu"].method_parts()


def test_unknown_presets_are_refused() -> None:
    """The message lists those there are."""
    with pytest.raises(UsageError, match="no such preset") as caught:
        get_preset("sammed")
    assert "samed" in str(caught.value.expected)
