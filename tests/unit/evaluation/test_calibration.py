"""Estimates of Dice: exact before calibration, monotone and right after it, honest where there is too little."""

from __future__ import annotations

import numpy as np
import pytest

from samunet.artifacts.quality import CalibrationFit, Observation, StructureSigns
from samunet.core.config import parse_schema
from samunet.core.errors import ConfigError
from samunet.evaluation.calibration import apply_fit, estimate_dice, fit_calibration


def seen(case: int, dice: float, structure: str = "ball", **signs: float) -> Observation:
    """A mask of known Dice."""
    return Observation(case=f"c{case}", structure=structure, dice=dice, signs=StructureSigns(voxels=9, **signs))


def line(number: int, slope: float, offset: float, noise: float = 0.0, seed: int = 0) -> list[Observation]:
    """Masks whose Dice is a line of what the probabilities lead one to expect."""
    draw = np.random.default_rng(seed)
    expected = draw.uniform(0.4, 0.9, number)
    dice = np.clip(slope * expected + offset + draw.normal(0, noise, number), 0, 1)
    return [seen(i, float(d), expected=float(e)) for i, (d, e) in enumerate(zip(dice, expected, strict=True))]


def signs(**values: float) -> StructureSigns:
    """Signs of a mask that is not empty."""
    return StructureSigns(voxels=9, **values)


def test_without_a_fit_the_estimate_is_the_expected_dice() -> None:
    """It has no interval then, and an empty mask has no estimate at all."""
    assert estimate_dice((), "ball", signs(expected=0.7)) == (0.7, None, None)
    assert estimate_dice((), "ball", StructureSigns(voxels=0)) == (None, None, None)


def test_a_line_is_found_and_its_interval_is_narrow() -> None:
    """Where Dice is a line of a sign, the fit is nearly that line: what it was drawn towards fades with 60 masks."""
    fits = fit_calibration(line(60, 0.6, 0.2))
    for expected in (0.45, 0.6, 0.85):
        value, low, high = estimate_dice(fits, "ball", signs(expected=expected))
        assert value == pytest.approx(0.6 * expected + 0.2, abs=0.005)
        assert low is not None
        assert high is not None
        assert low <= value <= high
        assert high - low < 0.02


def test_what_needs_no_correction_gets_none() -> None:
    """Where the expected Dice is the true one, weight 1 and offset 0 come out."""
    (fit,) = [fit for fit in fit_calibration(line(30, 1.0, 0.0)) if fit.structure is None]
    assert fit.weights[0] == pytest.approx(1, abs=1e-3)
    assert fit.offset == pytest.approx(0, abs=1e-3)


def test_a_better_sign_never_lowers_the_estimate() -> None:
    """Even where a sign misleads: noise and a reversed sign get weights that are not negative."""
    draw = np.random.default_rng(1)
    masks = [
        seen(i, dice, expected=float(draw.uniform(0.5, 1)), certainty=1 - dice, agreement=dice, iou_head=0.5)
        for i, dice in enumerate(draw.uniform(0.3, 0.95, 30).tolist())
    ]
    for fit in fit_calibration(masks):
        assert min(fit.weights) >= 0
        base = {"expected": 0.6, "certainty": 0.5, "agreement": 0.6, "iou_head": 0.5}
        for name in base:
            assert apply_fit(fit, signs(**(base | {name: base[name] + 0.2}))) >= apply_fit(fit, signs(**base))


def test_the_schema_refuses_a_falling_fit() -> None:
    """A weight below zero in the file is an error."""
    fit = {"structure": None, "signs": ["expected"], "weights": [-0.1], "offset": 0.0}
    with pytest.raises(ConfigError, match="not negative"):
        parse_schema(CalibrationFit, fit | {"low": 0.0, "high": 0.0, "error": 0.0, "num_masks": 9})


def test_too_few_cases_calibrate_nothing() -> None:
    """Four cases give no fit, five do; two structures of one case are one case."""
    assert fit_calibration(line(4, 0.6, 0.2)) == ()
    assert fit_calibration([*line(4, 0.6, 0.2), *(seen(i, 0.5, "cube", expected=0.6) for i in range(4))]) == ()
    assert len(fit_calibration(line(5, 0.6, 0.2))) == 1


def test_structures_with_enough_cases_have_their_own_fit() -> None:
    """Two structures that err in opposite ways are told apart, a third is judged by all masks together."""
    masks = [
        *(seen(i, e - 0.1, "ball", expected=e) for i, e in enumerate(np.linspace(0.5, 0.9, 25).tolist())),
        *(seen(i, e + 0.05, "cube", expected=e) for i, e in enumerate(np.linspace(0.5, 0.9, 25).tolist())),
    ]
    fits = fit_calibration(masks)
    assert [fit.structure for fit in fits] == ["ball", "cube", None]
    found = {name: estimate_dice(fits, name, signs(expected=0.7))[0] for name in ("ball", "cube", "other")}
    assert found["ball"] == pytest.approx(0.6, abs=0.01)
    assert found["cube"] == pytest.approx(0.75, abs=0.01)
    assert found["other"] == pytest.approx(0.675, abs=0.02)


def test_views_that_are_missing_have_a_fit_of_their_own() -> None:
    """Without mirrored views the fit without their agreement is taken."""
    draw = np.random.default_rng(2)
    masks = [seen(i, d, expected=d / 2 + 0.4, agreement=d) for i, d in enumerate(draw.uniform(0.3, 0.9, 12).tolist())]
    fits = fit_calibration(masks)
    assert [fit.signs for fit in fits] == [("expected", "agreement"), ("expected",)]
    value, low, _ = estimate_dice(fits, "ball", signs(expected=0.7))
    assert value == pytest.approx(0.6, abs=0.02)
    assert low is not None


def test_a_missing_head_of_a_member_leaves_the_average_calibrated() -> None:
    """Each of the signs that a pair of unlike models can lack has fits without it, and one without both."""
    draw = np.random.default_rng(4)
    masks = [
        seen(i, d, expected=d / 2 + 0.4, certainty=0.8, agreement=d, iou_head=float(draw.uniform(0.5, 1)))
        for i, d in enumerate(draw.uniform(0.3, 0.9, 12).tolist())
    ]
    fits = fit_calibration(masks)
    assert [fit.signs for fit in fits] == [
        ("expected", "certainty", "agreement", "iou_head"),
        ("expected", "certainty", "iou_head"),
        ("expected", "certainty", "agreement"),
        ("expected", "certainty"),
    ]
    for said in ({"agreement": 0.6}, {"iou_head": 0.7}, {}):
        value, low, _ = estimate_dice(fits, "ball", signs(expected=0.7, certainty=0.8, **said))
        assert value == pytest.approx(0.6, abs=0.05)
        assert low is not None


def test_models_that_disagree_bound_the_estimate() -> None:
    """No estimate is above what several models agree to; agreement above it changes nothing."""
    fits = fit_calibration(line(30, 1.0, 0.0))
    alone = estimate_dice(fits, "ball", signs(expected=0.8))
    assert estimate_dice(fits, "ball", signs(expected=0.8, models_agree=0.9)) == alone
    value, low, high = estimate_dice(fits, "ball", signs(expected=0.8, models_agree=0.5))
    assert value == 0.5
    assert low is not None
    assert high is not None
    assert low <= 0.5 <= high


def test_intervals_hold_what_they_say() -> None:
    """Of masks like those calibrated on, about nine of ten lie inside; the estimate stays in [0, 1]."""
    fits = fit_calibration(line(80, 0.9, 0.02, noise=0.05))
    fresh = line(400, 0.9, 0.02, noise=0.05, seed=9)
    inside = []
    for mask in fresh:
        value, low, high = estimate_dice(fits, "ball", mask.signs)
        assert value is not None
        assert low is not None
        assert high is not None
        assert 0 <= low <= value <= high <= 1
        inside.append(low <= mask.dice <= high)
    assert 0.84 < np.mean(inside) < 0.96
    assert estimate_dice(fits, "ball", signs(expected=1.0))[2] == pytest.approx(1, abs=0.1)


def test_cases_of_a_group_are_held_out_together() -> None:
    """Where groups err alike, the error is that of a new group: larger; groups count, not their cases."""
    draw = np.random.default_rng(6)
    shift = np.repeat(draw.normal(0, 0.15, 6), 5)
    masks = [
        seen(i, float(np.clip(0.5 + s + draw.normal(0, 0.01), 0, 1)), expected=float(0.5 + s / 9), certainty=float(c))
        for i, (s, c) in enumerate(zip(shift, np.repeat(draw.uniform(0.4, 0.9, 6), 5), strict=True))
    ]
    groups = {f"c{index}": f"patient_{index // 5}" for index in range(30)}
    by_case = next(fit for fit in fit_calibration(masks) if fit.structure is None)
    by_group = next(fit for fit in fit_calibration(masks, groups) if fit.structure is None)
    assert by_group.weights == by_case.weights
    assert by_group.error > 1.15 * by_case.error
    assert fit_calibration(masks[:20]) != ()
    assert fit_calibration(masks[:20], groups) == ()
    assert {fit.structure for fit in fit_calibration(masks)} == {"ball", None}
    assert {fit.structure for fit in fit_calibration(masks, groups)} == {None}
