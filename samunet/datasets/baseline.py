"""The honest baseline of the demo: intensity windows times a location prior, fitted on the same training cases."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter, zoom

from samunet.core.geometry import AxisOperation, canonical_operation
from samunet.core.volume import Volume

_FRAME = ("S", "A", "R")
_PRIOR_SHAPE = (24, 48, 48)
_PRIOR_SMOOTHING = 1.0
_NUM_BINS = 64
_RANGE_Z = (-2.0, 5.0)
_FLOOR = 1e-4


@dataclass(frozen=True, eq=False)
class ThresholdPrior:
    """Per class, how often it stands at a place of the image and how often it has an intensity.

    Args:
        classes: Label values, background first.
        location: (K + 1, Z, Y, X) frequencies over normalized image coordinates, orientation S, A, R.
        intensity: (K + 1, bins) frequencies of the z-scored intensity within the class.
    """

    classes: tuple[int, ...]
    location: NDArray[np.float64]
    intensity: NDArray[np.float64]

    def predict(self, volume: Volume) -> NDArray[np.uint8]:
        """Label each voxel by the largest product of the two frequencies.

        Returns:
            (Z, Y, X) labels in the volume's own axes.
        """
        operation = _to_frame(volume)
        bins = _bins(operation.apply(volume.data)[0])
        score = np.stack(
            [
                self.intensity[index][bins] * _resized(self.location[index], bins.shape)
                for index in range(len(self.classes))
            ]
        )
        table = np.array(self.classes, dtype=np.uint8)
        return np.ascontiguousarray(operation.invert(table[np.argmax(score, axis=0)]))


def fit_threshold_prior(cases: Sequence[tuple[Volume, NDArray[Any]]]) -> ThresholdPrior:
    """Fit the baseline.

    Args:
        cases: Training volumes of one channel with their labels (Z, Y, X).
    """
    classes = sorted({0}.union(*(np.unique(labels).tolist() for _, labels in cases)))
    location = np.zeros((len(classes), *_PRIOR_SHAPE))
    intensity = np.zeros((len(classes), _NUM_BINS))
    for volume, labels in cases:
        operation = _to_frame(volume)
        bins = _bins(operation.apply(volume.data)[0])
        turned = operation.apply(labels)
        for index, value in enumerate(classes):
            mask = turned == value
            location[index] += _resized(mask.astype(np.float64), _PRIOR_SHAPE) / len(cases)
            intensity[index] += np.bincount(bins[mask], minlength=_NUM_BINS)
    location = gaussian_filter(location, (0, *[_PRIOR_SMOOTHING] * 3)).clip(_FLOOR)
    intensity = gaussian_filter(intensity, (0, 1.0))
    return ThresholdPrior(tuple(classes), location, intensity / intensity.sum(axis=1, keepdims=True))


def _to_frame(volume: Volume) -> AxisOperation:
    """The axis operation to superior, anterior, right: without it a turned scan would defeat the prior unfairly."""
    return canonical_operation(
        volume.geometry, reference_codes=_FRAME, reference_spacing=volume.geometry.spacing, slice_axis=0
    )


def _bins(image: NDArray[Any]) -> NDArray[np.intp]:
    """Histogram bin of each voxel's intensity, standardized over the image."""
    score = (image - image.mean()) / max(float(image.std()), 1e-8)
    low, high = _RANGE_Z
    result: NDArray[np.intp] = np.clip((score - low) / (high - low) * _NUM_BINS, 0, _NUM_BINS - 1).astype(np.intp)
    return result


def _resized(field: NDArray[Any], shape: Sequence[int]) -> NDArray[np.float64]:
    factors = [wanted / found for wanted, found in zip(shape, field.shape, strict=True)]
    result: NDArray[np.float64] = zoom(field, factors, order=1, mode="nearest", grid_mode=True)
    return result
