"""Foreground statistics equal those of the drawn values themselves."""

from __future__ import annotations

import numpy as np
import pytest

from samunet.planners import intensities
from samunet.planners.intensities import IntensityPool, ValueCounts, ZScorePool, draw_foreground, weighted_percentiles

NUM_SAMPLES = 20_000


def _literal_draws(cases: list[list[np.ndarray]]) -> list[np.ndarray]:
    """What nnU-Net's fingerprint keeps: all draws, channel after channel from one generator per case."""
    kept: list[list[np.ndarray]] = [[] for _ in cases[0]]
    for channels in cases:
        generator = np.random.RandomState(1234)
        for index, voxels in enumerate(channels):
            if voxels.size:
                kept[index].append(generator.choice(voxels, NUM_SAMPLES, replace=True))
    return [np.concatenate(draws).astype(np.float64) for draws in kept]


def _random_cases(seed: int) -> list[list[np.ndarray]]:
    generator = np.random.default_rng(seed)
    sizes = generator.integers(50, 5000, size=4)
    return [
        [generator.normal(100, 30, n).astype(np.float32), generator.integers(0, 60, n).astype(np.float32)]
        for n in sizes
    ]


@pytest.mark.parametrize("chunk", [700, 1 << 22])
def test_statistics_equal_those_of_the_draws(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    """Mean, std, range and percentiles agree with numpy on all draws to 1e-6, however the draws are chunked."""
    monkeypatch.setattr(intensities, "_CHUNK", chunk)
    cases = _random_cases(0)
    for channel, draws in enumerate(_literal_draws(cases)):
        pool = IntensityPool()
        for case in cases:
            pool.add(draw_foreground(case, NUM_SAMPLES)[channel])
        found = pool.statistics()
        assert found is not None
        low, median, high = np.percentile(draws, (0.5, 50, 99.5))
        expected = (draws.mean(), median, draws.std(), draws.min(), draws.max(), low, high)
        np.testing.assert_allclose(list(found.model_dump().values()), expected, rtol=1e-6)


def test_a_case_without_foreground_contributes_nothing() -> None:
    """An empty case changes no statistic, and if all are empty there is none."""
    pool, other = IntensityPool(), IntensityPool()
    voxels = np.arange(10, dtype=np.float32)
    for target in (pool, other):
        target.add(draw_foreground([voxels], 100)[0])
    other.add(draw_foreground([np.empty(0, np.float32)], 100)[0])
    assert pool.statistics() == other.statistics()
    assert IntensityPool().statistics() is None
    assert ZScorePool().range() is None


def test_many_distinct_values_are_rounded_within_a_millionth(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the limit of distinct values memory stops growing and percentiles stay right to 1e-6."""
    monkeypatch.setattr(intensities, "_MAX_PAIRS", 1000)
    values = np.sort(np.random.default_rng(1).normal(1000, 1, 30_000).astype(np.float32))
    values = np.unique(values)
    pool = IntensityPool()
    for part in np.array_split(values, 7):
        pool.add(ValueCounts(part, np.ones(part.size, dtype=np.int64)))
    found = pool.statistics()
    assert found is not None
    assert pool._pairs.values.size < values.size
    expected = np.percentile(values.astype(np.float64), (0.5, 50, 99.5))
    got = (found.percentile_00_5, found.median, found.percentile_99_5)
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_weighted_percentiles_interpolate_between_order_statistics() -> None:
    """Two values drawn 1 and 3 times give what numpy gives for the four numbers."""
    pairs = ValueCounts(np.array([1.0, 2.0], np.float32), np.array([1, 3]))
    expected = np.percentile([1, 2, 2, 2], (0, 10, 50, 100))
    np.testing.assert_allclose(weighted_percentiles(pairs, (0, 10, 50, 100)), expected)


def test_zscore_range_is_in_units_of_each_image() -> None:
    """Two images with different scales but the same shape of foreground give the range of either."""
    scores = np.linspace(-2, 2, 1001).astype(np.float32)
    pool = ZScorePool()
    for mean, std in ((100.0, 10.0), (5000.0, 700.0)):
        values = (scores * std + mean).astype(np.float32)
        pool.add(ValueCounts(values, np.ones(values.size, dtype=np.int64)), [mean, std, mean, std])
    found = pool.range()
    assert found is not None
    assert found.lower == pytest.approx(-1.98, abs=0.01)
    assert found.upper_nonzero == pytest.approx(1.98, abs=0.01)
