"""Component filters: what is kept, per structure, and what becomes of the rest."""

from __future__ import annotations

import numpy as np
import pytest
from pydantic import ValidationError

from samunet.artifacts.best import ComponentFilter
from samunet.core.labels import LabelSpec
from samunet.inference.postprocess import apply_filters, component_sizes, filtered_mask

LARGEST = ComponentFilter(structure="organ", kind="largest")
SPEC = LabelSpec({"organ": (1,), "tumour": (2,)})


def scene() -> np.ndarray:
    """Organ of 27 voxels and one of 8 and one of 1, tumours of 2 and 1."""
    labels = np.zeros((8, 12, 12), np.uint8)
    labels[0:3, 0:3, 0:3] = 1
    labels[5:7, 5:7, 5:7] = 1
    labels[7, 11, 11] = 1
    labels[0, 8, 8:10] = 2
    labels[4, 0, 11] = 2
    return labels


def test_components_touch_at_corners() -> None:
    """Voxels that share only a corner are one component."""
    mask = np.zeros((3, 3, 3), bool)
    mask[0, 0, 0] = mask[1, 1, 1] = mask[0, 2, 2] = True
    assert sorted(component_sizes(mask)) == [3]
    mask[1, 1, 1] = False
    assert sorted(component_sizes(mask)) == [1, 1]
    assert component_sizes(np.zeros((2, 2, 2), bool)).size == 0


def test_the_largest_component_of_one_structure_is_kept() -> None:
    """The others become background; the other structure is not touched, nor is the input."""
    labels = scene()
    result = apply_filters(labels, [LARGEST], SPEC, 1.0)
    assert (result == 1).sum() == 27
    assert np.array_equal(result == 2, labels == 2)
    assert np.array_equal(labels, scene())
    assert result.dtype == labels.dtype


@pytest.mark.parametrize(("least", "kept"), [(1.0, 36), (2.0, 36), (2.1, 35), (16.0, 35), (16.1, 27), (1000.0, 0)])
def test_components_below_a_volume_go(least: float, kept: int) -> None:
    """Volumes count in mm3: with voxels of 2 mm3 a component of 8 voxels has 16."""
    rule = ComponentFilter(structure="organ", kind="size", least_mm3=least)
    assert (apply_filters(scene(), [rule], SPEC, 2.0) == 1).sum() == kept


def test_an_empty_mask_stays_empty() -> None:
    """Nothing to keep is no error."""
    assert not filtered_mask(np.zeros((2, 3, 4), bool), LARGEST, 1.0).any()


def test_regions_are_repainted() -> None:
    """Where the core loses a component, the region around it stays: the voxel is painted as what it is still in."""
    spec = LabelSpec({"whole": (1, 2), "core": (2,)}, regions_class_order=(1, 2))
    labels = np.zeros((3, 8, 8), np.uint8)
    labels[:, 1:7, 1:7] = 1
    labels[1, 2:4, 2:4] = 2
    labels[1, 5, 5] = 2
    result = apply_filters(labels, [ComponentFilter(structure="core", kind="largest")], spec, 1.0)
    assert result[1, 5, 5] == 1
    assert (result == 2).sum() == 4
    assert np.array_equal(result > 0, labels > 0)


def test_a_filter_says_what_it_needs() -> None:
    """A size filter without a size, and a largest one with, are refused."""
    for wrong in ({"kind": "size"}, {"kind": "largest", "least_mm3": 3.0}, {"kind": "biggest"}):
        with pytest.raises(ValidationError):
            ComponentFilter(structure="organ", **wrong)
