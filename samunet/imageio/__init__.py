"""Files to volumes and back: the only place where axes and affines are converted.

Reading is tolerant of rounding noise and strict about everything else; writing keeps the source's grid. The format
libraries are imported when a file of their kind is opened.
"""

from samunet.imageio.formats import ENDINGS, ending_of
from samunet.imageio.volumes import (
    MISMATCH_VOX,
    ROUNDING_VOX,
    read_geometry,
    read_labels,
    read_volume,
    write_image,
    write_labels,
)

__all__ = [
    "ENDINGS",
    "MISMATCH_VOX",
    "ROUNDING_VOX",
    "ending_of",
    "read_geometry",
    "read_labels",
    "read_volume",
    "write_image",
    "write_labels",
]
