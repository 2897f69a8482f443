"""One case from its file's grid to the store's grid, with a record that lets the way be walked back."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from samunet.artifacts.dataset import Case
from samunet.artifacts.plan import Plan
from samunet.artifacts.store import CaseRecord, ChannelIntensities
from samunet.core.volume import Volume
from samunet.preprocessing.checks import check_case
from samunet.preprocessing.cropping import nonzero_crop
from samunet.preprocessing.normalization import normalize
from samunet.preprocessing.planes import occupied_slices
from samunet.preprocessing.resampling import resample_image, resample_labels, resampled_shape, target_spacing

PERCENTILES = (0.5, 50.0, 99.5)
_SAMPLED_VOXELS = 50_000


@dataclass(frozen=True, eq=False)
class PreprocessedCase:
    """One case as the network's data loader and the predictor see it.

    Args:
        data: (C, S, H, W) float32, normalized; axes are slice, row, column.
        labels: (S, H, W) int16 label values as in dataset.json; None for images without a reference.
        record: What was done.
    """

    data: NDArray[np.float32]
    labels: NDArray[np.int16] | None
    record: CaseRecord


def preprocess_case(
    volume: Volume,
    labels: Volume | None,
    *,
    plan: Plan,
    configuration: str,
    name: str,
    files: Case | None = None,
    source_sha256: str = "",
) -> PreprocessedCase:
    """Bring a case into the plan's frame, crop it to its nonzero region, normalize and resample it.

    Voxels outside the nonzero region but inside its box stay zero where a channel is normalized within the region.
    The labels never touch the image, so training and prediction see the same voxels. (nnU-Net counts labelled voxels
    as nonzero when it trains, which shows the network where zeros are labelled.)

    Args:
        volume: The image in its file's axes.
        labels: The reference on the same grid; None for prediction.
        plan: Frame, normalization and spacing.
        configuration: Name of the configuration whose spacing is wanted.
        name: Case name, for the record and for messages.
        files: Where image and reference were read from, for messages.
        source_sha256: Hash of the source files, for the record.

    Raises:
        DataError: If the channels or label values do not fit the plan, the grids differ, or a voxel is NaN or infinite.
    """
    check_case(volume, labels, num_channels=len(plan.channel_names), spec=plan.label_spec, name=name, files=files)
    operation = plan.frame.value.operation_for(volume.geometry)
    canonical = operation.apply_geometry(volume.geometry)
    data = operation.apply(volume.data)
    crop = nonzero_crop(data)
    cropped = data[(slice(None), *crop.window)]
    normalized = normalize(cropped, crop.mask, plan.normalization_of(configuration))

    wanted = plan.configuration(configuration).spacing.value
    shape = resampled_shape(crop.mask.shape, canonical.spacing, wanted)
    resampled = resample_image(normalized, shape, canonical.spacing, wanted)
    reference = None
    if labels is not None:
        cropped_labels = operation.apply(labels.data)[0][crop.window].astype(np.int16)
        reference = resample_labels(cropped_labels, shape, canonical.spacing, wanted)
    record = CaseRecord(
        name=name,
        file_shape=volume.geometry.shape,
        permutation=operation.permutation,
        flips=operation.flips,
        anatomical_axes=canonical.anatomical_axes,
        canonical_shape=canonical.shape,
        crop_start=crop.start,
        crop_stop=crop.stop,
        crop_spacing=canonical.spacing,
        store_shape=shape,
        store_spacing=target_spacing(canonical.spacing, wanted),
        source_sha256=source_sha256,
        intensities=_intensities(cropped, normalized, crop.mask),
        **({} if reference is None else occupied_slices(reference, plan.label_spec)._asdict()),
    )
    return PreprocessedCase(resampled, reference, record)


def _intensities(
    raw: NDArray[Any], normalized: NDArray[np.float32], mask: NDArray[np.bool_]
) -> tuple[ChannelIntensities, ...]:
    """Percentiles of every channel, of a regular sample of the voxels."""
    step = max(1, math.ceil((mask.size / _SAMPLED_VOXELS) ** (1 / 3)))
    sample = (slice(None, None, step),) * 3
    inside = mask[sample] if mask[sample].any() else np.ones(mask[sample].shape, bool)
    return tuple(
        ChannelIntensities(raw=_percentiles(before[sample][inside]), normalized=_percentiles(after[sample][inside]))
        for before, after in zip(raw, normalized, strict=True)
    )


def _percentiles(values: NDArray[Any]) -> tuple[float, float, float]:
    low, middle, high = (float(f"{value:.5g}") for value in np.percentile(values.astype(np.float64), PERCENTILES))
    return low, middle, high
