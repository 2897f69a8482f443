"""Pictures: depth of bits, colours, palettes, pages."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray
from PIL import Image

from samunet.core.errors import DataError
from samunet.core.geometry import Geometry
from samunet.core.volume import Volume
from samunet.imageio import read_geometry, read_labels, read_volume, write_image, write_labels

RNG = np.random.default_rng(0)


def packed(bits: str) -> bytes:
    """Bits as bytes, filled up with zeros."""
    return int(bits + "0" * (-len(bits) % 8), 2).to_bytes((len(bits) + 7) // 8, "big")


def rows_of(values: NDArray[Any], depth: int) -> list[bytes]:
    """The rows of a picture whose values take so many bits each."""
    return [packed("".join(f"{value:0{depth}b}" for value in row)) for row in values]


def small_png(file: Path, values: NDArray[Any], depth: int) -> Path:
    """A grey PNG of few bits, which Pillow cannot write."""
    chunks = {
        b"IHDR": struct.pack(">IIBBBBB", values.shape[1], values.shape[0], depth, 0, 0, 0, 0),
        b"IDAT": zlib.compress(b"".join(b"\0" + row for row in rows_of(values, depth))),
        b"IEND": b"",
    }
    body = [struct.pack(">I", len(c)) + k + c + struct.pack(">I", zlib.crc32(k + c)) for k, c in chunks.items()]
    file.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(body))
    return file


def lzw_tiff(file: Path, values: NDArray[Any], depth: int, photometric: int) -> Path:
    """A grey TIFF of few bits with LZW (codes of 9 bits: clear, each byte as it is, end)."""
    codes = [256, *b"".join(rows_of(values, depth)), 257]
    data = packed("".join(f"{code:09b}" for code in codes))
    height, width = values.shape
    tags = {256: width, 257: height, 258: depth, 259: 5, 262: photometric, 273: 8, 277: 1, 278: height, 279: len(data)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    start = 8 + len(data)
    file.write_bytes(b"II*\0" + struct.pack("<I", start) + data + struct.pack("<H", len(tags)) + entries + bytes(4))
    return file


def test_grey_png_of_8_and_16_bits_keep_their_values(tmp_path: Path) -> None:
    """Values are not scaled, and a picture is one slice with nnU-Net's spacing."""
    for kind, top in ((np.uint8, 256), (np.uint16, 65536)):
        pixels = RNG.integers(0, top, (6, 7)).astype(kind)
        Image.fromarray(pixels).save(tmp_path / "a.png")
        volume = read_volume([tmp_path / "a.png"])
        np.testing.assert_array_equal(volume.data[0, 0], pixels)
        assert volume.geometry.spacing == (999.0, 1.0, 1.0)
        assert read_geometry(tmp_path / "a.png").matches(volume.geometry)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA"])
def test_colours_become_channels_and_alpha_is_dropped(tmp_path: Path, mode: str) -> None:
    """Three channels of a colour picture, one of a grey one, whatever its transparency."""
    channels = {"RGB": 3, "RGBA": 4, "LA": 2}[mode]
    pixels = RNG.integers(0, 256, (6, 7, channels)).astype(np.uint8)
    Image.fromarray(pixels, mode).save(tmp_path / "a.png")
    kept = 1 if mode == "LA" else 3
    np.testing.assert_array_equal(read_volume([tmp_path / "a.png"]).data[:, 0], pixels[..., :kept].transpose(2, 0, 1))


def test_palettes_are_colours_in_images_and_values_in_labels(tmp_path: Path) -> None:
    """An indexed PNG is converted as an image; as a label map its indices are the labels."""
    indices = RNG.integers(0, 3, (6, 7)).astype(np.uint8)
    picture = Image.fromarray(indices, "P")
    picture.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    picture.save(tmp_path / "a.png")
    image = read_volume([tmp_path / "a.png"])
    assert image.num_channels == 3
    np.testing.assert_array_equal(image.data[1, 0], np.array([20, 50, 80])[indices])
    np.testing.assert_array_equal(read_labels(tmp_path / "a.png").data[0, 0], indices)
    picture.putpalette([10, 10, 10, 40, 40, 40, 70, 70, 70])
    picture.save(tmp_path / "g.png")
    assert read_volume([tmp_path / "g.png"]).num_channels == 1


def test_binary_png_are_zero_and_one(tmp_path: Path) -> None:
    """A one-bit mask holds the labels 0 and 1."""
    mask = RNG.integers(0, 2, (6, 7)).astype(bool)
    Image.fromarray(mask).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_labels(tmp_path / "a.png").data[0, 0], mask)


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_small_grey_values_are_the_labels(tmp_path: Path, depth: int) -> None:
    """A grey PNG of 1, 2 or 4 bits holds its labels unscaled; so does a TIFF of any photometric meaning."""
    values = RNG.integers(0, 2**depth, (6, 7))
    files = [small_png(tmp_path / "a.png", values, depth)]
    files += [lzw_tiff(tmp_path / f"{white}.tif", values, depth, white) for white in (0, 1)]
    for file in files:
        np.testing.assert_array_equal(read_labels(file).data[0, 0], values, err_msg=file.name)


def test_16_bit_colour_png_are_refused(tmp_path: Path) -> None:
    """Pillow would reduce them to 8 bits without a word."""
    header = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR" + bytes([0, 0, 0, 2, 0, 0, 0, 2, 16, 2, 0, 0, 0])
    (tmp_path / "a.png").write_bytes(header + b"\x00" * 40)
    with pytest.raises(DataError, match="16 bits"):
        read_volume([tmp_path / "a.png"])


def test_tiff_of_16_bit_colours_are_read_whole(tmp_path: Path) -> None:
    """TIFF holds what PNG through Pillow cannot."""
    pixels = RNG.integers(0, 65536, (6, 7, 3)).astype(np.uint16)
    tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="rgb")
    np.testing.assert_array_equal(read_volume([tmp_path / "a.tif"]).data[:, 0], pixels.transpose(2, 0, 1))


def test_tiff_with_alpha_and_planes(tmp_path: Path) -> None:
    """Extra samples are dropped, and colours stored plane by plane are the same colours."""
    pixels = RNG.integers(0, 256, (6, 7, 4)).astype(np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="rgb", extrasamples=["unassalpha"])
    np.testing.assert_array_equal(read_volume([tmp_path / "a.tif"]).data[:, 0], pixels[..., :3].transpose(2, 0, 1))
    planes = pixels[..., :3].transpose(2, 0, 1)
    tifffile.imwrite(tmp_path / "p.tif", planes, photometric="rgb", planarconfig="separate")
    np.testing.assert_array_equal(read_volume([tmp_path / "p.tif"]).data[:, 0], planes)


def test_tiff_compressed_by_other_programs(tmp_path: Path) -> None:
    """LZW and deflate, the usual compressions, are read without further packages."""
    pixels = RNG.integers(0, 4, (30, 40)).astype(np.uint8)
    for name in ("tiff_lzw", "tiff_deflate", "packbits"):
        Image.fromarray(pixels).save(tmp_path / "a.tif", compression=name)
        np.testing.assert_array_equal(read_volume([tmp_path / "a.tif"]).data[0, 0], pixels)


def test_tiff_pages_are_slices_and_the_side_file_tells_the_spacing(tmp_path: Path) -> None:
    """Several pages are a volume whose spacing stands in nnU-Net's CASE.json; without it 1 mm is assumed, and noted."""
    pages = RNG.integers(0, 256, (3, 6, 7)).astype(np.uint8)
    file = tmp_path / "case_0000.tif"
    tifffile.imwrite(file, pages, photometric="minisblack")
    unknown = read_volume([file])
    np.testing.assert_array_equal(unknown.data[0], pages)
    assert unknown.geometry.spacing == (1.0, 1.0, 1.0)
    assert unknown.header is not None
    assert "spacing is unknown" in unknown.header.notes[0]
    (tmp_path / "case.json").write_text('{"spacing": [4, 0.5, 0.25]}')
    assert read_volume([file]).geometry.spacing == (4.0, 0.5, 0.25)
    assert read_geometry(file).spacing == (4.0, 0.5, 0.25)
    (tmp_path / "case.json").write_text('{"spacing": [4, "wide", 0.25]}')
    with pytest.raises(DataError, match="spacing"):
        read_volume([file])


def test_a_mask_of_pages_keeps_the_spacing(tmp_path: Path) -> None:
    """A written TIFF volume comes back with its spacing."""
    grid = Geometry.from_spacing((3, 6, 7), (4.0, 0.5, 0.25))
    labels = RNG.integers(0, 300, grid.shape)
    write_labels(tmp_path / "m.tif", labels, geometry=grid)
    back = read_labels(tmp_path / "m.tif")
    np.testing.assert_array_equal(back.data[0], labels)
    assert back.geometry.matches(grid)


def test_numbered_volumes_have_side_files_of_their_own(tmp_path: Path) -> None:
    """A number at the end of a mask's name is no channel: no mask takes another's spacing."""
    for number, spacing in ((1, 2.0), (2, 5.0)):
        grid = Geometry.from_spacing((3, 6, 7), (spacing, 1.0, 1.0))
        write_labels(tmp_path / f"scan_000{number}.tif", np.ones(grid.shape, np.uint8), geometry=grid)
    spacings = [read_labels(tmp_path / f"scan_000{number}.tif").geometry.spacing[0] for number in (1, 2)]
    assert spacings == [2.0, 5.0]
    assert sorted(file.name for file in tmp_path.glob("*.json")) == ["scan_0001.json", "scan_0002.json"]
    assert read_volume([tmp_path / "scan_0002.tif"]).geometry.spacing == (5.0, 1.0, 1.0)


def test_side_files_in_nnu_nets_layout(tmp_path: Path) -> None:
    """CASE.json belongs to the images CASE_0000 and the label map CASE, also where CASE ends in a number."""
    pages = np.ones((3, 6, 7), np.uint8)
    for name in ("cell_0001.tif", "cell_0001_0000.tif", "cell_0001_0001.tif", "cell_0002.tif"):
        tifffile.imwrite(tmp_path / name, pages, photometric="minisblack")
    (tmp_path / "cell_0001.json").write_text('{"spacing": [2, 1, 1]}')
    (tmp_path / "cell.json").write_text('{"spacing": [7, 1, 1]}')
    image = read_volume([tmp_path / "cell_0001_0000.tif", tmp_path / "cell_0001_0001.tif"])
    assert image.geometry.spacing == read_labels(tmp_path / "cell_0001.tif").geometry.spacing == (2.0, 1.0, 1.0)
    assert read_labels(tmp_path / "cell_0002.tif").geometry.spacing == (1.0, 1.0, 1.0)


def test_tiff_with_pages_of_several_sizes_are_refused(tmp_path: Path) -> None:
    """Pages that do not stack are no volume."""
    with tifffile.TiffWriter(tmp_path / "a.tif") as tiff:
        tiff.write(np.zeros((6, 7), np.uint8))
        tiff.write(np.zeros((8, 9), np.uint8))
    with pytest.raises(DataError, match="do not form one volume"):
        read_volume([tmp_path / "a.tif"])


def test_pictures_round_trip_and_refuse_what_they_cannot_hold(tmp_path: Path) -> None:
    """Colours come back; several slices or fractions in a PNG are refused, and nothing is left behind."""
    grid = Geometry.from_spacing((1, 6, 7), (999.0, 1.0, 1.0))
    colours = RNG.integers(0, 256, (3, 1, 6, 7)).astype(np.float32)
    for name in ("c.png", "c.tif"):
        write_image(tmp_path / name, Volume(colours, grid))
        np.testing.assert_array_equal(read_volume([tmp_path / name]).data, colours)
    deep = Geometry.from_spacing((2, 6, 7), (1.0, 1.0, 1.0))
    with pytest.raises(DataError, match="cannot hold"):
        write_labels(tmp_path / "d.png", np.zeros(deep.shape, np.uint8), geometry=deep)
    with pytest.raises(DataError, match="whole numbers"):
        write_image(tmp_path / "f.png", Volume(np.full((1, 1, 6, 7), 0.5, np.float32), grid))
    for channels, name in ((2, "n.png"), (4, "n.png"), (2, "n.tif"), (4, "n.tif")):
        with pytest.raises(DataError, match="one channel, or three"):
            write_image(tmp_path / name, Volume(np.ones((channels, 1, 6, 7), np.uint8), grid))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["c.png", "c.tif"]
