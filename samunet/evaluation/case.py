"""All scores of one case."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from samunet.artifacts.report import CaseReport, StructureMetrics, structure_keys
from samunet.core.errors import DataError
from samunet.core.geometry import Geometry, SpacingTriple
from samunet.core.labels import LabelSpec
from samunet.evaluation.overlap import count_voxels, dice, iou
from samunet.evaluation.policy import distance_when_empty, emptiness, score_when_empty
from samunet.evaluation.surface import (
    average_distance,
    bounding_box,
    hausdorff,
    hausdorff_95,
    surface_dice,
    surface_distances,
)

DEFAULT_TOLERANCE_MM = 1.0


def evaluate_case(
    reference: NDArray[Any],
    prediction: NDArray[Any],
    *,
    labels: LabelSpec,
    geometry: Geometry,
    tolerance_mm: float = DEFAULT_TOLERANCE_MM,
    surface: bool = True,
) -> dict[str, StructureMetrics]:
    """Score every structure of one case on its own grid.

    Voxels that the reference ignores count nowhere: both label maps are background there, and they are no true
    negatives. Values that the labels do not declare count as background.

    Args:
        reference: (Z, Y, X) label values.
        prediction: (Z, Y, X) label values.
        labels: What the values mean.
        geometry: The grid of both.
        tolerance_mm: Tolerance of the normalized surface Dice.
        surface: Whether to measure surface distances; without them those scores are None.

    Returns:
        Structure name to its scores, in dataset.json order.

    Raises:
        DataError: If the shapes differ from the geometry's.
    """
    for what, array in (("reference", reference), ("prediction", prediction)):
        if array.shape != geometry.shape:
            raise DataError(f"the {what} does not fit the grid", expected=str(geometry.shape), found=str(array.shape))
    num_voxels = reference.size
    if labels.ignore is not None:
        ignored = reference == labels.ignore
        num_voxels -= int(np.count_nonzero(ignored))
        reference = np.where(ignored, labels.background, reference)
        prediction = np.where(ignored, labels.background, prediction)
    # Structures lie in the box around everything that is not background; the rest only adds true negatives.
    box = bounding_box((reference != labels.background) | (prediction != labels.background)) or (slice(0, 1),) * 3
    reference, prediction = reference[box], prediction[box]
    return {
        name: _score(
            labels.structure_mask(reference, name),
            labels.structure_mask(prediction, name),
            geometry,
            num_voxels=num_voxels,
            tolerance_mm=tolerance_mm if surface else None,
        )
        for name in labels.names
    }


def case_report(
    case: str,
    metrics: Mapping[str, StructureMetrics],
    labels: LabelSpec,
    *,
    reference_file: Path | str = "",
    prediction_file: Path | str = "",
    spacing: SpacingTriple | None = None,
    undeclared_values: tuple[int, ...] = (),
    num_ignored: int | None = None,
) -> CaseReport:
    """Turn :func:`evaluate_case`'s result (by structure name) into a report's entry (by nnU-Net's key)."""
    keys = structure_keys(labels)
    return CaseReport(
        case=case,
        reference_file=str(reference_file),
        prediction_file=str(prediction_file),
        metrics={keys[name]: scores for name, scores in metrics.items()},
        spacing=spacing,
        undeclared_values=undeclared_values,
        num_ignored=num_ignored,
    )


def _score(
    reference: NDArray[np.bool_],
    prediction: NDArray[np.bool_],
    geometry: Geometry,
    *,
    num_voxels: int,
    tolerance_mm: float | None,
) -> StructureMetrics:
    """Score one structure, given as two masks cropped from the geometry's grid."""
    counts = count_voxels(reference, prediction, num_voxels=num_voxels)
    scores = {} if tolerance_mm is None else _surface_scores(reference, prediction, geometry, tolerance_mm)
    return StructureMetrics(
        Dice=dice(counts),
        IoU=iou(counts),
        TP=counts.tp,
        FP=counts.fp,
        FN=counts.fn,
        TN=counts.tn,
        n_pred=counts.num_prediction,
        n_ref=counts.num_reference,
        volume_ref_mm3=counts.num_reference * geometry.voxel_volume_mm3,
        volume_pred_mm3=counts.num_prediction * geometry.voxel_volume_mm3,
        **scores,
    )


def _surface_scores(
    reference: NDArray[np.bool_], prediction: NDArray[np.bool_], geometry: Geometry, tolerance_mm: float
) -> dict[str, float]:
    state = emptiness(int(np.count_nonzero(reference)), int(np.count_nonzero(prediction)))
    if state != "none":
        worst = distance_when_empty(state, geometry)
        return {"NSD": score_when_empty(state), "HD": worst, "HD95": worst, "ASSD": worst}
    neighbour_axes = [n > 1 for n in geometry.shape]
    distances = surface_distances(reference, prediction, geometry.spacing, neighbour_axes=neighbour_axes)
    return {
        "NSD": surface_dice(distances, tolerance_mm),
        "HD": hausdorff(distances),
        "HD95": hausdorff_95(distances),
        "ASSD": average_distance(distances),
    }
