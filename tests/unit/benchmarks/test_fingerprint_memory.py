"""The fingerprint's memory benchmark: what it writes can be measured, and the links are the same cases."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks import fingerprint_memory as module
from samunet.datasets.raw import load_raw_dataset
from samunet.imageio import read_labels, read_volume
from samunet.planners import fingerprint as measuring


def test_a_linked_part_is_a_dataset_that_can_be_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of three cases are linked, hold every structure and are measured."""
    monkeypatch.setattr(measuring, "NUM_SAMPLES_DATASET", 2000)
    whole = module.write_cases(tmp_path / "Dataset500_Many", 3, (8, 24, 24), structures=2, whole=True)
    part = module.link_cases(whole, tmp_path / "Dataset002_Some", 2)
    raw = load_raw_dataset(part)
    assert [case.name for case in raw.training] == ["case_000", "case_001"]
    label = raw.training[0].label
    assert label is not None
    assert label.stat().st_nlink >= 2
    assert np.unique(read_labels(label).data).tolist() == [0, 1, 2]
    image = read_volume(raw.training[0].images, case="case_000").data
    assert np.array_equal(image, np.round(image))
    found = module.measure(part)
    assert 0.01 < found["peak_rss_gib"] < 100
    text = module.table({"cases": {"all different": {"50": found, "1": found}}, "small_shape": [8, 24, 24]})
    assert text.index("| 1 |") < text.index("| 50 |")
