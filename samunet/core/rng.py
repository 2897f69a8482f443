"""Randomness that depends only on (seed, epoch, index): not on workers, order or interruptions."""

from __future__ import annotations

import random

import numpy as np


def derive_seed(*parts: int) -> int:
    """A 32-bit seed from integers, through numpy's SeedSequence (well mixed, stable across platforms)."""
    return int(np.random.SeedSequence([part & 0xFFFFFFFF for part in parts]).generate_state(1)[0])


def seed_sample(seed: int, epoch: int, index: int) -> np.random.Generator:
    """Seed numpy's and python's global generators for one sample, and return a private generator.

    batchgenerators draws from both global generators, so both are set before each sample.
    """
    value = derive_seed(seed, epoch, index)
    random.seed(value)
    np.random.seed(value)  # noqa: NPY002 - batchgenerators reads the legacy global generator
    return np.random.default_rng([value, 1])
