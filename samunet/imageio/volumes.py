"""Volumes of one or several files, label maps, and their way back to disk, whatever the format."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from samunet.core.errors import DataError, UsageError
from samunet.core.files import atomic_path
from samunet.core.geometry import Geometry
from samunet.core.volume import SourceHeader, Volume
from samunet.imageio.formats import format_of, reading

ROUNDING_VOX = 0.01
MISMATCH_VOX = 0.1
_INTEGRAL_TOLERANCE = 1e-4


def read_volume(files: Sequence[Path], *, case: str | None = None) -> Volume:
    """Read a case's image: one file per channel, or one file that holds all channels.

    Args:
        files: In channel order.
        case: Name for messages.

    Returns:
        float32 (C, Z, Y, X) on the first file's grid, with the first file's header; its notes name what was odd.

    Raises:
        DataError: If a file cannot be read, or the files' grids differ by more than MISMATCH_VOX of a voxel.
    """
    if not files:
        raise DataError("the case has no image file", case=case)
    parts: list[NDArray[np.float32]] = []
    notes: list[str] = []
    first: Volume | None = None
    for file in files:
        volume = _read(file, case=case)
        first = first or volume
        notes += _check_grid(first.geometry, volume.geometry, file, case)
        notes += volume.header.notes if volume.header else ()
        parts.append(np.ascontiguousarray(volume.data, dtype=np.float32))
    assert first is not None
    assert first.header is not None
    header = SourceHeader(first.header.format, first.header.content, tuple(dict.fromkeys(notes)))
    return Volume(parts[0] if len(parts) == 1 else np.concatenate(parts), first.geometry, header)


def read_labels(file: Path, *, case: str | None = None) -> Volume:
    """Read a label map.

    Returns:
        int16 (1, Z, Y, X), int32 where the values need it.

    Raises:
        DataError: If the file cannot be read, has several channels, or values that are not whole numbers.
    """
    volume = _read(file, case=case, as_labels=True)
    if volume.num_channels != 1:
        raise DataError(
            "a label map needs one channel",
            expected="1 channel of label values",
            found=f"{volume.num_channels} channels",
            file=file,
            case=case,
        )
    return volume.with_data(_as_integers(volume.data, file, case))


def read_geometry(file: Path) -> Geometry:
    """Read a file's grid, without its voxels."""
    with reading(file):
        match format_of(file):
            case "nifti":
                from samunet.imageio import nifti

                return nifti.read_geometry(file)
            case "sitk":
                from samunet.imageio import sitk

                return sitk.read_geometry(file)
            case "natural":
                from samunet.imageio import natural

                return natural.read_geometry(file)


def write_labels(
    file: Path, labels: NDArray[Any], like: Volume | None = None, geometry: Geometry | None = None
) -> None:
    """Write a label map atomically, in the smallest unsigned type that holds its values.

    Args:
        file: Where to; the ending decides on the format.
        labels: (Z, Y, X) whole numbers from 0.
        like: The image the labels belong to. From NIfTI to NIfTI its header is copied, with both matrices and codes;
            an image of two axes has a mask of two axes.
        geometry: The grid, where there is no image.

    Raises:
        UsageError: If neither an image nor a grid is given.
        DataError: If the values or the shape cannot be written.
    """
    grid = geometry if like is None else like.geometry
    if grid is None:
        raise UsageError("a label map needs the image it belongs to, or a geometry", file=file)
    _write(file, _smallest_unsigned(labels, file)[np.newaxis], grid, None if like is None else like.header)


def write_image(file: Path, volume: Volume) -> None:
    """Write an image atomically in its own type; PNG needs whole numbers of at most 16 bits.

    Args:
        file: Where to; the ending decides on the format.
        volume: (C, Z, Y, X); NIfTI takes one channel.
    """
    data = volume.data
    if format_of(file) == "natural" and data.dtype.kind not in "u":
        data = _smallest_unsigned(data, file)
    _write(file, data, volume.geometry, volume.header)


def _read(file: Path, *, case: str | None, as_labels: bool = False) -> Volume:
    with reading(file, case):
        match format_of(file):
            case "nifti":
                from samunet.imageio import nifti

                return nifti.read(file)
            case "sitk":
                from samunet.imageio import sitk

                return sitk.read(file)
            case "natural":
                from samunet.imageio import natural

                return natural.read(file, as_labels=as_labels)


def _write(file: Path, array: NDArray[Any], geometry: Geometry, header: SourceHeader | None) -> None:
    if array.ndim != 4 or array.shape[1:] != geometry.shape:
        raise DataError(
            "the array does not fit the grid it is written with",
            expected=str(geometry.shape),
            found=str(array.shape[1:]),
            file=file,
        )
    kind = format_of(file)
    if kind == "nifti" and array.shape[0] != 1:
        raise DataError("a NIfTI file takes one channel", found=f"{array.shape[0]} channels", file=file)
    with atomic_path(file) as temporary:
        match kind:
            case "nifti":
                from samunet.imageio import nifti

                nifti.write(temporary, array[0], geometry, header)
            case "sitk":
                from samunet.imageio import sitk

                sitk.write(temporary, array, geometry, header)
            case "natural":
                from samunet.imageio import natural

                natural.write(temporary, array, geometry, name=file)


def _check_grid(first: Geometry, other: Geometry, file: Path, case: str | None) -> list[str]:
    """Refuse a channel on another grid; note one that is off by more than rounding."""
    if first.shape != other.shape:
        raise DataError(
            "the channels have different shapes",
            expected=str(first.shape),
            found=str(other.shape),
            file=file,
            case=case,
        )
    gap = first.corner_distance_vox(other)
    if gap > MISMATCH_VOX:
        raise DataError(
            "the channels lie at different places in the world",
            expected=f"the first channel's grid to within {MISMATCH_VOX} voxel",
            found=f"{gap:.3g} voxels apart at a corner",
            file=file,
            case=case,
        )
    return [f"{file.name} is {gap:.3g} voxels off the first channel's grid"] if gap > ROUNDING_VOX else []


def _as_integers(data: NDArray[Any], file: Path, case: str | None) -> NDArray[Any]:
    if data.dtype.kind == "f":
        rounded = np.rint(data)
        with np.errstate(invalid="ignore"):
            wrong = ~(np.abs(data - rounded) <= _INTEGRAL_TOLERANCE)
        if wrong.any():
            raise DataError(
                "labels must be whole numbers",
                expected="integers",
                found=f"{int(wrong.sum())} voxels with other values, as {float(data[wrong][0]):.6g}",
                file=file,
                case=case,
                todo="was the label map resampled with interpolation? Resample it with nearest neighbour",
            )
        data = rounded
    low, high = (float(data.min()), float(data.max())) if data.size else (0.0, 0.0)
    limits = np.iinfo(np.int32)
    if low < limits.min or high > limits.max:
        raise DataError("label values are too large", found=f"{low:.0f} to {high:.0f}", file=file, case=case)
    small = np.iinfo(np.int16)
    return np.ascontiguousarray(data, dtype=np.int16 if small.min <= low and high <= small.max else np.int32)


def _smallest_unsigned(values: NDArray[Any], file: Path) -> NDArray[Any]:
    low, high = (values.min(), values.max()) if values.size else (0, 0)
    whole = values.dtype.kind in "iub" or bool((values == np.rint(values)).all())
    if not whole or low < 0 or high > np.iinfo(np.uint32).max:
        raise DataError(
            "only whole numbers from 0 can be written here",
            found=f"{values.dtype} from {float(low):.6g} to {float(high):.6g}",
            file=file,
        )
    kind = next(t for t in (np.uint8, np.uint16, np.uint32) if high <= np.iinfo(t).max)
    return values.astype(kind)
