"""One case: structures, regions, the ignore label and the rule for empty masks."""

# ruff: noqa: SIM300 - nnU-Net's metric names are upper case, but no constants

from __future__ import annotations

import numpy as np
import pytest

from samunet.artifacts.report import structure_keys
from samunet.core.errors import DataError
from samunet.core.geometry import Geometry
from samunet.core.labels import LabelSpec
from samunet.evaluation.case import evaluate_case
from samunet.evaluation.policy import worst_distance_mm

SHAPE, SPACING = (10, 12, 14), (2.0, 1.0, 0.5)
GRID = Geometry.from_spacing(SHAPE, SPACING)
PLAIN = LabelSpec({"liver": (1,), "tumour": (2,)})


def blank() -> np.ndarray:
    return np.zeros(SHAPE, dtype=np.int16)


def scored(reference: np.ndarray, prediction: np.ndarray, labels: LabelSpec = PLAIN, **options: object) -> dict:
    return evaluate_case(reference, prediction, labels=labels, geometry=GRID, **options)  # type: ignore[arg-type]


def test_shifted_box_in_mm() -> None:
    """A box of 3 x 4 x 5 voxels shifted by one slice: Dice 2/3, distances of one slice spacing."""
    reference, prediction = blank(), blank()
    reference[2:5, 3:7, 4:9] = 1
    prediction[3:6, 3:7, 4:9] = 1
    liver = scored(reference, prediction, tolerance_mm=1.0)["liver"]
    assert liver.Dice == pytest.approx(2 / 3)
    assert liver.IoU == pytest.approx(1 / 2)
    assert (liver.TP, liver.FP, liver.FN, liver.n_pred, liver.n_ref) == (40, 20, 20, 60, 60)
    assert liver.TN == reference.size - 80
    assert liver.volume_ref_mm3 == pytest.approx(60 * 1.0)
    assert liver.volume_pred_mm3 == pytest.approx(60 * 1.0)
    assert liver.HD == pytest.approx(2.0)
    assert liver.HD95 == pytest.approx(2.0)
    # Each mask has 54 surface voxels: two end slices of 20 and a rim of 14 between them. The end slice that sticks out
    # is 2 mm away. Of the other one 14 voxels coincide with the other mask's rim; its 2 x 3 inner voxels are 0.5, 1.0
    # and 0.5 mm from it. All else coincides.
    assert liver.NSD == pytest.approx((54 - 20) / 54)
    assert liver.ASSD == pytest.approx((20 * 2.0 + 2 * (0.5 + 1.0 + 0.5)) / 54)


def test_both_empty_has_no_score_and_is_not_perfect() -> None:
    """A structure in neither map has no score at all."""
    reference = blank()
    reference[2:5, 3:7, 4:9] = 1
    tumour = scored(reference, reference)["tumour"]
    assert (tumour.Dice, tumour.IoU, tumour.NSD, tumour.HD, tumour.HD95, tumour.ASSD) == (None,) * 6
    assert (tumour.n_ref, tumour.n_pred, tumour.volume_ref_mm3) == (0, 0, 0.0)


@pytest.mark.parametrize("missed", [True, False])
def test_one_empty_gets_the_worst_scores(missed: bool) -> None:
    """A missed and an invented structure have overlap 0 and the image diagonal as distance."""
    full = blank()
    full[2:5, 3:7, 4:9] = 1
    liver = scored(full, blank())["liver"] if missed else scored(blank(), full)["liver"]
    diagonal = float(np.linalg.norm(np.array(SHAPE) * np.array(SPACING)))
    assert (liver.Dice, liver.IoU, liver.NSD) == (0.0, 0.0, 0.0)
    assert (liver.HD, liver.HD95, liver.ASSD) == pytest.approx((diagonal,) * 3)


def test_the_worst_distance_of_a_png_ignores_its_nominal_slice_spacing() -> None:
    """A missed structure in a 2D image is as far as its in-plane diagonal, not as 999."""
    assert worst_distance_mm(Geometry.from_spacing((1, 30, 40), (999, 1, 1))) == pytest.approx(50.0)
    assert worst_distance_mm(GRID) == pytest.approx(GRID.diagonal_mm)


def test_worst_distance_bounds_every_distance() -> None:
    """Opposite corners are nearer than a missed structure."""
    reference, prediction = blank(), blank()
    reference[0, 0, 0] = prediction[-1, -1, -1] = 1
    found = scored(reference, prediction)["liver"].HD
    assert found is not None
    assert found < worst_distance_mm(GRID)


def test_ignored_voxels_count_nowhere() -> None:
    """Whatever is predicted where the reference says ignore changes no number, not even true negatives."""
    labels = LabelSpec({"liver": (1,), "tumour": (2,)}, ignore=3)
    reference, prediction = blank(), blank()
    reference[2:5, 3:7, 4:9] = 1
    prediction[2:5, 3:7, 4:10] = 1
    reference[:, :, 9:] = 3
    wild = prediction.copy()
    wild[:, :, 9:] = 2
    first, second = scored(reference, prediction, labels), scored(reference, wild, labels)
    assert first == second
    assert first["liver"].Dice == 1.0
    assert first["liver"].HD == 0.0
    assert first["liver"].TN == reference.size - 60 - 10 * 12 * 5
    assert first["tumour"].Dice is None


def test_regions_overlap_and_keep_nnunet_keys() -> None:
    """A region is the union of its values; keys are a value or the tuple of values."""
    labels = LabelSpec({"whole": (1, 2), "core": (2,)}, regions_class_order=(1, 2))
    reference, prediction = blank(), blank()
    reference[2:6, 2:6, 2:6], reference[3:5, 3:5, 3:5] = 1, 2
    prediction[2:6, 2:6, 2:6] = 1
    scores = scored(reference, prediction, labels)
    assert scores["whole"].Dice == 1.0
    assert scores["core"].Dice == 0.0
    assert structure_keys(labels) == {"whole": "(1, 2)", "core": "2"}


def test_without_surface_distances() -> None:
    """Asked for overlap only, the surface scores are absent and the overlap is there."""
    full = blank()
    full[2:5, 3:7, 4:9] = 1
    liver = scored(full, full, surface=False)["liver"]
    assert liver.Dice == 1.0
    assert (liver.HD, liver.HD95, liver.ASSD, liver.NSD) == (None,) * 4


def test_wrong_shape_is_refused() -> None:
    """A prediction of another shape is an error that says both shapes."""
    with pytest.raises(DataError, match="prediction") as error:
        scored(blank(), blank()[1:])
    assert "(10, 12, 14)" in str(error.value)
    assert "(9, 12, 14)" in str(error.value)
