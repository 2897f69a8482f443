"""A small plan and small volumes for the preprocessing tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from samunet.artifacts.plan import Plan
from samunet.core.config import parse_schema
from samunet.core.geometry import Geometry
from samunet.core.volume import Volume

PlanMaker = Callable[..., Plan]


def decided(value: Any) -> dict[str, Any]:
    return {"value": value, "reason": "for a test"}


@pytest.fixture
def make_plan() -> PlanMaker:
    """Builds a plan without recipes; keyword arguments replace what the preprocessing depends on."""

    def build(
        *,
        spacing: tuple[float | None, float, float] = (None, 1.0, 1.0),
        slice_axis: int = 0,
        orientation: tuple[str, str, str] = ("S", "A", "R"),
        reference_spacing: tuple[float, float, float] = (3.0, 1.0, 1.0),
        normalization: tuple[dict[str, Any], ...] = ({"scheme": "none"},),
        labels: dict[str, Any] | None = None,
        regions_class_order: tuple[int, ...] | None = None,
        left_out: tuple[str, ...] = (),
    ) -> Plan:
        configuration = {
            "spacing": decided(spacing),
            "context_slices": decided(0),
            "slab_depth": decided(1),
            "channels": decided("repeat"),
            "tile_overlap": decided(0.5),
            "recipes": {},
        }
        frame = {"slice_axis": slice_axis, "orientation": orientation, "spacing": reference_spacing}
        content = {
            "dataset": "Dataset001_Test",
            "fingerprint_sha256": "",
            "channel_names": tuple(f"channel {index}" for index in range(len(normalization))),
            "file_ending": ".nii.gz",
            "labels": labels or {"background": 0, "organ": 1, "vessel": 2},
            "regions_class_order": regions_class_order,
            "frame": decided(frame),
            "target_spacing": decided((3.0, 1.0, 1.0)),
            "normalization": decided(normalization),
            "mirror_axes": decided(()),
            "configurations": {"2d": configuration},
            "recommended": decided("2d"),
            "budget": {"gpu_memory_gib": 1, "cpu_memory_gib": 1, "cpu_minutes": 1},
            "left_out": left_out,
        }
        return parse_schema(Plan, content)

    return build


@pytest.fixture
def phantom() -> tuple[Volume, Volume]:
    """An image with an empty border and its labels: an organ with a vessel in it; (6, 20, 18) at 3 x 1 x 1 mm."""
    generator = np.random.default_rng(0)
    labels = np.zeros((6, 20, 18), np.uint8)
    labels[2:5, 6:14, 5:12] = 1
    labels[3:4, 8:11, 7:9] = 2
    image = np.zeros(labels.shape, np.int16)
    image[1:5, 3:17, 2:16] = generator.integers(50, 90, (4, 14, 14))
    image += labels * 100
    geometry = Geometry.from_spacing(labels.shape, (3.0, 1.0, 1.0))
    return Volume(image[np.newaxis], geometry), Volume(labels[np.newaxis], geometry)
