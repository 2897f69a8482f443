"""Foreground intensity statistics equal to nnU-Net's, without ever holding the drawn values.

nnU-Net draws 1e8 // n foreground voxels per case, with replacement, and keeps them all. Here a case's draws become
counts of its distinct values, and cases are merged as sorted (value, count) pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from samunet.artifacts.fingerprint import IntensityStatistics, ZScoreRange

NUM_SAMPLES_DATASET = 100_000_000
SAMPLING_SEED = 1234
PERCENTILES = (0.5, 50.0, 99.5)
_CHUNK = 1 << 22
_MAX_PAIRS = 1 << 22
_KEPT_MANTISSA_BITS = 20
_Z_LIMIT, _Z_BINS = 30.0, 60_000


@dataclass(frozen=True, eq=False)
class ValueCounts:
    """Distinct values and how often each was drawn.

    Args:
        values: (V,) float32, ascending, distinct.
        counts: (V,) int64, positive.
    """

    values: NDArray[np.float32]
    counts: NDArray[np.int64]

    @property
    def total(self) -> int:
        """Number of draws."""
        return int(self.counts.sum())


def draw_foreground(channels: Sequence[NDArray[np.float32]], num_samples: int) -> list[ValueCounts]:
    """Draw foreground voxels of one case with replacement, channel after channel from one seeded generator.

    Args:
        channels: Foreground voxels per channel, each (V,), in C order of the cropped volume.
        num_samples: Draws per channel.

    Source: nnU-Net v2's fingerprint (the draws are the same, voxel for voxel).
    """
    generator = np.random.RandomState(SAMPLING_SEED)
    return [_draw(generator, voxels, num_samples) for voxels in channels]


def _draw(generator: np.random.RandomState, voxels: NDArray[np.float32], num_samples: int) -> ValueCounts:
    if voxels.size == 0:
        return ValueCounts(np.empty(0, np.float32), np.empty(0, np.int64))
    multiplicity = np.zeros(voxels.size, dtype=np.int64)
    for start in range(0, num_samples, _CHUNK):
        indices = generator.randint(0, voxels.size, size=min(_CHUNK, num_samples - start))
        multiplicity += np.bincount(indices, minlength=voxels.size)
    values, inverse = np.unique(voxels, return_inverse=True)
    counts = np.bincount(inverse.ravel(), weights=multiplicity, minlength=values.size).astype(np.int64)
    drawn = counts > 0
    return ValueCounts(values[drawn].astype(np.float32), counts[drawn])


class IntensityPool:
    """Merges the draws of one channel over cases; memory is bounded whatever the number of cases.

    Mean, standard deviation, minimum and maximum stay exact. Percentiles are exact until the distinct values exceed
    about four million; beyond that values are rounded to 20 mantissa bits (a relative error below 5e-7).
    """

    def __init__(self) -> None:
        self._pairs = ValueCounts(np.empty(0, np.float32), np.empty(0, np.int64))
        self._total = 0
        self._mean = 0.0
        self._squares = 0.0
        self._range = (np.inf, -np.inf)

    def add(self, drawn: ValueCounts) -> None:
        """Merge the draws of one case; a case without foreground contributes nothing."""
        if drawn.total == 0:
            return
        values = drawn.values.astype(np.float64)
        total = drawn.total
        mean = float(np.average(values, weights=drawn.counts))
        squares = float(np.sum(drawn.counts * (values - mean) ** 2))
        joint = self._total + total
        delta = mean - self._mean
        self._squares += squares + delta**2 * self._total * total / joint
        self._mean += delta * total / joint
        self._total = joint
        self._range = (min(self._range[0], values[0]), max(self._range[1], values[-1]))
        self._pairs = _merge(self._pairs, drawn)
        if self._pairs.values.size > _MAX_PAIRS:
            self._pairs = _merge(_rounded(self._pairs), ValueCounts(np.empty(0, np.float32), np.empty(0, np.int64)))

    def statistics(self) -> IntensityStatistics | None:
        """nnU-Net's seven numbers, or None if nothing was drawn."""
        if self._total == 0:
            return None
        low, median, high = weighted_percentiles(self._pairs, PERCENTILES)
        return IntensityStatistics(
            mean=self._mean,
            median=median,
            std=float(np.sqrt(self._squares / self._total)),
            min=float(self._range[0]),
            max=float(self._range[1]),
            percentile_00_5=low,
            percentile_99_5=high,
        )


def weighted_percentiles(pairs: ValueCounts, percentiles: Sequence[float]) -> list[float]:
    """Percentiles of the multiset with numpy's linear interpolation between order statistics."""
    last_index = np.cumsum(pairs.counts) - 1
    positions = np.asarray(percentiles, dtype=np.float64) / 100 * (pairs.total - 1)
    lower = np.floor(positions).astype(np.int64)
    upper = np.minimum(lower + 1, pairs.total - 1)
    values = pairs.values.astype(np.float64)
    below = values[np.searchsorted(last_index, lower)]
    above = values[np.searchsorted(last_index, upper)]
    return [float(v) for v in below + (above - below) * (positions - lower)]


class ZScorePool:
    """Histogram of foreground values in units of their own image's mean and standard deviation.

    The bins are 0.001 wide over [-30, 30]; values beyond count at the ends. The nonzero variant leaves zeros out: the
    store keeps them at zero.
    """

    def __init__(self) -> None:
        self._counts = {nonzero: np.zeros(_Z_BINS, dtype=np.int64) for nonzero in (False, True)}

    def add(self, drawn: ValueCounts, moments: Sequence[float]) -> None:
        """Merge one case.

        Args:
            drawn: Its foreground draws.
            moments: Mean and standard deviation over the image, then over its nonzero voxels.
        """
        for nonzero, (mean, std) in ((False, moments[:2]), (True, moments[2:])):
            used = drawn.values != 0 if nonzero else np.ones(drawn.values.size, dtype=bool)
            scores = (drawn.values[used].astype(np.float64) - mean) / max(std, 1e-8)
            bins = np.clip((scores + _Z_LIMIT) * (_Z_BINS / (2 * _Z_LIMIT)), 0, _Z_BINS - 1).astype(np.int64)
            self._counts[nonzero] += np.bincount(bins, weights=drawn.counts[used], minlength=_Z_BINS).astype(np.int64)

    def range(self) -> ZScoreRange | None:
        """Percentiles 0.5 and 99.5 of both variants, or None if nothing was drawn."""
        if not self._counts[False].any():
            return None
        lower, upper = self._percentiles(False)
        lower_nonzero, upper_nonzero = self._percentiles(True)
        return ZScoreRange(lower=lower, upper=upper, lower_nonzero=lower_nonzero, upper_nonzero=upper_nonzero)

    def _percentiles(self, nonzero: bool) -> tuple[float, float]:
        counts = self._counts[nonzero and bool(self._counts[True].any())]
        cumulated = np.cumsum(counts)
        places = np.searchsorted(cumulated, np.array([0.005, 0.995]) * cumulated[-1])
        width = 2 * _Z_LIMIT / _Z_BINS
        low, high = (float(round((p + 0.5) * width - _Z_LIMIT, 6)) for p in places)
        return low, high


def _merge(first: ValueCounts, second: ValueCounts) -> ValueCounts:
    values, inverse = np.unique(np.concatenate([first.values, second.values]), return_inverse=True)
    weights = np.concatenate([first.counts, second.counts])
    counts = np.zeros(values.size, dtype=np.int64)
    np.add.at(counts, inverse.ravel(), weights)
    return ValueCounts(values, counts)


def _rounded(pairs: ValueCounts) -> ValueCounts:
    mantissa, exponent = np.frexp(pairs.values.astype(np.float64))
    scale = float(1 << _KEPT_MANTISSA_BITS)
    return ValueCounts(np.ldexp(np.round(mantissa * scale) / scale, exponent).astype(np.float32), pairs.counts)
