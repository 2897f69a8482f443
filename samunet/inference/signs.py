"""What a model says about its own masks, added up while the probabilities are there: nothing of a volume is kept.

Legend: T mask tokens, K structures, h w a slice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from samunet.artifacts.quality import StructureSigns
from samunet.core.labels import LabelSpec

DIGITS = 5
_SIZE, _INSIDE, _CERTAIN, _TOTAL = range(4)
_LEAST_PROBABILITY = 1e-7


class MaskSums:
    """Sums over a volume of every structure's probability, inside its mask and everywhere.

    Args:
        labels: Meaning of the label values.
    """

    def __init__(self, labels: LabelSpec) -> None:
        self._labels = labels
        self._channel = np.zeros(max(labels.values) + 1, np.int64)
        for index, values in enumerate(labels.names.values(), start=1):
            self._channel[list(values)] = index
        self._slices: list[Tensor] = []

    def add(self, probabilities: Tensor, painted: NDArray[np.integer[Any]]) -> None:
        """Add a slice.

        Args:
            probabilities: (T, h, w) float32.
            painted: (h, w) label values decided from them.
        """
        count = self._regions if self._labels.has_regions else self._classes
        self._slices.append(count(probabilities, painted))

    def signs(self) -> dict[str, StructureSigns]:
        """Per structure the size of its mask, the Dice to expect and the certainty; those are None where it is empty.

        A voxel is expected to be in the structure as often as its probability says. So of a mask M, sum(p in M)
        voxels are expected to be right and the structure to be sum(p) large: Dice is about
        2 sum(p in M) / (|M| + sum(p)).
        """
        number = len(self._labels.names)
        total = torch.stack(self._slices).sum(0).cpu().numpy() if self._slices else np.zeros((4, number))
        return {name: _signs_of(total[:, index]) for index, name in enumerate(self._labels.names)}

    def _classes(self, probabilities: Tensor, painted: NDArray[np.integer[Any]]) -> Tensor:
        """Sums (4, K) of exclusive classes: every voxel is in one mask."""
        channel = torch.from_numpy(self._channel[painted]).to(probabilities.device)
        inside = probabilities.gather(0, channel[None])[0].double().flatten()
        flat, number = channel.flatten(), len(probabilities)
        size, of_mask, certain = (
            torch.bincount(flat, weights=values, minlength=number)[1:]
            for values in (torch.ones_like(inside), inside, _certainty(inside))
        )
        return torch.stack([size, of_mask, certain, probabilities.sum((1, 2)).double()[1:]])

    def _regions(self, probabilities: Tensor, painted: NDArray[np.integer[Any]]) -> Tensor:
        """Sums (4, K) of regions, which may overlap."""
        masks = np.stack([self._labels.structure_mask(painted, name) for name in self._labels.names])
        inside, p = torch.from_numpy(masks).to(probabilities.device), probabilities.double()
        parts = (inside.double(), p * inside, _certainty(p) * inside, p)
        return torch.stack([part.sum((1, 2)) for part in parts])


def join_signs(
    combined: Mapping[str, StructureSigns],
    members: Sequence[tuple[NDArray[Any], Mapping[str, StructureSigns]]],
    labels: LabelSpec,
) -> dict[str, StructureSigns]:
    """The signs of an average over models of different kinds.

    Args:
        combined: Of the averaged probabilities.
        members: Each model's own labels (Z, Y, X), and what it says about them.
        labels: Meaning of the values.

    Returns:
        Per structure: of the average what its probabilities say, the means of what the members' views and heads say,
        and how much the members' masks agree (or their folds, where those agree less).
    """
    return {name: _joined(name, own, members, labels) for name, own in combined.items()}


def _joined(
    name: str,
    own: StructureSigns,
    members: Sequence[tuple[NDArray[Any], Mapping[str, StructureSigns]]],
    labels: LabelSpec,
) -> StructureSigns:
    said = [signs[name] for _, signs in members]
    masks = [labels.structure_mask(values, name) for values, _ in members]
    sizes = [int(mask.sum()) for mask in masks]
    pairs = [pair for pair in combinations(range(len(masks)), 2) if sizes[pair[0]] + sizes[pair[1]]]
    agree = [2 * int((masks[a] & masks[b]).sum()) / (sizes[a] + sizes[b]) for a, b in pairs]
    folds = [signs.models_agree for signs in said if signs.models_agree is not None]
    return own.model_copy(
        update={
            "agreement": _mean([signs.agreement for signs in said]),
            "iou_head": _mean([signs.iou_head for signs in said]),
            "models_agree": min([*folds, round(float(np.mean(agree)), DIGITS)]) if agree else None,
        }
    )


def _mean(values: Sequence[float | None]) -> float | None:
    """Mean of all; None where one is missing, since a mean of the others would be no member's own."""
    known = [value for value in values if value is not None]
    return round(float(np.mean(known)), DIGITS) if known and len(known) == len(values) else None


def _certainty(probabilities: Tensor) -> Tensor:
    """1 - binary entropy in bits, without the rounding errors that would make it leave [0, 1]."""
    p = probabilities.clamp(_LEAST_PROBABILITY, 1 - _LEAST_PROBABILITY)
    return 1 + p * p.log2() + (1 - p) * (1 - p).log2()


def _signs_of(sums: NDArray[np.float64]) -> StructureSigns:
    size = int(sums[_SIZE])
    if not size:
        return StructureSigns(voxels=0)
    return StructureSigns(
        voxels=size,
        expected=round(float(2 * sums[_INSIDE] / (size + sums[_TOTAL])), DIGITS),
        certainty=round(float(sums[_CERTAIN] / size), DIGITS),
    )
