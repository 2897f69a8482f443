"""The one rule for empty masks, in words and as functions. Every report prints it."""

from __future__ import annotations

from typing import Literal

import numpy as np

from samunet.core.geometry import Geometry

EMPTY_RULE = (
    "Empty masks: where reference and prediction are both empty, there is no score (the pair is counted and left out "
    "of the means); where exactly one is empty, Dice, IoU and NSD are 0 and HD, HD95 and ASSD are the image diagonal "
    "in mm. Ignored voxels count nowhere."
)

Emptiness = Literal["none", "both_empty", "missed", "invented"]


def emptiness(num_reference: int, num_prediction: int) -> Emptiness:
    """Which of the two masks is empty, from their voxel counts."""
    if num_reference == 0:
        return "both_empty" if num_prediction == 0 else "invented"
    return "missed" if num_prediction == 0 else "none"


def score_when_empty(state: Emptiness) -> float:
    """Dice, IoU or NSD of a pair in which at least one mask is empty."""
    return float("nan") if state == "both_empty" else 0.0


def distance_when_empty(state: Emptiness, geometry: Geometry) -> float:
    """HD, HD95 or ASSD in mm of a pair in which at least one mask is empty."""
    return float("nan") if state == "both_empty" else worst_distance_mm(geometry)


def worst_distance_mm(geometry: Geometry) -> float:
    """The image diagonal in mm, an upper bound of every distance within the image.

    An axis of one voxel adds nothing: the nominal slice spacing of a 2D image (999 for PNG) is no distance that two
    of its pixels can have.
    """
    extent = [n * s for n, s in zip(geometry.shape, geometry.spacing, strict=True) if n > 1]
    return float(np.linalg.norm(extent)) if extent else geometry.diagonal_mm
