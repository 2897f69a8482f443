"""How images are varied in training, and which views and slabs prediction averages: facts in, (value, reason) out."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import numpy as np

from samunet.artifacts.augmentation import Augmentation
from samunet.artifacts.fingerprint import CaseFacts
from samunet.artifacts.plan import DeviceClass, Frame
from samunet.core.geometry import ANATOMICAL_AXES, Triple
from samunet.imageio.natural import FLAT_SLICE_SPACING_MM

NARROW_DEG, WIDEST_TILT_DEG, ANY_DEG = 15.0, 45.0, 180.0
TILT_STEP_DEG = 5.0
TILT_PERCENTILE = 90
LONG_PIXELS = 1.5
ALIGNED, ALIGNED_EVIDENCE = 0.5, 4.0
NNUNET_SCALE = (0.7, 1.4)
MOST_VIEWS = 4
LONGEST_SECONDS = 60.0


def augmentation(
    cases: Sequence[CaseFacts], frame: Frame, mirror: Collection[str], in_plane: tuple[float, float]
) -> tuple[Augmentation, str]:
    """How far slices are turned and scaled in training.

    Args:
        cases: Facts of all cases.
        frame: Axes of processing.
        mirror: Anatomical axes along which images may be mirrored.
        in_plane: Target spacing of rows and columns in mm.
    """
    angle, reason = rotation_deg(cases, frame, mirror, in_plane)
    return Augmentation(rotation_deg=angle, scale=NNUNET_SCALE), (
        f"{reason}; scaled by {NNUNET_SCALE[0]:g} to {NNUNET_SCALE[1]:g} and with nnU-Net's table of intensities"
    )


def rotation_deg(
    cases: Sequence[CaseFacts], frame: Frame, mirror: Collection[str], in_plane: tuple[float, float]
) -> tuple[float, str]:
    """Largest in-plane rotation to either side, in degrees.

    Any angle only where nothing says what is up: pictures without a place in the world that may be mirrored along
    both axes and in which no structure keeps to one side. Scans share a view, up to how obliquely they lie.

    Args:
        cases: As in :func:`augmentation`.
        frame: As in :func:`augmentation`.
        mirror: As in :func:`augmentation`.
        in_plane: As in :func:`augmentation`.

    Source: nnU-Net turns 2D patches by any angle, or by 15 degrees where they are long; here the data decide.
    """
    ratio = max(in_plane) / min(in_plane)
    if ratio > LONG_PIXELS:
        return NARROW_DEG, (
            f"turned by up to {NARROW_DEG:g} degrees, as pixels are {ratio:.1f} times longer one way than the other "
            f"(more than {LONG_PIXELS:g}) and larger turns would distort them"
        )
    if all(_is_picture(case) for case in cases):
        return _picture_rotation(cases, in_plane_mirrors(frame, mirror))
    tilts = [case.tilt_deg for case in cases if case.tilt_deg is not None]
    if not tilts:
        return NARROW_DEG, f"turned by up to {NARROW_DEG:g} degrees, as how obliquely cases lie was not measured"
    tilt = float(np.percentile(tilts, TILT_PERCENTILE))
    angle = min(WIDEST_TILT_DEG, max(NARROW_DEG, math.ceil(tilt / TILT_STEP_DEG - 1e-6) * TILT_STEP_DEG))
    share = f"nine cases of ten lie within {tilt:.0f} degrees of the anatomical axes"
    if angle == NARROW_DEG:
        return angle, f"{share}, so all share a view and are turned by up to {NARROW_DEG:g} degrees"
    return angle, f"{share}, so slices are turned as far as that, by up to {angle:g} degrees"


def _picture_rotation(pictures: Sequence[CaseFacts], mirrors: int) -> tuple[float, str]:
    start = f"turned by up to {NARROW_DEG:g} degrees, as "
    if mirrors < 2:
        return NARROW_DEG, f"{start}mirroring would swap structures, so pictures have an up"
    name, agreement, number = side_of_structures(pictures)
    if agreement >= ALIGNED and number * agreement**2 >= ALIGNED_EVIDENCE:
        return NARROW_DEG, (
            f"{start}'{name}' keeps to one side of the picture (its directions from the middle agree by "
            f"{agreement:.2f} in {number} pictures; 1 would be all alike), so pictures have an up"
        )
    return ANY_DEG, "turned by any angle, as nothing says what is up in these pictures"


def _is_picture(case: CaseFacts) -> bool:
    """Whether a case is a picture: one slice, without a place in the world."""
    return case.shape[0] == 1 and case.spacing[0] == FLAT_SLICE_SPACING_MM


def side_of_structures(pictures: Sequence[CaseFacts]) -> tuple[str, float, int]:
    """The structure that keeps best to one side of pictures.

    Returns:
        Its name, the length of the mean of its unit directions from the middle of the picture (0: all around; 1:
        always the same), and in how many pictures it is not in the very middle. Empty name if nothing is labelled.
    """
    directions: dict[str, list[complex]] = {}
    for case in pictures:
        _, height, width = case.shape
        _, row_mm, column_mm = case.spacing
        for name, structure in case.structures.items():
            column, row = structure.centroid_mm[0] / column_mm, structure.centroid_mm[1] / row_mm
            offset = complex((column - (width - 1) / 2) / width, (row - (height - 1) / 2) / height)
            if abs(offset) > 1e-6:
                directions.setdefault(name, []).append(offset / abs(offset))
    found = [(abs(sum(units)) / len(units), len(units), name) for name, units in sorted(directions.items())]
    agreement, number, name = max(found, key=lambda f: min(f[0] / ALIGNED, f[1] * f[0] ** 2), default=(0.0, 0, ""))
    return name, agreement, number


def in_plane_mirrors(frame: Frame, mirror: Collection[str]) -> int:
    """Number of in-plane axes (0 to 2) of the majority's frame along which images may be mirrored."""
    return sum(axis in mirror for axis in anatomical_axes(frame)[1:])


def anatomical_axes(frame: Frame) -> tuple[str, str, str]:
    """The majority's anatomical axes along slices, rows and columns."""
    slices, rows, columns = (_anatomical(frame.orientation[axis]) for axis in frame.file_axes)
    return slices, rows, columns


def _anatomical(code: str) -> str:
    return ANATOMICAL_AXES[next(index for index, pair in enumerate(("LR", "AP", "SI")) if code in pair)]


def depth_overlap(slab_depth: int) -> tuple[float, str]:
    """Fraction by which slabs overlap: about half, so that every slice but those at the ends is seen twice.

    Args:
        slab_depth: Slices of a slab D; slabs start floor(D / 2) slices apart.
    """
    if slab_depth == 1:
        return 0.0, "slices are predicted on their own"
    step = slab_depth // 2
    # rounded down, so that slabs are never laid out closer than the step
    share = math.floor((1 - step / slab_depth) * 1e4) / 1e4
    distance = f"{step} slice{'s' * (step > 1)}"
    return share, f"slabs of {slab_depth} slices start every {distance}, so that two slabs at least see each slice"


def num_tiles(shapes: Sequence[Triple], tile_vox: int, overlap: float) -> int:
    """Tiles of a typical volume: the median over cases.

    Args:
        shapes: Voxels per case, slices first.
        tile_vox: Side of a tile.
        overlap: Fraction by which tiles overlap.
    """
    step = max(1, math.floor(tile_vox * (1 - overlap)))
    counts = [
        slices * math.prod(1 + math.ceil(max(0, side - tile_vox) / step) for side in plane) for slices, *plane in shapes
    ]
    return int(np.median(counts))


def mirror_views(*, device: DeviceClass, promptable: bool, mirrors: int, seconds: float) -> tuple[int, str]:
    """How many mirrored views of an image prediction averages at most: 4, 2 (as it is and turned half) or 1.

    Args:
        device: Class of device.
        promptable: Whether prompts are needed; their places fit one view only.
        mirrors: In-plane axes along which images may be mirrored.
        seconds: What a typical volume takes on a CPU without mirrored views.
    """
    if promptable:
        return 1, "prompts point at one view"
    if device == "gpu":
        return MOST_VIEWS, "every view that the mirror axes allow, as nnU-Net"
    for views in (MOST_VIEWS, MOST_VIEWS // 2, 1):
        taken = min(views, 2**mirrors)
        if taken * seconds <= LONGEST_SECONDS or views == 1:
            break
    text = f"a typical volume takes about {seconds:.2g} s per view on two CPU threads"
    if views == MOST_VIEWS:
        return views, f"{text}, {taken} view{'s' * (taken > 1)} no more than {LONGEST_SECONDS:g} s"
    return views, f"{text}: more than {taken} view{'s' * (taken > 1)} would take longer than {LONGEST_SECONDS:g} s"
