"""Small lesions, for the same processor minutes: how many voxels a decoder cell may span before nothing is found.

    python -m benchmarks.small_structures --minutes 1.5 --shares 0.5 0.64 0.78 1

Generates 30 head-like volumes with one to three bright lesions of a few millimetres (seeded), plans them, and trains
with tiles that cover these shares of a slice's side. Lesions are the only structure; with `--head` the head around them
is another. Cells and table are those of `benchmarks.sizes`, to whose results they go.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from benchmarks.cells import run_table
from benchmarks.sizes import TABLE, cells, table
from samunet.core.files import write_json
from samunet.core.geometry import Geometry
from samunet.core.volume import Volume
from samunet.imageio import write_image, write_labels

NAME = "Dataset901_SmallLesions"
NUM_CASES, LESION, HEAD = 30, 1, 2
SHAPE, SPACING = (24, 144, 128), (3.0, 1.0, 1.0)
HEAD_MM, SKULL = np.array([30.0, 58.0, 48.0]), 1.15
Field = NDArray[np.float64]


def main() -> None:
    """Generate what is missing, run the cells that are missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=1.5, help="of every training")
    parser.add_argument("--inputs", type=int, nargs="+", default=[112], help="encoder pixels")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.5, 0.64, 0.78, 1.0], help="of a slice's side")
    parser.add_argument("--radii", type=float, nargs=2, default=[2.5, 5.0], help="smallest and largest lesion, mm")
    parser.add_argument("--head", action="store_true", help="the head is a structure too")
    parser.add_argument("--seeds", type=int, nargs="+", default=[12345])
    parser.add_argument("--workspace", type=Path, default=Path("samunet_workspace"))
    parser.add_argument("--table", action="store_true", help="only print the table")
    options = parser.parse_args()
    low, high = options.radii
    name = f"{NAME}{low:g}to{high:g}mm{'AndHead' * options.head}"
    folder = options.workspace / "raw" / name.replace(".", "_")
    if not options.table:
        write_lesion_dataset(folder, radii=(low, high), head=options.head)
    options.data, options.configuration = [folder], None
    run_table(options, TABLE, cells, table)


def write_lesion_dataset(
    folder: Path, *, radii: tuple[float, float], head: bool = False, num_cases: int = NUM_CASES
) -> None:
    """A raw dataset of generated heads; cases that are there are kept.

    Args:
        folder: To fill.
        radii: Of the lesions in mm, smallest and largest.
        head: Label the head too, with 2.
        num_cases: How many.
    """
    for name in ("imagesTr", "labelsTr"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for index in range(num_cases):
        case = f"head_{index:03d}"
        label = folder / "labelsTr" / f"{case}.nii.gz"
        if not label.is_file():
            volume, labels = make_head(index, radii)
            write_image(folder / "imagesTr" / f"{case}_0000.nii.gz", volume)
            write_labels(label, labels if head else labels * (labels == LESION), volume)
    write_json(
        folder / "dataset.json",
        {
            "channel_names": {"0": "MRI"},
            "labels": {"background": 0, "lesion": LESION, **({"head": HEAD} if head else {})},
            "numTraining": num_cases,
            "file_ending": ".nii.gz",
        },
    )


def make_head(seed: int, radii: tuple[float, float]) -> tuple[Volume, NDArray[np.uint8]]:
    """A textured ellipsoid in a bright shell, and labels (Z, Y, X) of it and its lesions."""
    generator = np.random.default_rng([seed, 901])
    points = np.stack(np.meshgrid(*(np.arange(n) * s for n, s in zip(SHAPE, SPACING, strict=True)), indexing="ij"))
    centre = np.array(SHAPE) * SPACING / 2 + generator.normal(0, (2, 4, 4))
    radius = HEAD_MM * (1, *generator.uniform(0.9, 1.1, 2))
    inside = _distance(points, centre, radius)
    texture = gaussian_filter(generator.normal(size=SHAPE), (1, 4, 4))
    image = np.where(inside < 1, 100 + 12 * texture / texture.std(), 5.0)
    image[(inside >= 1) & (inside < SKULL)] += 120
    lesions = np.zeros(SHAPE, bool)
    for _ in range(int(generator.integers(1, 4))):
        direction = generator.normal(size=3)
        place = centre + radius * direction / np.linalg.norm(direction) * 0.8 * generator.uniform() ** (1 / 3)
        lesions |= _distance(points, place, np.full(3, generator.uniform(*radii))) < 1
    image += 45 * gaussian_filter(lesions.astype(float), (0, 0.7, 0.7)) + generator.normal(0, 4, SHAPE)
    geometry = Geometry.from_spacing(SHAPE, SPACING)
    labels = np.where(lesions, LESION, np.where(inside < SKULL, HEAD, 0))
    return Volume(image[None].astype(np.float32), geometry), labels.astype(np.uint8)


def _distance(points: NDArray[np.float64], centre: NDArray[np.float64], radii: NDArray[np.float64]) -> Field:
    """Of points (3, Z, Y, X) to the centre of an ellipsoid, 1 on its surface."""
    column = (3, 1, 1, 1)
    scaled: Field = np.linalg.norm((points - centre.reshape(column)) / radii.reshape(column), axis=0)
    return scaled


if __name__ == "__main__":
    main()
