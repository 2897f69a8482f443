"""A rank for every block from what the gradient looks like at the start, under one budget of parameters."""

from __future__ import annotations

from collections.abc import Sequence

from samunet.artifacts.fingerprint import Fingerprint
from samunet.artifacts.model_spec import get_spec
from samunet.artifacts.probe import Probe, Probes
from samunet.planners.counts import block_dims

MOST_TIMES_UNIFORM = 4


def usable_probe(
    probes: Probes, fingerprint: Fingerprint, *, configuration: str, weights: str, backbone: str
) -> tuple[Probe | None, str]:
    """The probe of a configuration, kind of weights and backbone, if it was made from the dataset's present facts.

    Args:
        probes: All there are.
        fingerprint: The facts.
        configuration: Planned configuration.
        weights: Kind of weights.
        backbone: Image encoder.

    Returns:
        The probe and nothing; or None and, where there is one of other facts, a sentence that says so.
    """
    found = probes.find(configuration=configuration, weights=weights, backbone=backbone)
    fault = None if found is None else found.fault_with(fingerprint)
    if fault is None:
        return found, ""
    return None, f"its probe is left aside, as it {fault} (samunet_probe measures again)"


def choose_ranks(probe: Probe, *, rank: int, targets: Sequence[str]) -> tuple[tuple[int, ...], str]:
    """The ranks that capture most of the squared singular values, at no more parameters than one rank everywhere.

    A direction of rank r in a block is worth its r-th squared singular values, summed over the targets, and costs as
    many parameters as the block's tokens are wide. Every block gets 1; the rest goes, one at a time, where it captures
    most per parameter. Where all blocks are equally wide that is the optimum.

    Args:
        probe: Of the encoder.
        rank: The uniform rank that sets the budget; a block gets at most four times as much.
        targets: Adapted projections, all of which a block adapts with the same rank.

    Returns:
        One rank per block, and why.

    Source: LoRA-GA (Wang et al. 2024) takes the update's subspace from the first gradient; AdaLoRA (Zhang et al. 2023)
    spreads a budget of ranks over layers by importance.
    """
    widths = block_dims(get_spec(probe.backbone))
    gains = [_gains(probe, block, targets) for block in range(len(widths))]
    limits = [max(1, min(MOST_TIMES_UNIFORM * rank, len(gain))) for gain in gains]
    ranks = [1] * len(widths)
    left = (rank - 1) * sum(widths)
    while True:
        open_blocks = [b for b, width in enumerate(widths) if ranks[b] < limits[b] and width <= left]
        if not open_blocks:
            break
        best = max(open_blocks, key=lambda b: (gains[b][ranks[b]] / widths[b], -ranks[b]))
        ranks[best] += 1
        left -= widths[best]
    uniform = [rank] * len(widths)
    total = sum(p.norm**2 for p in probe.projections if p.target in targets)
    return tuple(ranks), (
        f"ranks {min(ranks)} to {max(ranks)} where the probe's gradient is largest: they capture "
        f"{_captured(gains, ranks, total):.1%} of its energy in {', '.join(targets)}, rank {rank} everywhere "
        f"{_captured(gains, uniform, total):.1%}, with as many parameters"
    )


def _gains(probe: Probe, block: int, targets: Sequence[str]) -> list[float]:
    """Squared singular values by index, summed over the targets of a block."""
    found = [p.singular_values for p in probe.projections if p.block == block and p.target in targets]
    return [sum(value**2 for value in values) for values in zip(*found, strict=True)]


def _captured(gains: Sequence[Sequence[float]], ranks: Sequence[int], total: float) -> float:
    return sum(sum(gain[:rank]) for gain, rank in zip(gains, ranks, strict=True)) / total if total > 0 else 0.0
