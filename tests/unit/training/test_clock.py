"""Which clock counts the minutes of a run, and who reads its data then."""

from __future__ import annotations

from time import monotonic, process_time

import pytest

from samunet.core.errors import UsageError
from samunet.training.clock import CLOCKS, clock_of_run, loader_workers


def test_a_run_keeps_the_clock_it_began_with() -> None:
    """Continued without a word it goes on with its own; another is refused; an old run that says nothing may choose."""
    assert clock_of_run(None, processor=True, resume=False) == "processor"
    assert clock_of_run(None, processor=False, resume=False) == "wall"
    assert clock_of_run("processor", processor=False, resume=True) == "processor"
    assert clock_of_run("processor", processor=True, resume=True) == "processor"
    assert clock_of_run(None, processor=True, resume=True) == "processor"
    with pytest.raises(UsageError, match="keeps its clock"):
        clock_of_run("wall", processor=True, resume=True)
    assert {"wall": monotonic, "processor": process_time} == CLOCKS


def test_the_processors_clock_reads_the_data_itself() -> None:
    """No loader process works for free: none by default, and to ask for one is refused."""
    assert loader_workers(None, "processor", "cpu") == 0
    assert loader_workers(0, "processor", "cuda") == 0
    assert loader_workers(None, "wall", "cpu") == 1
    assert loader_workers(3, "wall", "cpu") == 3
    with pytest.raises(UsageError, match="work for free"):
        loader_workers(1, "processor", "cpu")
