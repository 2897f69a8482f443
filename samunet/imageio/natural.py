"""PNG through Pillow and TIFF through tifffile: pictures as one-slice volumes, pages as slices.

A picture has no place in the world: its grid gets 1 mm pixels and, as in nnU-Net, slices 999 mm apart. The spacing of
a TIFF with several pages stands in nnU-Net's side file CASE.json, ``{"spacing": [z, y, x]}``.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from samunet.core.errors import DataError
from samunet.core.files import read_json, write_json
from samunet.core.geometry import Geometry, SpacingTriple
from samunet.core.volume import SourceHeader, Volume

FLAT_SLICE_SPACING_MM = 999.0
_PNG_GRAY = 0
_PNG_DEPTH_BYTE, _PNG_COLOUR_BYTE = 24, 25


def read(file: Path, *, as_labels: bool = False) -> Volume:
    """Read a picture.

    Args:
        file: A .png, .tif or .tiff file.
        as_labels: Take a palette's indices as they are; otherwise its colours.

    Returns:
        (C, Z, Y, X) voxels in the stored type; alpha dropped, a palette of greys as one channel.
    """
    array = _read_png(file, as_labels) if file.suffix.lower() == ".png" else _read_tiff(file, as_labels)
    geometry, notes = _grid(file, (array.shape[1], array.shape[2], array.shape[3]))
    return Volume(array, geometry, SourceHeader("natural", None, notes))


def read_geometry(file: Path) -> Geometry:
    """Read the grid without decoding pixels."""
    if file.suffix.lower() == ".png":
        from PIL import Image

        with Image.open(file) as picture:
            return _grid(file, (1, picture.height, picture.width))[0]
    import tifffile

    with tifffile.TiffFile(file) as tiff:
        series = _single_series(tiff)
        sizes = dict(zip(series.axes, series.shape, strict=True))
    depth = int(np.prod([n for axis, n in sizes.items() if axis not in "YXSC"]))
    return _grid(file, (depth, sizes["Y"], sizes["X"]))[0]


def write(file: Path, array: NDArray[Any], geometry: Geometry, *, name: Path) -> None:
    """Write (C, Z, Y, X) unsigned voxels.

    Args:
        file: Where to write now.
        array: Voxels; PNG holds one slice of 8 or 16 bits, TIFF any depth and type.
        geometry: Their grid; only its spacing can be kept, and only for several slices.
        name: The final file name, which a side file with the spacing is named after.
    """
    channels, depth = array.shape[:2]
    pages = np.ascontiguousarray(np.moveaxis(array, 0, -1) if channels > 1 else array[0])
    if name.suffix.lower() == ".png":
        _write_png(file, pages, name)
        return
    import tifffile

    colour = "rgb" if channels == 3 and array.dtype.kind == "u" else "minisblack"
    tifffile.imwrite(file, pages if depth > 1 else pages[0], photometric=colour, compression="zlib")
    if depth > 1:
        write_json(side_file(name), {"spacing": list(geometry.spacing)})


def side_file(file: Path) -> Path:
    """nnU-Net's file with the spacing of a TIFF volume: CASE.json, without a channel number."""
    return file.with_name(re.sub(r"(_\d{4})?\.tiff?$", "", file.name, flags=re.IGNORECASE) + ".json")


def _read_png(file: Path, as_labels: bool) -> NDArray[Any]:
    from PIL import Image

    with file.open("rb") as stream:
        head = stream.read(26)
    if len(head) == 26 and head[_PNG_DEPTH_BYTE] == 16 and head[_PNG_COLOUR_BYTE] != _PNG_GRAY:
        raise DataError(
            "colours of 16 bits in a PNG cannot be read without loss",
            expected="8 bits per channel, or one grey channel of 16 bits",
            todo="convert it to TIFF, or to one 16-bit grey PNG per channel",
        )
    with Image.open(file) as picture:
        if picture.mode == "P" and not as_labels:
            return _drop_equal_channels(np.asarray(picture.convert("RGB")))
        pixels = np.asarray(picture)
        if picture.mode in ("LA", "RGBA"):
            pixels = pixels[..., :-1]
    return _channels_first(pixels.astype(np.uint8) if pixels.dtype == np.bool_ else pixels)


def _write_png(file: Path, pages: NDArray[Any], name: Path) -> None:
    from PIL import Image

    if pages.shape[0] != 1 or pages.dtype not in (np.uint8, np.uint16) or (pages.ndim == 4 and pages.dtype != np.uint8):
        raise DataError(
            "a PNG cannot hold this array",
            expected="one slice of 8 or 16 bits, in colour of 8 bits",
            found=f"shape {pages.shape} of {pages.dtype}",
            file=name,
            todo="use .tif or .nii.gz",
        )
    Image.fromarray(pages[0]).save(file)


def _read_tiff(file: Path, as_labels: bool) -> NDArray[Any]:
    import tifffile

    with tifffile.TiffFile(file) as tiff:
        series = _single_series(tiff)
        axes = series.axes
        try:
            array = series.asarray()
        except ValueError as error:
            if "imagecodecs" not in str(error):
                raise
            array = _decode_with_pillow(file)
            axes = "QYXS"[: array.ndim]
        colours = getattr(series.keyframe, "colormap", None)
        extra = len(getattr(series.keyframe, "extrasamples", ()) or ())
    return _arrange_tiff(array, axes, extra, None if as_labels else colours)


def _decode_with_pillow(file: Path) -> NDArray[Any]:
    """(page, Y, X) or (page, Y, X, S) of a compression that tifffile needs another package for, as LZW."""
    from PIL import Image, ImageSequence

    with Image.open(file) as picture:
        return np.stack([np.asarray(page) for page in ImageSequence.Iterator(picture)])


def _arrange_tiff(array: NDArray[Any], axes: str, extra: int, colours: NDArray[Any] | None) -> NDArray[Any]:
    """(C, Z, Y, X) from tifffile's named axes: S and C are channels, the others slices."""
    order = sorted(range(array.ndim), key=lambda axis: (axes[axis] not in "SC", axes[axis] in "YX", axis))
    names = [axes[axis] for axis in order]
    moved = array.transpose(order)
    num_channel_axes = sum(name in "SC" for name in names)
    channels = int(np.prod(moved.shape[:num_channel_axes]))
    result: NDArray[Any] = moved.reshape(channels, -1, *moved.shape[-2:])
    if extra and "S" in axes and channels > extra:
        result = result[: channels - extra]
    if colours is not None and channels == 1:
        result = _drop_equal_channels((colours[:, result[0]] // 257).astype(np.uint8), axis=0)
    return result


def _single_series(tiff: Any) -> Any:
    if len(tiff.series) != 1 or not {"Y", "X"} <= set(tiff.series[0].axes):
        raise DataError(
            "the pages of this TIFF do not form one volume",
            expected="pages of one size and type",
            found=f"{len(tiff.series)} groups of pages",
        )
    return tiff.series[0]


def _channels_first(pixels: NDArray[Any]) -> NDArray[Any]:
    flat = pixels[..., np.newaxis] if pixels.ndim == 2 else pixels
    return np.moveaxis(flat, -1, 0)[:, np.newaxis]


def _drop_equal_channels(pixels: NDArray[Any], axis: int = -1) -> NDArray[Any]:
    """One channel if a palette held only greys; channels first in any case."""
    stack = np.moveaxis(pixels, axis, 0)
    grey = bool((stack[0] == stack[1]).all() and (stack[0] == stack[2]).all())
    kept = stack[:1] if grey else stack
    return kept[:, np.newaxis] if kept.ndim == 3 else kept


def _grid(file: Path, shape: tuple[int, int, int]) -> tuple[Geometry, tuple[str, ...]]:
    """A picture's grid and what is odd about it."""
    if shape[0] == 1:
        return Geometry.from_spacing(shape, (FLAT_SLICE_SPACING_MM, 1.0, 1.0)), ()
    beside = side_file(file)
    if not beside.is_file():
        return Geometry.from_spacing(shape, (1.0, 1.0, 1.0)), (
            f"the spacing is unknown, 1 mm is assumed ({beside.name} with the key 'spacing' would tell)",
        )
    return Geometry.from_spacing(shape, _side_spacing(beside)), ()


def _side_spacing(beside: Path) -> SpacingTriple:
    content = read_json(beside)
    spacing: Any = content.get("spacing") if isinstance(content, dict) else None
    wrong = not isinstance(spacing, list) or len(spacing) != 3
    if wrong or not all(isinstance(n, (int, float)) and n > 0 for n in spacing):
        raise DataError("no usable spacing", expected='{"spacing": [z, y, x]} in mm', found=str(content), file=beside)
    return float(spacing[0]), float(spacing[1]), float(spacing[2])
