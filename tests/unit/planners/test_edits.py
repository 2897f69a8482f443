"""Decisions of the user: they stay, and what depends on them is planned around them."""

from __future__ import annotations

import re
from typing import Any

import pytest

from samunet.artifacts.model_spec import get_spec
from samunet.artifacts.plan import Configuration, Decided, Plan, Recipe
from samunet.artifacts.plan_document import marked, reduced, resolved
from samunet.core.config import parse_schema
from samunet.core.errors import ConfigError
from samunet.planners import memory, sizes
from samunet.planners.edits import Edits, edits_of, places_by_user
from samunet.planners.planner import facts_of_plan, make_plan
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
    """Warm-up and average follow edited epochs, the pixels that a CPU trains on edited minutes."""
    short = recipe(edited({("configurations", "2d", *RECIPE, "epochs"): 2}))
    assert short.warmup_steps.value == int(0.1 * 2 * short.iterations.value)
    cpu = ("configurations", "2d", "recipes", "none", "cpu", "minutes")
    pixels = [
        r.iterations.value * r.epochs.value * r.input_size.value**2
        for r in (recipe(p, "2d", "none", "cpu") for p in (plan(), edited({cpu: 10.0})))
    ]
    assert pixels[1] < pixels[0] / 2


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


def test_edited_prompts_take_the_place_of_a_planned_side_path() -> None:
    """What the user asks for stands; the decoder of random weights is planned around it and says so."""
    at = ("configurations", "2d", "recipes", "none", "cpu")
    found = recipe(edited({(*at, "prompts"): {"kind": "box"}}), "2d", "none", "cpu")
    assert found.prompts.value.kind == "box"
    assert found.decoder.value.upsampler == "sam"
    assert "side path" in found.decoder.reason
    assert recipe(plan(), "2d", "none", "cpu").decoder.value.upsampler == "side_path"
    progressive = {"train": "full", "upsampler": "progressive"}
    with pytest.raises(ConfigError, match=r"(?s)none on a cpu.*set decoder\.upsampler to sam"):
        edited({(*at, "prompts"): {"kind": "box"}, (*at, "decoder"): progressive})


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


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        (("target_spacing",), [0, 1, 1], "target_spacing.value.0"),
        (("target_spacing",), [-1, 1, 1], "target_spacing.value.0"),
        (("target_spacing",), [float("inf"), 1, 1], "target_spacing.value.0"),
        (("normalization",), [], r"normalization: expected one entry for each of 1 channels \(MRI\), found 0"),
        (("normalization",), [{"scheme": "zscore"}] * 2, "found 2"),
        (("normalization",), [{"scheme": "ct", "std": -1.0}], "normalization.value.0.std"),
        (("normalization",), [{"scheme": "window_to_01"}], "lower end below the upper"),
        (
            ("configurations", "2d_medsam", "normalization"),
            [],
            r"configurations\.2d_medsam\.normalization: expected one",
        ),
        (("frame",), {"slice_axis": 0, "orientation": "SAR", "spacing": [-1, 1, 1]}, "frame.value.spacing.0"),
        (("frame",), {"slice_axis": 0, "orientation": "SIR", "spacing": [1, 1, 1]}, "one of L and R, .* found S, I, R"),
        (("frame",), {"slice_axis": 0, "orientation": "SAX", "spacing": [1, 1, 1]}, "found S, A, X"),
        (
            ("configurations", "2d", *RECIPE, "intensity_map"),
            {"kind": "unit", "lower": [1.0], "upper": [1.0]},
            "each lower bound below its upper",
        ),
    ],
)
def test_impossible_values_are_one_fault_with_their_place(place: tuple[str, ...], value: Any, words: str) -> None:
    """What no dataset can have is refused when the file is read, before anything is planned around it."""
    if place == ("frame",):
        value = {**value, "orientation": list(value["orientation"])}
    with pytest.raises(ConfigError, match=words) as caught:
        edited({place: value})
    assert "1 fault\n" in str(caught.value)


@pytest.mark.parametrize("figure", ["gpu_memory_gib", "cpu_minutes"])
@pytest.mark.parametrize("value", [0, -8.0])
def test_hardware_that_there_is_not_is_one_fault(figure: str, value: float) -> None:
    """No memory or no minutes are the budget's fault, not that of every recipe."""
    content = plan().model_dump(mode="json")
    content["budget"][figure] = value
    with pytest.raises(ConfigError, match=f"1 fault\n  - budget.{figure}: Input should be greater than 0"):
        parse_schema(Plan, content, context={"edited": True})


def test_an_orientation_of_no_case_is_refused() -> None:
    """Nothing was measured along its axes; the message names those that there are."""
    frame = plan().frame.value.model_dump(mode="json")
    with pytest.raises(ConfigError) as caught:
        edited({("frame",): {**frame, "orientation": ["I", "A", "R"]}})
    assert all(words in str(caught.value) for words in ("frame", "expected: S-A-R", "found: I-A-R", "--overwrite-plan"))
    turned = facts.fingerprint([facts.case(shape=(40, 200, 200), codes=("I", "P", "R"))] * 6)
    pinned = Edits(choices={"frame": Decided(**user(plan().frame.value))})
    with pytest.raises(ConfigError, match="no case has the orientation"):
        make_plan(turned, facts.description(), facts.budget(), edits=pinned)


@pytest.mark.parametrize("place", [("normalization",), ("configurations", "2d_medsam", "normalization")])
def test_intensities_for_other_channels_are_refused(place: tuple[str, ...]) -> None:
    """An edit that outlives the dataset it was made for names both numbers."""
    edits = edits_of(edited({place: [{"scheme": "zscore"}]}))
    names = ("T1", "T2")
    with pytest.raises(ConfigError, match="normalization: the number of entries") as caught:
        make_plan(
            facts.fingerprint([facts.case()] * 6, channels=names),
            facts.description(channels=names),
            facts.budget(),
            edits=edits,
        )
    assert all(words in str(caught.value) for words in ("expected: 2, for T1, T2", "found: 1", "--overwrite-plan"))


def test_recipes_of_the_users_own_are_planned_with_the_others() -> None:
    """Weights that the rules plan none for in a configuration stay there, for both devices, in every round."""
    record = reduced(plan().model_dump(mode="json"))
    content = reduced(plan().model_dump(mode="json"))
    own = content["configurations"]["2d"]["recipes"]["none"]["cpu"]
    content["configurations"]["2d_medsam"]["recipes"]["none"] = {"cpu": own}
    found = parse_schema(Plan, resolved(marked(content, record)), context={"edited": True})
    for _ in range(2):
        found = plan(edits_of(found))
        recipes = found.configurations["2d_medsam"].recipes
        assert list(recipes) == ["medsam", "sam", "none"]
        assert recipes["none"]["cpu"].input_size.by_user
        assert not recipes["none"]["gpu"].input_size.by_user


def test_overlaps_are_planned_around() -> None:
    """Tiles that overlap more are more of the same size, and cost views, as do slabs that overlap more."""
    at = ("configurations", "2d", "recipes", "none", "cpu")
    fine = {("target_spacing",): [1.0, 0.2, 0.2], (*at, "input_size"): 224}
    tiles = [
        recipe(edited({**fine, ("configurations", "2d", "tile_overlap"): overlap}), "2d", "none", "cpu")
        for overlap in (0.5, 0.75)
    ]
    counts = [int(re.findall(r"so (\d+) x", found.tile_vox.reason)[0]) for found in tiles]
    assert counts[1] > 1.5 * counts[0]
    assert seconds(tiles[1]) == pytest.approx(seconds(tiles[0]) * (counts[1] / counts[0]) ** 2, rel=0.5)
    slabs = [
        recipe(edited({("configurations", "3d", "depth_overlap"): overlap}), "3d", "none", "cpu")
        for overlap in (0.0, 0.7)
    ]
    assert seconds(slabs[1]) == pytest.approx(3 * seconds(slabs[0]), rel=0.1)


def test_a_presets_recipe_is_planned_with_the_overlaps_too() -> None:
    """Facts in a configuration hold its overlaps."""
    found = edited({("configurations", "2d", "tile_overlap"): 0.25, ("configurations", "3d", "depth_overlap"): 0.7})
    overlaps = [
        (own.tile_overlap, own.depth_overlap)
        for own in (facts_of_plan(found, FINGERPRINT, configuration=name) for name in ("2d", "3d"))
    ]
    assert overlaps == [(0.25, 0.0), (0.5, 0.7)]


def test_tiles_that_overlap_almost_whole_are_planned_at_once() -> None:
    """Their number is computed, not counted up."""
    plane = sizes.InPlane(typical_vox=60_000, largest_vox=60_000, width_vox=0.0, area_vox=0.0, resolution=1.0)
    assert sizes.tile(plane, 224, wanted=1120, overlap=1 - 1e-9)[0] <= 224


def seconds(found: Recipe) -> float:
    """How long a recipe's reason says that a volume takes per view."""
    return float(re.findall(r"about ([\d.e+]+) s per view", found.mirror_views.reason)[0])


AT_2D, AT_3D, AT_NEIGHBOURS = (("configurations", name) for name in ("2d", "3d", "2.5d"))


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        ((*AT_3D, "slab_depth"), 50, ("configurations.3d.slab_depth", "50", "1 to 40")),
        ((*AT_2D, "slab_depth"), 41, ("configurations.2d.slab_depth", "41", "1 to 40")),
        ((*AT_NEIGHBOURS, "context_slices"), 40, ("configurations.2.5d.context_slices", "40", "0 to 39")),
        ((*AT_2D, *RECIPE, "accumulation_steps"), 1000, ("sam on gpu", "accumulation_steps 1000", "has 1 to ")),
        ((*AT_3D, *RECIPE, "accumulation_steps"), 24, ("sam on gpu", "accumulation_steps 24", "in slabs of")),
        ((*AT_2D, *RECIPE, "warmup_steps"), 10**9, ("sam on gpu", "warmup_steps 1000000000", "0 to 3000")),
        ((*AT_2D, *RECIPE, "memory_gib"), -5.0, ("sam.gpu.memory_gib", "-5.0", "greater than 0")),
        ((*AT_2D, *RECIPE, "memory_gib"), 0.0, ("sam.gpu.memory_gib", "0.0", "greater than 0")),
        ((*AT_2D, *RECIPE, "memory_gib"), float("nan"), ("sam.gpu.memory_gib", "nan", "finite")),
        ((*AT_2D, *RECIPE, "decay"), {"power": float("inf")}, ("sam.gpu.decay", "inf", "finite")),
        ((*AT_2D, *RECIPE, "loss"), {"dice": float("inf")}, ("sam.gpu.loss", "inf", "finite")),
        (
            (*AT_2D, *RECIPE, "intensity_map"),
            {"kind": "unit", "lower": [float("nan")], "upper": [1.0]},
            ("sam.gpu.intensity_map", "nan", "finite"),
        ),
        (("normalization",), [{"scheme": "ct", "mean": float("nan")}], ("normalization", "nan", "finite")),
    ],
)
def test_an_edit_that_cannot_be_is_one_error(place: tuple[str, ...], value: Any, words: tuple[str, ...]) -> None:
    """It names the field, the value and what is possible."""
    with pytest.raises(ConfigError) as caught:
        edited({place: value})
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_a_plan_with_an_impossible_edit_is_not_trained() -> None:
    """Edits of a recipe that training reads without planning again are held against the same limits."""
    for name, value in (("accumulation_steps", 1000), ("warmup_steps", 10**9)):
        content = plan().model_dump(mode="json")
        content["configurations"]["2d"]["recipes"]["sam"]["gpu"][name].update(value=value, source="user")
        with pytest.raises(ConfigError, match=f"{name} {value}"):
            parse_schema(Plan, content)
    shorter = plan().model_dump(mode="json")
    shorter["configurations"]["2d"]["recipes"]["sam"]["gpu"]["epochs"].update(value=1, source="user")
    shorter["configurations"]["2d"]["recipes"]["sam"]["gpu"]["iterations"].update(value=10, source="user")
    assert parse_schema(Plan, shorter)
