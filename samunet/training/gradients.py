"""Gradients of a step's batch: in its planned parts, each at once or in pieces that give the same gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from samunet.models.segmentation import SegmentationModel
from samunet.training.fallback import Volatile
from samunet.training.objective import Batch, Objective


def accumulate(
    model: SegmentationModel,
    objective: Objective,
    batch: Batch,
    *,
    parts: int,
    pieces: int,
    least: int,
    scaler: torch.amp.GradScaler,
) -> Tensor:
    """Add the gradient of a batch's loss to the parameters; returns that loss.

    The loss is the mean of the parts' losses, weighted by their samples, in whatever pieces they are computed.

    Args:
        model: In train mode, on its device.
        objective: What is minimised.
        batch: Tensors with B samples each, on the device.
        parts: Parts that have a loss each.
        pieces: How many times each part is cut further.
        least: Samples that a piece has at least.
        scaler: Of float16.
    """
    total = torch.zeros((), device=batch[0].device)
    for part in zip(*(tensor.chunk(parts) for tensor in batch), strict=True):
        share, number = len(part[0]) / len(batch[0]), min(pieces, len(part[0]) // least)
        if number > 1:
            total += _in_pieces(model, objective, part, share=share, number=number, scaler=scaler)
            continue
        loss = objective.loss(model, part) * share
        scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        total += loss.detach()
    return total


def _in_pieces(
    model: SegmentationModel,
    objective: Objective,
    part: Batch,
    *,
    share: float,
    number: int,
    scaler: torch.amp.GradScaler,
) -> Tensor:
    """Add the gradient of one part's loss, a piece at a time.

    Dice is a ratio of sums over all slices: it is no mean over pieces. So the sums of all pieces are taken first,
    recording nothing; the loss of their totals says how it depends on each sum, and with these slopes every piece is
    run again and adds what its own sums contribute. Both runs draw the same dropout.

    Source: Gao et al., Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup, 2021 (two passes).
    """
    pieces = list(zip(*(tensor.tensor_split(number) for tensor in part), strict=True))
    start = Volatile.of(model)
    with torch.no_grad():
        sums = [objective.sums(model, piece) for piece in pieces]
    start.restore()
    totals = tuple(torch.stack(values).sum(0).requires_grad_() for values in zip(*sums, strict=True))
    loss = objective.loss_of(totals) * share
    slopes = torch.autograd.grad(loss, totals)
    for piece in pieces:
        values = objective.sums(model, piece)
        products = [(slope * value).sum() for slope, value in zip(slopes, values, strict=True)]
        scaler.scale(torch.stack(products).sum()).backward()  # type: ignore[no-untyped-call]
    return loss.detach()
