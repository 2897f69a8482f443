"""Component filters of regions: judged on the masks that come out of all of them together."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from samunet.core.geometry import Geometry
from samunet.core.labels import LabelSpec
from samunet.imageio import write_labels
from samunet.pipeline.find_best import NO_FILTER_HELPS, MaskPair, choose_filters

REGIONS = LabelSpec({"whole": (1, 2), "core": (2,)}, regions_class_order=(1, 2))
GRID = Geometry.from_spacing((4, 30, 30), (1.0, 1.0, 1.0))


def pairs(folder: Path, *, far: int) -> list[MaskPair]:
    """Six cases whose masks hold a part far from the rest, of which one row of six belongs to the structure.

    Args:
        folder: For the label files.
        far: What the other rows are painted as: the outer region, or the inner one, which is nowhere.
    """
    made = []
    for index in range(6):
        truth: NDArray[np.uint8] = np.zeros(GRID.shape, np.uint8)
        truth[:, 2:12, 2 : 12 + index] = 1
        truth[0, 22, 22:28] = 1
        mask = truth.copy()
        mask[0, 23:28, 22:28] = far
        files = folder / "truth" / f"{index}.nii.gz", folder / "mask" / f"{index}.nii.gz"
        for file, labels in zip(files, (truth, mask), strict=True):
            write_labels(file, labels, geometry=GRID)
        made.append(MaskPair(str(index), *files))
    return made


def test_filters_that_do_not_help_together_are_refused(tmp_path: Path) -> None:
    """Without the far part the outer region is better; what the inner one keeps of it makes it worse than before."""
    assert choose_filters(pairs(tmp_path, far=2), REGIONS)[:2] == ((), None)


def test_a_filter_that_helps_in_the_masks_as_written_is_taken(tmp_path: Path) -> None:
    """Where nothing of the far part stays, the same filter is taken, with the score of the filtered masks."""
    filters, score, *_ = choose_filters(pairs(tmp_path, far=1), REGIONS)
    assert {(rule.structure, rule.kind) for rule in filters} == {("whole", "largest")}
    assert score is not None
    sizes = [40 * (10 + index) for index in range(6)]
    assert score.value == pytest.approx(np.mean([(2 * n / (2 * n + 6) + 1) / 2 for n in sizes]))


def test_too_few_cases_are_a_reason_of_their_own(tmp_path: Path) -> None:
    """That no filter gains is said only where it was tried: on five cases, or as many groups, at least."""
    six = pairs(tmp_path, far=1)
    assert choose_filters(six[:4], REGIONS) == ((), None, "not tried: 4 cases; fewer than 5 show nothing")
    groups = {pair.case: f"patient {int(pair.case) // 2}" for pair in six}
    assert choose_filters(six, REGIONS, groups) == (
        (),
        None,
        "not tried: 3 groups of cases; fewer than 5 show nothing",
    )
    clean = [MaskPair(pair.case, pair.reference, pair.reference) for pair in six]
    assert choose_filters(clean, REGIONS)[2] == NO_FILTER_HELPS
