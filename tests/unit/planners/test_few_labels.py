"""A recipe for a subset of the cases: what depends on the number of labels, and nothing else."""

from __future__ import annotations

from dataclasses import fields, replace

from samunet.artifacts.plan import ResolvedRecipe, resolve_recipe
from samunet.artifacts.plan_parts import STORED
from samunet.planners import peft
from samunet.planners.few_labels import Labelled, labelled, subset_batch, subset_recipe
from samunet.planners.planner import make_plan
from tests.planning_facts import budget, case, description, fingerprint

FINGERPRINT = fingerprint([case(shape=(200, 60, 60), spacing=(2.0, 1.0, 1.0)) for _ in range(60)])
PLAN = make_plan(FINGERPRINT, description(), budget())
WHOLE = labelled(PLAN, FINGERPRINT)


def part(number: int) -> Labelled:
    return labelled(PLAN, FINGERPRINT, sorted(FINGERPRINT.cases)[:number])


def two_slices() -> Labelled:
    return replace(part(1), shapes=[(2, 60, 60)], num_slices=2, num_foreground_slices=2)


def recipe(weights: str = "sam", device: str = "gpu") -> ResolvedRecipe:
    return resolve_recipe(PLAN.configuration("2d"), weights, device)


def changed_fields(before: ResolvedRecipe, after: ResolvedRecipe) -> set[str]:
    return {entry.name for entry in fields(before) if getattr(before, entry.name) != getattr(after, entry.name)}


def test_counts_are_those_of_the_subset() -> None:
    """Slices are counted over the named cases only."""
    few = part(2)
    assert (few.num_cases, few.num_slices, few.num_foreground_slices) == (2, 400, 200)
    assert WHOLE.num_slices == 60 * 200


def test_all_cases_change_nothing() -> None:
    """For every kind of weights and device, a subset of all cases leaves the planned recipe as it is."""
    for weights in ("sam", "none"):
        for device in ("gpu", "cpu"):
            planned = recipe(weights, device)
            assert changed_fields(planned, subset_recipe(planned, WHOLE, WHOLE)[0]) == set()


def test_a_gpu_run_takes_the_steps_batch_and_rank_that_the_subset_is_worth() -> None:
    """Steps fall with the labelled slices to their least, the rank to 4; sizes and augmentation stay."""
    planned = recipe()
    few, reasons = subset_recipe(planned, WHOLE, part(3))
    assert planned.method.adapter("lora").rank == peft.lora_rank(6000, 1)[0] > few.method.adapter("lora").rank == 4
    assert few.iterations * few.epochs == 3000 < planned.iterations * planned.epochs
    allowed = {"batch_size", "accumulation_steps", "method", "learning_rate", "iterations", "epochs", "warmup_steps"}
    assert changed_fields(planned, few) <= allowed | {"ema_decay", "foreground_fraction"}
    assert all(reasons.values())
    kept, _ = subset_recipe(planned, WHOLE, part(3), keep_rank=True)
    assert kept.method == planned.method


def test_the_batch_never_grows_and_keeps_whole_slabs() -> None:
    """Between the least batch and the planned one, a multiple of the slab's depth."""
    for depth in (1, 3):
        planned = replace(recipe(), batch_size=12, slab_depth=depth)
        batches = [subset_batch(planned, part(number))[0] for number in (1, 5, 60)]
        assert batches == sorted(batches)
        assert batches[-1] == 12
        assert all(batch % depth == 0 and batch >= 4 for batch in batches)
    assert subset_batch(replace(recipe(), batch_size=12, slab_depth=3), two_slices())[0] == 6


def test_edited_values_stay() -> None:
    """A learning rate, rank or length that is no rule's is kept."""
    planned = recipe()
    lora = planned.method.adapter("lora").model_copy(update={"rank": 16})
    encoder = planned.method.encoder.model_copy(update={"adapters": (lora,)})
    method = planned.method.model_copy(update={"encoder": encoder})
    edited = replace(planned, learning_rate=3.3e-4, epochs=7, method=method, foreground_fraction=0.9)
    few, _ = subset_recipe(edited, WHOLE, part(3))
    assert (few.learning_rate, few.epochs, few.method.adapter("lora").rank) == (3.3e-4, 7, 16)
    assert few.foreground_fraction == 0.9


def test_a_cpu_run_keeps_its_minutes() -> None:
    """With minutes the length stays; a smaller batch only means more steps in them."""
    planned = recipe("mobile_sam", "cpu")
    few, _ = subset_recipe(
        planned, WHOLE, replace(part(1), shapes=[(2, 60, 60)], num_slices=2, num_foreground_slices=2)
    )
    assert few.minutes == planned.minutes == 60
    assert (planned.batch_size, few.batch_size) == (8, 4)
    assert few.iterations * few.epochs > 1.5 * planned.iterations * planned.epochs


def test_a_published_schedule_keeps_its_passes() -> None:
    """An epoch is a pass over the subset's slices; nothing else changes."""
    planned = recipe()
    few, _ = subset_recipe(planned, WHOLE, part(3), published=True)
    assert changed_fields(planned, few) == {"iterations"}
    assert few.iterations == round(300 / planned.batch_size)


def test_few_cases_that_are_seen_often_are_cut_in_more_planes() -> None:
    """Cubic volumes that a CPU sees too seldom for a second plane get it where they are five."""
    cubic = fingerprint([case(shape=(60, 60, 60)) for _ in range(200)])
    plan = make_plan(cubic, description(), budget(minutes=10.0))
    planned = resolve_recipe(plan.configuration("2.5d"), "none", "cpu")
    assert planned.planes == STORED
    whole = labelled(plan, cubic)
    some = labelled(plan, cubic, sorted(cubic.cases)[:5])
    few, reasons = subset_recipe(planned, whole, some)
    assert few.planes == ("slices", "rows", "columns")
    assert "longer one way" in reasons["planes"]
    for kept in (replace(planned, planes=("rows",)), replace(planned, slab_depth=3)):
        assert subset_recipe(kept, whole, some)[0].planes == kept.planes
