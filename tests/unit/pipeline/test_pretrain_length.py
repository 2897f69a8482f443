"""How long a pretraining run is for the slices that it sees, and what is said of it."""

from __future__ import annotations

import pytest

from samunet.core.log import SilentReporter
from samunet.pipeline.pretrain_length import expected_passes, tell_length, with_length_for
from samunet.planners import schedule
from tests.unit.models.model_helpers import recipe

PLANNED = recipe(iterations=250, epochs=12, batch_size=10, warmup_steps=250, ema_decay=0.9)


@pytest.mark.parametrize(("num_tiles", "steps"), [(100, 3000), (1000, 10_000), (50_000, 40_000)])
def test_steps_are_those_of_the_tiles_that_are_seen(num_tiles: int, steps: int) -> None:
    """By the rule of training, with what follows from the number of steps."""
    longer = with_length_for(PLANNED, num_tiles)
    assert longer.iterations * longer.epochs == steps == schedule.dataset_steps(num_tiles, 10)[0]
    assert longer.warmup_steps == schedule.warmup_steps(steps)[0]
    assert longer.ema_decay == schedule.ema_decay(steps)[0]


def test_minutes_stay_the_length_where_they_decide() -> None:
    """A plan for a CPU is as long as its minutes, however many images there are."""
    planned = recipe(minutes=60.0)
    assert with_length_for(planned, 50_000) == planned


def test_passes_follow_steps_or_minutes() -> None:
    """A time limit has as many steps as its share of the planned minutes; without these nobody has estimated any."""
    planned = recipe(minutes=60.0, iterations=100, epochs=40, batch_size=4)
    assert expected_passes(planned, planned, 8000) == pytest.approx(2.0)
    assert expected_passes(recipe(minutes=15.0, epochs=40), planned, 8000) == pytest.approx(0.5)
    assert expected_passes(recipe(iterations=10, epochs=3, batch_size=2), planned, 30) == pytest.approx(2.0)
    assert expected_passes(recipe(minutes=15.0), PLANNED, 30) is None


@pytest.mark.parametrize(
    ("minutes", "words"),
    [(60.0, "--time-limit 300 or --epochs 200 makes it one"), (None, "of slices: --epochs 200 makes it one")],
)
def test_less_than_one_pass_is_a_warning_with_the_options(minutes: float | None, words: str) -> None:
    """The numbers are those of one whole pass; a run of one pass or more is only told."""
    run = recipe(minutes=minutes, iterations=100, epochs=40, batch_size=5)
    told = SilentReporter()
    tell_length(run, run, 100_000, told)
    assert "100000 tiles of slices, each seen about 0.2 times" in told.messages[0]
    assert [words in text for text in told.warnings] == [True]
    told = SilentReporter()
    tell_length(run, run, 20_000, told)
    assert not told.warnings
    told = SilentReporter()
    tell_length(recipe(minutes=5.0), PLANNED, 20_000, told)
    assert "told at the end" in told.messages[0]
