"""The facts of a dataset that a plan is made from. nnU-Net's are kept exactly, so that plans can be compared."""

from __future__ import annotations

from samunet.core.config import Schema
from samunet.core.files import sha256_json
from samunet.core.geometry import SpacingTriple, Triple

FINGERPRINT_VERSION = 1


class IntensityStatistics(Schema):
    """Foreground intensities of one channel over the sampled voxels (nnU-Net's seven numbers)."""

    mean: float
    median: float
    std: float
    min: float
    max: float
    percentile_00_5: float
    percentile_99_5: float


class StructureFacts(Schema):
    """What one structure looks like in one case, measured on the uncropped file grid.

    Axes are the file's (Z, Y, X).

    Args:
        volume_mm3: Volume.
        num_components: Connected components (26 neighbours).
        num_slices: Slices it occupies along each axis.
        extent_mm: Size of its bounding box along each axis.
        width_mm: Twice the largest distance from a voxel of it to the outside, in mm (its thickest place).
        centroid_mm: RAS centroid.
        coherence: Per axis, mean Dice between its cross-sections one slice apart (over slices that hold it).
        coherence_mm: Per axis, the distance at which that Dice has fallen to one half.
    """

    volume_mm3: float
    num_components: int
    num_slices: Triple
    extent_mm: SpacingTriple
    width_mm: float
    centroid_mm: SpacingTriple
    coherence: tuple[float, float, float]
    coherence_mm: SpacingTriple = (0.0, 0.0, 0.0)


class CaseFacts(Schema):
    """Facts of one case, in its file's axis order (Z, Y, X).

    Args:
        shape: Voxels before any crop.
        spacing: Millimetres per voxel.
        codes: Orientation code per axis.
        shape_after_crop: Voxels after the crop to nonzero.
        relative_size_after_crop: Fraction of the voxels that the crop keeps.
        num_foreground_voxels: Voxels of any structure.
        num_foreground_slices: Slices with any structure, per axis.
        effective_resolution: Per axis, the fraction of the Nyquist frequency below which 99 % of the power of the
            image's derivative lies (1: the grid is fully used; 0.5: the image looks upsampled twofold). The
            derivative, because an image's own power falls so steeply that its low frequencies would decide.
        structures: Facts per structure present.
        tilt_deg: Largest angle between an axis of the file and the anatomical axis it is named after; None in
            fingerprints made before it was measured.
    """

    shape: Triple
    spacing: SpacingTriple
    codes: tuple[str, str, str]
    shape_after_crop: Triple
    relative_size_after_crop: float
    num_foreground_voxels: int
    num_foreground_slices: Triple
    effective_resolution: tuple[float, float, float]
    structures: dict[str, StructureFacts]
    tilt_deg: float | None = None


class ZScoreRange(Schema):
    """Foreground percentiles 0.5 and 99.5 of one channel after each image's own z-score.

    Args:
        lower: Percentile 0.5 with mean and standard deviation over the whole cropped image.
        upper: Percentile 99.5 of the same.
        lower_nonzero: Percentile 0.5 with mean and standard deviation over the image's nonzero voxels only.
        upper_nonzero: Percentile 99.5 of the same.
    """

    lower: float
    upper: float
    lower_nonzero: float
    upper_nonzero: float


class MirrorPair(Schema):
    """Two structures that a reflection would swap.

    Args:
        first: One structure.
        second: The other.
        axis: The anatomical axis across which they are mirrored.
        evidence: "name"; "name and geometry" where the structures' places say which axis separates them; "geometry"
            where two structures of no such names are alike and lie on two sides.
    """

    first: str
    second: str
    axis: str
    evidence: str


class Fingerprint(Schema):
    """Facts of a whole dataset.

    Args:
        version: Schema version.
        dataset: Folder name.
        channel_names: In order.
        cases: Facts per training case.
        foreground_intensities: Per channel; None where no case has foreground.
        zscore_ranges: Per channel; None where no case has foreground.
        mirror_pairs: Pairs of structures that swap under a reflection.
        left_out: Cases that verification rejected or that could not be measured, and that the user chose to skip.
        inputs_sha256: Hash of names, sizes and times of the input files; no fact, so `facts_sha256` ignores it. (Stores
            remember their own: they may be older than the fingerprint.)
        verified: Whether verification ran on these inputs; no fact either.
    """

    version: int = FINGERPRINT_VERSION
    dataset: str
    channel_names: tuple[str, ...]
    cases: dict[str, CaseFacts]
    foreground_intensities: tuple[IntensityStatistics | None, ...]
    zscore_ranges: tuple[ZScoreRange | None, ...] = ()
    mirror_pairs: tuple[MirrorPair, ...] = ()
    left_out: tuple[str, ...] = ()
    inputs_sha256: str = ""
    verified: bool = False

    @property
    def facts_sha256(self) -> str:
        """Hash of the facts: what a plan was made from, wherever the files lie."""
        # without what was not measured, so that a fact added later does not make older plans stale
        return sha256_json(self.model_dump(mode="json", exclude={"inputs_sha256", "verified"}, exclude_none=True))
