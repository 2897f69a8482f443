"""Ranks from a probe: the budget is kept, the best directions are taken, and the plan says so."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from samunet.artifacts.fingerprint import Fingerprint
from samunet.artifacts.method import EncoderMethod, Lora, Method, NoDepth
from samunet.artifacts.model_spec import get_spec
from samunet.artifacts.probe import Probe, Probes
from samunet.planners.alterations import Inputs
from samunet.planners.counts import block_dims, encoder_adapter_parameters
from samunet.planners.edits import decisions
from samunet.planners.peft import encoder_method
from samunet.planners.planner import make_plan
from samunet.planners.ranks import MOST_TIMES_UNIFORM, choose_ranks, usable_probe
from tests import planning_facts as facts
from tests.planted_probe import make_probe


def random_probe(seed: int, backbone: str = "vit_xs", number: int = 32) -> Probe:
    """Falling singular values of very different size from block to block."""
    generator = np.random.default_rng(seed)
    blocks = len(block_dims(get_spec(backbone)))
    sizes = 10 ** generator.uniform(-2, 1, (blocks, 1))
    values = -np.sort(-sizes * generator.uniform(0.01, 1, (blocks, number)))
    return make_probe(values.tolist(), backbone=backbone)


def parameters(ranks: tuple[int, ...] | None, rank: int, backbone: str) -> int:
    """What LoRA on q and v adds."""
    lora = Lora(rank=rank, ranks=ranks)
    method = Method(encoder=EncoderMethod(train="adapters", adapters=(lora,)))
    return encoder_adapter_parameters(method, get_spec(backbone))


@pytest.mark.parametrize("backbone", ["vit_xs", "vit_b", "vit_t_xs"])
@pytest.mark.parametrize("rank", [1, 2, 4, 8])
def test_the_budget_is_kept_and_used(rank: int, backbone: str) -> None:
    """Never more parameters than the uniform rank; within one rank of the narrowest block below it; in its limits."""
    for seed in range(5):
        ranks, _ = choose_ranks(random_probe(seed, backbone), rank=rank, targets=("q", "v"))
        assert len(ranks) == len(block_dims(get_spec(backbone)))
        assert min(ranks) >= 1
        assert max(ranks) <= MOST_TIMES_UNIFORM * rank
        uniform, found = (parameters(r, rank, backbone) for r in (None, ranks))
        assert uniform - 4 * max(block_dims(get_spec(backbone))) < found <= uniform
        if backbone != "vit_t_xs":
            assert found == uniform


def test_no_other_ranks_capture_more() -> None:
    """Against every choice of ranks for six equally wide blocks at the same budget."""
    probe, rank = random_probe(3), 2
    values = np.array([[p.singular_values for p in probe.projections if p.target == t] for t in ("q", "v")])
    cumulated = np.cumsum((values**2).sum(0), axis=1)

    def captured(ranks: tuple[int, ...]) -> float:
        return float(sum(cumulated[block, r - 1] for block, r in enumerate(ranks)))

    found, _ = choose_ranks(probe, rank=rank, targets=("q", "v"))
    every = [r for r in product(range(1, 4 * rank + 1), repeat=6) if sum(r) <= 6 * rank]
    assert captured(found) == pytest.approx(max(map(captured, every)))


def test_only_the_adapted_projections_count() -> None:
    """What pulls at k and o decides nothing when q and v are adapted."""
    probe = make_probe([[3.0, 3.0, 3.0, 3.0]] + [[0.1, 0.1, 0.1, 0.1]] * 5)
    swapped = make_probe([[1e-3] * 4] * 5 + [[9.0] * 4], targets="ko")
    assert choose_ranks(probe, rank=2, targets=("q", "v"))[0] == (4, 2, 2, 2, 1, 1)
    first, second = (choose_ranks(swapped, rank=2, targets=t)[0] for t in (("q", "v"), ("k", "o")))
    assert second[5] == 4
    assert first == (2,) * 6


def test_equal_blocks_get_equal_ranks() -> None:
    """A probe that prefers nothing gives the uniform rank, and one with no gradient at all does not fail."""
    falling = [list(map(float, range(32, 0, -1)))] * 6
    assert choose_ranks(make_probe(falling), rank=4, targets=("q", "v"))[0] == (4,) * 6
    ranks, reason = choose_ranks(make_probe([[0.0] * 8] * 6), rank=2, targets=("q", "v"))
    assert sum(ranks) == 12
    assert "0.0%" in reason


def test_the_plan_uses_a_probe_and_says_so() -> None:
    """With a probe the adapters have its ranks and the reason its figures; random weights take no notice."""
    probe = random_probe(1)
    plain, _ = encoder_method("sam", 500, 2, depth=NoDepth())
    found, reason = encoder_method("sam", 500, 2, depth=NoDepth(), probe=probe)
    assert plain.adapters[0].ranks is None
    assert found.adapters[0].ranks == choose_ranks(probe, rank=4, targets=("q", "v"))[0]
    assert found.adapters[0].rank == 4
    assert "probe" in reason
    assert encoder_method("none", 500, 2, depth=NoDepth(), probe=probe)[0] == EncoderMethod(train="full")


def test_ranks_probed_at_another_input_size_say_so() -> None:
    """The reason names both sizes where they differ and neither where they agree; the ranks are the same."""
    fingerprint = facts.fingerprint([facts.case(shape=(40, 200, 200))] * 5)
    values = [[10.0 / (block + 1)] * 8 for block in range(12)]
    for size in (224, 448):
        probe = make_probe(values, backbone="vit_b", facts=fingerprint).model_copy(update={"input_size": size})
        plan = make_plan(fingerprint, facts.description(), facts.budget(), probes=Probes(probes=(probe,)))
        for device, recipe in plan.configuration("2d").recipes["sam"].items():
            used, reason = recipe.input_size.value, recipe.encoder.reason
            assert recipe.encoder.value.adapters[0].ranks == choose_ranks(probe, rank=4, targets=("q", "v"))[0], device
            assert ("probed at" in reason) == (used != size)
            assert used == size or f"probed at {size} px, used at {used} px" in reason


@pytest.mark.parametrize("changed", ["cases", "dataset", "channel_names"])
def test_a_probe_of_other_facts_decides_nothing(changed: str) -> None:
    """But for the reason that names it, the plan is the one without a probe."""
    fingerprint = facts.fingerprint([facts.case()] * 5)
    other = fingerprint.model_copy(
        update={
            "cases": {"cases": {"case_000": facts.case(shape=(9, 80, 80))}},
            "dataset": {"dataset": "Dataset004_Hippocampus"},
            "channel_names": {"channel_names": ("CT",)},
        }[changed]
    )
    probe = make_probe([[10.0 / (block + 1)] * 8 for block in range(12)], backbone="vit_b", facts=other)
    plain = make_plan(fingerprint, facts.description(), facts.budget())
    found = make_plan(fingerprint, facts.description(), facts.budget(), probes=Probes(probes=(probe,)))
    differing = {place for place, now in decisions(found) if now != dict(decisions(plain))[place]}
    assert differing == {("configurations", "2d", "recipes", "sam", device, "encoder") for device in ("gpu", "cpu")}
    for place in differing:
        now, before = (dict(decisions(plan))[place] for plan in (found, plain))
        assert now.value == before.value
        assert now.reason == f"{before.reason}; {usable_probe_words(probe, fingerprint)}"


def usable_probe_words(probe: Probe, fingerprint: Fingerprint) -> str:
    """Why a probe is left aside."""
    asked = {"configuration": probe.configuration, "weights": probe.weights, "backbone": probe.backbone}
    found, words = usable_probe(Probes(probes=(probe,)), fingerprint, **asked)
    assert found is None
    return words


def test_planning_with_other_facts_takes_the_probe_along() -> None:
    """What would change with more cases is not that the probe is left aside."""
    fingerprint = facts.fingerprint([facts.case()] * 5)
    values = [[10.0 / (block + 1)] * 8 for block in range(12)]
    probes = Probes(probes=(make_probe(values, backbone="vit_b", facts=fingerprint),))
    plan = make_plan(fingerprint, facts.description(), facts.budget(), probes=probes)
    more = Inputs.of(plan, fingerprint, probes).times_over(2).plan()
    used, taken_along = (
        p.configuration("2d").recipes["sam"]["cpu"].encoder.value.adapters[0].ranks for p in (plan, more)
    )
    assert used is not None
    assert taken_along == used
