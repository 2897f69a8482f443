"""What must hold for any pair of masks."""

# ruff: noqa: SIM300 - nnU-Net's metric names are upper case, but no constants

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from samunet.artifacts.report import StructureMetrics
from samunet.core.geometry import AxisOperation, Geometry
from samunet.core.labels import LabelSpec
from samunet.evaluation.case import evaluate_case

LABELS = LabelSpec({"thing": (1,)})
SYMMETRIC = ("Dice", "IoU", "NSD", "HD", "HD95", "ASSD")
QUICK = settings(max_examples=40, deadline=None)


@st.composite
def pairs(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, tuple[float, float, float]]:
    """Two label maps of random sparse or dense masks (one may be empty) and a spacing."""
    shape = draw(st.tuples(*[st.integers(1, 7)] * 3))
    spacing = draw(st.tuples(*[st.floats(0.2, 6.0)] * 3))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    densities = draw(st.tuples(*[st.sampled_from((0.0, 0.05, 0.3, 0.9))] * 2))
    first, second = ((generator.random(shape) < density).astype(np.int16) for density in densities)
    return first, second, spacing


def scores(
    reference: np.ndarray, prediction: np.ndarray, spacing: tuple[float, ...], tolerance_mm: float = 1.0
) -> StructureMetrics:
    grid = Geometry.from_spacing(reference.shape, spacing)
    return evaluate_case(reference, prediction, labels=LABELS, geometry=grid, tolerance_mm=tolerance_mm)["thing"]


def same(first: StructureMetrics, second: StructureMetrics) -> None:
    for name in SYMMETRIC:
        a, b = getattr(first, name), getattr(second, name)
        assert (a is None) == (b is None), name
        assert a is None or a == pytest.approx(b, abs=1e-9), name


@QUICK
@given(pairs())
def test_symmetry(pair: tuple) -> None:
    """Reference and prediction may be swapped: every score stays, FP and FN trade places."""
    a, b, spacing = pair
    forth, back = scores(a, b, spacing), scores(b, a, spacing)
    same(forth, back)
    assert (forth.FP, forth.FN, forth.TP, forth.TN) == (back.FN, back.FP, back.TP, back.TN)


@QUICK
@given(pairs())
def test_identity(pair: tuple) -> None:
    """A mask scores perfectly against itself, and has no score where it is empty."""
    a, _, spacing = pair
    found = scores(a, a, spacing)
    expected = (1.0, 1.0, 1.0, 0.0, 0.0, 0.0) if a.any() else (None,) * 6
    assert tuple(getattr(found, name) for name in SYMMETRIC) == expected


@QUICK
@given(pairs(), st.tuples(*[st.integers(0, 4)] * 3), st.tuples(*[st.integers(1, 4)] * 3))
def test_translation(pair: tuple, before: tuple, after: tuple) -> None:
    """More background around two masks changes no score, unless a mask is empty (then the image has grown)."""
    a, b, spacing = pair
    assume(a.any() and b.any() and min(a.shape) > 1)
    padding = list(zip(before, after, strict=True))
    same(scores(a, b, spacing), scores(np.pad(a, padding), np.pad(b, padding), spacing))


@QUICK
@given(pairs(), st.permutations(range(3)), st.tuples(*[st.booleans()] * 3))
def test_axis_order_and_flips(pair: tuple, order: list[int], flips: tuple[bool, bool, bool]) -> None:
    """Storing both masks in other axes, spacing along, changes no score."""
    a, b, spacing = pair
    operation = AxisOperation(tuple(order), flips)
    same(scores(a, b, spacing), scores(operation.apply(a), operation.apply(b), operation.reorder(spacing)))


@QUICK
@given(pairs(), st.floats(0.1, 10.0))
def test_scaling(pair: tuple, factor: float) -> None:
    """Distances scale with the spacing; overlap does not."""
    a, b, spacing = pair
    small, large = scores(a, b, spacing), scores(a, b, tuple(factor * s for s in spacing))
    assert small.Dice == large.Dice
    for name in ("HD", "HD95", "ASSD"):
        if (value := getattr(small, name)) is not None:
            assert getattr(large, name) == pytest.approx(factor * value, rel=1e-6)


@QUICK
@given(pairs(), st.tuples(st.floats(0.1, 8.0), st.floats(0.1, 8.0)))
def test_order_of_the_scores(pair: tuple, tolerances: tuple[float, float]) -> None:
    """HD95 and ASSD never exceed HD, IoU never exceeds Dice, and NSD grows with its tolerance."""
    a, b, spacing = pair
    assume(a.any() or b.any())
    strict, loose = (scores(a, b, spacing, t) for t in sorted(tolerances))
    assert max(strict.HD95, strict.ASSD) <= strict.HD + 1e-9
    assert strict.IoU <= strict.Dice
    assert strict.NSD <= loose.NSD
    assert 0 <= strict.NSD <= 1
    assert loose.HD == strict.HD


@QUICK
@given(pairs())
def test_counts_add_up(pair: tuple) -> None:
    """The four cells are all voxels, and Dice and IoU follow from them."""
    a, b, spacing = pair
    found = scores(a, b, spacing)
    assert found.TP + found.FP + found.FN + found.TN == a.size
    assert (found.n_ref, found.n_pred) == (int(a.sum()), int(b.sum()))
    if found.Dice is not None and found.IoU is not None:
        assert found.IoU == pytest.approx(found.Dice / (2 - found.Dice))
