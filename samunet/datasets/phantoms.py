"""Synthetic volumes with known truth: an abdomen-like scene that intensity and location alone cannot segment.

Organs share their intensities with each other and with unlabelled distractors (spleen, bowel, muscle wall, vessels,
nodule-like spots outside the liver); position, size and shape vary by smooth random deformations. Slices are thick,
scans oblique, and every third case is stored along other axes. Images get partial volume, texture, a bias field,
Rician noise and a gain of their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter, zoom
from scipy.spatial.transform import Rotation

from samunet.core.files import write_json
from samunet.core.geometry import AxisOperation, Geometry, code_directions
from samunet.core.volume import Volume
from samunet.imageio import write_image, write_labels

Field = NDArray[np.float32]

STRUCTURES = {"liver": 1, "left_kidney": 2, "right_kidney": 3, "spine": 4, "nodule": 5}

_SHAPE = (20, 96, 96)
_FRAME = ("S", "A", "R")
_NOISE = 0.04
_BIAS = 0.25
_TEXTURE = 0.10
_DEFORMATION_MM = 2.0
_FAT = 0.28
_CAPSULE_MM = 1.5


@dataclass(frozen=True)
class _Part:
    """Something painted into the scene: where it is (signed distance, mm), how bright, and its label if it has one."""

    distance_mm: Field
    intensity: float
    label: int | None = None


def make_phantom(seed: int) -> tuple[Volume, NDArray[np.uint8]]:
    """Make one volume and its labels; the same seed gives the same arrays.

    Returns:
        A one-channel float32 volume, and uint8 labels (Z, Y, X) with the values of STRUCTURES.
    """
    rng = np.random.default_rng([seed, 20])
    geometry = _scan_geometry(rng)
    image, labels = _paint(_scene(_body_coordinates(geometry, rng), rng))
    image = _acquire(image, rng)
    stored = AxisOperation((0, 1, 2), (False, True, True)) if seed % 3 == 2 else AxisOperation()
    volume = Volume(
        np.ascontiguousarray(stored.apply(image))[np.newaxis].astype(np.float32), stored.apply_geometry(geometry)
    )
    return volume, np.ascontiguousarray(stored.apply(labels))


def write_phantom_dataset(folder: Path, *, num_train: int = 16, num_test: int = 4, seed: int = 0) -> Path:
    """Write a dataset in nnU-Net's raw format: imagesTr, labelsTr, imagesTs, labelsTs, dataset.json.

    Args:
        folder: The dataset's own folder, as ``raw/Dataset900_Phantom``.
        num_train: Training cases, phantom_000, phantom_001, ...
        num_test: Held-out cases; their numbers follow on.
        seed: Another seed gives other volumes under the same names.

    Returns:
        The folder.
    """
    for index in range(num_train + num_test):
        volume, labels = make_phantom(seed * 100_000 + index)
        part = "Tr" if index < num_train else "Ts"
        name = f"phantom_{index:03d}"
        write_image(folder / f"images{part}" / f"{name}_0000.nii.gz", volume)
        write_labels(folder / f"labels{part}" / f"{name}.nii.gz", labels, geometry=volume.geometry)
    write_json(
        folder / "dataset.json",
        {
            "name": folder.name,
            "description": "synthetic abdomen-like volumes with known truth",
            "channel_names": {"0": "MRI"},
            "labels": {"background": 0, **STRUCTURES},
            "numTraining": num_train,
            "file_ending": ".nii.gz",
        },
    )
    return folder


def _scan_geometry(rng: np.random.Generator) -> Geometry:
    """An oblique grid of thick slices whose axes point roughly to superior, anterior and right."""
    spacing = (rng.uniform(3.2, 3.8), *[rng.uniform(1.15, 1.3)] * 2)
    tilt = Rotation.from_euler("zyx", rng.uniform(-15, 15, 3), degrees=True).as_matrix()
    return Geometry.from_spacing(
        _SHAPE, spacing, directions=code_directions(_FRAME) @ tilt.T, origin=rng.uniform(-80, 80, 3).tolist()
    )


def _body_coordinates(geometry: Geometry, rng: np.random.Generator) -> Field:
    """(3, Z, Y, X) position of each voxel in the body's own frame (superior, anterior, right) in mm, deformed.

    The patient lies shifted, turned and scaled in the scan, and no two bodies are alike.
    """
    axes = [(np.arange(n) - (n - 1) / 2) * step for n, step in zip(geometry.shape, geometry.spacing, strict=True)]
    points = np.stack(np.meshgrid(*axes, indexing="ij"))
    turn = Rotation.from_euler("xyz", rng.normal(0, [6, 2, 2]), degrees=True).as_matrix()
    scale = rng.normal(1, 0.05, 3).clip(0.9, 1.1)
    shift = rng.uniform([-5, -11, -11], [5, 11, 11])
    points = np.tensordot(turn, (points - shift[:, None, None, None]) / scale[:, None, None, None], axes=1)
    bend = np.stack([_smooth_noise(geometry, rng, wavelength_mm=45) for _ in range(3)])
    result: Field = (points + _DEFORMATION_MM * bend).astype(np.float32)
    return result


def _smooth_noise(geometry: Geometry, rng: np.random.Generator, *, wavelength_mm: float) -> Field:
    """A random field of unit variance, about, that changes over a given length."""
    field = rng.normal(
        size=[max(4, round(n * s / wavelength_mm * 2)) for n, s in zip(geometry.shape, geometry.spacing, strict=True)]
    )
    for axis, size in enumerate(geometry.shape):
        field = np.moveaxis(np.tensordot(_interpolation(field.shape[axis], size), field, axes=(1, axis)), 0, axis)
    result: Field = field.astype(np.float32)
    return result


@lru_cache
def _interpolation(num_knots: int, size: int) -> NDArray[np.float64]:
    """(size, num_knots) cubic spline interpolation of one axis; axis by axis it is ten times faster than at once."""
    matrix: NDArray[np.float64] = zoom(
        np.eye(num_knots), (size / num_knots, 1), order=3, mode="nearest", grid_mode=True
    )
    return matrix


def _scene(points: Field, rng: np.random.Generator) -> Iterator[_Part]:
    """The parts of a body in painting order; later ones cover earlier ones. Positions are (S, A, R) in mm."""

    def vary(value: float) -> float:
        return value + float(rng.normal(0, 0.03))

    body = _ellipsoid(points, (0, 0, 0), (80, 36, 43))
    yield _Part(body, vary(0.75))
    yield _Part(body + 4, vary(0.54))
    yield _Part(body + 8, _FAT)
    yield from _bowel(points, rng)
    yield _Part(_near(points, (3, -3, -33), (14, 12, 7), rng), vary(0.56))
    yield from _liver(points, rng)
    for side in (-1, 1):
        centre = np.array((-3 - 3 * side, -11, 20 * side)) + rng.normal(0, (4, 2, 2))
        name = "right_kidney" if side > 0 else "left_kidney"
        yield from _organ(_kidney(points, centre, side, rng), vary(0.55), name)
    spine = _near(points, (0, -25, 0), (200, 8, 9), rng)
    yield from _organ(spine, vary(0.54), "spine")
    yield _Part(_ellipsoid(points, (0, -12, rng.normal(-4, 1)), (200, 3.5, 3.5)), vary(0.85))


def _bowel(points: Field, rng: np.random.Generator) -> Iterator[_Part]:
    """Unlabelled loops as bright as organs, and spots as bright as nodules, anywhere in front of the spine."""
    for _ in range(6):
        centre = rng.uniform((-32, -8, -32), (32, 26, 32))
        yield _Part(_ellipsoid(points, centre, rng.uniform(5, 11, 3)), rng.uniform(0.42, 0.66))
    for _ in range(4):
        centre = rng.uniform((-32, -4, -34), (32, 26, 34))
        yield _Part(_ellipsoid(points, centre, rng.uniform(4, 6.5, 3)), rng.uniform(0.75, 0.95))


def _liver(points: Field, rng: np.random.Generator) -> Iterator[_Part]:
    """A large organ at the right, and a bright nodule somewhere inside it."""
    centre = np.array((6, 10, 17)) + rng.normal(0, (3, 2, 2))
    radii = np.array((24, 17, 20)) * rng.normal(1, 0.08, 3).clip(0.85, 1.15)
    left_lobe = _ellipsoid(points, centre + np.array((4, 6, -18)), radii * (0.5, 0.45, 0.7))
    liver = np.minimum(_ellipsoid(points, centre, radii), left_lobe)
    yield from _organ(liver, rng.normal(0.54, 0.03), "liver")
    way = rng.normal(size=3)
    place = centre + way / np.linalg.norm(way) * radii * 0.4 * rng.uniform(0, 1) ** 0.5
    size = rng.uniform(8.0, 9.5) * rng.normal(1, 0.08, 3)
    yield _Part(_ellipsoid(points, place, size), rng.normal(0.9, 0.03), STRUCTURES["nodule"])


def _organ(distance_mm: Field, intensity: float, name: str) -> Iterator[_Part]:
    """A labelled organ in its capsule of fat."""
    yield _Part(distance_mm - _CAPSULE_MM, _FAT)
    yield _Part(distance_mm, intensity, STRUCTURES[name])


def _kidney(points: Field, centre: NDArray[np.float64], side: int, rng: np.random.Generator) -> Field:
    """A bean whose notch looks to the middle."""
    radii = np.array((18, 9, 11)) * rng.normal(1, 0.08, 3).clip(0.85, 1.15)
    notch = _ellipsoid(points, centre - (0, -2, 9.0 * side), (6, 4, 4.5))
    return np.maximum(_ellipsoid(points, centre, radii), -notch)


def _near(points: Field, centre: tuple[float, ...], radii: tuple[float, ...], rng: np.random.Generator) -> Field:
    """An ellipsoid with some variation of place and size."""
    return _ellipsoid(
        points, np.array(centre) + rng.normal(0, 2, 3), np.array(radii) * rng.normal(1, 0.08, 3).clip(0.85, 1.15)
    )


def _ellipsoid(points: Field, centre: object, radii: object) -> Field:
    """Signed distance to an ellipsoid in mm, to first order: negative inside."""
    size = np.asarray(radii, dtype=np.float32)[:, None, None, None]
    offset = (points - np.asarray(centre, dtype=np.float32)[:, None, None, None]) / size
    squares = offset * offset
    level = np.sqrt(squares.sum(axis=0))
    slope = np.sqrt((squares / (size * size)).sum(axis=0))
    result: Field = (level - 1) * level / np.maximum(slope, 1e-6)
    return result


def _paint(parts: Iterator[_Part]) -> tuple[Field, NDArray[np.uint8]]:
    """Blend the parts, each covering a voxel by the fraction that lies inside it; a label needs half a voxel."""
    image: Field | None = None
    labels: NDArray[np.uint8] | None = None
    for part in parts:
        if image is None or labels is None:
            image = np.full(part.distance_mm.shape, 0.03, dtype=np.float32)
            labels = np.zeros(part.distance_mm.shape, dtype=np.uint8)
        cover = np.clip(0.5 - part.distance_mm / 1.6, 0, 1)
        image = image * (1 - cover) + np.float32(part.intensity) * cover
        labels[part.distance_mm < 0] = part.label or 0
    assert image is not None
    assert labels is not None
    return image, labels


def _acquire(image: Field, rng: np.random.Generator) -> Field:
    """What a scanner makes of the scene: texture, blur across and along slices, bias, Rician noise, gain."""
    grid = Geometry.from_spacing(image.shape, (3.5, 1.2, 1.2))
    texture = 1 + _TEXTURE * _smooth_noise(grid, rng, wavelength_mm=9)
    bias = np.exp(_BIAS * _smooth_noise(grid, rng, wavelength_mm=90))
    signal = gaussian_filter(image * texture, (0.4, 0.6, 0.6)) * bias
    real, imaginary = rng.normal(0, _NOISE, (2, *image.shape))
    result: Field = (rng.uniform(400, 1600) * np.hypot(signal + real, imaginary)).astype(np.float32)
    return result
