"""What the integers in a label map mean, and how a network's maps become them.

Plain labels: one mask token per class with background first (T = K + 1), softmax. Regions: one token per region in
dataset.json order, no background token, sigmoid, painted in ``regions_class_order`` where p > 0.5 (nnU-Net's rule).
The ignore label is never a class.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from samunet.core.errors import ConfigError

IGNORE_INDEX = -1
IGNORE_NAME = "ignore"


@dataclass(frozen=True)
class LabelSpec:
    """The labels of a dataset.

    Args:
        names: Foreground structure to its value, or to the values a region is made of; dataset.json order.
        regions_class_order: Value painted for each region, in order; None for plain labels.
        ignore: Value of unlabelled voxels; None if there is none.
        background: Value of background.
    """

    names: Mapping[str, tuple[int, ...]]
    regions_class_order: tuple[int, ...] | None = None
    ignore: int | None = None
    background: int = 0

    @classmethod
    def from_dataset_json(cls, content: Mapping[str, Any]) -> LabelSpec:
        """Read ``labels`` and ``regions_class_order`` of an nnU-Net dataset.json.

        Raises:
            ConfigError: If background is not 0, values repeat, or regions lack their order.
        """
        labels = content["labels"]
        names = {n: _as_values(n, v) for n, v in labels.items() if n not in ("background", IGNORE_NAME)}
        ignore = labels.get(IGNORE_NAME)
        if _as_values("background", labels.get("background", 0)) != (0,):
            raise ConfigError("the background label must be 0", found=str(labels.get("background")))
        order = content.get("regions_class_order")
        has_regions = any(len(v) > 1 for v in names.values())
        painting = tuple(int(v) for v in order or ())
        if has_regions and len(painting) != len(names):
            raise ConfigError(
                "region-based labels need regions_class_order with one entry per region",
                expected=f"{len(names)} entries",
                found=str(order),
            )
        spec = cls(names, painting if has_regions else None, None if ignore is None else int(ignore))
        spec._check()
        return spec

    def _check(self) -> None:
        if not self.names:
            raise ConfigError("dataset.json declares no foreground label", expected="one beside background")
        if self.regions_class_order is None:
            values = [v[0] for v in self.names.values()]
            if len(set(values)) != len(values) or 0 in values:
                raise ConfigError("label values must be unique and not 0", found=str(dict(self.names)))
        if self.ignore is not None and any(self.ignore in v for v in self.names.values()):
            raise ConfigError("the ignore label is also the value of a structure", found=str(self.ignore))

    @property
    def has_regions(self) -> bool:
        """Whether structures overlap and are trained with one sigmoid each."""
        return self.regions_class_order is not None

    @property
    def num_foreground(self) -> int:
        """Number of structures (K)."""
        return len(self.names)

    @property
    def num_tokens(self) -> int:
        """Number of mask tokens T: K + 1 for plain labels, the number of regions otherwise."""
        return self.num_foreground + (0 if self.has_regions else 1)

    @property
    def values(self) -> tuple[int, ...]:
        """Every value that may stand in a label map, sorted, with background and ignore."""
        found = {v for values in self.names.values() for v in values} | {self.background}
        return tuple(sorted(found | ({self.ignore} if self.ignore is not None else set())))

    def foreground_mask(self, labels: NDArray[Any]) -> NDArray[np.bool_]:
        """Voxels that belong to any structure: neither background nor ignore."""
        mask = labels > self.background
        return mask if self.ignore is None else mask & (labels != self.ignore)

    def structure_mask(self, labels: NDArray[Any], name: str) -> NDArray[np.bool_]:
        """Voxels of one structure or region."""
        result: NDArray[np.bool_] = np.isin(labels, self.names[name])
        return result

    def encode(self, labels: NDArray[Any]) -> NDArray[np.int16]:
        """Label values to training targets.

        Args:
            labels: Integer array of any shape.

        Returns:
            For plain labels class indices 0..K of the same shape, IGNORE_INDEX where ignored. For regions a stack
            (T, ...) of 0/1 maps, IGNORE_INDEX where ignored.
        """
        if self.has_regions:
            stack = np.stack([np.isin(labels, v) for v in self.names.values()]).astype(np.int16)
            if self.ignore is not None:
                stack[:, labels == self.ignore] = IGNORE_INDEX
            return stack
        target = np.zeros(labels.shape, dtype=np.int16)
        for index, values in enumerate(self.names.values(), start=1):
            target[labels == values[0]] = index
        if self.ignore is not None:
            target[labels == self.ignore] = IGNORE_INDEX
        return target

    def decide(self, logits: NDArray[np.floating[Any]]) -> NDArray[np.uint16]:
        """Network maps to label values.

        Args:
            logits: (T, ...) logits (softmax is monotone, so the largest wins; regions are painted at logit > 0).
        """
        if self.regions_class_order is None:
            table = np.array([self.background, *(v[0] for v in self.names.values())], dtype=np.uint16)
            painted: NDArray[np.uint16] = table[np.argmax(logits, axis=0)]
            return painted
        result = np.zeros(logits.shape[1:], dtype=np.uint16)
        for index, value in enumerate(self.regions_class_order):
            result[logits[index] > 0] = value
        return result

    def to_json(self) -> dict[str, Any]:
        """The ``labels`` object of dataset.json."""
        labels: dict[str, Any] = {"background": self.background}
        labels.update({n: v[0] if len(v) == 1 else list(v) for n, v in self.names.items()})
        if self.ignore is not None:
            labels[IGNORE_NAME] = self.ignore
        return labels


def _as_values(name: str, value: int | Sequence[int]) -> tuple[int, ...]:
    values = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    if not values or not all(isinstance(v, int) and v >= 0 for v in values):
        raise ConfigError("a label value must be a non-negative integer or a list of them", found=f"{name}: {value!r}")
    return values
