"""Encoder input size and tile: how many voxels a decoder cell may span, and what fits memory and minutes.

A tile of V x V voxels at target spacing is zoomed to S x S encoder pixels; the grid of SAM's decoder has S / 4 cells a
side, so a cell spans 4 V / S voxels. A side path of stride p has S / p cells a side.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from samunet.artifacts.method import Method
from samunet.artifacts.model_spec import DECODER_STRIDE, SIZE_STEP
from samunet.planners.schedule import LEAST_CPU_STEPS

SLACK = 1.1
TILE_SLACK = 1.15
COARSEST_CELL_VOX = 2.0
CELLS_PER_WIDTH = 8
FEW_STEPS_CELLS_PER_WIDTH = 0.5
CELLS_OF_SMALL = 6
SMALL_SHARE = 0.4
UPSAMPLED_BELOW = 0.75
TILE_OVERLAP = 0.5
SMALLEST_TILE_SHARE = 1 / 8


@dataclass(frozen=True)
class InPlane:
    """What the sizes of slices say.

    Args:
        typical_vox: Median over cases of the longer in-plane side, in target voxels.
        largest_vox: Largest over all cases.
        width_vox: Thickest place of the thinnest structure, in target voxels; 0 if nothing is labelled.
        area_vox: Mean cross-section of small structures with a slice that holds them, in square voxels: two structures
            of five are no larger (of up to three the smallest); 0 if nothing is labelled.
        resolution: Fraction of the in-plane Nyquist frequency that carries detail.
    """

    typical_vox: int
    largest_vox: int
    width_vox: float
    area_vox: float
    resolution: float


@dataclass(frozen=True)
class Grid:
    """Which input sizes are planned, and how fine masks are decoded.

    Args:
        stride: Encoder pixels per decoder cell.
        step: Input sizes are multiples of it.
        smallest: Smallest input.
        largest: Largest input.
        least_steps: A smaller input is planned where the minutes of a CPU hold fewer steps.
        most_cell_vox: Voxels that a decoder cell may span at most where structures are wide.
        few_steps_cell_vox: The same in few steps, where structures need not be wide for it.
    """

    stride: int
    step: int
    smallest: int
    largest: int
    least_steps: int
    most_cell_vox: float
    few_steps_cell_vox: float

    def smaller(self, size: int) -> list[int]:
        """The size and all smaller ones, largest first."""
        sizes = list(range(size, self.smallest - 1, -self.step))
        return sizes if sizes[-1] == self.smallest else [*sizes, self.smallest]


SAM_GRID = Grid(DECODER_STRIDE, SIZE_STEP, SIZE_STEP // 2, 5 * SIZE_STEP, LEAST_CPU_STEPS, 4.0, 5.0)
_HALF_STEP = SIZE_STEP // 2
PATH_GRIDS = {
    stride: Grid(stride, _HALF_STEP, _HALF_STEP, 5 * _HALF_STEP, 4000, 1.25 * stride, 1.25 * stride)
    for stride in (1, 2)
}


def grid_of(method: Method) -> Grid:
    """The sizes for a method.

    An encoder that starts from pretrained weights wants inputs like those it was trained on, whatever decodes it; one
    that trains whole beside a side path leaves what is small to it, so that a cell of the path per voxel is enough.
    """
    if method.decoder.upsampler == "side_path" and method.encoder.train == "full":
        return PATH_GRIDS[method.decoder.path_stride]
    return SAM_GRID


def wanted_input(facts: InPlane, grid: Grid = SAM_GRID) -> tuple[int, str]:
    """Smallest size whose decoder grid is not coarser than the image's detail, with 10 % slack."""
    share = _detail_share(facts)
    wanted = max(1, math.ceil(grid.stride * share * facts.typical_vox / SLACK / grid.step)) * grid.step
    size = min(grid.largest, max(grid.smallest, wanted))
    reason = f"typical slices have {facts.typical_vox} voxels a side; a decoder grid of {size // grid.stride} cells "
    reason += "resolves them" if size >= wanted else f"is the finest planned ({wanted} px would resolve every voxel)"
    if share < 1:
        reason += f"; images carry detail up to {facts.resolution:.2f} of their grid's limit, so fewer cells are enough"
    return size, reason


def _detail_share(facts: InPlane) -> float:
    """Of the voxels along a side, the fraction that the image's detail needs: a half at least, 1 if not upsampled."""
    return max(0.5, facts.resolution) if facts.resolution < UPSAMPLED_BELOW else 1.0


def coarsest_cell(facts: InPlane, *, grid: Grid = SAM_GRID, few_steps: bool) -> float:
    """Voxels a decoder cell may span: two, or an eighth of the thinnest structure's width up to the grid's most.

    In few steps as many as the grid says, at most twice that width: seeing more of a slice then teaches more than
    detail does (`benchmarks.sizes`). But so few that six cells make up the cross-section of small structures, down to
    one voxel: what has fewer is not found at all in few steps (`benchmarks.small_structures`).
    """
    limit = min(grid.most_cell_vox, max(COARSEST_CELL_VOX, facts.width_vox / CELLS_PER_WIDTH))
    if not few_steps:
        return limit
    limit = max(limit, min(grid.few_steps_cell_vox, facts.width_vox / FEW_STEPS_CELLS_PER_WIDTH))
    return min(limit, max(1.0, math.sqrt(facts.area_vox / CELLS_OF_SMALL))) if facts.area_vox else limit


def area_of_small(areas: Sequence[float]) -> float:
    """The area that two structures of five do not exceed, of up to three the smallest; 0 of none."""
    return sorted(areas)[int(SMALL_SHARE * (len(areas) - 1))] if areas else 0.0


def tile(
    facts: InPlane,
    input_size: int,
    *,
    wanted: int,
    grid: Grid = SAM_GRID,
    overlap: float = TILE_OVERLAP,
    few_steps: bool = False,
) -> tuple[int, str]:
    """Side in voxels of the square that one input covers.

    Whole slices if a decoder cell then spans no more than it may: about one voxel where the input is as large as wanted
    (up to two of upsampled images), else what `coarsest_cell` allows. Otherwise typical slices are cut into as few
    overlapping tiles as bring the cell within that limit; only outliers are tiled if typical slices fit.

    Args:
        facts: Sizes of slices.
        input_size: Encoder pixels.
        wanted: What :func:`wanted_input` says.
        grid: Of the decoder.
        overlap: Of neighbouring tiles, as a fraction of a tile.
        few_steps: Whether training is short, as on a CPU.
    """
    cells = input_size // grid.stride
    is_enough = input_size >= wanted and wanted < grid.largest
    limit = TILE_SLACK * (
        1 / _detail_share(facts) if is_enough else coarsest_cell(facts, grid=grid, few_steps=few_steps)
    )
    least = math.ceil(input_size * SMALLEST_TILE_SHARE)
    most = int(limit * cells)
    if facts.largest_vox <= most:
        side = max(least, facts.largest_vox)
        return side, f"the largest slice ({facts.largest_vox} voxels) fits whole; {_cell(side, cells)}"
    if facts.typical_vox <= most:
        return most, (
            f"typical slices ({facts.typical_vox} voxels) fit whole, the largest ({facts.largest_vox}) are tiled; "
            f"{_cell(most, cells)}"
        )
    number = max(2, math.floor(1 + (facts.typical_vox / most - 1) / (1 - overlap)))
    while _cover(facts.typical_vox, number, overlap) > most:
        number += 1
    side = max(least, _cover(facts.typical_vox, number, overlap))
    return side, (
        f"whole slices of {facts.typical_vox} voxels would make a decoder cell span {facts.typical_vox / cells:.1f} "
        f"(allowed {limit:.1f}), so {number} x {number} overlapping tiles cover one; {_cell(side, cells)}"
    )


def five_percent(shapes: Sequence[tuple[int, int, int]], tile_vox: int) -> int:
    """Slices per step that cover at most five percent of the dataset's pixels.

    Source: nnU-Net (Isensee et al., Nature Methods 2021), limit on the batch size.
    """
    pixels = sum(s * r * c for s, r, c in shapes)
    return max(1, int(0.05 * pixels / tile_vox**2))


def tiles_per_slice(shapes: Sequence[tuple[int, int, int]], tile_vox: int) -> float:
    """Tiles without overlap that cover a typical slice, as many as its area takes: the median over cases, at least 1.

    Args:
        shapes: Voxels per case, slices first.
        tile_vox: Side of a tile.
    """
    return round(median(max(1.0, r / tile_vox) * max(1.0, c / tile_vox) for _, r, c in shapes), 1)


def _cover(extent: int, number: int, overlap: float) -> int:
    """Side of tiles of which `number` in a row cover an extent, overlapping by a fraction of a tile."""
    return math.ceil(extent / (number - (number - 1) * overlap))


def _cell(side: int, cells: int) -> str:
    return f"a decoder cell spans {side / cells:.2f} voxels"
