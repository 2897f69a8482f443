"""A volume in memory: voxels, their grid, and the header of the file they came from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from samunet.core.errors import GeometryError
from samunet.core.geometry import Geometry


@dataclass(frozen=True, eq=False)
class SourceHeader:
    """What a file said beside its voxels, kept so that a mask can be written with the same geometry.

    Args:
        format: Name of the reader that made it: "nifti", "sitk" or "natural".
        content: The reader's own header; only the same reader looks into it.
        notes: Oddities found while reading, one sentence each (verification prints them).
    """

    format: str
    content: Any
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Volume:
    """Voxels of one case.

    Args:
        data: (C, Z, Y, X) array.
        geometry: Grid of the last three axes.
        header: Where it came from; None for arrays made in memory.
    """

    data: NDArray[Any]
    geometry: Geometry
    header: SourceHeader | None = None

    def __post_init__(self) -> None:
        if self.data.ndim != 4 or self.data.shape[1:] != self.geometry.shape:
            raise GeometryError(
                "a volume's array does not fit its geometry",
                expected=f"(C, {', '.join(map(str, self.geometry.shape))})",
                found=str(self.data.shape),
            )

    @property
    def num_channels(self) -> int:
        """Number of channels."""
        return int(self.data.shape[0])

    def with_data(self, data: NDArray[Any]) -> Volume:
        """The same grid and header around other voxels; a (Z, Y, X) array becomes one channel."""
        return Volume(data if data.ndim == 4 else data[np.newaxis], self.geometry, self.header)
