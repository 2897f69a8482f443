"""Ranks from a probe: the budget is kept, the best directions are taken, and the plan says so."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from samunet.artifacts.method import EncoderMethod, Lora, Method, NoDepth
from samunet.artifacts.model_spec import get_spec
from samunet.artifacts.probe import Probe
from samunet.planners.counts import block_dims, encoder_adapter_parameters
from samunet.planners.peft import encoder_method
from samunet.planners.ranks import MOST_TIMES_UNIFORM, choose_ranks
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
