"""Images of random shapes with known masks: what base checkpoints of the benchmarks are trained on.

Ellipses, polygons and tubes of random brightness and texture on a textured background, blurred, with a bias field and
noise; nothing in them is anatomy.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from skimage.draw import ellipse, line, polygon

LEAST_AREA = 40


def random_image(generator: np.random.Generator, side: int) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """One image in [0, 1] (S, S) and its label map, a value per object from 1."""
    image = generator.uniform(0.1, 0.6) + _texture(generator, side, generator.uniform(0.0, 0.15))
    labels = np.zeros((side, side), np.uint8)
    for value in range(1, int(generator.integers(3, 9))):
        inside = _shape(generator, side)
        if inside.sum() < LEAST_AREA:
            continue
        labels[inside] = value
        texture = _texture(generator, side, generator.uniform(0.0, 0.12))
        image[inside] = (generator.uniform(0.0, 1.0) + texture)[inside]
    image = ndimage.gaussian_filter(image, generator.uniform(0.0, 1.5))
    image *= 1 + _texture(generator, side, generator.uniform(0.0, 0.3), scale=0.4)
    image += generator.normal(0, generator.uniform(0.0, 0.08), image.shape)
    low, high = np.percentile(image, [0.5, 99.5])
    scaled = np.clip((image - low) / max(high - low, 1e-6), 0, 1)
    return scaled.astype(np.float32), labels


def _shape(generator: np.random.Generator, side: int) -> NDArray[np.bool_]:
    mask = np.zeros((side, side), bool)
    centre = generator.uniform(0.1, 0.9, 2) * side
    size = side * float(np.exp(generator.uniform(np.log(0.06), np.log(0.3))))
    kind = int(generator.integers(3))
    if kind == 0:
        (row, column), (high, wide) = centre, size * generator.uniform(0.4, 1.0, 2)
        found = ellipse(row, column, high, wide, shape=mask.shape, rotation=generator.uniform(0, np.pi))
        mask[found] = True
    elif kind == 1:
        angles = np.sort(generator.uniform(0, 2 * np.pi, int(generator.integers(5, 12))))
        reach = size * generator.uniform(0.4, 1.0, len(angles))
        mask[polygon(centre[0] + reach * np.sin(angles), centre[1] + reach * np.cos(angles), mask.shape)] = True
    else:
        ends = np.clip(centre + generator.normal(0, 2 * size, (3, 2)), 0, side - 1).astype(int)
        for first, second in pairwise(ends):
            mask[line(*first, *second)] = True
        mask = ndimage.distance_transform_edt(~mask) < max(2.0, size * 0.25)
    return mask


def _texture(
    generator: np.random.Generator, side: int, amount: float, scale: float | None = None
) -> NDArray[np.float64]:
    """Smooth noise of a given standard deviation."""
    cells = max(2, int(side * (generator.uniform(0.02, 0.4) if scale is None else 0.02)))
    coarse = generator.normal(0, 1, (cells, cells))
    smooth: NDArray[np.float64] = ndimage.zoom(coarse, side / cells, order=1)[:side, :side]
    return amount * smooth / max(float(smooth.std()), 1e-6)
