"""Preprocessed cases on disk: compressed whole-slice chunks, readable slice by slice.

A store folder holds ``store.json`` (what its voxels depend on) and per case ``data/NAME.b2nd``,
``labels/NAME.b2nd`` and ``records/NAME.json``. The record is written last: a case without one is not finished.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from samunet.artifacts.store import STORE_VERSION, CaseRecord
from samunet.core.config import Schema, load_schema, save_schema
from samunet.core.errors import StoreError
from samunet.core.files import atomic_path, sha256_json

if TYPE_CHECKING:
    from samunet.preprocessing.pipeline import PreprocessedCase

STORE_FILE = "store.json"
LEFTOVER_SECONDS = 3600.0
_COMPRESSION_LEVEL = 1


class StoreHeader(Schema):
    """What the voxels of a store depend on.

    Args:
        version: Format of the store.
        sha256: Hash of ``spec``.
        spec: As :meth:`samunet.artifacts.plan.Plan.store_spec` gives it.
    """

    version: int = STORE_VERSION
    sha256: str
    spec: dict[str, Any]


@dataclass(frozen=True, eq=False)
class OpenCase:
    """A case whose slices are read on demand, in one thread.

    Args:
        data: blosc2 array (C, S, H, W), float32.
        labels: blosc2 array (S, H, W), int16; None if the case has no reference.
        record: How the case was made.
    """

    data: Any
    labels: Any
    record: CaseRecord

    def slices(self, first: int, last: int) -> NDArray[np.float32]:
        """Read slices first to last (exclusive) of every channel: (C, last - first, H, W).

        Raises:
            StoreError: If the range is empty or leaves the volume.
        """
        self._check_range(first, last)
        voxels: NDArray[np.float32] = self.data[:, first:last]
        return voxels

    def label_slices(self, first: int, last: int) -> NDArray[np.int16]:
        """Read the reference of slices first to last (exclusive): (last - first, H, W).

        Raises:
            StoreError: If the range is empty or leaves the volume, or the case has no reference.
        """
        self._check_range(first, last)
        if self.labels is None:
            raise StoreError("the case was stored without a reference", case=self.record.name)
        voxels: NDArray[np.int16] = self.labels[first:last]
        return voxels

    def _check_range(self, first: int, last: int) -> None:
        if not 0 <= first < last <= self.record.store_shape[0]:
            raise StoreError(
                "no such slices",
                case=self.record.name,
                expected=f"within 0 to {self.record.store_shape[0]}",
                found=f"{first} to {last}",
            )


class CaseStore:
    """A store folder, opened for reading.

    Args:
        folder: The store.
        spec: What the reader expects the voxels to depend on; not compared if None.

    Raises:
        StoreError: If there is no store, or it was made by another plan.
    """

    def __init__(self, folder: Path, *, spec: Mapping[str, Any] | None = None) -> None:
        self.folder = folder
        if not (folder / STORE_FILE).is_file():
            raise StoreError(
                "there is no preprocessed store", file=folder, todo="run samunet_plan_and_preprocess for this dataset"
            )
        if spec is not None:
            _check_header(folder, spec)

    def names(self) -> list[str]:
        """Names of the finished cases, sorted."""
        return _finished(self.folder)

    def record(self, name: str) -> CaseRecord:
        """How a case was made.

        Raises:
            StoreError: If the case is not finished.
        """
        path = _record_file(self.folder, name)
        if not path.is_file():
            raise StoreError(
                "the case is not in the store",
                case=name,
                file=self.folder,
                todo="run samunet_plan_and_preprocess again; finished cases are skipped",
            )
        return load_schema(CaseRecord, path)

    def open(self, name: str) -> OpenCase:
        """Open a case for reading slices. Open it in the process that reads it.

        Raises:
            StoreError: If the case is not finished or a file of it is damaged.
        """
        record = self.record(name)
        labels_file = _labels_file(self.folder, name)
        labels = _open_array(labels_file, name) if labels_file.is_file() else None
        return OpenCase(_open_array(_data_file(self.folder, name), name), labels, record)


class CaseReader(Protocol):
    """What gives preprocessed cases by name."""

    def record(self, name: str) -> CaseRecord:
        """How a case was made."""

    def open(self, name: str) -> OpenCase:
        """Open a case for reading slices, in the process that reads it."""


class RelabelledCases:
    """Cases of stores with other labels than these hold, kept in folders of their own.

    Args:
        folders: Of the labels; of a case that is in several, those in the last one count.
        sources: Case to the store that holds its voxels; labels there are never read.
    """

    def __init__(self, folders: Sequence[Path], sources: Mapping[str, CaseStore]) -> None:
        self._sources = sources
        self._folders = {name: folder for folder in folders for name in _finished(folder) if name in sources}

    def names(self) -> list[str]:
        """Names of the cases that have labels made for the image as it is stored now, sorted."""
        return sorted(name for name in self._folders if self._is_of_image(name))

    def record(self, name: str) -> CaseRecord:
        """How a case was made, with the slices that hold structures by the labels here."""
        return load_schema(CaseRecord, _record_file(self._folders[name], name))

    def open(self, name: str) -> OpenCase:
        """Open a case for reading slices: voxels as stored, labels from here.

        Raises:
            StoreError: If a file is missing or damaged.
        """
        voxels = self._sources[name].open(name).data
        return OpenCase(voxels, _open_array(_labels_file(self._folders[name], name), name), self.record(name))

    def _is_of_image(self, name: str) -> bool:
        there, here = self._sources[name].record(name), self.record(name)
        return (there.source_sha256, there.store_shape) == (here.source_sha256, here.store_shape)


def write_labels_of(folder: Path, labels: NDArray[np.int16], record: CaseRecord) -> None:
    """Write labels (S, H, W) for :class:`RelabelledCases`, then the record that says what their slices hold."""
    _write_array(_labels_file(folder, record.name), labels)
    save_schema(record, _record_file(folder, record.name))


def create_store(folder: Path, spec: Mapping[str, Any]) -> CaseStore:
    """Create a store folder, or open it if it was made from the same spec.

    Args:
        folder: The store.
        spec: As :meth:`samunet.artifacts.plan.Plan.store_spec` gives it.

    Raises:
        StoreError: If the folder holds a store of another plan.
    """
    if (folder / STORE_FILE).is_file():
        _check_header(folder, spec)
    else:
        save_schema(StoreHeader(sha256=sha256_json(spec), spec=dict(spec)), folder / STORE_FILE)
    return CaseStore(folder)


def write_case(folder: Path, case: PreprocessedCase) -> None:
    """Write a case: voxels, labels, then the record that marks it finished.

    Each file appears whole or not at all; a case that is written again loses its mark first.
    """
    name = case.record.name
    record_file, labels_file = _record_file(folder, name), _labels_file(folder, name)
    record_file.unlink(missing_ok=True)
    labels_file.unlink(missing_ok=True)
    _write_array(_data_file(folder, name), case.data)
    if case.labels is not None:
        _write_array(labels_file, case.labels)
    save_schema(case.record, record_file)


def remove_leftovers(folder: Path) -> None:
    """Delete what a killed run left under temporary names; younger files may be another run's that is writing them."""
    for path in folder.glob("*/.partial-*"):
        with suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime > LEFTOVER_SECONDS:
                path.unlink()


def _finished(folder: Path) -> list[str]:
    """Names of the cases that have a record, sorted."""
    return sorted(path.name.removesuffix(".json") for path in (folder / "records").glob("[!.]*.json"))


def _check_header(folder: Path, spec: Mapping[str, Any]) -> None:
    found, expected = load_schema(StoreHeader, folder / STORE_FILE), sha256_json(spec)
    if (found.version, found.sha256) != (STORE_VERSION, expected):
        raise StoreError(
            "the store was made by another plan",
            file=folder,
            expected=f"version {STORE_VERSION}, {expected[:10]}",
            found=f"version {found.version}, {found.sha256[:10]}",
            todo="delete the folder and run samunet_plan_and_preprocess again",
        )


def _write_array(path: Path, array: NDArray[Any]) -> None:
    """Write an array with one chunk per slice (and channel)."""
    import blosc2

    chunk = (1,) * (array.ndim - 2) + array.shape[-2:]
    settings = {"codec": blosc2.Codec.ZSTD, "clevel": _COMPRESSION_LEVEL, "nthreads": 1}
    with atomic_path(path) as temporary:
        blosc2.asarray(
            np.ascontiguousarray(array),
            chunks=chunk,
            urlpath=str(temporary),
            mode="w",
            cparams=settings,
            dparams={"nthreads": 1},
        )


def _open_array(path: Path, name: str) -> Any:
    import blosc2

    try:
        return blosc2.open(str(path), mode="r", dparams={"nthreads": 1})
    except (OSError, RuntimeError, ValueError) as error:
        raise StoreError(
            "a file of the store is missing or damaged",
            case=name,
            file=path,
            found=str(error) or type(error).__name__,
            todo="delete the record of this case in records/ and run samunet_plan_and_preprocess again",
        ) from None


def _data_file(folder: Path, name: str) -> Path:
    return folder / "data" / f"{name}.b2nd"


def _labels_file(folder: Path, name: str) -> Path:
    return folder / "labels" / f"{name}.b2nd"


def _record_file(folder: Path, name: str) -> Path:
    return folder / "records" / f"{name}.json"
