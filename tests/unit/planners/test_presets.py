"""Presets: which there are, what they fix, and what the plan decides for them."""

from __future__ import annotations

import pytest

from samunet.artifacts.method import Method
from samunet.artifacts.plan import Plan, Recipe
from samunet.artifacts.plan_parts import STORED
from samunet.core.errors import ConfigError, UsageError
from samunet.planners import schedule
from samunet.planners.method_recipes import automatic_recipe, preset_recipe, with_changes
from samunet.planners.planner import make_plan
from samunet.planners.presets import PRESETS, get_preset
from tests import planning_facts as facts

FINGERPRINT = facts.fingerprint([facts.case()] * 6)
ROWS = (
    "sam_decoder",
    "sam_zero_shot",
    "medsam",
    "sam_adapter",
    "samed",
    "samed_s",
    "samed_h",
    "med_sa",
    "ma_sam",
    "nnsam",
)


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
    assert planned.input_size.value % 112 == 0
    assert published.input_size.value == PRESETS[name].published.input_size
    assert published.planes.value == STORED
    assert published.loss.value == PRESETS[name].published.loss.model_copy(update={"estimated_iou": 1.0})
    for field in {"learning_rate", "weight_decay"} - set(PRESETS[name].published.left_to_plan):
        assert getattr(published, field).value == getattr(PRESETS[name].published, field)
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


def test_medsam_takes_configurations_with_its_intensities(plan: Plan) -> None:
    """A user's configuration that inherits from 2d_medsam is accepted; with other intensities it is refused."""
    parent = plan.configurations["2d_medsam"]
    child = parent.model_copy(update={"inherits_from": "2d_medsam"})
    other = child.model_copy(update={"normalization": plan.normalization})
    edited = plan.model_copy(update={"configurations": {**plan.configurations, "mine": child, "other": other}})
    assert recipe(edited, "medsam", "mine") == recipe(plan, "medsam")
    with pytest.raises(ConfigError, match="own intensities"):
        recipe(edited, "medsam", "other")


def test_a_rate_of_another_optimizer_is_not_taken(plan: Plan) -> None:
    """NnSAM's rate and decay were SGD's: the published recipe keeps the planned ones and says why."""
    planned, published = recipe(plan, "nnsam"), recipe(plan, "nnsam", published=True)
    for field in ("learning_rate", "weight_decay"):
        assert getattr(published, field).value == getattr(planned, field).value
        assert "SGD" in getattr(published, field).reason
    assert published.learning_rate.value < PRESETS["nnsam"].published.learning_rate / 2
    assert published.epochs.value == 1000


@pytest.mark.parametrize("device", ["gpu", "cpu"])
def test_the_average_spans_the_published_steps(plan: Plan, device: str) -> None:
    """On a small dataset a publication's epochs are few steps; the average is planned for these, not for the rule's."""
    published = recipe(plan, "samed", published=True, device=device)
    steps = published.iterations.value * published.epochs.value
    assert published.minutes.value is None
    assert (published.ema_decay.value, published.ema_decay.reason) == schedule.ema_decay(steps)
    assert published.epochs.reason == published.iterations.reason == "published with samed"


def test_no_reason_speaks_of_random_weights_where_there_are_none(plan: Plan) -> None:
    """MedSAM's way trains a whole pretrained encoder."""
    found = recipe(plan, "medsam")
    reasons = [getattr(found, name).reason for name in type(found).model_fields]
    assert found.weight_decay.value == 0.05
    assert [reason for reason in reasons if "random" in reason] == []


@pytest.mark.parametrize(
    ("name", "cross_entropy", "dice"),
    [
        ("samed", 0.2, 0.8),
        ("ma_sam", 0.2, 0.8),
        ("medsam", 1, 1),
        ("med_sa", 1, 1),
        ("med_sa_2d", 1, 0),
        ("nnsam", 1, 1),
    ],
)
def test_published_losses(plan: Plan, name: str, cross_entropy: float, dice: float) -> None:
    """The weights are the publication's; Medical SAM Adapter has no Dice where it sees slices."""
    loss = recipe(plan, name, published=True).loss.value
    assert (loss.cross_entropy, loss.dice) == (cross_entropy, dice)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("samed", {"weights": "none"}, "set encoder.train to full"),
        ("sam_zero_shot", {"weights": "none"}, "set decoder.train to full"),
        ("nnsam", {"weights": "none"}, "give --weights"),
        ("samed", {"weights": "mobile_sam"}, "--backbone vit_t"),
        ("medsam", {"weights": "medsam", "backbone": "vit_h"}, "--backbone vit_b"),
        ("nnsam", {"weights": "mobile_sam", "configuration": "3d"}, "--set depth.kind=attention"),
        ("ma_sam", {"changes": {"depth.kind": "none"}}, "--set depth.kind=attention"),
        ("samed", {"changes": {"encoder.adapters.0.blocks": [0, 12]}}, "encoder.adapters.0.blocks"),
        ("med_sa", {"changes": {"depth.blocks": [-33]}}, "depth.blocks"),
        ("samed", {"changes": {"encoder.adapters.0.ranks": [4, 8]}}, "encoder.adapters.0.ranks"),
    ],
)
def test_what_cannot_be_trained_is_refused_when_it_is_read(
    plan: Plan, name: str, options: dict[str, object], words: str
) -> None:
    """Method, weights, backbone and configuration are checked before anything is built, and the message helps."""
    with pytest.raises(ConfigError) as caught:
        recipe(plan, name, **options)  # type: ignore[arg-type]
    assert words in str(caught.value)


def test_from_random_weights_what_trains_whole_is_allowed(plan: Plan) -> None:
    """MedSAM's way and fine-tuning of everything need no weights."""
    for name in ("medsam", "finetune_sam_vit_b_both_vanilla"):
        assert recipe(plan, name, weights="none").encoder.value.train == "full"


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
    with pytest.raises(ConfigError, match=r"set encoder\.train to adapters"):
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
