"""Overlap scores on masks whose counts are known by hand."""

from __future__ import annotations

import math

import numpy as np

from samunet.evaluation.overlap import VoxelCounts, count_voxels, dice, iou


def cube(start: int, stop: int, shape: tuple[int, int, int] = (8, 8, 8)) -> np.ndarray:
    mask = np.zeros(shape, dtype=bool)
    mask[start:stop, start:stop, start:stop] = True
    return mask


def test_counts_of_shifted_cubes() -> None:
    """Two 4-voxel cubes shifted by one voxel along each axis share 3^3 of their 4^3 voxels."""
    counts = count_voxels(cube(1, 5), cube(2, 6))
    assert counts == VoxelCounts(tp=27, fp=37, fn=37, tn=512 - 101)
    assert dice(counts) == 27 / 64
    assert iou(counts) == 27 / 101
    assert (counts.num_reference, counts.num_prediction) == (64, 64)


def test_both_empty_has_no_score() -> None:
    """Two empty masks give NaN, neither 0 nor 1."""
    counts = count_voxels(cube(0, 0), cube(0, 0))
    assert math.isnan(dice(counts))
    assert math.isnan(iou(counts))
    assert counts.tn == 512


def test_one_empty_scores_zero() -> None:
    """A missed or invented structure has overlap 0."""
    for reference, prediction in ((cube(1, 3), cube(0, 0)), (cube(0, 0), cube(1, 3))):
        counts = count_voxels(reference, prediction)
        assert dice(counts) == 0.0
        assert iou(counts) == 0.0


def test_number_of_voxels_is_that_of_the_image_not_of_the_crop() -> None:
    """True negatives count voxels outside a crop and leave ignored ones out."""
    counts = count_voxels(cube(1, 5), cube(2, 6), num_voxels=1000)
    assert counts.tn == 1000 - 101
