"""Input size and tile at their thresholds."""

from __future__ import annotations

import pytest

from samunet.artifacts.method import DecoderMethod, EncoderMethod, Method
from samunet.planners import sizes
from samunet.planners.sizes import InPlane


def plane(
    typical: int,
    largest: int | None = None,
    *,
    width: float = 10.0,
    area: float = 10_000.0,
    resolution: float = 1.0,
) -> InPlane:
    """Slices, with small structures that cover a hundred voxels squared unless said."""
    return InPlane(typical, largest or typical, width, area, resolution)


@pytest.mark.parametrize(
    ("typical", "expected"), [(20, 224), (61, 224), (62, 448), (123, 448), (124, 672), (2000, 1120)]
)
def test_input_is_the_smallest_that_resolves_typical_slices(typical: int, expected: int) -> None:
    """56 decoder cells with ten percent of slack serve 61 voxels; beyond 1120 px nothing is planned."""
    assert sizes.wanted_input(plane(typical))[0] == expected


def test_upsampled_images_buy_no_tokens() -> None:
    """Images that carry detail up to half of their grid's limit need half the cells; slightly smooth ones all."""
    assert sizes.wanted_input(plane(120, resolution=0.5))[0] == 224
    assert sizes.wanted_input(plane(120, resolution=0.8))[0] == 448


SIDE_PATH = DecoderMethod(upsampler="side_path", path_stride=2)


@pytest.mark.parametrize(
    ("typical", "expected"), [(20, 112), (61, 112), (62, 224), (123, 224), (124, 336), (4000, 560)]
)
def test_beside_a_side_path_a_cell_of_the_path_is_a_voxel(typical: int, expected: int) -> None:
    """Multiples of 112 with ten percent of slack, up to 560 px, and the tile is then judged by the path's cells too."""
    grid = sizes.grid_of(Method(encoder=EncoderMethod(train="full"), decoder=SIDE_PATH))
    assert sizes.wanted_input(plane(typical), grid)[0] == expected
    assert sizes.tile(plane(105), 224, wanted=224, grid=grid)[0] == 105
    assert sizes.tile(plane(105), 224, wanted=224)[0] < 105


def test_only_an_encoder_that_trains_whole_takes_fine_sizes() -> None:
    """SAM's decoder and encoders that keep pretrained weights stay at the sizes those were trained for."""
    kept = EncoderMethod(train="frozen")
    assert sizes.grid_of(Method(encoder=kept, decoder=SIDE_PATH)) == sizes.SAM_GRID
    assert sizes.grid_of(Method(encoder=EncoderMethod(train="full"))) == sizes.SAM_GRID


def test_smaller_sizes_end_at_the_smallest() -> None:
    """Every step down to the smallest is tried, which for SAM's decoder is half a step."""
    assert sizes.SAM_GRID.smaller(672) == [672, 448, 224, 112]
    assert sizes.PATH_GRIDS[2].smaller(336) == [336, 224, 112]


def test_whole_slices_where_they_fit() -> None:
    """The largest slice decides the tile if a cell then spans at most 1.15 voxels."""
    assert sizes.tile(plane(56, 64), 224, wanted=224)[0] == 64
    assert sizes.tile(plane(56, 65), 224, wanted=224)[0] == 64


def test_tiny_slices_are_padded_rather_than_blown_up() -> None:
    """A slice of 5 voxels is placed in a tile of an eighth of the input."""
    assert sizes.tile(plane(5), 224, wanted=224)[0] == 28


def test_a_forced_small_input_accepts_two_voxels_per_cell() -> None:
    """If 224 px is all that fits, 128 voxels stay whole (2.3 per cell) and 130 are cut into two by two tiles."""
    assert sizes.tile(plane(128), 224, wanted=448)[0] == 128
    side, reason = sizes.tile(plane(130), 224, wanted=672)
    assert side == 87
    assert "2 x 2" in reason


def test_wide_structures_accept_coarser_cells() -> None:
    """A structure 28 voxels wide accepts cells of 3.5 voxels, but never more than 4."""
    limits = [sizes.coarsest_cell(plane(100, width=width), few_steps=False) for width in (0, 10, 28, 400)]
    assert limits == [2.0, 2.0, 3.5, 4.0]
    assert sizes.tile(plane(200, width=28), 224, wanted=896)[0] == 200


def test_few_steps_see_more_of_a_slice() -> None:
    """Cells may then span five voxels, but never more than twice the thinnest structure."""
    limits = [sizes.coarsest_cell(plane(100, width=width), few_steps=True) for width in (0, 0.5, 1.5, 2.5, 28, 400)]
    assert limits == [2.0, 2.0, 3.0, 5.0, 5.0, 5.0]
    assert sizes.tile(plane(128, width=3), 112, wanted=448, few_steps=True)[0] == 128
    assert sizes.tile(plane(128, width=3), 112, wanted=448)[0] < 128


def test_beside_a_side_path_cells_stay_small() -> None:
    """A pixel spans one and a quarter at most, in many steps and in few, however wide the structures are."""
    for few_steps in (False, True):
        at = {"grid": sizes.PATH_GRIDS[2], "few_steps": few_steps}
        limits = [sizes.coarsest_cell(plane(100, width=width), **at) for width in (0, 18, 28, 400)]
        assert limits == ([2.0, 2.5, 2.5, 2.5] if few_steps else [2.0, 2.25, 2.5, 2.5])
        assert sizes.coarsest_cell(plane(100, width=28), grid=sizes.PATH_GRIDS[1], few_steps=few_steps) == 1.25


@pytest.mark.parametrize(("area", "limit"), [(0, 5), (2, 1), (6, 1), (24, 2), (54, 3), (150, 5), (9000, 5)])
def test_small_structures_have_six_cells(area: float, limit: float) -> None:
    """In few steps their cross-section is made up of six cells, but none is smaller than a voxel."""
    assert sizes.coarsest_cell(plane(144, width=7.2, area=area), few_steps=True) == pytest.approx(limit)
    assert sizes.coarsest_cell(plane(144, width=7.2, area=area), few_steps=False) == 2


def test_small_lesions_are_not_shown_whole_slices() -> None:
    """Lesions of 40 square voxels on slices of 144: 28 cells cover 72 voxels, which is learned where 144 is not."""
    assert sizes.tile(plane(144, width=7.2, area=40), 112, wanted=672, few_steps=True)[0] == 72
    assert sizes.tile(plane(144, width=7.2, area=400), 112, wanted=672, few_steps=True)[0] == 144


@pytest.mark.parametrize(
    ("areas", "small"),
    [([], 0), ([7], 7), ([80, 7], 7), ([80, 7, 90], 7), ([80, 7, 90, 8], 8), ([*range(36, -1, -1)], 14)],
)
def test_area_of_small_structures(areas: list[float], small: float) -> None:
    """Of up to three structures the smallest counts, of many two in five may be smaller."""
    assert sizes.area_of_small(areas) == small


def test_huge_slices_are_tiled() -> None:
    """Slices of 4096 voxels become as many tiles as the cell's limit asks for, and they cover the slice."""
    side, _ = sizes.tile(plane(4096), 1120, wanted=1120)
    cells = 1120 / 4
    assert side / cells <= 2.0 * sizes.TILE_SLACK
    count = 1
    while side + (count - 1) * side * (1 - sizes.TILE_OVERLAP) < 4096:
        count += 1
    assert f"{count} x {count}" in sizes.tile(plane(4096), 1120, wanted=1120)[1]


def test_five_percent_of_the_dataset() -> None:
    """A hundred slices of one tile each allow five slices per step, and one is always allowed."""
    assert sizes.five_percent([(100, 50, 50)], 50) == 5
    assert sizes.five_percent([(1, 10, 10)], 50) == 1


def test_upsampled_slices_buy_neither_tokens_nor_tiles() -> None:
    """Twofold upsampled slices at the input they want are covered whole, as those of half the size are."""
    for typical, resolution in ((200, 0.5), (100, 1.0)):
        facts = plane(typical, resolution=resolution)
        wanted = sizes.wanted_input(facts)[0]
        assert (wanted, sizes.tile(facts, wanted, wanted=wanted)[0]) == (448, typical)
