"""Stored cases as stacks of slices to train on, across any axis of their volumes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from samunet.artifacts.plan_parts import Across
from samunet.artifacts.store import CaseRecord
from samunet.core.labels import LabelSpec
from samunet.preprocessing.planes import occupied_slices, turn, turned
from samunet.preprocessing.store import CaseReader, OpenCase

HELD_BYTES = 2**28
Voxels = tuple[Any, Any]


@dataclass(frozen=True)
class Stack:
    """A case, cut into slices across one axis.

    Args:
        num_slices: How many.
        anatomical_axes: The anatomical axis closest to the stack's (slice, row, column).
        label_slices: Per structure, the slices that hold it.
        valid_slices: Slices that there is something to learn on.
    """

    num_slices: int
    anatomical_axes: tuple[str, str, str]
    label_slices: Mapping[str, tuple[int, ...]]
    valid_slices: tuple[int, ...]

    @classmethod
    def of(cls, record: CaseRecord) -> Stack:
        """The slices as they are stored."""
        return cls(record.store_shape[0], record.anatomical_axes, record.label_slices, record.valid_slices)


class Volumes:
    """The voxels of cases: read slice by slice, or held whole as far as there is room.

    Args:
        store: Where they are.
        with_labels: Whether labels are read.
    """

    def __init__(self, store: CaseReader, *, with_labels: bool) -> None:
        self._store, self._with_labels = store, with_labels
        self._open: dict[str, OpenCase] = {}
        self._held: OrderedDict[str, Voxels] = OrderedDict()
        self._bytes = 0

    @property
    def held(self) -> Sequence[str]:
        """Cases that are held whole, the longest unused first."""
        return list(self._held)

    def whole(self, case: str) -> Voxels:
        """Channels (C, S, H, W) and labels (S, H, W) of a case in memory; labels None where they are not read."""
        if case not in self._held:
            data, labels = self._stored(case)
            voxels = data[:], None if labels is None else labels[:]
            self._bytes += _num_bytes(voxels)
            while self._held and self._bytes > HELD_BYTES:
                self._bytes -= _num_bytes(self._held.popitem(last=False)[1])
            self._held[case] = voxels
        self._held.move_to_end(case)
        return self._held[case]

    def stored(self, case: str) -> Voxels:
        """The same, to be read slice by slice where the case is not held."""
        return self._held.get(case) or self._stored(case)

    def labels(self, case: str) -> NDArray[np.int16]:
        """Labels (S, H, W) of a case, without its channels."""
        labels: NDArray[np.int16] = self.stored(case)[1][:]
        return labels

    def _stored(self, case: str) -> Voxels:
        if case not in self._open:
            self._open[case] = self._store.open(case)
        opened = self._open[case]
        return opened.data, opened.labels if self._with_labels else None


class Stacks(Mapping[str, Stack]):
    """Cases by name, as stacks across one axis.

    Args:
        volumes: Their voxels.
        records: Of the cases that can be cut so.
        across: The axis.
        labels: Meaning of the references; None where they are not read, and every slice counts.
    """

    def __init__(
        self, volumes: Volumes, records: Mapping[str, CaseRecord], across: Across, labels: LabelSpec | None
    ) -> None:
        self._volumes, self._records, self._across, self._labels = volumes, records, across, labels
        self._known: dict[str, Stack] = {}

    def __getitem__(self, case: str) -> Stack:
        if case not in self._known:
            self._known[case] = self._stack(self._records[case])
        return self._known[case]

    def __iter__(self) -> Iterator[str]:
        return iter(self._records)

    def __len__(self) -> int:
        return len(self._records)

    def voxels(self, case: str) -> Voxels:
        """Channels (C, S, H, W) and labels (S, H, W) of a case, to be sliced; labels None where they are not read."""
        if self._across == "slices":
            return self._volumes.stored(case)
        data, labels = self._volumes.whole(case)
        return turn(data, self._across), None if labels is None else turn(labels, self._across)

    def _stack(self, record: CaseRecord) -> Stack:
        if self._across == "slices":
            return Stack.of(record)
        number, *_ = turned(record.store_shape, self._across)
        axes = turned(record.anatomical_axes, self._across)
        if self._labels is None:
            return Stack(number, axes, {}, tuple(range(number)))
        return Stack(
            number, axes, *occupied_slices(turn(self._volumes.labels(record.name), self._across), self._labels)
        )


def _num_bytes(voxels: Voxels) -> int:
    data, labels = voxels
    return int(data.nbytes) + (0 if labels is None else int(labels.nbytes))
