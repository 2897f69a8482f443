"""The cache of embeddings beside other runs that fill it."""

from __future__ import annotations

import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from torch import nn

from samunet.core.log import SilentReporter
from samunet.training.embeddings import EmbeddingCache


def test_filling_leaves_what_another_run_is_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Of a case's other files, those of older images go and what a killed run left, but no file in the making."""
    monkeypatch.setattr(EmbeddingCache, "_encode", lambda *_: np.zeros((1, 2, 2, 2), np.float16))
    records: Any = {"case": SimpleNamespace(store_shape=(3, 8, 8), source_sha256="ab")}
    cache = EmbeddingCache(tmp_path, {}, records)
    folder = cache.folder / "case"
    folder.mkdir(parents=True)
    for name in ("older.npy", ".partial-1-ab.npy", ".partial-2-ab.npy"):
        (folder / name).write_bytes(b"0")
    os.utime(folder / ".partial-2-ab.npy", (time.time() - 7200,) * 2)
    slices = SimpleNamespace(num_slices=lambda _: 3)
    cache.fill(cast("Any", slices), cast("Any", nn.Identity()), device="cpu", reporter=SilentReporter())
    assert {path.name for path in folder.iterdir()} == {"ab.npy", ".partial-1-ab.npy"}
    assert cache.read("case", 2).shape == (2, 2, 2)
