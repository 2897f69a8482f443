"""What holds for every crop, tiling, zoom and resampling, whatever the numbers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from samunet.artifacts.plan import ChannelNormalization
from samunet.core.geometry import AxisOperation
from samunet.preprocessing.cropping import nonzero_crop
from samunet.preprocessing.normalization import normalize
from samunet.preprocessing.resampling import resample_image, resample_labels, resampled_shape, separate_axis
from samunet.preprocessing.slicing import (
    context_indices,
    cut_tile,
    pixel_to_voxel,
    tile_positions,
    tile_starts,
    tile_windows,
    voxel_to_pixel,
)

FEW = settings(max_examples=40, deadline=None)
LENGTHS = st.integers(1, 70)
TILES = st.integers(1, 40)
OVERLAPS = st.floats(0, 0.9)
SPACINGS = st.tuples(*[st.floats(0.3, 9.0)] * 3)
SEEDS = st.integers(0, 2**31)
OPERATIONS = st.builds(
    AxisOperation, st.permutations((0, 1, 2)).map(tuple), st.tuples(st.booleans(), st.booleans(), st.booleans())
)


def sparse(seed: int, shape: tuple[int, ...] = (1, 6, 7, 8)) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return generator.normal(size=shape).astype(np.float32) * (generator.random(shape) < 0.03)


@given(LENGTHS, TILES, OVERLAPS)
def test_tiles_cover_everything_and_share_the_overlap(length: int, tile: int, overlap: float) -> None:
    """Every voxel lies in a tile, tiles stay inside long axes, and neighbours share at least the overlap."""
    starts = tile_starts(length, tile, overlap)
    covered = np.zeros(length, bool)
    for start in starts:
        covered[max(0, start) : start + tile] = True
    assert covered.all()
    if length > tile:
        assert (starts[0], starts[-1]) == (0, length - tile)
        steps = np.diff(starts)
        assert steps.min() > 0
        assert steps.max() <= max(1, tile * (1 - overlap) + 1e-6)
    else:
        assert len(starts) == 1
        assert 0 <= (tile - length) + 2 * starts[0] <= 1


@given(LENGTHS, LENGTHS, TILES, OVERLAPS, SEEDS)
@FEW
def test_all_tiles_put_in_their_windows_give_the_slice_back(
    rows: int, columns: int, tile: int, overlap: float, seed: int
) -> None:
    """What is cut, written back through the tile's windows, is the slice."""
    image = np.random.default_rng(seed).normal(size=(2, rows, columns))
    restored = np.full_like(image, np.nan)
    for start in tile_positions((rows, columns), tile, overlap):
        content = cut_tile(image, start, tile, fill=0)
        assert content.shape == (2, tile, tile)
        outer, inner = tile_windows(start, tile, (rows, columns))
        restored[(..., *outer)] = content[(..., *inner)]
    np.testing.assert_array_equal(restored, image)


@given(st.integers(1, 30), st.integers(0, 5), st.data())
def test_context_is_a_window_around_its_slice(num_slices: int, context: int, data: st.DataObject) -> None:
    """The middle is the slice itself, indices never leave the volume nor decrease, and step by at most one."""
    index = data.draw(st.integers(0, num_slices - 1))
    indices = context_indices(index, num_slices, context)
    assert len(indices) == 2 * context + 1
    assert indices[context] == index
    assert indices.min() >= 0
    assert indices.max() < num_slices
    assert set(np.diff(indices)) <= {0, 1}


@given(st.integers(1, 600), st.integers(16, 1024), st.lists(st.floats(-50, 700), min_size=1, max_size=9))
def test_zoom_is_invertible(tile: int, input_size: int, positions: list[float]) -> None:
    """Voxel to pixel and back is the identity."""
    back = pixel_to_voxel(voxel_to_pixel(positions, tile, input_size), tile, input_size)
    np.testing.assert_allclose(back, positions, atol=1e-7)


@given(SEEDS, OPERATIONS)
@FEW
def test_crop_follows_the_axis_operation(seed: int, operation: AxisOperation) -> None:
    """Cropping then turning equals turning then cropping, and nothing nonzero is lost."""
    data = sparse(seed)
    crop, turned = nonzero_crop(data), nonzero_crop(operation.apply(data))
    cut = data[(slice(None), *crop.window)]
    np.testing.assert_array_equal(operation.apply(cut), operation.apply(data)[(slice(None), *turned.window)])
    np.testing.assert_array_equal(operation.apply(crop.mask), turned.mask)
    assert np.count_nonzero(cut) == np.count_nonzero(data)


@given(SEEDS, st.floats(0.1, 50), st.floats(-100, 100))
@FEW
def test_zscore_ignores_gain_and_offset(seed: int, gain: float, offset: float) -> None:
    """A linear change of intensities changes nothing after the z-score."""
    image = np.random.default_rng(seed).normal(size=(1, 4, 5, 6))
    spec = [ChannelNormalization(scheme="zscore")]
    np.testing.assert_allclose(normalize(image * gain + offset, None, spec), normalize(image, None, spec), atol=2e-3)


@given(st.tuples(*[st.integers(1, 12)] * 3), SPACINGS, SPACINGS, OPERATIONS)
@FEW
def test_resampling_commutes_with_axis_operations(
    shape: tuple[int, int, int],
    before: tuple[float, float, float],
    after: tuple[float, float, float],
    operation: AxisOperation,
) -> None:
    """Shape and separate axis follow a permutation of the axes."""
    wanted = resampled_shape(shape, before, after)
    assert min(wanted) >= 1
    turned = resampled_shape(operation.reorder(shape), operation.reorder(before), operation.reorder(after))
    assert turned == operation.reorder(wanted)
    axis = separate_axis(before, after)
    expected = None if axis is None else operation.permutation.index(axis)
    assert separate_axis(operation.reorder(before), operation.reorder(after)) == expected


@pytest.mark.parametrize("before", [(1.0, 1.0, 1.0), (5.0, 1.0, 1.0)])
@given(st.tuples(*[st.integers(2, 9)] * 3), SEEDS)
@settings(max_examples=15, deadline=None)
def test_resampling_stays_in_range_and_invents_no_label(
    before: tuple[float, float, float], shape: tuple[int, int, int], seed: int
) -> None:
    """Images stay within their range (no overshoot), constants stay constant, labels stay among those present."""
    generator = np.random.default_rng(seed)
    image = generator.normal(size=(1, 4, 5, 6)).astype(np.float32)
    result = resample_image(image, shape, before, (1.0, 1.0, 1.0))
    assert result.shape[1:] == shape
    assert result.min() >= image.min() - 1e-5
    assert result.max() <= image.max() + 1e-5
    flat = resample_image(np.full_like(image, 3), shape, before, (1.0, 1.0, 1.0))
    np.testing.assert_allclose(flat, 3, rtol=1e-6)
    labels = generator.choice(np.array([0, 4, 9], np.int16), size=(4, 5, 6))
    assert set(np.unique(resample_labels(labels, shape, before, (1.0, 1.0, 1.0)))) <= {0, 4, 9}
