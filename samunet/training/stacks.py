"""Stored cases as stacks of slices to train on, across any axis of their volumes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from samunet.artifacts.plan_parts import Across
from samunet.artifacts.store import CaseRecord
from samunet.core.labels import LabelSpec
from samunet.preprocessing.planes import occupied_slices, turn, turned
from samunet.preprocessing.store import CaseStore

HELD_BYTES = 2**28


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
        records: Of the cases, by name.
        whole: Whether whole volumes are read, which slices across other axes need.
    """

    def __init__(self, store: CaseStore, records: Mapping[str, CaseRecord], *, whole: bool) -> None:
        self.records = records
        self._store, self._whole = store, whole
        self._open: OrderedDict[str, tuple[Any, Any]] = OrderedDict()
        self._held = 0

    def __len__(self) -> int:
        """How many are open or held."""
        return len(self._open)

    def __getitem__(self, case: str) -> tuple[Any, Any]:
        """Channels (C, S, H, W) and labels (S, H, W), to be sliced; labels None where there are none."""
        if case in self._open:
            self._open.move_to_end(case)
            return self._open[case]
        opened = self._store.open(case)
        voxels = opened.data, opened.labels
        if self._whole:
            voxels = opened.data[:], None if opened.labels is None else opened.labels[:]
            self._held += _num_bytes(voxels)
            while self._open and self._held > HELD_BYTES:
                self._held -= _num_bytes(self._open.popitem(last=False)[1])
        self._open[case] = voxels
        return voxels


class Stacks(Mapping[str, Stack]):
    """Cases by name, as stacks across one axis.

    Args:
        volumes: Their voxels.
        across: The axis.
        labels: Meaning of the references; None where they are not read, and every slice counts.
    """

    def __init__(self, volumes: Volumes, across: Across, labels: LabelSpec | None) -> None:
        self._volumes, self._across, self._labels = volumes, across, labels
        self._known: dict[str, Stack] = {}

    def __getitem__(self, case: str) -> Stack:
        if case not in self._known:
            self._known[case] = self._stack(self._volumes.records[case])
        return self._known[case]

    def __iter__(self) -> Iterator[str]:
        return iter(self._volumes.records)

    def __len__(self) -> int:
        return len(self._volumes.records)

    def voxels(self, case: str) -> tuple[Any, Any]:
        """Channels (C, S, H, W) and labels (S, H, W) of a case, to be sliced; labels None where there are none."""
        data, labels = self._volumes[case]
        if self._across == "slices":
            return data, labels
        return turn(data, self._across), None if labels is None else turn(labels, self._across)

    def _stack(self, record: CaseRecord) -> Stack:
        if self._across == "slices":
            return Stack.of(record)
        number, *_ = turned(record.store_shape, self._across)
        axes = turned(record.anatomical_axes, self._across)
        if self._labels is None:
            return Stack(number, axes, {}, tuple(range(number)))
        return Stack(number, axes, *occupied_slices(self.voxels(record.name)[1], self._labels))


def _num_bytes(voxels: tuple[Any, Any]) -> int:
    data, labels = voxels
    return int(data.nbytes) + (0 if labels is None else int(labels.nbytes))
