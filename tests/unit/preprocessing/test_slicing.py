"""Context, tiles and zoom."""

from __future__ import annotations

import numpy as np
import pytest

from samunet.core.errors import ConfigError
from samunet.preprocessing.slicing import (
    context_indices,
    cut_tile,
    tile_positions,
    tile_starts,
    tile_windows,
    voxel_to_pixel,
)


def test_context_repeats_edge_slices() -> None:
    """Beyond the first and last slice the edge slice is repeated."""
    assert context_indices(0, 5, 2).tolist() == [0, 0, 0, 1, 2]
    assert context_indices(4, 5, 1).tolist() == [3, 4, 4]
    assert context_indices(0, 1, 1).tolist() == [0, 0, 0]
    assert context_indices(2, 5, 0).tolist() == [2]


def test_small_slices_lie_in_the_middle_of_their_tile() -> None:
    """A slice smaller than the tile is centred, with the odd voxel behind, and the rest filled."""
    assert tile_starts(5, 8, 0.5) == (-1,)
    tile = cut_tile(np.ones((2, 5, 8), np.float32), (-1, 0), 8, fill=-7)
    assert tile.shape == (2, 8, 8)
    assert (tile[:, 1:6] == 1).all()
    assert (tile[:, [0, 6, 7]] == -7).all()


def test_large_slices_get_tiles_flush_with_both_ends() -> None:
    """The first tile starts at 0, the last ends at the end, and neighbours share at least the overlap."""
    assert tile_starts(100, 40, 0.5) == (0, 20, 40, 60)
    assert tile_starts(101, 40, 0.5)[-1] == 61
    assert tile_starts(80, 40, 0.0) == (0, 40)
    assert tile_positions((60, 30), 40, 0.5) == ((0, -5), (20, -5))


def test_windows_tell_where_tile_and_slice_meet() -> None:
    """The outer window lies in the slice and the inner one in the tile, with equal sizes."""
    outer, inner = tile_windows((-2, 3), 6, (3, 9))
    assert outer == (slice(0, 3), slice(3, 9))
    assert inner == (slice(2, 5), slice(0, 6))


def test_zoom_maps_outer_edges_onto_each_other() -> None:
    """Tile edges (-0.5 and V - 0.5) become input edges (-0.5 and S - 0.5)."""
    np.testing.assert_allclose(voxel_to_pixel([-0.5, 63.5], 64, 224), [-0.5, 223.5])


@pytest.mark.parametrize(("length", "tile", "overlap"), [(10, 5, 1.0), (10, 5, -0.1), (10, 0, 0.5), (0, 5, 0.5)])
def test_impossible_tilings_are_errors(length: int, tile: int, overlap: float) -> None:
    """Full overlap would never end; sizes must be positive."""
    with pytest.raises(ConfigError, match="tiles"):
        tile_starts(length, tile, overlap)
