"""Choosing among candidates and filters: the simpler one wins unless the other is better by more than noise."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from samunet.evaluation.selection import choose, filter_helps, mean_dice, paired_gain, score_table, size_thresholds

RNG = np.random.default_rng(5)
BASE = RNG.uniform(0.6, 0.9, (20, 2))
NUMBERS = {"a": 1, "b": 1, "a+b": 2}


def tables(single: float, pair: float, spread: float = 0.0) -> dict[str, np.ndarray]:
    """B better than a by a margin on average, a+b better than b by another, with noise of its own per case."""
    noise = np.random.default_rng(1).normal(0, spread, BASE.shape)
    return {"a": BASE, "b": BASE + single, "a+b": BASE + single + pair + noise - noise.mean()}


def test_a_structure_that_is_nowhere_counts_as_found() -> None:
    """None becomes 1, and rows and columns come in the order asked for."""
    scores = {"x": {"left": None, "right": 0.5}, "y": {"left": 0.25, "right": 0.75}}
    assert score_table(scores, ["y", "x"], ["right", "left"]).tolist() == [[0.75, 0.25], [0.5, 1.0]]


def test_of_equally_many_models_the_higher_mean_wins_and_ties_go_to_the_first() -> None:
    """Between single models the mean decides; identical ones stay in their order."""
    assert choose({"a": BASE, "b": BASE + 0.01}, NUMBERS | {"b": 1})[0] == "b"
    assert choose({"a": BASE, "b": BASE.copy()}, {"a": 1, "b": 1})[0] == "a"


def test_a_pair_has_to_be_better_by_more_than_noise() -> None:
    """A steady gain brings the pair; the same mean gain in the noise of cases does not, and the reason says so."""
    assert choose(tables(0.02, 0.02), NUMBERS)[0] == "a+b"
    chosen, reason = choose(tables(0.02, 0.02, spread=0.3), NUMBERS)
    assert chosen == "b"
    assert "a+b is not better by more than noise" in reason
    assert choose(tables(0.02, -0.02), NUMBERS)[0] == "b"


def test_one_case_shows_no_pair_better() -> None:
    """With a single case there is no interval, and the simpler one stays."""
    assert choose({name: table[:1] for name, table in tables(0.02, 0.1).items()}, NUMBERS)[0] == "b"


@given(st.floats(-0.2, 0.2), st.integers(2, 30))
def test_a_constant_difference_is_its_own_interval(gain: float, number: int) -> None:
    """Pairing removes what cases differ by: the interval of a constant gain has no width."""
    table = np.random.default_rng(0).uniform(0.3, 0.6, (number, 3))
    interval = paired_gain(table + gain, table)
    assert interval.low == pytest.approx(gain, abs=1e-9)
    assert interval.high == pytest.approx(gain, abs=1e-9)
    assert mean_dice(table).low < mean_dice(table).high


def test_a_filter_needs_cases_a_gain_and_no_likely_loss() -> None:
    """Taken where some gain and none loses; not below five cases, without gain, or where a loss is likely."""
    before = np.full(10, 0.8)
    some = before + np.array([0.1, *[0.0] * 9])
    assert filter_helps(before, some)[0]
    assert not filter_helps(before[:4], some[:4])[0]
    assert not filter_helps(before, before)[0]
    mixed = before + np.array([0.3, *[-0.02] * 9])
    assert mixed.mean() > before.mean()
    assert not filter_helps(before, mixed)[0]


def test_size_thresholds_lie_low_among_the_references_components() -> None:
    """Two percentiles, one where all components are alike, none without any."""
    low, high = size_thresholds(list(range(1, 101)))
    assert 5 <= low < high <= 26
    assert size_thresholds([7.0, 7.0]) == (7.0,)
    assert size_thresholds([]) == ()


def test_certainty_is_that_of_whole_groups() -> None:
    """A gain that three of four patients have is sure over 40 scans, not over 4 patients; of one, nothing is sure."""
    gain = np.repeat([0.03, 0.03, 0.03, -0.04], 10)[:, None]
    base = np.full((40, 1), 0.7)
    both = {"a": base, "a+b": base + gain}
    groups = [f"patient_{index // 10}" for index in range(40)]
    assert choose(both, NUMBERS)[0] == "a+b"
    assert choose(both, NUMBERS, groups)[0] == "a"
    narrow, wide = paired_gain(base + gain, base), paired_gain(base + gain, base, groups)
    assert narrow.value == wide.value
    assert wide.high - wide.low > 2 * (narrow.high - narrow.low)
    alone = paired_gain(base + gain, base, ["patient"] * 40)
    assert (alone.low, alone.high) == (None, None)
    assert paired_gain(base + gain, base, [str(index) for index in range(40)]) == narrow
    five = [f"patient_{index % 5}" for index in range(40)]
    assert filter_helps(base[:, 0], base[:, 0] + 0.1, five)[0]
    helps, reason = filter_helps(base[:, 0], base[:, 0] + 0.1, groups)
    assert not helps
    assert "4 groups of cases" in reason
