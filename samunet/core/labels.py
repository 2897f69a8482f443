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
LARGEST_VALUE = int(np.iinfo(np.int16).max)  # the store's label maps are int16


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
            ConfigError: If a value is no whole number up to LARGEST_VALUE, background is not 0, values repeat, regions
                lack their order, or masks painted in that order would not show the regions that were predicted.
        """
        labels = content["labels"]
        names = {n: _as_values(n, v) for n, v in labels.items() if n not in ("background", IGNORE_NAME)}
        if _as_values("background", labels.get("background", 0)) != (0,):
            raise ConfigError("the background label must be 0", found=str(labels.get("background")))
        has_regions = any(len(v) > 1 for v in names.values())
        order = _painting(names, content.get("regions_class_order")) if has_regions else None
        spec = cls(names, order, _ignore_value(labels.get(IGNORE_NAME)))
        spec._check()
        return spec

    def _check(self) -> None:
        if not self.names:
            raise ConfigError("dataset.json declares no foreground label", expected="one beside background")
        if self.regions_class_order is None:
            values = [v[0] for v in self.names.values()]
            if len(set(values)) != len(values) or 0 in values:
                raise ConfigError("label values must be unique and not 0", found=str(dict(self.names)))
        else:
            _check_regions(self.names, self.regions_class_order)
        if self.ignore == self.background:
            raise ConfigError("the ignore label is also the background's", found=str(self.ignore))
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

    def undeclared_in(self, labels: NDArray[Any]) -> tuple[int, ...]:
        """The values of a label map that nothing declares, sorted."""
        return tuple(int(value) for value in np.unique(labels[~np.isin(labels, self.values)]))

    def foreground_mask(self, labels: NDArray[Any]) -> NDArray[np.bool_]:
        """Voxels that belong to any structure: neither background nor ignore."""
        mask = labels > self.background
        return mask if self.ignore is None else mask & (labels != self.ignore)

    def num_ignored(self, labels: NDArray[Any]) -> int:
        """How many voxels of a label map are ignored."""
        return 0 if self.ignore is None else int(np.count_nonzero(labels == self.ignore))

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
    if max(values) > LARGEST_VALUE:
        raise ConfigError(
            "a label value is too large to be stored",
            expected=f"at most {LARGEST_VALUE}",
            found=f"{name}: {max(values)}",
            todo="number the structures from 1, in dataset.json and in the label files",
        )
    return values


def _ignore_value(value: Any) -> int | None:
    if value is None:
        return None
    if isinstance(value, (list, tuple)):
        raise ConfigError("the ignore label must be one value", expected="an integer", found=f"{IGNORE_NAME}: {value}")
    return _as_values(IGNORE_NAME, value)[0]


def _painting(names: Mapping[str, tuple[int, ...]], order: Any) -> tuple[int, ...]:
    """The value painted for each region."""
    if not isinstance(order, (list, tuple)) or len(order) != len(names):
        raise ConfigError(
            "region-based labels need regions_class_order with one entry per region",
            expected=f"{len(names)} entries",
            found=str(order),
        )
    return _as_values("regions_class_order", order)


def _check_regions(names: Mapping[str, tuple[int, ...]], order: Sequence[int]) -> None:
    """Refuse regions whose painted masks would not show what was predicted, though every region were predicted right.

    nnU-Net checks the number of entries alone. What it documents passes: regions that enclose others come first, each
    painted with a value of its own that is in none of those inside.
    """
    seen: dict[frozenset[int], str] = {}
    for (name, values), painted in zip(names.items(), order, strict=True):
        region = f"{name}: {list(values)}"
        if 0 in values:
            raise ConfigError("a region contains the background", found=region, todo="take 0 out of the region")
        other = seen.setdefault(frozenset(values), name)
        if other != name:
            raise ConfigError("two regions have the same values", found=f"{other} and {region}", todo="declare one")
        if painted not in values:
            raise ConfigError(
                "regions_class_order paints a region with a value that does not belong to it",
                expected=f"one of {list(values)} for {name}",
                found=str(painted),
                todo="give the values in the order in which the regions are declared",
            )
    for value in sorted({value for values in names.values() for value in values}):
        inside = _regions_with(value, names)
        painted = [chosen for name, chosen in zip(names, order, strict=True) if name in inside][-1]
        if _regions_with(painted, names) != inside:
            raise ConfigError(
                "masks painted in regions_class_order would not show the regions that are predicted",
                expected=f"voxels of {' and '.join(inside)} (label value {value}) painted with a value of just these",
                found=f"{painted}, a value of {' and '.join(_regions_with(painted, names))}",
                todo="declare regions that enclose others first, paint each with a value that is in none of those "
                "inside, and declare a part that regions share as a region of its own after them",
            )


def _regions_with(value: int, names: Mapping[str, tuple[int, ...]]) -> list[str]:
    return [name for name, values in names.items() if value in values]
