"""Probes with known singular values, shared by tests."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate

from samunet.artifacts.fingerprint import Fingerprint
from samunet.artifacts.probe import Probe, ProjectionFacts, Target

TARGETS: tuple[Target, ...] = ("q", "k", "v", "o")


def projection(block: int, target: Target, values: Sequence[float]) -> ProjectionFacts:
    """Facts of a gradient that has exactly these singular values."""
    squares = [value**2 for value in values]
    norm = math.sqrt(sum(squares))
    energy = tuple(part / max(norm**2, 1e-30) for part in accumulate(squares))
    return ProjectionFacts(
        block=block, target=target, singular_values=tuple(values), energy=energy, norm=norm, batch_norm=2 * norm
    )


def make_probe(
    values: Sequence[Sequence[float]],
    *,
    backbone: str = "vit_xs",
    targets: str = "qv",
    facts: Fingerprint | None = None,
) -> Probe:
    """A probe whose block b has the singular values b in the given targets, and ones in the other projections.

    Args:
        values: By block.
        backbone: Image encoder.
        targets: Projections that have them.
        facts: What it is made from; None: as a file that does not say.
    """
    found = [
        projection(block, target, given if target in targets else [1.0] * len(given))
        for block, given in enumerate(values)
        for target in TARGETS
    ]
    return Probe(
        configuration="2d",
        weights="sam",
        weights_sha256="0" * 64,
        backbone=backbone,
        input_size=224,
        seed=0,
        fold="0",
        warmup_steps=10,
        warmup_loss=(2.0, 1.0),
        batches=4,
        batch_size=4,
        projections=tuple(found),
        dataset=None if facts is None else facts.dataset,
        fingerprint_sha256=None if facts is None else facts.facts_sha256,
    )
