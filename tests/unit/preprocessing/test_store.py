"""Stored cases: what is written is read, whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import blosc2
import numpy as np
import pytest

import samunet.preprocessing.store as store_module
from samunet.artifacts.plan import Plan
from samunet.core.errors import StoreError
from samunet.core.volume import Volume
from samunet.preprocessing.pipeline import PreprocessedCase, preprocess_case
from samunet.preprocessing.store import CaseStore, create_store, remove_leftovers, write_case

SPEC = {"spacing": [None, 1.0, 1.0], "format": 1}


@pytest.fixture
def case(make_plan: Callable[..., Plan], phantom: tuple[Volume, Volume]) -> PreprocessedCase:
    return preprocess_case(*phantom, plan=make_plan(), configuration="2d", name="case_1.2")


@pytest.fixture
def store(tmp_path: Path) -> CaseStore:
    return create_store(tmp_path / "store", SPEC)


def test_written_cases_are_read_back_exactly(store: CaseStore, case: PreprocessedCase) -> None:
    """Voxels, labels and record survive, in whole and slice by slice."""
    write_case(store.folder, case)
    assert store.names() == ["case_1.2"]
    opened = store.open("case_1.2")
    assert opened.record == store.record("case_1.2") == case.record
    np.testing.assert_array_equal(opened.slices(0, 4), case.data)
    np.testing.assert_array_equal(opened.slices(1, 3), case.data[:, 1:3])
    assert case.labels is not None
    np.testing.assert_array_equal(opened.label_slices(2, 3), case.labels[2:3])
    assert opened.slices(0, 1).dtype == np.float32


def test_chunks_are_whole_slices_read_by_one_thread(store: CaseStore, case: PreprocessedCase) -> None:
    """Reading one slice decompresses one chunk per channel, and starts no threads."""
    write_case(store.folder, case)
    opened = store.open("case_1.2")
    assert opened.data.chunks == (1, 1, *case.data.shape[2:])
    assert opened.labels.chunks == (1, *case.data.shape[2:])
    assert opened.data.schunk.dparams.nthreads == 1
    assert isinstance(opened.data, blosc2.NDArray)


@pytest.mark.parametrize(("first", "last"), [(-1, 2), (0, 5), (2, 2), (3, 1)])
def test_slices_outside_the_volume_are_errors(store: CaseStore, case: PreprocessedCase, first: int, last: int) -> None:
    """A range is never silently cut short."""
    write_case(store.folder, case)
    opened = store.open("case_1.2")
    with pytest.raises(StoreError, match="no such slices"):
        opened.slices(first, last)
    with pytest.raises(StoreError, match="no such slices"):
        opened.label_slices(first, last)


def test_cases_without_labels(store: CaseStore, case: PreprocessedCase) -> None:
    """A case stored without a reference opens, also where it had one before, and says so when asked for it."""
    write_case(store.folder, case)
    write_case(store.folder, PreprocessedCase(case.data, None, case.record))
    opened = store.open("case_1.2")
    assert opened.labels is None
    with pytest.raises(StoreError, match="without a reference"):
        opened.label_slices(0, 1)


@pytest.mark.parametrize("writes_before_crash", [0, 1, 2])
def test_a_crash_between_writes_leaves_no_finished_case(
    store: CaseStore, case: PreprocessedCase, monkeypatch: pytest.MonkeyPatch, writes_before_crash: int
) -> None:
    """Wherever writing stops, also when a finished case is replaced, the case is not listed; writing again heals it."""
    write_case(store.folder, case)
    count = 0

    def crashing(name: str) -> None:
        write = getattr(store_module, name)

        def guarded(*args: object) -> None:
            nonlocal count
            if count == writes_before_crash:
                raise KeyboardInterrupt
            count += 1
            write(*args)

        monkeypatch.setattr(store_module, name, guarded)

    crashing("_write_array")
    crashing("save_schema")
    with pytest.raises(KeyboardInterrupt):
        write_case(store.folder, case)
    assert store.names() == []
    with pytest.raises(StoreError, match="not in the store"):
        store.open("case_1.2")
    monkeypatch.undo()
    write_case(store.folder, case)
    np.testing.assert_array_equal(store.open("case_1.2").slices(0, 4), case.data)


def test_a_crash_within_a_write_leaves_the_old_file(
    store: CaseStore, case: PreprocessedCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compression that fails halfway leaves neither a damaged nor a temporary file."""
    write_case(store.folder, case)
    before = (store.folder / "data" / "case_1.2.b2nd").read_bytes()

    def failing(array: np.ndarray, *, urlpath: str, **settings: object) -> None:
        Path(urlpath).write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(blosc2, "asarray", failing)
    with pytest.raises(OSError, match="no space"):
        write_case(store.folder, case)
    assert (store.folder / "data" / "case_1.2.b2nd").read_bytes() == before
    assert not list(store.folder.rglob(".partial-*"))


def test_leftovers_of_a_killed_run_are_neither_listed_nor_kept(store: CaseStore, case: PreprocessedCase) -> None:
    """Temporary files that a kill left behind are no cases, and are removed; those of a run that writes now stay."""
    write_case(store.folder, case)
    for kind, ending in (("data", "b2nd"), ("records", "json")):
        (store.folder / kind / f".partial-abc-case_2.{ending}").write_bytes(b"half")
        os.utime(store.folder / kind / f".partial-abc-case_2.{ending}", (0, 0))
    being_written = store.folder / "data" / ".partial-def-case_3.b2nd"
    being_written.write_bytes(b"another run's")
    assert store.names() == ["case_1.2"]
    remove_leftovers(store.folder)
    assert list(store.folder.rglob(".partial-*")) == [being_written]
    assert store.names() == ["case_1.2"]


def test_damaged_files_are_errors_that_name_the_case(store: CaseStore, case: PreprocessedCase) -> None:
    """A truncated array is reported with its file."""
    write_case(store.folder, case)
    path = store.folder / "data" / "case_1.2.b2nd"
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(StoreError, match="damaged") as caught:
        store.open("case_1.2")
    assert caught.value.file == path


def test_missing_and_stale_stores_are_errors(tmp_path: Path, store: CaseStore) -> None:
    """No store, or one made from another spec, is refused; the same spec opens it again."""
    with pytest.raises(StoreError, match="no preprocessed store"):
        CaseStore(tmp_path)
    other = SPEC | {"format": 2}
    with pytest.raises(StoreError, match="another plan"):
        CaseStore(store.folder, spec=other)
    with pytest.raises(StoreError, match="another plan"):
        create_store(store.folder, other)
    assert create_store(store.folder, dict(reversed(SPEC.items()))).names() == []
