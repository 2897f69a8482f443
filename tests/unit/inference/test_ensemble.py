"""Averages of probabilities: in pieces as at once, from disk as from memory."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from samunet.core.errors import DataError
from samunet.core.geometry import AxisOperation
from samunet.core.labels import LabelSpec
from samunet.inference import ensemble
from samunet.inference.ensemble import mean_labels, mean_probabilities, on_disk
from samunet.inference.restore import restore
from samunet.preprocessing.pipeline import preprocess_case
from tests.samples import make_case, make_plan

PLAIN = LabelSpec({"a": (1,), "b": (7,)})
REGIONS = LabelSpec({"whole": (1, 2), "core": (2,)}, regions_class_order=(1, 2))


def members(tokens: int, number: int = 2) -> list[np.ndarray]:
    rng = np.random.default_rng(3)
    raw = rng.uniform(0, 1, (number, tokens, 5, 6, 7)).astype(np.float32)
    return [(one / one.sum(0) if tokens == 3 else one).astype(np.float16) for one in raw]


@pytest.mark.parametrize(("spec", "tokens"), [(PLAIN, 3), (REGIONS, 2)])
def test_labels_in_pieces_are_those_of_the_whole_mean(
    spec: LabelSpec, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One slice at a time gives what averaging everything gives; regions are painted above one half."""
    maps = members(tokens)
    mean = np.mean([one.astype(np.float32) for one in maps], axis=0)
    if spec.has_regions:
        expected = np.where(mean[1] > 0.5, 2, np.where(mean[0] > 0.5, 1, 0))
    else:
        expected = np.array([0, 1, 7])[mean.argmax(0)]
    monkeypatch.setattr(ensemble, "CHUNK_BYTES", 1)
    assert np.array_equal(mean_labels(maps, spec), expected)
    assert np.allclose(mean_probabilities(maps), mean, atol=1e-3)


def test_one_member_twice_is_that_member() -> None:
    """The average of a model with itself decides as the model alone."""
    one = members(3)[0]
    assert np.array_equal(mean_labels([one, one], PLAIN), mean_labels([one], PLAIN))


def test_a_full_disk_is_an_error_and_not_the_end_of_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Too little free space is said before anything is written; so is a reservation that fails, whose file goes."""
    place = on_disk(tmp_path / "p.npy")
    with pytest.raises(DataError, match="no room") as error:
        place((4, 1 << 20, 1 << 20, 1 << 10))
    assert "TMPDIR" in str(error.value)
    assert list(tmp_path.iterdir()) == []

    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full, raising=False)
    with pytest.raises(DataError, match="no room"):
        place((2, 3, 4, 5))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="nothing to reserve with")
def test_probabilities_have_their_place_before_they_are_written(tmp_path: Path) -> None:
    """The file that is mapped is not sparse, and starts as zeros."""
    mapped = on_disk(tmp_path / "p.npy")((2, 8, 128, 128))
    file = (tmp_path / "p.npy").stat()
    assert file.st_blocks * 512 >= file.st_size > mapped.nbytes
    assert not mapped.any()


def test_probabilities_on_disk_are_those_in_memory(tmp_path: Path) -> None:
    """Restore writes the same numbers on the same grid to a file, for a case that lies turned in its file."""
    plan = make_plan()
    volume, _ = make_case(1)
    turned = AxisOperation((1, 2, 0), (True, False, True))
    volume = type(volume)(np.ascontiguousarray(turned.apply(volume.data)), turned.apply_geometry(volume.geometry))
    record = preprocess_case(volume, None, plan=plan, configuration="2d", name="case").record
    generator = torch.Generator().manual_seed(0)
    logits = [(i, torch.randn(3, *record.store_shape[1:], generator=generator)) for i in range(record.store_shape[0])]
    spec = plan.label_spec
    memory = restore(iter(logits), record, spec, with_probabilities=True)
    disk = restore(iter(logits), record, spec, with_probabilities=True, allocate=on_disk(tmp_path / "p.npy"))
    assert (tmp_path / "p.npy").stat().st_size > 2 * memory.probabilities.size
    assert disk.probabilities.shape[1:] == volume.geometry.shape
    assert np.array_equal(memory.probabilities, disk.probabilities)
    assert np.array_equal(memory.labels, disk.labels)
