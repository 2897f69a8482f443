"""Small datasets on disk for the tests of this folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from samunet.core.geometry import Geometry
from samunet.core.volume import Volume
from samunet.imageio import write_image, write_labels

GRID = Geometry.from_spacing((3, 4, 5), (3.0, 1.0, 1.0))


def describe(folder: Path, *, channels: int = 1, ending: str = ".nii.gz", **changes: Any) -> Path:
    """Write a dataset.json; changes replace keys, and None removes them."""
    content = {
        "channel_names": {str(index): "MRI" for index in range(channels)},
        "labels": {"background": 0, "organ": 1, "lesion": 2},
        "file_ending": ending,
        **changes,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "dataset.json").write_text(json.dumps({k: v for k, v in content.items() if v is not None}))
    return folder


def add_image(file: Path, *, seed: int = 0, grid: Geometry = GRID) -> Path:
    """Write an image of noise."""
    write_image(file, Volume(np.random.default_rng(seed).normal(size=(1, *grid.shape)).astype(np.float32), grid))
    return file


def add_label(file: Path, *, values: tuple[int, ...] = (0, 1, 2), grid: Geometry = GRID) -> Path:
    """Write a label map that holds the given values."""
    labels = np.resize(np.array(values), grid.shape)
    write_labels(file, labels, geometry=grid)
    return file


def make_dataset(folder: Path, *, cases: int = 3, channels: int = 1) -> Path:
    """Write a complete, correct dataset with cases case_0, case_1, ..."""
    describe(folder, channels=channels, numTraining=cases)
    for case in range(cases):
        for channel in range(channels):
            add_image(folder / "imagesTr" / f"case_{case}_{channel:04d}.nii.gz", seed=10 * case + channel)
        add_label(folder / "labelsTr" / f"case_{case}.nii.gz")
    return folder
