"""Endings, lazy imports, and the door every reader's failure leaves through."""

from __future__ import annotations

import gzip
import pickle
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from samunet.core.errors import DataError
from samunet.core.geometry import Geometry
from samunet.core.volume import Volume
from samunet.imageio import ENDINGS, ending_of, read_geometry, read_labels, read_volume, write_labels

GRID = Geometry.from_spacing((1, 40, 50), (3.0, 1.0, 1.0))


def valid_file(folder: Path, ending: str) -> Path:
    """A label map of noise, which does not compress to nothing."""
    file = folder / f"file{ending}"
    write_labels(file, np.random.default_rng(0).integers(0, 200, GRID.shape), geometry=GRID)
    return file


def test_importing_imageio_loads_no_format_library() -> None:
    """A command's help must not wait for nibabel, SimpleITK or Pillow."""
    check = (
        "import sys, samunet.imageio;"
        "print(sorted({'nibabel', 'SimpleITK', 'PIL', 'tifffile', 'torch'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_endings_of_two_dots_are_recognised() -> None:
    """The longest ending wins and case does not matter."""
    assert ending_of(Path("a.b.nii.gz")) == ".nii.gz"
    assert ending_of(Path("A.NII.GZ")) == ".nii.gz"
    assert ending_of(Path("a.tiff")) == ".tiff"
    assert ending_of(Path("a.gz")) == ""


@pytest.mark.parametrize("ending", ENDINGS)
def test_truncated_files_are_data_errors(tmp_path: Path, ending: str) -> None:
    """Cut anywhere, a file is refused with its name and case, and never with another exception."""
    content = valid_file(tmp_path, ending).read_bytes()
    file = tmp_path / f"cut{ending}"
    for part in (0.0, 0.01, 0.3, 0.7):
        file.write_bytes(content[: int(len(content) * part)])
        with pytest.raises(DataError) as caught:
            read_volume([file], case="case_7")
        assert caught.value.file == file
        assert caught.value.case == "case_7"


@pytest.mark.parametrize("ending", ENDINGS)
def test_files_of_noise_are_data_errors(tmp_path: Path, ending: str) -> None:
    """Random bytes are refused by every reader, voxels or header alone."""
    file = tmp_path / f"noise{ending}"
    file.write_bytes(np.random.default_rng(0).bytes(5000))
    for read in (lambda: read_volume([file]), lambda: read_labels(file), lambda: read_geometry(file)):
        with pytest.raises(DataError):
            read()


@pytest.mark.parametrize("ending", [".nii", ".nii.gz", ".mha", ".nrrd", ".png", ".tif"])
@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_flipped_bytes_never_cause_another_exception(tmp_path: Path, ending: str, data: st.DataObject) -> None:
    """A file with a few wrong header bytes is read, or refused as a DataError."""
    content = bytearray(valid_file(tmp_path, ending).read_bytes())
    reach = min(len(content), 400)
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, reach - 1))] = data.draw(st.integers(0, 255))
    file = tmp_path / f"flipped{ending}"
    file.write_bytes(bytes(content))
    try:
        volume = read_volume([file])
    except DataError:
        return
    assert isinstance(volume, Volume)


def test_damage_inside_a_gzip_stream_is_noticed(tmp_path: Path) -> None:
    """A wrong checksum alone makes a file unusable: its voxels may be wrong anywhere."""
    content = bytearray(valid_file(tmp_path, ".nii.gz").read_bytes())
    content[-6] ^= 0xFF
    file = tmp_path / "crc.nii.gz"
    file.write_bytes(bytes(content))
    with pytest.raises(DataError, match="cannot be read"):
        read_volume([file])


def test_missing_and_unknown_files_are_data_errors(tmp_path: Path) -> None:
    """The message says what is missing, or which endings are known."""
    with pytest.raises(DataError, match="does not exist"):
        read_volume([tmp_path / "none.nii.gz"])
    other = tmp_path / "scan.dat"
    other.write_bytes(b"x")
    with pytest.raises(DataError) as caught:
        read_volume([other])
    assert ".nii.gz" in str(caught.value)


def test_compression_is_seen_in_the_file_not_in_its_name(tmp_path: Path) -> None:
    """A .nii that is compressed, and a .nii.gz that is not, are read."""
    plain = valid_file(tmp_path, ".nii").read_bytes()
    (tmp_path / "plain.nii.gz").write_bytes(plain)
    (tmp_path / "packed.nii").write_bytes(gzip.compress(plain))
    for name in ("plain.nii.gz", "packed.nii"):
        np.testing.assert_array_equal(read_labels(tmp_path / name).data, read_labels(tmp_path / "file.nii").data)


def test_volumes_cross_process_boundaries(tmp_path: Path) -> None:
    """A volume with its NIfTI header can be pickled, and a mask written from the copy keeps the codes."""
    volume = read_volume([valid_file(tmp_path, ".nii")])
    copy: Volume = pickle.loads(pickle.dumps(volume))
    write_labels(tmp_path / "mask.nii", np.zeros(GRID.shape, dtype=np.uint8), like=copy)
    assert int(nibabel.load(tmp_path / "mask.nii").header["sform_code"]) == 1
