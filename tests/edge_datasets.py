"""Small raw datasets that are odd in one way each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from samunet.core.files import write_json
from samunet.core.geometry import Geometry
from samunet.core.volume import Volume
from samunet.imageio import write_image, write_labels
from tests.samples import LABELS, make_case

Case = tuple[Volume, NDArray[np.uint8]]
FLAT = (999.0, 1.0, 1.0)


@dataclass(frozen=True)
class EdgeDataset:
    """A dataset in memory.

    Args:
        cases: Images (C, Z, Y, X) and labels (Z, Y, X).
        channels: Names of the channels.
        labels: As in dataset.json.
        ending: File ending.
    """

    cases: list[Case]
    channels: tuple[str, ...] = ("MRI",)
    labels: dict[str, Any] | None = None
    ending: str = ".nii.gz"

    def write(self, folder: Path) -> Path:
        """Write it in nnU-Net's raw format."""
        colour = self.ending == ".png" and len(self.channels) == 3
        for index, (image, labels) in enumerate(self.cases):
            parts = [image.data] if colour else [image.data[c : c + 1] for c in range(len(self.channels))]
            for channel, part in enumerate(parts):
                name = f"case_{index}_{channel:04d}{self.ending}"
                write_image(folder / "imagesTr" / name, image.with_data(part))
            write_labels(folder / "labelsTr" / f"case_{index}{self.ending}", labels, geometry=image.geometry)
        description = {
            "channel_names": {str(i): name for i, name in enumerate(self.channels)},
            "labels": self.labels or LABELS,
            "numTraining": len(self.cases),
            "file_ending": self.ending,
        }
        write_json(folder / "dataset.json", description)
        return folder


def _picture(seed: int, angle: float | None = None, channels: int = 1) -> Case:
    """A noisy picture with a bright disc, in a direction from the middle or anywhere."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:48, :64]
    shift = rng.uniform(-10, 10, 2) if angle is None else 12 * np.array([np.sin(angle), np.cos(angle)])
    disc = np.hypot(rows - 23.5 - shift[0], columns - 31.5 - shift[1]) < 7
    pixels = rng.normal(90, 10, (channels, 1, 48, 64)) + 80 * disc
    labels = disc[np.newaxis].astype(np.uint8)
    grid = Geometry.from_spacing(labels.shape, FLAT)
    return Volume(np.clip(pixels, 0, 255).astype(np.uint8), grid), labels


def _pictures() -> EdgeDataset:
    return EdgeDataset([_picture(seed) for seed in range(6)], labels={"background": 0, "disc": 1}, ending=".png")


def _colour() -> EdgeDataset:
    cases = [_picture(seed, angle=seed * np.pi / 3, channels=3) for seed in range(6)]
    return EdgeDataset(cases, ("rgb_to_0_1",) * 3, {"background": 0, "disc": 1}, ".png")


def _label_in_one_case() -> EdgeDataset:
    """Four cases, of which the third alone keeps its cube."""

    def case(seed: int) -> Case:
        image, labels = make_case(seed)
        return image, labels if seed == 2 else labels * (labels != 2)

    return EdgeDataset([case(seed) for seed in range(4)])


def _four_channels() -> EdgeDataset:
    def case(seed: int) -> Case:
        image, labels = make_case(seed)
        noise = np.random.default_rng([seed, 4]).normal(0, 5, (4, *labels.shape))
        gains = np.array([1.0, -0.5, 2.0, 0.1]).reshape(4, 1, 1, 1)
        return image.with_data((gains * image.data + 200 + noise).astype(np.float32)), labels

    return EdgeDataset([case(seed) for seed in range(4)], ("T1", "T1c", "T2", "FLAIR"))


def _constant() -> EdgeDataset:
    """Three images of one value each, the last of zeros."""

    def case(seed: int) -> Case:
        image, labels = make_case(seed)
        return image.with_data(np.full_like(image.data, (100.0, 7.0, 0.0)[seed])), labels

    return EdgeDataset([case(seed) for seed in range(3)])


def _at_the_border() -> EdgeDataset:
    """A corner of every volume is a cube, and the last slice is all ball."""

    def case(seed: int) -> Case:
        image, labels = make_case(seed)
        labels[:2, :9, -7:] = 2
        labels[-1] = 1
        return image, labels

    return EdgeDataset([case(seed) for seed in range(4)])


def _all_ignore() -> EdgeDataset:
    """Half of the slices are all ignored, and one case is altogether."""

    def case(seed: int) -> Case:
        image, labels = make_case(seed)
        labels[labels == 2] = 0
        labels[3:] = 2
        if seed == 1:
            labels[:] = 2
        return image, labels

    return EdgeDataset([case(seed) for seed in range(4)], labels={"background": 0, "ball": 1, "ignore": 2})


def _cubic_with_sides() -> EdgeDataset:
    """Voxels of 1 mm, with a ball on the left and one on the right."""

    def case(seed: int) -> Case:
        rng, shape = np.random.default_rng(seed), (22, 30, 26)
        z, y, x = np.meshgrid(*[np.arange(n) for n in shape], indexing="ij")
        middle = rng.uniform(-1, 1, 3)
        labels = np.zeros(shape, np.uint8)
        for value, side in ((1, -6), (2, 6)):
            # columns run to the right
            away = (z - 11 - middle[0]) ** 2 + (y - 15 - middle[1]) ** 2 + (x - 13 - side - middle[2]) ** 2
            labels[away < 20] = value
        image = 100 + rng.normal(0, 8, shape) + 60 * (labels > 0)
        return Volume(image[np.newaxis].astype(np.float32), Geometry.from_spacing(shape, (1.0, 1.0, 1.0))), labels

    return EdgeDataset([case(seed) for seed in range(5)], labels={"background": 0, "left ball": 1, "right ball": 2})


EDGE_DATASETS: dict[str, Callable[[], EdgeDataset]] = {
    "pictures": _pictures,
    "colour_pictures": _colour,
    "one_case": lambda: EdgeDataset([make_case(0)]),
    "two_cases": lambda: EdgeDataset([make_case(seed) for seed in range(2)]),
    "label_in_one_case": _label_in_one_case,
    "three_slices": lambda: EdgeDataset([make_case(seed, shape=(3, 30, 26)) for seed in range(4)]),
    "four_channels": _four_channels,
    "constant_images": _constant,
    "labels_at_the_border": _at_the_border,
    "all_ignore_slices": _all_ignore,
    "cubic_with_sides": _cubic_with_sides,
}
