"""Which reader serves which file ending, and the one door through which every reader's failure leaves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from samunet.core.errors import DataError, SamunetError

FormatName = Literal["nifti", "sitk", "natural"]

_FORMATS: dict[str, FormatName] = {
    ".nii.gz": "nifti",
    ".nii": "nifti",
    ".nrrd": "sitk",
    ".mha": "sitk",
    ".png": "natural",
    ".tif": "natural",
    ".tiff": "natural",
}
ENDINGS: tuple[str, ...] = tuple(_FORMATS)


def ending_of(file: Path) -> str:
    """The readable ending of a file name, as ".nii.gz"; the empty text if there is none."""
    return next((ending for ending in ENDINGS if file.name.lower().endswith(ending)), "")


def format_of(file: Path) -> FormatName:
    """The reader and writer of a file.

    Raises:
        DataError: If no reader knows its ending.
    """
    ending = ending_of(file)
    if not ending:
        raise DataError("unknown file ending", expected=f"one of {' '.join(ENDINGS)}", found=file.name, file=file)
    return _FORMATS[ending]


@contextmanager
def reading(file: Path, case: str | None = None) -> Iterator[None]:
    """Turn whatever a format library raises inside the block into a DataError that names file and case.

    The libraries raise some twenty exception types on damaged input (zlib, EOF, struct, value, memory errors of a
    nonsense header, ...), so every Exception is caught here, and only here.
    """
    try:
        if not file.is_file():
            raise DataError("the file does not exist", file=file, case=case)
        if file.stat().st_size == 0:
            raise DataError("the file is empty", expected="an image", found="0 bytes", file=file, case=case)
        yield
    except SamunetError as error:
        error.file = error.file or file
        error.case = error.case or case
        raise
    except ModuleNotFoundError as error:
        raise DataError(
            f"reading this file needs {error.name}", file=file, case=case, todo=f"pip install {error.name}"
        ) from None
    except Exception as error:
        raise DataError(
            "the file cannot be read: it is damaged, truncated, or not what its ending says",
            found=_one_line(error),
            file=file,
            case=case,
            todo="restore it from its source",
        ) from error


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:300]
