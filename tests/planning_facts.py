"""Synthetic facts to plan from, shared by unit and property tests."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from samunet.artifacts.dataset import DatasetDescription
from samunet.artifacts.fingerprint import (
    CaseFacts,
    Fingerprint,
    IntensityStatistics,
    MirrorPair,
    StructureFacts,
    ZScoreRange,
)
from samunet.artifacts.plan import Budget

STATISTICS = IntensityStatistics(
    mean=80.0, median=75.0, std=40.0, min=-100.0, max=400.0, percentile_00_5=-60.0, percentile_99_5=260.0
)
SCORES = ZScoreRange(lower=-0.5, upper=3.0, lower_nonzero=-1.5, upper_nonzero=2.5)


def structure(
    *,
    width_mm: float = 20.0,
    volume_mm3: float | None = None,
    num_slices: tuple[int, int, int] | None = None,
    coherence: tuple[float, float, float] = (0.8, 0.8, 0.8),
    centroid_mm: tuple[float, float, float] = (0.0, 0.0, 0.0),
    coherence_mm: tuple[float, float, float] = (0.0, 0.0, 0.0),
) -> StructureFacts:
    """Facts of one structure: of a ball on slices of 1 mm, unless said."""
    return StructureFacts(
        volume_mm3=math.pi / 6 * width_mm**3 if volume_mm3 is None else volume_mm3,
        num_components=1,
        num_slices=num_slices or (max(1, round(width_mm)),) * 3,
        extent_mm=(20.0, 20.0, 20.0),
        width_mm=width_mm,
        centroid_mm=centroid_mm,
        coherence=coherence,
        coherence_mm=coherence_mm,
    )


def case(
    *,
    shape: tuple[int, int, int] = (40, 100, 100),
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0),
    codes: tuple[str, str, str] = ("S", "A", "R"),
    crop: tuple[int, int, int] | None = None,
    structures: Mapping[str, StructureFacts] | None = None,
    resolution: tuple[float, float, float] = (1.0, 1.0, 1.0),
    tilt: float | None = 0.0,
) -> CaseFacts:
    """Facts of one case."""
    kept = crop or shape
    held = {"organ": structure()} if structures is None else dict(structures)
    labelled = (max(1, shape[0] // 2), max(1, shape[1] // 2), max(1, shape[2] // 2)) if held else (0, 0, 0)
    relative = kept[0] * kept[1] * kept[2] / (shape[0] * shape[1] * shape[2])
    return CaseFacts(
        shape=shape,
        spacing=spacing,
        codes=codes,
        shape_after_crop=kept,
        relative_size_after_crop=relative,
        num_foreground_voxels=1000 if held else 0,
        num_foreground_slices=labelled,
        effective_resolution=resolution,
        structures=held,
        tilt_deg=tilt,
    )


def fingerprint(
    cases: Sequence[CaseFacts],
    *,
    channels: Sequence[str] = ("MRI",),
    pairs: Sequence[MirrorPair] = (),
    foreground: bool = True,
) -> Fingerprint:
    """A fingerprint of these cases."""
    return Fingerprint(
        dataset="Dataset999_Test",
        channel_names=tuple(channels),
        cases={f"case_{index:03d}": facts for index, facts in enumerate(cases)},
        foreground_intensities=tuple(STATISTICS if foreground else None for _ in channels),
        zscore_ranges=tuple(SCORES if foreground else None for _ in channels),
        mirror_pairs=tuple(pairs),
    )


def description(
    *, channels: Sequence[str] = ("MRI",), labels: Mapping[str, Any] | None = None, order: list[int] | None = None
) -> DatasetDescription:
    """A dataset.json to go with it."""
    return DatasetDescription(
        channel_names={str(index): name for index, name in enumerate(channels)},
        labels=dict(labels or {"background": 0, "organ": 1}),
        regions_class_order=order,
        file_ending=".nii.gz",
    )


def budget(*, gpu: float = 8.0, cpu: float = 16.0, minutes: float = 60.0) -> Budget:
    """Hardware to plan for."""
    return Budget(gpu_memory_gib=gpu, cpu_memory_gib=cpu, cpu_minutes=minutes)
