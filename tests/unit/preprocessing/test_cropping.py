"""The crop to the nonzero region."""

from __future__ import annotations

import numpy as np

from samunet.preprocessing.cropping import nonzero_crop


def test_box_is_the_union_over_channels() -> None:
    """A voxel counts if any channel is nonzero there; negative values and NaN count too."""
    data = np.zeros((2, 8, 9, 10), np.float32)
    data[0, 2, 3, 4] = -1
    data[1, 5, 6, 1] = np.nan
    crop = nonzero_crop(data)
    assert (crop.start, crop.stop) == ((2, 3, 1), (6, 7, 5))
    assert crop.mask.shape == (4, 4, 4)
    assert crop.mask.sum() == 2
    assert data[(slice(None), *crop.window)].shape == (2, 4, 4, 4)


def test_holes_belong_to_the_region_and_bays_do_not() -> None:
    """A zero enclosed on all sides is inside; one that touches the outside stays outside."""
    data = np.ones((1, 5, 5, 5), np.int16)
    data[0, 2, 2, 2] = 0
    data[0, 0, 0, 0] = 0
    crop = nonzero_crop(data)
    assert crop.mask[2, 2, 2]
    assert not crop.mask[0, 0, 0]


def test_an_image_of_zeros_is_kept_whole() -> None:
    """Without any nonzero voxel there is nothing to crop to."""
    crop = nonzero_crop(np.zeros((1, 3, 4, 5)))
    assert (crop.start, crop.stop) == ((0, 0, 0), (3, 4, 5))
    assert not crop.mask.any()
