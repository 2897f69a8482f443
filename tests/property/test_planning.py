"""Whatever the facts and the hardware, a plan is valid, explained, and monotone in memory."""

from __future__ import annotations

import random
from itertools import pairwise
from statistics import median
from typing import Any

from hypothesis import assume, given, settings
from hypothesis import strategies as st

from samunet.artifacts.fingerprint import CaseFacts, Fingerprint
from samunet.artifacts.plan import (
    DEVICE_CLASSES,
    ChannelNormalization,
    Configuration,
    DeviceClass,
    Frame,
    Plan,
    resolve_recipe,
)
from samunet.artifacts.plan_document import EDITED
from samunet.core.config import parse_schema
from samunet.inference.sliding import slab_starts
from samunet.planners.batches import LEAST_BATCH_NORM
from samunet.planners.edits import decisions, edits_of
from samunet.planners.explain import explain, summary
from samunet.planners.planner import gather, make_plan
from samunet.planners.recipes import automatic, plan_recipe
from samunet.planners.rules import canonical_shapes
from samunet.planners.sizes import grid_of
from tests import planning_facts as facts

CODES = [("S", "A", "R"), ("I", "P", "L"), ("A", "I", "L"), ("R", "S", "P")]
side = st.integers(1, 700)
millimetres = st.floats(0.05, 12.0, allow_nan=False)
unit = st.floats(0.0, 1.0)


@st.composite
def cases(draw: st.DrawFn) -> Any:
    """Facts of one case of any size, spacing and orientation, with up to three structures."""
    shape = (draw(st.integers(1, 400)), draw(side), draw(side))
    crop = tuple(draw(st.integers(1, n)) for n in shape)
    names = draw(st.sets(st.sampled_from(["a", "b", "c"])))
    structures = {
        name: facts.structure(
            width_mm=draw(st.floats(0.1, 200.0)),
            coherence=(draw(unit), draw(unit), draw(unit)),
            coherence_mm=(draw(millimetres), draw(millimetres), draw(millimetres)),
        )
        for name in sorted(names)
    }
    return facts.case(
        shape=shape,
        crop=(crop[0], crop[1], crop[2]),
        spacing=(draw(millimetres), draw(millimetres), draw(millimetres)),
        codes=draw(st.sampled_from(CODES)),
        structures=structures,
        resolution=(draw(unit), draw(unit), draw(unit)),
        tilt=draw(st.none() | st.floats(0.0, 54.7)),
    )


@st.composite
def fingerprints(draw: st.DrawFn) -> Fingerprint:
    """A dataset of one to six such cases with one to four channels."""
    channels = draw(st.lists(st.sampled_from(["MRI", "CT", "rgb_to_0_1", "noNorm"]), min_size=1, max_size=4))
    return facts.fingerprint(
        draw(st.lists(cases(), min_size=1, max_size=6)), channels=channels, foreground=draw(st.booleans())
    )


def plan_for(fingerprint: Fingerprint, *, gpu: float = 8.0, cpu: float = 16.0, minutes: float = 60.0) -> Plan:
    labels = {"background": 0, "a": 1, "b": 2, "c": 3}
    description = facts.description(channels=fingerprint.channel_names, labels=labels)
    return make_plan(fingerprint, description, facts.budget(gpu=gpu, cpu=cpu, minutes=minutes))


@settings(max_examples=60, deadline=None)
@given(fingerprints(), st.floats(1.0, 90.0), st.floats(1.0, 64.0), st.floats(0.5, 600.0))
def test_a_plan_is_always_valid_and_explained(fingerprint: Fingerprint, gpu: float, cpu: float, minutes: float) -> None:
    """Every recipe resolves, its sizes divide, its tile is no larger than needed, and every decision has a reason."""
    plan = plan_for(fingerprint, gpu=gpu, cpu=cpu, minutes=minutes)
    assert parse_schema(Plan, plan.model_dump(mode="json")) == plan
    largest = 1
    for configuration in plan.configurations.values():
        for weights in configuration.recipes:
            for device in DEVICE_CLASSES:
                recipe = resolve_recipe(configuration, weights, device)
                grid = grid_of(recipe.method)
                assert recipe.input_size in grid.smaller(grid.largest)
                assert recipe.batch_size >= recipe.accumulation_steps >= 1
                assert recipe.tile_vox >= recipe.input_size // 8
                assert recipe.warmup_steps <= recipe.iterations * recipe.epochs
                assert (recipe.method.encoder.train == "full") == (weights == "none")
                assert recipe.batch_size % recipe.slab_depth == 0
                assert (recipe.method.depth.kind == "none") == (recipe.slab_depth == 1)
                assert 15 <= recipe.augmentation.rotation_deg <= 180
                assert recipe.mirror_views in (1, 2, 4)
                budget = gpu if device == "gpu" else cpu
                too_little = "may need more" in configuration.recipes[weights][device].batch_size.reason
                assert recipe.memory_gib <= budget + 0.01 or (too_little and recipe.input_size == grid.smallest)
                largest = max(largest, recipe.tile_vox)
                reasons = [getattr(configuration.recipes[weights][device], name).reason for name in RECIPE_FIELDS]
                assert all(reasons)
    assert plan.recommended.value in explain(plan, fingerprint)
    assert fingerprint.dataset in summary(plan)


RECIPE_FIELDS = (
    *("backbone", "input_size", "tile_vox", "batch_size", "epochs", "learning_rate", "memory_gib"),
    *("augmentation", "mirror_views"),
)


@settings(max_examples=30, deadline=None)
@given(fingerprints())
def test_slabs_fit_the_volumes_and_overlap_by_half(fingerprint: Fingerprint) -> None:
    """No slab is deeper than half of the volumes, as they are or resampled; two slabs at least see a slice within."""
    plan = plan_for(fingerprint)
    axis = plan.frame.value.slice_axis
    for name, configuration in plan.configurations.items():
        depth, overlap = configuration.slab_depth.value, configuration.depth_overlap.value
        assert (depth > 1) == (name == "3d")
        if depth == 1:
            continue
        shapes = [
            canonical_shapes(
                list(fingerprint.cases.values()), plan.frame.value, configuration.spacing.value[1:], slice_mm=distance
            )
            for distance in (None, plan.target_spacing.value[axis])
        ]
        assert all(depth <= median(shape[0] for shape in found) for found in shapes)
        starts = slab_starts(4 * depth, depth, overlap)
        assert max(b - a for a, b in pairwise(starts)) <= depth / 2


@settings(max_examples=40, deadline=None)
@given(fingerprints(), st.randoms(use_true_random=False))
def test_the_order_and_names_of_cases_change_nothing(fingerprint: Fingerprint, shuffler: random.Random) -> None:
    """Giving the same facts to the cases in another order gives the same decisions."""
    values = list(fingerprint.cases.values())
    shuffler.shuffle(values)
    shuffled = fingerprint.model_copy(update={"cases": dict(zip(fingerprint.cases, values, strict=True))})
    first, second = (plan_for(f).model_dump(exclude={"fingerprint_sha256"}) for f in (fingerprint, shuffled))
    assert first == second


@st.composite
def alike(draw: st.DrawFn) -> Fingerprint:
    """A dataset whose cases share orientation and shape of voxels, and whose slice axis hangs on no tie of axes."""
    held = facts.fingerprint(draw(st.lists(cases(), min_size=1, max_size=4)))
    codes = draw(st.sampled_from(CODES))
    spacing = (draw(millimetres), draw(millimetres), draw(millimetres))
    same = {}
    for name, case in held.cases.items():
        zoom = draw(st.floats(0.2, 5.0))
        own = tuple(zoom * mm for mm in spacing)
        same[name] = case.model_copy(update={"codes": codes, "spacing": own})
    sizes = {median(case.shape[axis] for case in same.values()) for axis in range(3)}
    assume(len({round(mm, 2) for mm in spacing}) == len(sizes) == 3)
    return held.model_copy(update={"cases": same})


@settings(max_examples=30, deadline=None)
@given(alike(), st.permutations(range(3)))
def test_the_order_of_file_axes_changes_nothing(fingerprint: Fingerprint, order: list[int]) -> None:
    """The same volumes stored with their axes in another order are cut into the same slices and trained alike."""
    moved = fingerprint.model_copy(
        update={"cases": {name: reordered(case, order) for name, case in fingerprint.cases.items()}}
    )
    first, second = plan_for(fingerprint), plan_for(moved)
    assert order[second.frame.value.slice_axis] == first.frame.value.slice_axis
    assert second.target_spacing.value == tuple(first.target_spacing.value[axis] for axis in order)
    assert second.recommended.value == first.recommended.value
    assert list(second.configurations) == list(first.configurations)
    for name, before in first.configurations.items():
        after = second.configurations[name]
        assert sorted(after.spacing.value[1:]) == sorted(before.spacing.value[1:])
        assert after.slab_depth.value == before.slab_depth.value
        for weights in before.recipes:
            for device in DEVICE_CLASSES:
                assert resolve_recipe(after, weights, device) == resolve_recipe(before, weights, device)


def reordered(case: CaseFacts, order: list[int]) -> CaseFacts:
    """A case whose file's axes come in another order."""

    def moved(held: Any, names: tuple[str, ...]) -> dict[str, Any]:
        return {name: tuple(getattr(held, name)[axis] for axis in order) for name in names}

    structures = {
        name: s.model_copy(update=moved(s, ("num_slices", "extent_mm", "coherence", "coherence_mm")))
        for name, s in case.structures.items()
    }
    per_axis = ("shape", "spacing", "codes", "shape_after_crop", "num_foreground_slices", "effective_resolution")
    return case.model_copy(update={**moved(case, per_axis), "structures": structures})


@settings(max_examples=60, deadline=None)
@given(fingerprints(), st.sampled_from(DEVICE_CLASSES), st.floats(1.5, 40.0), st.floats(1.0, 4.0))
def test_more_memory_never_plans_less(
    fingerprint: Fingerprint, device: DeviceClass, memory: float, factor: float
) -> None:
    """In every configuration the tuple (fits, sizes, no checkpointing, fewer parts) never falls when memory grows."""
    less, more = (plan_for(fingerprint, **{device: gib}) for gib in (memory, memory * factor))
    assert list(less.configurations) == list(more.configurations)
    for name, configuration in less.configurations.items():
        for weights in configuration.recipes:
            poor = rank(configuration, weights, device, memory)
            rich = rank(more.configurations[name], weights, device, memory * factor)
            assert poor <= rich, (name, weights)


@settings(max_examples=40, deadline=None)
@given(fingerprints(), st.floats(0.5, 300.0), st.floats(1.0, 10.0))
def test_more_minutes_never_plan_less(fingerprint: Fingerprint, minutes: float, factor: float) -> None:
    """On a CPU neither the input nor the steps at the same input and batch shrink when there is more time."""
    less, more = (plan_for(fingerprint, minutes=time) for time in (minutes, minutes * factor))
    for name, configuration in less.configurations.items():
        for weights in configuration.recipes:
            poor, rich = (resolve_recipe(c, weights, "cpu") for c in (configuration, more.configurations[name]))
            assert poor.input_size <= rich.input_size, (name, weights)
            if (poor.input_size, poor.batch_size, poor.tile_vox) == (rich.input_size, rich.batch_size, rich.tile_vox):
                assert poor.iterations * poor.epochs <= rich.iterations * rich.epochs + rich.iterations


def rank(configuration: Configuration, weights: str, device: DeviceClass, memory: float) -> tuple[Any, ...]:
    """What more memory must not make worse, most important first."""
    recipe = resolve_recipe(configuration, weights, device)
    fits = recipe.memory_gib <= memory + 0.01
    sizes = (recipe.input_size, recipe.slab_depth, recipe.batch_size)
    return (fits, *sizes, not recipe.checkpointing, -recipe.accumulation_steps)


@settings(max_examples=150, deadline=None)
@given(st.floats(1.0, 24.0), st.integers(1, 150), st.sampled_from([200, 600, 1500]), st.sampled_from([1, 3, 4, 5]))
def test_batch_norm_that_trains_sees_eight_slices(gib: float, slices: int, side: int, depth: int) -> None:
    """Whatever memory there is: no part of a step has fewer than eight, and none is made before checkpointing."""
    fingerprint = facts.fingerprint([facts.case(shape=(slices, side, side))])
    known = gather(
        fingerprint,
        facts.description(),
        facts.budget(gpu=gib, cpu=gib),
        Frame(slice_axis=0, orientation=("S", "A", "R"), spacing=(1.0, 1.0, 1.0)),
        (1.0, 1.0, 1.0),
        [ChannelNormalization(scheme="zscore")],
        [],
    )
    for device in DEVICE_CLASSES:
        recipe = plan_recipe(known, automatic(known, "none", device, configuration="2d", slab_depth=depth))
        value = {name: recipe[name]["value"] for name in ("batch_size", "accumulation_steps", "checkpointing")}
        batch, parts = value["batch_size"], value["accumulation_steps"]
        assert batch % (parts * depth) == 0
        assert batch // parts >= LEAST_BATCH_NORM
        assert value["checkpointing"] or parts == 1
        fits = recipe["memory_gib"]["value"] <= gib + 0.01
        assert fits or "may need more" in recipe["batch_size"]["reason"]


@settings(max_examples=40, deadline=None)
@given(fingerprints(), st.floats(1.0, 90.0), st.floats(0.5, 600.0))
def test_what_a_rule_decides_is_possible_as_an_edit(fingerprint: Fingerprint, gpu: float, minutes: float) -> None:
    """Every decision of a plan that limits are set to is within them: pinned by the user, it is planned the same."""
    plan = plan_for(fingerprint, gpu=gpu, minutes=minutes)
    limited = ("slab_depth", "context_slices", "accumulation_steps", "warmup_steps", "memory_gib")
    content = plan.model_dump(mode="json")
    for place, _ in decisions(plan):
        entry = content
        for key in place:
            entry = entry[key]
        if place[-1] in limited:
            entry["source"] = "user"
    pinned = parse_schema(Plan, content, context=EDITED)
    labels = {"background": 0, "a": 1, "b": 2, "c": 3}
    described = facts.description(channels=fingerprint.channel_names, labels=labels)
    found = make_plan(fingerprint, described, plan.budget, edits=edits_of(pinned))
    now = {place: decided.value for place, decided in decisions(found) if place[-1] in limited}
    assert now == {place: decided.value for place, decided in decisions(plan) if place[-1] in limited}
