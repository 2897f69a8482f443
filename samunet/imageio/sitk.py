"""NRRD and MetaImage through SimpleITK, whose world is LPS where ours is RAS."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from samunet.core.errors import DataError
from samunet.core.geometry import Geometry
from samunet.core.volume import SourceHeader, Volume
from samunet.imageio.natural import FLAT_SLICE_SPACING_MM

_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0])


def read(file: Path) -> Volume:
    """Read one file; pixels that are vectors become channels.

    Returns:
        (C, Z, Y, X) voxels in the stored type.
    """
    sitk = _library()
    image = sitk.ReadImage(str(file))
    array = sitk.GetArrayFromImage(image)
    if image.GetNumberOfComponentsPerPixel() > 1:
        array = np.moveaxis(array, -1, 0)
    else:
        array = array[np.newaxis]
    geometry = _geometry(image.GetSize(), image.GetSpacing(), image.GetOrigin(), image.GetDirection())
    header = SourceHeader("sitk", image.GetDimension())
    return Volume(array.reshape(array.shape[0], *geometry.shape), geometry, header)


def read_geometry(file: Path) -> Geometry:
    """Read the grid from the header alone."""
    sitk = _library()
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(file))
    reader.ReadImageInformation()
    return _geometry(reader.GetSize(), reader.GetSpacing(), reader.GetOrigin(), reader.GetDirection())


def write(file: Path, array: NDArray[Any], geometry: Geometry, header: SourceHeader | None) -> None:
    """Write (C, Z, Y, X) voxels, compressed; several channels become vector pixels.

    Args:
        file: Where to.
        array: Voxels.
        geometry: Their grid.
        header: Header of the file the grid came from: if that had two axes only, so does this one.
    """
    sitk = _library()
    flat = header is not None and header.format == "sitk" and header.content == 2 and _is_flat(geometry)
    axes = 2 if flat else 3
    vector = array.shape[0] > 1
    voxels = np.moveaxis(array, 0, -1) if vector else array[0]
    image = sitk.GetImageFromArray(np.ascontiguousarray(voxels[0] if flat else voxels), isVector=vector)
    columns = _LPS_TO_RAS @ geometry.affine[:3, :3]
    lengths = np.linalg.norm(columns, axis=0)
    image.SetSpacing([float(length) for length in lengths[:axes]])
    image.SetDirection([float(value) for value in (columns / lengths)[:axes, :axes].ravel()])
    image.SetOrigin([float(value) for value in (_LPS_TO_RAS @ geometry.affine[:3, 3])[:axes]])
    sitk.WriteImage(image, str(file), useCompression=True)


def _is_flat(geometry: Geometry) -> bool:
    """Whether a grid is one that a file of two axes is read to: one slice in the plane z = 0."""
    across = (0.0, 0.0, FLAT_SLICE_SPACING_MM, 0.0)
    return bool(
        geometry.shape[0] == 1
        and np.array_equal(geometry.affine[2], across)
        and np.array_equal(geometry.affine[:3, 2], across[:3])
    )


def _library() -> Any:
    """SimpleITK without its warnings on standard error: what matters about a file is raised as an error."""
    import SimpleITK

    library: Any = SimpleITK
    library.ProcessObject.SetGlobalWarningDisplay(False)
    return library


def _geometry(size: Any, spacing: Any, origin: Any, direction: Any) -> Geometry:
    """RAS grid from SimpleITK's (x, y, z) values; a flat image becomes one slice."""
    dimension = len(size)
    if dimension > 3 and any(n != 1 for n in size[3:]):
        raise DataError(
            "an image of more than three axes is not a volume",
            expected="three axes, or further ones of size 1",
            found=f"size {tuple(size)}",
            todo="write each channel or time point to a file of its own (CASE_0000, CASE_0001, ...)",
        )
    kept = min(dimension, 3)
    axes = np.eye(3)
    axes[:kept, :kept] = np.asarray(direction).reshape(dimension, dimension)[:kept, :kept]
    lengths = np.array([*spacing[:kept], *[FLAT_SLICE_SPACING_MM] * (3 - kept)])
    affine = np.eye(4)
    affine[:3, :3] = _LPS_TO_RAS @ axes @ np.diag(lengths)
    affine[:3, 3] = _LPS_TO_RAS @ np.array([*origin[:kept], *[0.0] * (3 - kept)])
    i, j, k = (*(int(n) for n in size[:kept]), *[1] * (3 - kept))
    return Geometry((k, j, i), affine)
