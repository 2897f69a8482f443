"""Whatever the facts and the hardware, a plan is valid, explained, and monotone in memory."""

from __future__ import annotations

import random
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from samunet.artifacts.fingerprint import Fingerprint
from samunet.artifacts.model_spec import SIZE_STEP
from samunet.artifacts.plan import DEVICE_CLASSES, WEIGHTS_KINDS, Plan, resolve_recipe
from samunet.core.config import parse_schema
from samunet.planners.explain import explain, summary
from samunet.planners.planner import make_plan
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
        name: facts.structure(width_mm=draw(st.floats(0.1, 200.0)), coherence=(draw(unit), draw(unit), draw(unit)))
        for name in sorted(names)
    }
    return facts.case(
        shape=shape,
        crop=(crop[0], crop[1], crop[2]),
        spacing=(draw(millimetres), draw(millimetres), draw(millimetres)),
        codes=draw(st.sampled_from(CODES)),
        structures=structures,
        resolution=(draw(unit), draw(unit), draw(unit)),
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
                assert recipe.input_size % SIZE_STEP == 0
                assert recipe.batch_size >= recipe.accumulation_steps >= 1
                assert recipe.tile_vox >= recipe.input_size // 8
                assert recipe.warmup_steps <= recipe.iterations * recipe.epochs
                assert (recipe.method.encoder.train == "full") == (weights == "none")
                assert recipe.batch_size % recipe.slab_depth == 0
                assert (recipe.method.depth.kind == "none") == (recipe.slab_depth == 1)
                largest = max(largest, recipe.tile_vox)
                reasons = [getattr(configuration.recipes[weights][device], name).reason for name in RECIPE_FIELDS]
                assert all(reasons)
    assert plan.recommended.value in explain(plan, fingerprint)
    assert fingerprint.dataset in summary(plan)


RECIPE_FIELDS = ("backbone", "input_size", "tile_vox", "batch_size", "epochs", "learning_rate", "memory_gib")


@settings(max_examples=40, deadline=None)
@given(fingerprints(), st.randoms(use_true_random=False))
def test_the_order_and_names_of_cases_change_nothing(fingerprint: Fingerprint, shuffler: random.Random) -> None:
    """Giving the same facts to the cases in another order gives the same decisions."""
    values = list(fingerprint.cases.values())
    shuffler.shuffle(values)
    shuffled = fingerprint.model_copy(update={"cases": dict(zip(fingerprint.cases, values, strict=True))})
    first, second = (plan_for(f).model_dump(exclude={"fingerprint_sha256"}) for f in (fingerprint, shuffled))
    assert first == second


@settings(max_examples=60, deadline=None)
@given(fingerprints(), st.floats(1.5, 40.0), st.floats(1.0, 4.0))
def test_more_memory_never_plans_less(fingerprint: Fingerprint, gpu: float, factor: float) -> None:
    """(fits, input size, slices per step, no checkpointing, fewer parts) never falls when memory grows."""
    less, more = (plan_for(fingerprint, gpu=memory).configuration("2d") for memory in (gpu, gpu * factor))
    for weights in WEIGHTS_KINDS:
        ranks = []
        for configuration, memory in ((less, gpu), (more, gpu * factor)):
            recipe = resolve_recipe(configuration, weights, "gpu")
            fits = recipe.memory_gib <= memory + 0.01
            ranks.append(
                (fits, recipe.input_size, recipe.batch_size, not recipe.checkpointing, -recipe.accumulation_steps)
            )
        assert ranks[0] <= ranks[1]
