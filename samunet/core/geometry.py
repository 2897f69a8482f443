"""Voxel grids in world space, and the axis operations between them.

Frames: arrays are (Z, Y, X), the reverse of NIfTI's (i, j, k); an affine maps (i, j, k, 1) to RAS+ millimetres,
so array axis ``a`` belongs to affine column ``2 - a``. Spacing, shape, codes and directions are given per array
axis, in (Z, Y, X) order, which is also nnU-Net's (SimpleITK's array order).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations, product
from typing import TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from samunet.core.errors import GeometryError

Element = TypeVar("Element", bound=np.generic)
Value = TypeVar("Value")

Triple = tuple[int, int, int]
SpacingTriple = tuple[float, float, float]

_POSITIVE = ("R", "A", "S")
_NEGATIVE = ("L", "P", "I")
_LEAST_VOLUME = 1e-12  # of a voxel, relative to one with the same edges at right angles
ANATOMICAL_AXES = ("left-right", "anterior-posterior", "superior-inferior")


@dataclass(frozen=True, eq=False)
class Geometry:
    """The voxel grid of one volume.

    Args:
        shape: Voxels along (Z, Y, X).
        affine: (4, 4) matrix from (i, j, k, 1) to RAS+ mm.

    Raises:
        GeometryError: If the affine is not finite, not invertible or not affine, or the shape is not positive.
    """

    shape: Triple
    affine: NDArray[np.float64]

    def __post_init__(self) -> None:
        affine = np.array(self.affine, dtype=np.float64)
        if affine.shape != (4, 4) or not np.isfinite(affine).all():
            raise GeometryError("the affine is not a finite 4x4 matrix", found=np.array2string(affine))
        if not np.allclose(affine[3], (0.0, 0.0, 0.0, 1.0)):
            raise GeometryError("the affine's last row is not 0 0 0 1", found=str(affine[3].tolist()))
        lengths = np.linalg.norm(affine[:3, :3], axis=0)
        if not lengths.all() or abs(np.linalg.det(affine[:3, :3] / lengths)) < _LEAST_VOLUME:
            raise GeometryError("the affine is singular: two axes point the same way", found=str(affine.tolist()))
        if len(self.shape) != 3 or min(self.shape) < 1:
            raise GeometryError("a volume needs three positive sizes", found=str(self.shape))
        affine.setflags(write=False)
        object.__setattr__(self, "affine", affine)
        object.__setattr__(self, "shape", tuple(int(n) for n in self.shape))

    @classmethod
    def from_spacing(
        cls,
        shape: Sequence[int],
        spacing: Sequence[float],
        *,
        directions: ArrayLike | None = None,
        origin: Sequence[float] = (0.0, 0.0, 0.0),
    ) -> Geometry:
        """Build a grid from sizes and spacing.

        Args:
            shape: Voxels along (Z, Y, X).
            spacing: Millimetres along (Z, Y, X).
            directions: (3, 3), row ``a`` the unit RAS direction of array axis ``a``; default X to R, Y to A, Z to S.
            origin: RAS position of voxel (0, 0, 0).
        """
        rows = np.eye(3)[::-1] if directions is None else np.asarray(directions, dtype=np.float64)
        affine = np.eye(4)
        for axis in range(3):
            affine[:3, 2 - axis] = rows[axis] * float(spacing[axis])
        affine[:3, 3] = origin
        return cls((int(shape[0]), int(shape[1]), int(shape[2])), affine)

    @property
    def spacing(self) -> SpacingTriple:
        """Millimetres between voxel centres along (Z, Y, X)."""
        lengths = np.linalg.norm(self.affine[:3, :3], axis=0)
        return float(lengths[2]), float(lengths[1]), float(lengths[0])

    @property
    def directions(self) -> NDArray[np.float64]:
        """(3, 3): row ``a`` is the unit RAS direction of array axis ``a``."""
        columns: NDArray[np.float64] = (self.affine[:3, :3] / np.linalg.norm(self.affine[:3, :3], axis=0)).T
        return columns[::-1].copy()

    @property
    def codes(self) -> tuple[str, str, str]:
        """The anatomical direction each array axis (Z, Y, X) points to, as in ('S', 'A', 'R')."""
        world = _closest_world_axes(self.directions)
        signs = [self.directions[axis, world[axis]] for axis in range(3)]
        names = [_POSITIVE[w] if s > 0 else _NEGATIVE[w] for w, s in zip(world, signs, strict=True)]
        return names[0], names[1], names[2]

    @property
    def anatomical_axes(self) -> tuple[str, str, str]:
        """The anatomical axis closest to each array axis (Z, Y, X), as in ANATOMICAL_AXES."""
        world = _closest_world_axes(self.directions)
        return ANATOMICAL_AXES[world[0]], ANATOMICAL_AXES[world[1]], ANATOMICAL_AXES[world[2]]

    @property
    def voxel_volume_mm3(self) -> float:
        """Volume of one voxel in cubic millimetres."""
        return float(abs(np.linalg.det(self.affine[:3, :3])))

    @property
    def diagonal_mm(self) -> float:
        """Length of the image diagonal in mm, from corner voxel centre to corner voxel centre plus one voxel."""
        extent = np.array(self.shape) * np.array(self.spacing)
        return float(np.linalg.norm(extent))

    def to_world(self, zyx: ArrayLike) -> NDArray[np.float64]:
        """Map (..., 3) array indices (z, y, x) to RAS+ mm."""
        points = np.asarray(zyx, dtype=np.float64)[..., ::-1]
        result: NDArray[np.float64] = points @ self.affine[:3, :3].T + self.affine[:3, 3]
        return result

    def to_voxel(self, world_mm: ArrayLike) -> NDArray[np.float64]:
        """Map (..., 3) RAS+ mm to continuous array indices (z, y, x)."""
        points = np.asarray(world_mm, dtype=np.float64) - self.affine[:3, 3]
        ijk = points @ np.linalg.inv(self.affine[:3, :3]).T
        result: NDArray[np.float64] = ijk[..., ::-1]
        return result

    def crop(self, start: Sequence[int], stop: Sequence[int]) -> Geometry:
        """The grid of ``array[start:stop]`` (array axes), at its place in the world."""
        affine = self.affine.copy()
        affine[:3, 3] = self.to_world(np.asarray(start))
        shape = [int(b) - int(a) for a, b in zip(start, stop, strict=True)]
        return Geometry((shape[0], shape[1], shape[2]), affine)

    def matches(self, other: Geometry, *, tolerance_vox: float = 0.01) -> bool:
        """Whether both grids put every corner voxel at the same place, to a fraction of the smaller voxel."""
        return self.shape == other.shape and self.corner_distance_vox(other) <= tolerance_vox

    def corner_distance_vox(self, other: Geometry) -> float:
        """Largest distance between corresponding corner voxels, in units of this grid's smallest spacing."""
        corners = np.array(list(product(*[(0, n - 1) for n in self.shape])), dtype=np.float64)
        gap = np.linalg.norm(self.to_world(corners) - other.to_world(corners), axis=1)
        return float(gap.max() / min(self.spacing))


def _closest_world_axes(directions: NDArray[np.float64]) -> tuple[int, int, int]:
    """Assign each array axis its own world axis (0 R/L, 1 A/P, 2 S/I), maximising the total alignment."""
    strength = np.abs(directions)
    best = max(permutations(range(3)), key=lambda p: sum(strength[a, p[a]] for a in range(3)))
    return best[0], best[1], best[2]


def code_directions(codes: Sequence[str]) -> NDArray[np.float64]:
    """(3, 3) unit RAS directions of orientation codes given per array axis."""
    rows = np.zeros((3, 3))
    for axis, code in enumerate(codes):
        if code in _POSITIVE:
            rows[axis, _POSITIVE.index(code)] = 1.0
        elif code in _NEGATIVE:
            rows[axis, _NEGATIVE.index(code)] = -1.0
        else:
            raise GeometryError("unknown orientation code", expected="one of R L A P S I", found=code)
    return rows


@dataclass(frozen=True)
class AxisOperation:
    """A permutation and flips of the three array axes, exactly invertible.

    Output axis ``d`` is input axis ``permutation[d]``, reversed where ``flips[d]``.
    """

    permutation: Triple = (0, 1, 2)
    flips: tuple[bool, bool, bool] = (False, False, False)

    def apply(self, array: NDArray[Element]) -> NDArray[Element]:
        """Reorder the last three axes of an array; a view, not a copy."""
        lead = array.ndim - 3
        moved = array.transpose(*range(lead), *(lead + p for p in self.permutation))
        return moved[(..., *(slice(None, None, -1) if f else slice(None) for f in self.flips))]

    def invert(self, array: NDArray[Element]) -> NDArray[Element]:
        """Undo :meth:`apply`; a view, not a copy."""
        return self.inverse().apply(array)

    def inverse(self) -> AxisOperation:
        """The operation that undoes this one."""
        order = [self.permutation.index(axis) for axis in range(3)]
        flips = [self.flips[d] for d in order]
        return AxisOperation((order[0], order[1], order[2]), (flips[0], flips[1], flips[2]))

    def reorder(self, values: Sequence[Value]) -> tuple[Value, Value, Value]:
        """Permute per-axis values (spacing, shape) from input to output order."""
        a, b, c = (values[p] for p in self.permutation)
        return a, b, c

    def apply_geometry(self, geometry: Geometry) -> Geometry:
        """The grid of :meth:`apply`'s result: the same voxels at the same places in the world."""
        shape = self.reorder(geometry.shape)
        directions = geometry.directions[list(self.permutation)]
        affine = np.eye(4)
        start = np.zeros(3)
        for out, source in enumerate(self.permutation):
            step = directions[out] * geometry.spacing[source]
            if self.flips[out]:
                start[source] = geometry.shape[source] - 1
                step = -step
            affine[:3, 2 - out] = step
        affine[:3, 3] = geometry.to_world(start)
        return Geometry(shape, affine)


def canonical_operation(
    geometry: Geometry, *, reference_codes: Sequence[str], reference_spacing: Sequence[float], slice_axis: int
) -> AxisOperation:
    """The operation that brings a case into a dataset's frame: slice axis first, then the two in-plane axes.

    Each of the 48 axis operations is judged first by how well the case's spacing fits the reference's (so a plane of
    thick slices never becomes in-plane), then by how well its directions fit. Cases of the reference orientation
    only get the transposition that puts the slice axis first.

    Args:
        geometry: The case's grid.
        reference_codes: Majority orientation of the dataset, per file axis (Z, Y, X).
        reference_spacing: Its spacing, per file axis (Z, Y, X).
        slice_axis: The file axis across which slices are stacked.
    """
    rows, columns = [axis for axis in range(3) if axis != slice_axis]
    target_order = (slice_axis, rows, columns)
    wanted = code_directions(reference_codes)[list(target_order)]
    spacing = np.log([reference_spacing[axis] for axis in target_order])
    own = np.log(geometry.spacing)
    mismatch = {p: float(np.abs(own[list(p)] - spacing).sum()) for p in permutations(range(3))}
    near = [p for p in mismatch if mismatch[p] <= min(mismatch.values()) + 0.25]
    alignment = geometry.directions @ wanted.T
    best = max(near, key=lambda p: (round(sum(abs(alignment[p[d], d]) for d in range(3)), 6), p == target_order))
    flips = [bool(alignment[best[d], d] < 0) for d in range(3)]
    return AxisOperation((best[0], best[1], best[2]), (flips[0], flips[1], flips[2]))
