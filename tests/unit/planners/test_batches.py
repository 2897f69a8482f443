"""Parts of an optimizer step: none larger than planned, none too small for batch norm that trains."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest

from samunet.artifacts.model_spec import get_spec
from samunet.artifacts.plan import ResolvedRecipe, resolve_recipe
from samunet.planners.batches import LEAST_BATCH_NORM, split_batch, trains_batch_norm
from samunet.planners.few_labels import labelled, subset_recipe
from samunet.planners.planner import make_plan
from tests.planning_facts import budget, case, description, fingerprint

torch = pytest.importorskip("torch")
NUM_CASES = 30


def chunks(recipe: ResolvedRecipe) -> list[int]:
    """Slices of every part of a step, as the trainer cuts it."""
    samples = torch.zeros(recipe.batch_size // recipe.slab_depth)
    return [len(part) * recipe.slab_depth for part in samples.chunk(recipe.accumulation_steps)]


@pytest.mark.parametrize(("side", "gpu"), product((90, 200, 512), (1.6, 1.8, 2.4, 4.0, 8.0)))
def test_batch_norm_sees_enough_slices_whatever_the_subset(side: int, gpu: float) -> None:
    """Over sizes, memory, slabs and numbers of cases: eight slices in every part, and no more than were planned."""
    facts = fingerprint([case(shape=(30, side, side)) for _ in range(NUM_CASES)])
    plan = make_plan(facts, description(), budget(gpu=gpu))
    whole = labelled(plan, facts)
    for name, number in product(plan.configurations, (1, 3, 9, 17, 25, NUM_CASES)):
        if "none" not in plan.configurations[name].recipes:
            continue
        planned = resolve_recipe(plan.configuration(name), "none", "gpu")
        assert trains_batch_norm(get_spec(planned.backbone), planned.method)
        few, _ = subset_recipe(planned, whole, labelled(plan, facts, sorted(facts.cases)[:number]))
        assert min(chunks(few)) >= LEAST_BATCH_NORM
        assert max(chunks(few)) <= max(max(chunks(planned)), 2 * LEAST_BATCH_NORM - 1)
        assert few.batch_size <= planned.batch_size


@pytest.mark.parametrize("planned", [(24, 3), (24, 2), (24, 1), (16, 2), (10, 1)])
@pytest.mark.parametrize("wanted", [8, 9, 10, 12, 15, 17, 20, 23, 25, 40])
def test_a_batch_that_is_asked_for_is_cut_as_a_planned_one(planned: tuple[int, int], wanted: int) -> None:
    """It has as many slices as asked for, in parts of eight at least; without batch norm none exceeds the planned."""
    facts = fingerprint([case()] * 6)
    plan = make_plan(facts, description(), budget())
    for weights in ("none", "sam"):
        recipe = replace(
            resolve_recipe(plan.configuration("2d"), weights, "gpu"),
            batch_size=planned[0],
            accumulation_steps=planned[1],
        )
        batch, parts = split_batch(recipe, wanted, is_fixed=True)
        cut = chunks(replace(recipe, batch_size=batch, accumulation_steps=parts))
        assert sum(cut) == batch == wanted
        if weights == "none":
            assert min(cut) >= LEAST_BATCH_NORM
        else:
            assert max(cut) <= -(-planned[0] // planned[1])


def test_the_planned_batch_is_cut_as_planned() -> None:
    """Also where its parts were edited."""
    facts = fingerprint([case()] * 6)
    recipe = resolve_recipe(make_plan(facts, description(), budget()).configuration("2d"), "none", "gpu")
    edited = replace(recipe, batch_size=12, accumulation_steps=4)
    assert split_batch(edited, 12, is_fixed=True) == split_batch(edited, 12, is_fixed=False) == (12, 4)
