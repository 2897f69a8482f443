"""Resampling to a target spacing: cubic for images, linear per class for labels, thick slices never blended.

Voxel centres follow the pixel-area convention: voxel i of n covers [i, i + 1) / n of the extent, before and after.

Source: nnU-Net (Isensee et al., Nature Methods 2021), resampling; the numbers are nnU-Net's to rounding error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from samunet.core.geometry import SpacingTriple, Triple

ANISOTROPY_THRESHOLD = 3.0
_IMAGE_ORDER, _LABEL_ORDER = 3, 1

_Resize = Callable[[NDArray[Any], Sequence[int]], NDArray[Any]]


def target_spacing(spacing_from: Sequence[float], spacing_to: Sequence[float | None]) -> SpacingTriple:
    """Fill the axes that keep their own spacing (None) of a target spacing."""
    a, b, c = (float(own if new is None else new) for own, new in zip(spacing_from, spacing_to, strict=True))
    return a, b, c


def resampled_shape(shape: Sequence[int], spacing_from: Sequence[float], spacing_to: Sequence[float | None]) -> Triple:
    """Voxels after resampling: the extent divided by the new spacing, rounded half to even, at least one.

    Args:
        shape: Voxels before, three axes in any order.
        spacing_from: Spacing before, in mm, same order.
        spacing_to: Spacing after; None where an axis keeps its own.
    """
    new = target_spacing(spacing_from, spacing_to)
    a, b, c = (max(1, round(float(f) / t * int(n))) for f, t, n in zip(spacing_from, new, shape, strict=True))
    return a, b, c


def separate_axis(spacing_from: Sequence[float], spacing_to: Sequence[float | None]) -> int | None:
    """The axis across which slices are picked instead of blended, if one is much coarser than the others.

    The grid before decides if its anisotropy exceeds the threshold, else the grid after. Two equally coarse axes
    are not treated separately.
    """
    for spacing in (tuple(float(s) for s in spacing_from), target_spacing(spacing_from, spacing_to)):
        if max(spacing) / min(spacing) > ANISOTROPY_THRESHOLD:
            coarsest = [axis for axis in range(3) if spacing[axis] == max(spacing)]
            return coarsest[0] if len(coarsest) == 1 else None
    return None


def resample_image(
    data: NDArray[Any],
    shape: Sequence[int],
    spacing_from: Sequence[float],
    spacing_to: Sequence[float | None],
) -> NDArray[np.float32]:
    """Resample every channel with cubic splines, channel after channel in float64.

    Args:
        data: (C, Z, Y, X), finite.
        shape: Voxels wanted, as :func:`resampled_shape` gives them.
        spacing_from: Spacing of ``data`` in mm; with ``spacing_to`` it decides whether one axis is kept separate.
        spacing_to: Spacing wanted; None where an axis keeps its own.
    """
    wanted = tuple(int(n) for n in shape)
    if data.shape[1:] == wanted:
        return data.astype(np.float32)
    axis = separate_axis(spacing_from, spacing_to)
    result = np.empty((data.shape[0], *wanted), dtype=np.float32)
    for channel in range(data.shape[0]):
        result[channel] = _resample(data[channel].astype(np.float64), wanted, axis, _resize_image)
    return result


def resample_labels(
    labels: NDArray[Any],
    shape: Sequence[int],
    spacing_from: Sequence[float],
    spacing_to: Sequence[float | None],
) -> NDArray[Any]:
    """Resample a label map: every label linearly, a voxel takes the label with the largest share of it.

    Args:
        labels: (Z, Y, X) integers.
        shape: Voxels wanted, as :func:`resampled_shape` gives them.
        spacing_from: Spacing of ``labels`` in mm.
        spacing_to: Spacing wanted; None where an axis keeps its own.

    Returns:
        Array of the same type; no value that was not there before.
    """
    wanted = tuple(int(n) for n in shape)
    if labels.shape == wanted:
        return labels.copy()
    return _resample(labels, wanted, separate_axis(spacing_from, spacing_to), _resize_labels)


def _resample(volume: NDArray[Any], shape: Sequence[int], axis: int | None, resize: _Resize) -> NDArray[Any]:
    """Resize a (Z, Y, X) array at once, or plane by plane with the nearest plane taken across ``axis``."""
    if axis is None:
        return resize(volume, shape)
    in_plane = [n for other, n in enumerate(shape) if other != axis]
    planes = np.moveaxis(volume, axis, 0)
    sources = _nearest_planes(volume.shape[axis], shape[axis])
    resized = {int(source): resize(planes[source], in_plane) for source in np.unique(sources)}
    return np.moveaxis(np.stack([resized[int(source)] for source in sources]), 0, axis)


def _nearest_planes(num_planes: int, num_wanted: int) -> NDArray[np.int64]:
    """Index of the plane closest to the centre of each wanted plane, ties upwards."""
    centres = num_planes / num_wanted * (np.arange(num_wanted) + 0.5) - 0.5
    nearest: NDArray[np.int64] = np.clip(np.floor(centres + 0.5), 0, num_planes - 1).astype(np.int64)
    return nearest


def _resize_image(image: NDArray[Any], shape: Sequence[int]) -> NDArray[Any]:
    from skimage.transform import resize

    if image.shape == tuple(shape):
        return image
    resized: NDArray[Any] = resize(  # type: ignore[no-untyped-call]
        image, tuple(shape), order=_IMAGE_ORDER, mode="edge", anti_aliasing=False
    )
    return resized


def _resize_labels(labels: NDArray[Any], shape: Sequence[int]) -> NDArray[Any]:
    from batchgenerators.augmentations.utils import resize_segmentation

    if labels.shape == tuple(shape):
        return labels
    resized: NDArray[Any] = resize_segmentation(labels, tuple(shape), order=_LABEL_ORDER)
    return resized
