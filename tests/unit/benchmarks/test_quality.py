"""The benchmark of the estimates: known artefacts, no leakage, scores that are what they say."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.quality import ARTEFACTS, CLEAN, auroc, degrade, judge, summarise, table
from samunet.artifacts.quality import StructureSigns
from tests.samples import make_case


@pytest.mark.parametrize("condition", ARTEFACTS)
def test_an_artefact_changes_the_image_the_same_way_every_time(condition: str) -> None:
    """The same seed gives the same image; the reference stays on the image's grid."""
    volume, labels = make_case(0)
    first, reference = degrade(volume, labels, condition, seed=3)
    again, _ = degrade(volume, labels, condition, seed=3)
    assert np.array_equal(first.data, again.data)
    assert first.geometry.shape == reference.shape
    assert first.data.shape != volume.data.shape or not np.allclose(first.data, volume.data)


def test_the_area_under_the_curve_is_a_probability() -> None:
    """1 if all bad masks have lower estimates, 0.5 for a tie, None without bad ones."""
    bad = np.array([True, True, False, False])
    assert auroc(np.array([0.1, 0.2, 0.3, 0.4]), bad) == 1
    assert auroc(np.array([0.2, 0.2, 0.2, 0.2]), bad) == 0.5
    assert auroc(np.array([0.2, 0.3]), np.array([False, False])) is None


def rows(number: int, *, shift: float = 0.0) -> list[dict[str, object]]:
    """Masks whose Dice is the expected one less 0.2, the first case's another."""
    made: list[dict[str, object]] = []
    for index, expected in enumerate(np.linspace(0.6, 0.95, number).tolist()):
        dice = expected - 0.2 + (shift if index == 0 else 0.0)
        signs = StructureSigns(voxels=5, expected=expected).model_dump()
        made += [
            {"case": f"c{index}", "condition": c, "dice": {"ball": dice}, "signs": {"ball": signs}, "flags": []}
            for c in (CLEAN, *ARTEFACTS)
        ]
    return made


def test_no_mask_is_judged_by_its_own_case() -> None:
    """Changing one case's true Dice changes no estimate of its own, and others' only."""
    before, after = judge(rows(20)), judge(rows(20, shift=-0.3))
    same = [(a.dice != b.dice, a.estimate == b.estimate) for a, b in zip(before, after, strict=True)]
    assert all(kept for changed, kept in same if changed)
    assert not all(kept for _, kept in same)


def test_a_shifted_estimate_is_calibrated_and_ranked() -> None:
    """A constant error is gone after calibration; the table has a line per condition."""
    summary = summarise(rows(20))
    assert summary["scores"]["all"]["spearman"] == pytest.approx(1)
    assert summary["scores"][CLEAN]["mean_absolute_error"] < 0.02
    assert summary["scores"]["all"]["masks"] == 100
    assert len(table({"run": summary}).splitlines()) == 2 + 2 + len(ARTEFACTS)


def test_no_mask_is_judged_by_its_own_group() -> None:
    """The halves are of groups: changing a case's true Dice changes no estimate of its group."""
    groups = {f"c{index}": f"g{index // 2}" for index in range(20)}
    before, after = judge(rows(20), groups), judge(rows(20, shift=-0.3), groups)
    clean = [pair for pair in zip(before, after, strict=True) if pair[0].condition == CLEAN]
    kept = {round(a.dice, 6): a.estimate == b.estimate for a, b in clean}
    first, second = sorted(kept)[:2]
    assert kept[first]
    assert kept[second]
    assert not all(kept.values())
