"""Logits back on the file's grid."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from samunet.artifacts.store import CaseRecord
from samunet.core.labels import LabelSpec
from samunet.inference.restore import crop_slices, nearest_store_slice, restore

LABELS = LabelSpec({"a": (1,), "b": (5,)})


def record(**changes) -> CaseRecord:
    """A record that undoes nothing, with changes."""
    values = {
        "name": "case",
        "file_shape": (3, 4, 5),
        "permutation": (0, 1, 2),
        "flips": (False, False, False),
        "anatomical_axes": ("superior-inferior", "anterior-posterior", "left-right"),
        "canonical_shape": (3, 4, 5),
        "crop_start": (0, 0, 0),
        "crop_stop": (3, 4, 5),
        "crop_spacing": (1.0, 1.0, 1.0),
        "store_shape": (3, 4, 5),
        "store_spacing": (1.0, 1.0, 1.0),
    }
    return CaseRecord(**{**values, **changes})


def stream(maps: torch.Tensor):
    """(T, S, H, W) as a stream of slices."""
    return ((index, maps[:, index]) for index in range(maps.shape[1]))


def test_slices_pass_unchanged_where_grids_agree():
    """The same tensors come out in the same order."""
    maps = torch.randn(3, 3, 4, 5)
    out = list(crop_slices(stream(maps), record()))
    assert [index for index, _ in out] == [0, 1, 2]
    assert all(torch.equal(value, maps[:, index]) for index, value in out)


@pytest.mark.parametrize(("inside", "outside"), [(3, 7), (7, 3), (1, 4), (5, 5), (2, 9)])
def test_depth_is_interpolated_as_torch_does_it_in_one_piece(inside: int, outside: int):
    """The stream equals trilinear interpolation of the whole volume."""
    maps = torch.randn(2, inside, 6, 7)
    made = record(store_shape=(inside, 6, 7), crop_stop=(outside, 9, 5), canonical_shape=(outside, 9, 5))
    out = torch.stack([value for _, value in crop_slices(stream(maps), made)], 1)
    expected = torch.nn.functional.interpolate(maps[None], size=(outside, 9, 5), mode="trilinear", align_corners=False)
    assert torch.allclose(out, expected[0], atol=1e-5)


@pytest.mark.parametrize(("inside", "outside"), [(84, 30), (52, 90), (60, 110), (7, 7), (5, 9), (9, 5), (1, 4)])
def test_what_is_asked_on_the_nearest_slice_alone_comes_back_on_its_slice(inside: int, outside: int):
    """Every slice is restored from the store's slice that is named for it, ties and their rounding included."""
    made = record(store_shape=(inside, 1, 1), crop_stop=(outside, 1, 1), canonical_shape=(outside, 1, 1))
    for index in range(outside):
        maps = torch.full((2, inside, 1, 1), -20.0)
        maps[0], maps[1, nearest_store_slice(index, made)] = 0, 8
        out = [value[1].item() for _, value in crop_slices(stream(maps), made, absent=-20.0)]
        assert out[index] == 8
        assert sum(value > 0 for value in out) <= max(1, -(-outside // inside))


def test_labels_are_pasted_into_the_uncropped_grid_and_turned_back():
    """A crop at an offset inside flipped and permuted axes lands on the right voxels; elsewhere is background."""
    made = record(
        file_shape=(5, 3, 6),
        permutation=(1, 2, 0),
        flips=(True, False, True),
        canonical_shape=(3, 6, 5),
        crop_start=(1, 2, 0),
        crop_stop=(3, 4, 3),
        store_shape=(2, 2, 3),
    )
    maps = torch.zeros(3, 2, 2, 3)
    maps[2, 0, 1, 2] = 5
    restored = restore(stream(maps), made, LABELS)
    expected = np.zeros((3, 6, 5))
    expected[1, 3, 2] = 5
    assert np.array_equal(restored.labels, made.operation.invert(expected))
    assert restored.labels.shape == made.file_shape
    assert restored.labels.dtype == np.uint8


def test_probabilities_sum_to_one_and_are_background_outside_the_crop():
    """Softmax inside the crop; probability 1 of background around it."""
    made = record(crop_start=(1, 1, 1), crop_stop=(3, 3, 4), store_shape=(2, 2, 3))
    restored = restore(stream(torch.randn(3, 2, 2, 3)), made, LABELS, with_probabilities=True)
    assert restored.probabilities is not None
    assert np.allclose(restored.probabilities.sum(0), 1, atol=2e-3)
    assert np.all(restored.probabilities[0, 0] == 1)


def test_regions_are_painted_in_order():
    """Later regions of regions_class_order cover earlier ones; probabilities are sigmoids."""
    regions = LabelSpec({"whole": (1, 2), "core": (2,)}, regions_class_order=(1, 2))
    maps = torch.full((2, 3, 4, 5), -4.0)
    maps[0, 1] = 4
    maps[1, 1, 2] = 4
    restored = restore(stream(maps), record(), regions, with_probabilities=True)
    assert set(np.unique(restored.labels[1, 2])) == {2}
    assert set(np.unique(restored.labels[1, 0])) == {1}
    assert np.all(restored.labels[0] == 0)
    assert restored.probabilities is not None
    assert float(restored.probabilities[0, 1, 0, 0]) == pytest.approx(1 / (1 + np.exp(-4)), abs=1e-3)
