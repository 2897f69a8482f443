"""What is recorded beside the preprocessed voxels of a case, enough to undo the preprocessing exactly."""

from __future__ import annotations

from pydantic import Field

from samunet.core.config import Schema
from samunet.core.geometry import AxisOperation, SpacingTriple, Triple

STORE_VERSION = 1


class ChannelIntensities(Schema):
    """Percentiles 0.5, 50 and 99.5 of one channel of one image, within its nonzero region.

    Args:
        raw: As in the file.
        normalized: As the network's data loader sees them.
    """

    raw: tuple[float, float, float]
    normalized: tuple[float, float, float]


class CaseRecord(Schema):
    """How a case went from its file grid to the store grid (slice, row, column).

    The steps, in order: the axis operation, the crop, normalization, resampling.

    Args:
        name: Case name.
        file_shape: Voxels in the file (Z, Y, X).
        permutation: Of the axis operation.
        flips: Of the axis operation.
        anatomical_axes: The anatomical axis closest to each canonical axis (slice, row, column) of this case.
        canonical_shape: Voxels after the axis operation, before the crop.
        crop_start: First voxel kept, canonical axes.
        crop_stop: One past the last voxel kept.
        crop_spacing: Spacing of the cropped grid, canonical axes, in mm.
        store_shape: Voxels in the store.
        store_spacing: Spacing in the store, in mm.
        label_slices: Per structure, the slices of the store that hold it.
        valid_slices: Slices with at least one voxel that is not ignored.
        source_sha256: Hash of the source files, to notice a changed image; empty for arrays.
        intensities: Per channel; empty in records made before they were measured.
    """

    version: int = STORE_VERSION
    name: str
    file_shape: Triple
    permutation: Triple
    flips: tuple[bool, bool, bool]
    anatomical_axes: tuple[str, str, str]
    canonical_shape: Triple
    crop_start: Triple
    crop_stop: Triple
    crop_spacing: SpacingTriple
    store_shape: Triple
    store_spacing: SpacingTriple
    label_slices: dict[str, tuple[int, ...]] = Field(default_factory=dict)
    valid_slices: tuple[int, ...] = ()
    source_sha256: str = ""
    intensities: tuple[ChannelIntensities, ...] = ()

    @property
    def operation(self) -> AxisOperation:
        """The axis operation from file axes to canonical axes."""
        return AxisOperation(self.permutation, self.flips)

    def on_store_grid(self) -> CaseRecord:
        """The record of a case whose file is what is stored: what is restored with it lies on the store's grid."""
        whole = self.store_shape
        alike = {"permutation": (0, 1, 2), "flips": (False, False, False), "crop_start": (0, 0, 0)}
        shapes = {"file_shape": whole, "canonical_shape": whole, "crop_stop": whole}
        return self.model_copy(update={**alike, **shapes, "crop_spacing": self.store_spacing})

    @property
    def crop_shape(self) -> Triple:
        """Voxels after the crop, before resampling."""
        a, b, c = (stop - start for start, stop in zip(self.crop_start, self.crop_stop, strict=True))
        return a, b, c
