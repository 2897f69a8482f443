"""The crop to the nonzero region."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from samunet.core.geometry import Triple


@dataclass(frozen=True, eq=False)
class NonzeroCrop:
    """The bounding box of an image's nonzero region.

    Args:
        start: First voxel kept along each axis.
        stop: One past the last voxel kept.
        mask: (Z, Y, X) of the box: True inside the nonzero region.
    """

    start: Triple
    stop: Triple
    mask: NDArray[np.bool_]

    @property
    def window(self) -> tuple[slice, slice, slice]:
        """Index of the box in a (Z, Y, X) array."""
        z, y, x = (slice(a, b) for a, b in zip(self.start, self.stop, strict=True))
        return z, y, x


def nonzero_crop(data: NDArray[Any]) -> NonzeroCrop:
    """Find the bounding box of the voxels that are not zero in every channel.

    Holes (zeros enclosed by nonzero voxels) belong to the region. An image of zeros is kept whole.

    Args:
        data: (C, Z, Y, X).

    Source: nnU-Net (Isensee et al., Nature Methods 2021), cropping.
    """
    from scipy.ndimage import binary_fill_holes

    mask: NDArray[np.bool_] = data[0] != 0
    for channel in data[1:]:
        mask |= channel != 0
    mask = binary_fill_holes(mask)
    if not mask.any():
        z, y, x = mask.shape
        return NonzeroCrop((0, 0, 0), (z, y, x), mask)
    start, stop = _bounding_box(mask)
    window = tuple(slice(a, b) for a, b in zip(start, stop, strict=True))
    return NonzeroCrop(start, stop, mask[window].copy())


def _bounding_box(mask: NDArray[np.bool_]) -> tuple[Triple, Triple]:
    bounds = []
    for axis in range(3):
        others = tuple(other for other in range(3) if other != axis)
        occupied = np.flatnonzero(mask.any(axis=others))
        bounds.append((int(occupied[0]), int(occupied[-1]) + 1))
    (z0, z1), (y0, y1), (x0, x1) = bounds
    return (z0, y0, x0), (z1, y1, x1)
