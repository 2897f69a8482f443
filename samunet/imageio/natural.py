"""PNG through Pillow and TIFF through tifffile: pictures as one-slice volumes, pages as slices.

A picture has no place in the world: its grid gets 1 mm pixels and, as in nnU-Net, slices 999 mm apart. The spacing of
a TIFF with several pages stands in nnU-Net's side file, ``{"spacing": [z, y, x]}``.
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
_TIFF_WHITE_IS_ZERO, _TIFF_BLACK_IS_ZERO = 0, 1
_PILLOW_FACTOR = {2: 85, 4: 17}  # by which Pillow stretches grey values of 2 and 4 bits to 8
_CHANNEL = re.compile(r"_\d{4}$")


def read(file: Path, *, as_labels: bool = False) -> Volume:
    """Read a picture.

    Args:
        file: A .png, .tif or .tiff file.
        as_labels: Take a palette's indices and small grey values as they are stored; otherwise colours and 8 bits.

    Returns:
        (C, Z, Y, X) voxels in the stored type; alpha dropped, a palette of greys as one channel.
    """
    array = _read_png(file, as_labels) if file.suffix.lower() == ".png" else _read_tiff(file, as_labels)
    geometry, notes = _grid(file, (array.shape[1], array.shape[2], array.shape[3]), as_labels)
    return Volume(array, geometry, SourceHeader("natural", None, notes))


def read_geometry(file: Path) -> Geometry:
    """Read the grid of an image without decoding pixels."""
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
        array: Voxels of one channel or three; PNG holds one slice of 8 or 16 bits, TIFF any depth and type.
        geometry: Their grid; only its spacing can be kept, and only for several slices.
        name: The final file name, which a side file with the spacing is named after.
    """
    channels, depth = array.shape[:2]
    if channels not in (1, 3):
        raise DataError(
            "a picture takes one channel, or three of colour",
            found=f"{channels} channels",
            file=name,
            todo="write each channel to a file of its own (CASE_0000, CASE_0001, ...)",
        )
    pages = np.ascontiguousarray(np.moveaxis(array, 0, -1) if channels > 1 else array[0])
    if name.suffix.lower() == ".png":
        _write_png(file, pages, name)
        return
    import tifffile

    colour = "rgb" if channels == 3 else "minisblack"
    tifffile.imwrite(file, pages if depth > 1 else pages[0], photometric=colour, compression="zlib")
    if depth > 1:
        write_json(name.with_suffix(".json"), {"spacing": list(geometry.spacing)})


def spacing_file(file: Path, *, as_labels: bool = False) -> Path | None:
    """The side file in which the spacing of a TIFF file stands, if there is one.

    It has the name of the file. An image may be one of several channels, and then as in nnU-Net the name without the
    channel's number; in the name of a label map a number is a part of the case's name.
    """
    if file.suffix.lower() not in (".tif", ".tiff"):
        return None
    stems = [file.stem] if as_labels else [file.stem, _CHANNEL.sub("", file.stem)]
    return next((beside for stem in stems if (beside := file.with_name(f"{stem}.json")).is_file()), None)


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
        if picture.mode == "L" and as_labels:
            pixels = pixels // _PILLOW_FACTOR.get(head[_PNG_DEPTH_BYTE], 1)
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
            array = _decode_with_pillow(file, series.keyframe)
            axes = "QYXS"[: array.ndim]
        colours = getattr(series.keyframe, "colormap", None)
        extra = len(getattr(series.keyframe, "extrasamples", ()) or ())
    return _arrange_tiff(array, axes, extra, None if as_labels else colours)


def _decode_with_pillow(file: Path, keyframe: Any) -> NDArray[Any]:
    """(page, Y, X) or (page, Y, X, S) of a compression that tifffile needs another package for, as LZW.

    Values are those stored, as tifffile gives them: Pillow inverts where 0 is white, and stretches small grey values.
    """
    from PIL import Image, ImageSequence

    with Image.open(file) as picture:
        pixels = np.stack([np.asarray(page) for page in ImageSequence.Iterator(picture)])
    if keyframe.photometric == _TIFF_WHITE_IS_ZERO and pixels.dtype in (np.bool_, np.uint8):
        pixels = ~pixels
    grey = keyframe.photometric in (_TIFF_WHITE_IS_ZERO, _TIFF_BLACK_IS_ZERO)
    return pixels // _PILLOW_FACTOR[keyframe.bitspersample] if grey and keyframe.bitspersample in (2, 4) else pixels


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


def _grid(file: Path, shape: tuple[int, int, int], as_labels: bool = False) -> tuple[Geometry, tuple[str, ...]]:
    """A picture's grid and what is odd about it."""
    if shape[0] == 1:
        return Geometry.from_spacing(shape, (FLAT_SLICE_SPACING_MM, 1.0, 1.0)), ()
    beside = spacing_file(file, as_labels=as_labels)
    if beside is None:
        return Geometry.from_spacing(shape, (1.0, 1.0, 1.0)), (
            f"the spacing is unknown, 1 mm is assumed ({file.stem}.json with the key 'spacing' would tell)",
        )
    return Geometry.from_spacing(shape, _side_spacing(beside)), ()


def _side_spacing(beside: Path) -> SpacingTriple:
    content = read_json(beside)
    spacing: Any = content.get("spacing") if isinstance(content, dict) else None
    wrong = not isinstance(spacing, list) or len(spacing) != 3
    if wrong or not all(isinstance(n, (int, float)) and n > 0 for n in spacing):
        raise DataError("no usable spacing", expected='{"spacing": [z, y, x]} in mm', found=str(content), file=beside)
    return float(spacing[0]), float(spacing[1]), float(spacing[2])
