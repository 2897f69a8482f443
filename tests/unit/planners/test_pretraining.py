"""Recipes of pretraining, and of training from what was pretrained from random weights."""

from __future__ import annotations

import pytest

from samunet.artifacts.plan_parts import STORED
from samunet.planners.method_recipes import automatic_recipe
from samunet.planners.peft import FROM_SCRATCH_RATE
from samunet.planners.planner import make_plan
from samunet.planners.pretraining import CONTINUED_RATE, FROM_RANDOM_RATE, pretraining_recipe
from tests import planning_facts as facts

FINGERPRINT = facts.fingerprint([facts.case()] * 6)
PLAN = make_plan(FINGERPRINT, facts.description(), facts.budget())


@pytest.mark.parametrize("supervised", [True, False])
@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_all_weights_learn_on_single_slices(device: str, supervised: bool) -> None:
    """Whatever the configuration's slabs, the whole encoder trains, prompted only where that was asked for."""
    asked = {"device": device, "backbone": "vit_b", "supervised": supervised, "from_random": False}
    for configuration in PLAN.configurations:
        recipe = pretraining_recipe(PLAN, FINGERPRINT, configuration=configuration, **asked)
        assert recipe.slab_depth == 1
        assert recipe.method.encoder.train == "full"
        assert recipe.method.promptable == supervised
        assert recipe.decay.kind == "cosine"
        assert recipe.weights_kind == "ssl"
        assert recipe.planes == STORED
    assert PLAN.configuration("2d").recipes["sam"]["gpu"].planes.value != STORED


def test_what_sam_has_taught_moves_slowly_and_sees_sams_intensities() -> None:
    """Continued weights get a tenth of the rate of random ones; random ones see images as they are stored."""
    asked = {"configuration": "2d", "device": "cpu", "backbone": "vit_t_xs", "supervised": False}
    continued, fresh = (pretraining_recipe(PLAN, FINGERPRINT, **asked, from_random=r) for r in (False, True))
    assert (continued.learning_rate, fresh.learning_rate) == (CONTINUED_RATE, FROM_RANDOM_RATE)
    assert (continued.intensity_map.kind, fresh.intensity_map.kind) == ("sam_pixels", "identity")


@pytest.mark.parametrize("supervised", [True, False])
@pytest.mark.parametrize("device", ["cpu", "gpu"])
@pytest.mark.parametrize("minutes", [1, 60])
def test_random_weights_are_pretrained_at_the_scale_of_the_training_that_follows(
    minutes: float, device: str, supervised: bool
) -> None:
    """Input and tile are those of the network with its side path, which needs other sizes than SAM's decoder alone."""
    case = facts.case(shape=(40, 60, 60), spacing=(1.0, 1.0, 1.0))
    fingerprint = facts.fingerprint([case] * 30)
    plan = make_plan(fingerprint, facts.description(), facts.budget(minutes=minutes))
    asked = {"configuration": "2.5d", "device": device, "backbone": "vit_t_xs"}
    after = automatic_recipe(plan, fingerprint, **asked, weights="ssl", changes={}, from_random=True)
    before = pretraining_recipe(plan, fingerprint, **asked, supervised=supervised, from_random=True)
    assert (before.input_size, before.tile_vox) == (after.input_size.value, after.tile_vox.value)
    sams = pretraining_recipe(plan, fingerprint, **asked, supervised=supervised, from_random=False)
    assert minutes == 1 or sams.input_size > before.input_size, "SAM's decoder alone asks for more pixels"


def test_training_from_weights_that_began_as_random_trains_all_of_them() -> None:
    """The method, rate and intensities are those of random weights; what continued SAM is adapted as ever."""
    asked = {"configuration": "2d", "weights": "ssl", "device": "cpu", "backbone": "vit_t_xs", "changes": {}}
    random = automatic_recipe(PLAN, FINGERPRINT, **{**asked, "weights": "none"})
    fresh, continued = (automatic_recipe(PLAN, FINGERPRINT, **asked, from_random=r) for r in (True, False))
    assert fresh.method_parts() == random.method_parts()
    assert fresh.intensity_map.value == random.intensity_map.value
    assert (fresh.input_size.value, fresh.batch_size.value) == (random.input_size.value, random.batch_size.value)
    assert fresh.learning_rate.value == FROM_SCRATCH_RATE
    assert continued.encoder.value.train == "adapters"
    assert continued.intensity_map.value.kind == "sam_pixels"
