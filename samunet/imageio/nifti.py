"""NIfTI through nibabel: headers copied, qform and sform kept with their codes, any affine."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from samunet.core.errors import DataError
from samunet.core.geometry import Geometry
from samunet.core.volume import SourceHeader, Volume

FORM_MISMATCH_VOX = 0.1
SCANNER = 1
_NIFTI1_MAX_SIZE = 32767


def read(file: Path) -> Volume:
    """Read one NIfTI file as a single channel.

    The file is read to its end, so that a gzip stream's checksum is verified.

    Returns:
        (1, Z, Y, X) voxels in the stored type (scaled to float where the header asks for it).
    """
    with _opened(file) as (image, stream):
        if np.dtype(image.get_data_dtype()).kind not in "iufb":
            raise DataError(
                "voxels that are neither integers nor real numbers cannot be used",
                found=str(image.get_data_dtype()),
                todo="write colour or complex channels to one file each",
            )
        shape = _shape_ijk(image.shape)
        voxels = np.asanyarray(image.dataobj).reshape(shape)
        while stream.read(1 << 20):
            pass
    geometry = Geometry((shape[2], shape[1], shape[0]), image.affine)
    header = SourceHeader("nifti", image.header.copy(), _notes(image.header, geometry))
    return Volume(voxels.transpose(2, 1, 0)[np.newaxis], geometry, header)


def read_geometry(file: Path) -> Geometry:
    """Read the grid from the header alone."""
    with _opened(file) as (image, _):
        shape = _shape_ijk(image.shape)
        return Geometry((shape[2], shape[1], shape[0]), image.affine)


def write(file: Path, array: NDArray[Any], geometry: Geometry, header: SourceHeader | None) -> None:
    """Write one channel.

    Args:
        file: Where to; its ending decides on compression.
        array: (Z, Y, X) voxels, stored in their own type without scaling.
        geometry: Their grid.
        header: Header of the file the grid came from: if it is a NIfTI header of the same grid, both matrices, both
            codes, units, time stamps and the number of axes (two or three) are kept; extensions are not, they may
            describe the image or the patient.
    """
    content = header.content if header is not None and header.format == "nifti" else None
    voxels = array.transpose(2, 1, 0)
    if content is not None and _describes(content, geometry):
        image = _with_copied_header(voxels, content)
    else:
        image = _with_new_header(voxels, geometry)
    image.to_filename(file)


@contextmanager
def _opened(file: Path) -> Iterator[tuple[Any, IO[bytes]]]:
    """Open a NIfTI-1 or NIfTI-2 file, compressed or not, whatever its ending says."""
    import nibabel

    with file.open("rb") as probe:
        compressed = probe.read(2) == b"\x1f\x8b"
    with gzip.open(file, "rb") if compressed else file.open("rb") as stream:
        first = stream.read(4)
        stream.seek(0)
        sizes = {int.from_bytes(first, "little"), int.from_bytes(first, "big")}
        kind = nibabel.Nifti2Image if 540 in sizes else nibabel.Nifti1Image
        yield kind.from_stream(stream), stream  # type: ignore[misc]


def _shape_ijk(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Three sizes from a header's shape; further axes must be single, missing ones are single."""
    sizes = (*shape, 1, 1)[:3]
    if any(size != 1 for size in shape[3:]):
        raise DataError(
            "an image of more than three axes is not a volume",
            expected="three axes, or further ones of size 1",
            found=f"shape {tuple(int(size) for size in shape)}",
            todo="write each channel or time point to a file of its own (CASE_0000, CASE_0001, ...)",
        )
    return int(sizes[0]), int(sizes[1]), int(sizes[2])


def _notes(header: Any, geometry: Geometry) -> tuple[str, ...]:
    """Oddities of a header that a user should know, one sentence each."""
    notes = []
    if int(header["qform_code"]) > 0 and int(header["sform_code"]) > 0:
        try:
            gap = geometry.corner_distance_vox(Geometry(geometry.shape, header.get_qform()))
        except (ValueError, DataError):
            notes.append("the qform is no rotation; the sform is used")
        else:
            if gap > FORM_MISMATCH_VOX:
                notes.append(f"qform and sform differ by {gap:.3g} voxels at a corner; the sform is used")
    elif int(header["qform_code"]) <= 0 and int(header["sform_code"]) <= 0:
        notes.append("neither qform nor sform is set; the orientation is nibabel's default (x to the left)")
    unit = header.get_xyzt_units()[0]
    if unit in ("meter", "micron"):
        notes.append(f"the header gives lengths in {unit}s; they are read as millimetres")
    return tuple(notes)


def _describes(content: Any, geometry: Geometry) -> bool:
    """Whether a header's grid is this grid (it is not after somebody moved the volume)."""
    shape = _shape_ijk(content.get_data_shape())[::-1]
    return bool(shape == geometry.shape and np.array_equal(content.get_best_affine(), geometry.affine))


def _with_copied_header(voxels: NDArray[Any], content: Any) -> Any:
    import nibabel

    header = content.copy()
    header.extensions.clear()
    header.set_data_dtype(voxels.dtype)
    header.set_slope_inter(1, 0)
    header["cal_min"] = header["cal_max"] = 0
    header.set_intent("none")
    kind = nibabel.Nifti2Image if isinstance(header, nibabel.Nifti2Header) else nibabel.Nifti1Image
    voxels = voxels.reshape(voxels.shape[: len(content.get_data_shape())])
    return kind(voxels, None, header)  # type: ignore[no-untyped-call]  # no affine: both matrices stay as they are


def _with_new_header(voxels: NDArray[Any], geometry: Geometry) -> Any:
    """An image with both forms set to the geometry, with code scanner.

    The qform is left unset where it cannot hold the geometry: it has no shear, and its single-precision quaternion is
    coarse near half turns (about 1e-3 rad). Two forms that disagree are worse than one.
    """
    import nibabel

    kind = nibabel.Nifti2Image if max(voxels.shape) > _NIFTI1_MAX_SIZE else nibabel.Nifti1Image
    image: Any = kind(voxels, geometry.affine)  # type: ignore[no-untyped-call]
    image.set_data_dtype(voxels.dtype)
    image.header.set_xyzt_units("mm")
    image.set_sform(geometry.affine, code=SCANNER)
    image.set_qform(geometry.affine, code=SCANNER, strip_shears=True)
    gap = geometry.corner_distance_vox(Geometry(geometry.shape, image.header.get_qform()))
    if gap > FORM_MISMATCH_VOX:
        image.set_qform(geometry.affine, code=0, strip_shears=True)
    return image
