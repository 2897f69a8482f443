"""Distances between the surfaces of two masks, in mm.

One definition throughout. The surface of a mask is the set of its voxels that have at least one of their face
neighbours outside the mask; voxels beyond the image count as outside; an axis of one voxel has no neighbours, so the
surface of a mask in a 2D image is its contour. A distance is that between voxel centres, from each surface voxel of
one mask to the nearest surface voxel of the other.

Source: the scores follow Maier-Hein et al., "Metrics reloaded", Nature Methods 2024 (HD, HD95 as the larger directed
percentile, ASSD pooled), and Nikolov et al., "Clinically applicable segmentation of head and neck anatomy",
JMIR 2021 (normalized surface Dice), counted in voxels instead of surface area.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

ROUNDING_MM = 1e-4  # spacings come from float32 headers: a distance equal to the tolerance must count as within it
Box = tuple[slice, ...]


@dataclass(frozen=True, eq=False)
class SurfaceDistances:
    """Both directions.

    Args:
        from_reference: (N,) mm from each surface voxel of the reference to the prediction's surface.
        from_prediction: (M,) mm from each surface voxel of the prediction to the reference's surface.
    """

    from_reference: NDArray[np.float64]
    from_prediction: NDArray[np.float64]


def bounding_box(mask: NDArray[np.bool_]) -> Box | None:
    """The smallest box around a mask as slices; None for an empty mask."""
    box = []
    for axis in range(mask.ndim):
        others = tuple(a for a in range(mask.ndim) if a != axis)
        used = np.flatnonzero(mask.any(axis=others))
        if used.size == 0:
            return None
        box.append(slice(int(used[0]), int(used[-1]) + 1))
    return tuple(box)


def surface_voxels(mask: NDArray[np.bool_], *, neighbour_axes: Sequence[bool] | None = None) -> NDArray[np.bool_]:
    """Mark the voxels of a mask that touch its outside.

    Args:
        mask: (Z, Y, X) boolean.
        neighbour_axes: The axes along which voxels have neighbours; default those longer than one voxel. To be
            given when the mask is a crop of a larger image.
    """
    from scipy.ndimage import binary_erosion

    axes = [n > 1 for n in mask.shape] if neighbour_axes is None else neighbour_axes
    if not any(axes):
        return mask
    cross = np.zeros((3,) * mask.ndim, dtype=bool)
    cross[(1,) * mask.ndim] = True
    for axis in np.flatnonzero(axes):
        line: list[int | slice] = [1] * mask.ndim
        line[axis] = slice(None)
        cross[tuple(line)] = True
    inside: NDArray[np.bool_] = binary_erosion(mask, structure=cross, border_value=0)
    return mask & ~inside


def surface_distances(
    reference: NDArray[np.bool_],
    prediction: NDArray[np.bool_],
    spacing: Sequence[float],
    *,
    neighbour_axes: Sequence[bool] | None = None,
) -> SurfaceDistances:
    """Measure the distances between two surfaces, exactly.

    Only the box around both masks is looked at. Nothing is lost by that: both surfaces lie in it, and outside of it
    both masks are empty, as they are beyond an image's border.

    Args:
        reference: (Z, Y, X) boolean, not empty.
        prediction: (Z, Y, X) boolean, not empty.
        spacing: Millimetres along (Z, Y, X).
        neighbour_axes: As in :func:`surface_voxels`.

    Raises:
        ValueError: If a mask is empty; policy decides what holds then.
    """
    axes = [n > 1 for n in reference.shape] if neighbour_axes is None else neighbour_axes
    if not reference.any() or not prediction.any():
        raise ValueError("surface distances need two masks that are not empty")
    box = bounding_box(reference | prediction)
    first = surface_voxels(reference[box], neighbour_axes=axes)
    second = surface_voxels(prediction[box], neighbour_axes=axes)
    return SurfaceDistances(_distances(first, second, spacing), _distances(second, first, spacing))


def _distances(source: NDArray[np.bool_], target: NDArray[np.bool_], spacing: Sequence[float]) -> NDArray[np.float64]:
    """Distance in mm from each voxel of source to the nearest voxel of target.

    Exact, as a distance transform of the box would be (tests hold the two against each other), but its cost follows
    the surfaces: one stray voxel in the far corner of a CT would make a transform of the whole image necessary.
    """
    from scipy.spatial import KDTree

    scale = np.asarray(spacing, dtype=np.float64)
    # The plainest tree: on points of a lattice balancing and shrinking its nodes make queries several times slower.
    tree = KDTree(np.argwhere(target) * scale, balanced_tree=False, compact_nodes=False)
    distances, _ = tree.query(np.argwhere(source) * scale)
    return np.asarray(distances, dtype=np.float64)


def hausdorff(distances: SurfaceDistances) -> float:
    """The largest distance in either direction, in mm."""
    return float(max(distances.from_reference.max(), distances.from_prediction.max()))


def hausdorff_95(distances: SurfaceDistances) -> float:
    """The larger of the two directed 95th percentiles (linear interpolation), in mm."""
    directed = [np.percentile(d, 95) for d in (distances.from_reference, distances.from_prediction)]
    return float(max(directed))


def average_distance(distances: SurfaceDistances) -> float:
    """The mean over all surface voxels of both masks together (ASSD), in mm."""
    return float(np.concatenate([distances.from_reference, distances.from_prediction]).mean())


def surface_dice(distances: SurfaceDistances, tolerance_mm: float) -> float:
    """The fraction of all surface voxels of both masks that lie within the tolerance of the other surface."""
    both = np.concatenate([distances.from_reference, distances.from_prediction])
    return float((both <= tolerance_mm + ROUNDING_MM).mean())
