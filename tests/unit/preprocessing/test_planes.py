"""Volumes cut across each of their axes: nothing moves but the axis in front."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from samunet.core.labels import LabelSpec
from samunet.preprocessing.planes import occupied_slices, turn, turned

SHAPES = {"slices": (2, 3, 4), "rows": (3, 2, 4), "columns": (4, 2, 3)}


@pytest.mark.parametrize("across", list(SHAPES))
@pytest.mark.parametrize("lead", [(), (5,)])
def test_a_turned_volume_is_a_view_whose_slices_lie_across_the_axis(across, lead):
    """Numpy and torch agree, values stay at their voxel, and what is written to the view stands in the volume."""
    volume = np.arange(np.prod((*lead, 2, 3, 4))).reshape(*lead, 2, 3, 4)
    found = turn(volume, across)
    assert found.shape == (*lead, *SHAPES[across]) == (*lead, *turned((2, 3, 4), across))
    assert np.array_equal(found, turn(torch.from_numpy(volume), across).numpy())
    place = {"slices": (1, 2, 3), "rows": (2, 1, 3), "columns": (3, 1, 2)}[across]
    assert np.all(found[(..., *place)] == volume[..., 1, 2, 3])
    tensor = torch.from_numpy(volume.copy())
    turn(tensor, across)[(..., *place)] = -7
    assert (tensor[..., 1, 2, 3] == -7).all()
    assert int((tensor == -7).sum()) == np.prod(lead)


def test_occupied_slices_name_structures_and_what_is_not_ignored():
    """A structure's slices are those that hold it; a slice of nothing but ignored voxels teaches nothing."""
    spec = LabelSpec.from_dataset_json({"labels": {"background": 0, "a": 1, "b": 2, "ignore": 3}})
    labels = np.zeros((4, 3, 5), np.int16)
    labels[0] = 3
    labels[1, 2, 4] = 1
    labels[3, 2, 0] = 1
    assert occupied_slices(labels, spec) == ({"a": (1, 3)}, (1, 2, 3))
    assert occupied_slices(turn(labels, "columns"), spec) == ({"a": (0, 4)}, (0, 1, 2, 3, 4))
