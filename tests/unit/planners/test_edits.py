"""Decisions of the user: they stay, and what depends on them is planned around them."""

from __future__ import annotations

from typing import Any

import pytest

from samunet.artifacts.model_spec import get_spec
from samunet.artifacts.plan import Configuration, Decided, Plan, Recipe
from samunet.artifacts.plan_document import reduced, resolved
from samunet.core.config import parse_schema
from samunet.core.errors import ConfigError
from samunet.planners import memory
from samunet.planners.edits import Edits, edits_of, places_by_user
from samunet.planners.planner import make_plan
from tests import planning_facts as facts

FINGERPRINT = facts.fingerprint([facts.case(shape=(40, 200, 200))] * 6)
RECIPE = ("recipes", "sam", "gpu")


def plan(edits: Edits | None = None, **budget: float) -> Plan:
    return make_plan(FINGERPRINT, facts.description(), facts.budget(**budget), edits=edits or Edits())


def user(value: Any) -> dict[str, Any]:
    return {"value": value, "reason": "mine", "source": "user"}


def edited(changes: dict[tuple[str, ...], Any], added: dict[str, Any] | None = None, **budget: float) -> Plan:
    """The plan made again after edits at these places and with configurations of the user's own."""
    content = reduced(plan(**budget).model_dump(mode="json"))
    for place, value in changes.items():
        parent = content
        for key in place[:-1]:
            parent = parent[key]
        parent[place[-1]] = user(value)
    content["configurations"] |= added or {}
    return plan(edits_of(parse_schema(Plan, resolved(content), context={"edited": True})), **budget)


def recipe(found: Plan, configuration: str = "2d", weights: str = "sam", device: str = "gpu") -> Recipe:
    return found.configurations[configuration].recipes[weights][device]  # type: ignore[index]


def test_no_edits_change_nothing() -> None:
    """Planning around nothing is planning."""
    assert plan(edits_of(plan())) == plan()


def test_an_edit_stays_and_says_what_the_rule_does() -> None:
    """Value, reason and source are the user's; the rule's answer stands beside them, through any number of rounds."""
    found = edited({("mirror_axes",): []})
    assert found.mirror_axes == Decided[tuple[str, ...]](
        value=(), reason="mine", source="user", by_rule=plan().mirror_axes.value
    )
    assert plan(edits_of(found)) == found
    assert list(places_by_user(found)) == [("mirror_axes",)]


def test_a_target_spacing_is_planned_around() -> None:
    """Twice finer, every configuration takes it; tiles have twice the voxels at the same input: no detail is gained."""
    before, after = plan(), edited({("target_spacing",): [1.0, 0.5, 0.5]})
    assert after.configurations["2d"].spacing.value == (None, 0.5, 0.5)
    assert after.configurations["3d"].spacing.value == (1.0, 0.5, 0.5)
    assert not after.configurations["2d"].spacing.by_user
    assert recipe(after).tile_vox.value == 2 * recipe(before).tile_vox.value
    assert recipe(after).input_size.value == recipe(before).input_size.value
    assert after.store_key("2d") != before.store_key("2d")


def test_a_configurations_spacing_is_planned_around() -> None:
    """Only its own recipes follow."""
    after = edited({("configurations", "2d", "spacing"): [None, 2.0, 2.0]})
    assert recipe(after).tile_vox.value == recipe(plan()).tile_vox.value // 2
    assert recipe(after, "2.5d") == recipe(plan(), "2.5d")


def test_an_input_size_is_planned_around() -> None:
    """Memory, batch and reasons follow a larger input; the recipe of another device does not move."""
    before, after = plan(gpu=3.0), edited({("configurations", "2d", *RECIPE, "input_size"): 1120}, gpu=3.0)
    chosen = recipe(after)
    assert (chosen.input_size.value, chosen.input_size.by_rule) == (1120, recipe(before).input_size.value)
    parts = (recipe(before).accumulation_steps.value, chosen.accumulation_steps.value)
    assert parts[1] > parts[0] or (chosen.checkpointing.value and not recipe(before).checkpointing.value)
    assert chosen.memory_gib.value <= 3.01
    assert recipe(after, device="cpu") == recipe(before, device="cpu")


def test_the_predicted_memory_is_that_of_the_edits() -> None:
    """Precision, checkpointing, tile and parts of a step enter the memory model as they were edited."""
    at = ("configurations", "2d", *RECIPE)
    before = recipe(plan())
    whole = {(*at, "precision"): "fp32", (*at, "checkpointing"): False, (*at, "accumulation_steps"): 1}
    wasteful = recipe(edited({**whole, (*at, "batch_size"): 48}))
    thrifty = recipe(edited({(*at, "checkpointing"): True, (*at, "accumulation_steps"): 4}))
    assert wasteful.batch_size.value == 48
    assert thrifty.memory_gib.value < before.memory_gib.value < wasteful.memory_gib.value
    assert recipe(edited({(*at, "tile_vox"): 90})).tile_vox.value == 90


def test_schedules_follow_epochs_and_minutes() -> None:
    """Warm-up and average follow edited epochs, the steps on a CPU edited minutes."""
    short = recipe(edited({("configurations", "2d", *RECIPE, "epochs"): 2}))
    assert short.warmup_steps.value == int(0.1 * 2 * short.iterations.value)
    cpu = ("configurations", "2d", "recipes", "none", "cpu", "minutes")
    steps = [
        r.iterations.value * r.epochs.value
        for r in (recipe(p, "2d", "none", "cpu") for p in (plan(), edited({cpu: 10.0})))
    ]
    assert steps[1] < steps[0] / 2


def test_a_slab_depth_is_planned_around() -> None:
    """Batches of every recipe become multiples of the depth, and slabs overlap by about half of it."""
    found = edited({("configurations", "3d", "slab_depth"): 4}).configurations["3d"]
    batches = [r.batch_size.value for devices in found.recipes.values() for r in devices.values()]
    assert all(batch % 4 == 0 for batch in batches)
    assert found.depth_overlap.value == pytest.approx(0.5)


def test_more_neighbours_are_projected() -> None:
    """Five slices do not fill the encoder's three channels."""
    found = edited({("configurations", "2.5d", "context_slices"): 2}).configurations["2.5d"]
    assert (found.context_slices.value, found.channels.value) == (2, "projection")
    assert "5" in found.channels.reason


def test_a_method_is_planned_around() -> None:
    """A larger rank lowers the learning rate as the rule says, and an edited learning rate stays."""
    at = ("configurations", "2d", *RECIPE)
    encoder = {"train": "adapters", "adapters": [{"kind": "lora", "targets": ["q", "v"], "rank": 16}]}
    followed = recipe(edited({(*at, "encoder"): encoder}))
    assert followed.learning_rate.value < recipe(plan()).learning_rate.value
    assert recipe(edited({(*at, "encoder"): encoder, (*at, "learning_rate"): 0.03})).learning_rate.value == 0.03


def test_edits_that_go_with_nothing_are_refused_by_place() -> None:
    """A frozen encoder whose slices are put into slabs names the recipe, the edit and what to change."""
    frozen = {("configurations", "2d", *RECIPE, "encoder"): {"train": "frozen"}}
    assert recipe(edited(frozen)).encoder.value.train == "frozen"
    with pytest.raises(ConfigError) as caught:
        edited({**frozen, ("configurations", "2d", "slab_depth"): 3})
    assert all(words in str(caught.value) for words in ("sam on a gpu", "found: encoder", "set encoder.train"))


def test_own_configurations_are_planned_like_the_one_they_inherit_from() -> None:
    """A child differs from its parent in its edit and in what depends on it; it follows edits of the parent too."""
    added = {"sharp": {"inherits_from": "2d", "recipes": {"sam": {"gpu": {"input_size": user(1120)}}}}}
    found = edited({("configurations", "2d", *RECIPE, "epochs"): 7}, added, gpu=3.0)
    child, parent = recipe(found, "sharp"), recipe(found)
    assert child.input_size.value == 1120
    assert child.epochs.value == parent.epochs.value == 7
    assert child.memory_gib.value <= 3.01
    assert child.foreground_fraction == parent.foreground_fraction
    assert found.configurations["sharp"].inherits_from == "2d"
    again = plan(edits_of(parse_schema(Plan, resolved(reduced(found.model_dump(mode="json"))))), gpu=3.0)
    assert again == found
    assert ("configurations", "sharp", *RECIPE, "epochs") not in places_by_user(found)


def test_own_configurations_without_a_parent_are_kept() -> None:
    """One that inherits from none, or from one that the data do not allow any more, stays as it was."""
    own = plan().configurations["3d"].model_dump(mode="json")
    found = edited({}, {"mine": own, "deep": {"inherits_from": "3d"}})
    assert found.configurations["mine"] == parse_schema(Configuration, own)
    flat = facts.fingerprint([facts.case(shape=(2, 200, 200), spacing=(5, 1, 1))] * 6)
    after = make_plan(flat, facts.description(), facts.budget(), edits=edits_of(found))
    assert "3d" not in after.configurations
    assert after.configurations["deep"].inherits_from is None
    assert after.configurations["deep"].recipes == plan().configurations["3d"].recipes


def test_the_memory_model_agrees_with_an_edited_recipe() -> None:
    """The figure in the plan is the model's own for the edited load, not the rule's."""
    at = ("configurations", "2d", *RECIPE)
    chosen = recipe(edited({(*at, "input_size"): 448, (*at, "batch_size"): 6, (*at, "precision"): "fp32"}))
    load = memory.Load(
        get_spec(chosen.backbone.value),
        448,
        chosen.tile_vox.value,
        2,
        6,
        chosen.method_parts(),
        precision="fp32",
        attention=chosen.attention.value,
        checkpointing=chosen.checkpointing.value,
    )
    assert chosen.memory_gib.value == memory.memory_gib(load)
