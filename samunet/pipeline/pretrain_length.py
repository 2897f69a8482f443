"""How long a pretraining run is for the tiles of slices that it sees, which may be many more than are labelled."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from samunet.artifacts.plan import ResolvedRecipe
from samunet.artifacts.store import CaseRecord
from samunet.core.errors import UsageError
from samunet.core.log import Reporter
from samunet.pipeline.pretrain_data import Source
from samunet.planners import schedule, sizes
from samunet.preprocessing.store import CaseStore


def count_tiles(sources: Sequence[Source], *, supervised: bool) -> int:
    """Tiles without overlap of the slices that samples are drawn from, one at least per slice.

    Slices are all, or those that hold a structure where one is prompted for.

    Raises:
        UsageError: If there is none.
    """
    number = sum(
        _tiles_of(store.record(name), source.recipe.tile_vox, supervised=supervised)
        for source in sources
        for store, cases in ((CaseStore(folder), cases) for folder, cases in source.stores)
        for name in cases
    )
    if not number:
        raise UsageError("no slice of these images holds a labelled structure", expected="labels for --supervised")
    return number


def _tiles_of(record: CaseRecord, tile_vox: int, *, supervised: bool) -> int:
    num_slices = record.store_shape[0]
    if supervised:
        num_slices = len({index for indices in record.label_slices.values() for index in indices})
    return round(num_slices * sizes.tiles_per_slice([record.store_shape], tile_vox))


def with_length_for(recipe: ResolvedRecipe, num_tiles: int) -> ResolvedRecipe:
    """A planned recipe with the steps that so many tiles are worth, where the steps and not the minutes decide.

    Args:
        recipe: As planned for the labelled slices of one dataset.
        num_tiles: Tiles that are seen, of all datasets.
    """
    if recipe.minutes is not None:
        return recipe
    steps, _ = schedule.dataset_steps(num_tiles, recipe.batch_size)
    iterations, epochs = schedule.epochs(steps, on_cpu=False)
    warmup, average = schedule.warmup_steps(steps)[0], schedule.ema_decay(steps)[0]
    return replace(recipe, iterations=iterations, epochs=epochs, warmup_steps=warmup, ema_decay=average)


def expected_passes(recipe: ResolvedRecipe, planned: ResolvedRecipe, num_tiles: int) -> float | None:
    """Times that each tile is seen on average; None where minutes decide and their steps were never estimated.

    Args:
        recipe: Of the run.
        planned: Before anything was asked for, whose steps are those that fit its minutes.
        num_tiles: Tiles that are seen.
    """
    if recipe.minutes is None:
        return _drawn(recipe) / num_tiles
    return None if planned.minutes is None else recipe.minutes / planned.minutes * _drawn(planned) / num_tiles


def tell_length(recipe: ResolvedRecipe, planned: ResolvedRecipe, num_tiles: int, reporter: Reporter) -> None:
    """Say how many tiles there are and how often each is seen; a warning where some are not, with what to do.

    Args:
        recipe: Of the run.
        planned: As for :func:`expected_passes`.
        num_tiles: Tiles that are seen.
        reporter: Who is told.
    """
    passes = expected_passes(recipe, planned, num_tiles)
    if passes is None:
        reporter.info(
            f"  {num_tiles} tiles of slices; how often they are seen depends on the speed, and is told at the end"
        )
        return
    reporter.info(f"  {num_tiles} tiles of slices, each seen about {passes:.2g} times on average")
    if passes < 1:
        epochs = math.ceil(num_tiles / (recipe.iterations * recipe.batch_size))
        minutes = "" if recipe.minutes is None else f"--time-limit {math.ceil(recipe.minutes / passes)} or "
        reporter.warn(
            f"the run is shorter than one pass over the {num_tiles} tiles of slices: {minutes}--epochs {epochs} "
            "makes it one"
        )


def _drawn(recipe: ResolvedRecipe) -> int:
    return recipe.iterations * recipe.epochs * recipe.batch_size
