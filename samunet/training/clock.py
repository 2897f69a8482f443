"""What tells the minutes of a run: the wall's clock, or this process's own."""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic, process_time

from samunet.artifacts.checkpoint import ClockName
from samunet.core.cores import MOST_PROCESSES, available_cores
from samunet.core.errors import UsageError

CLOCKS: dict[ClockName, Callable[[], float]] = {"wall": monotonic, "processor": process_time}


def clock_of_run(recorded: ClockName | None, *, processor: bool, resume: bool) -> ClockName:
    """The clock that a run counts with; one that is continued keeps its own.

    Args:
        recorded: Of the run that is continued; None if it does not say.
        processor: Whether the processor's clock is asked for.
        resume: Whether a run is continued.

    Raises:
        UsageError: If it is continued with another clock than it began with.
    """
    if not resume or recorded is None:
        return "processor" if processor else "wall"
    if processor and recorded != "processor":
        raise UsageError(
            "a run that is continued keeps its clock",
            expected="no --cpu-clock: its minutes were counted by the wall's clock",
            found="--cpu-clock",
            todo="leave it out, or start a new run with --overwrite",
        )
    return recorded


def loader_workers(asked: int | None, clock: ClockName, device: str) -> int:
    """How many processes read the data.

    Args:
        asked: By the user; None: one beside a CPU that trains, a few beside a GPU.
        clock: Of the run. The processor's clock counts this process alone, so that it has to read the data itself.
        device: Where it trains.

    Raises:
        UsageError: If the loader's time would not be counted.
    """
    if clock == "processor":
        if asked:
            raise UsageError(
                "--cpu-clock counts the time of one process, and loader processes would work for free",
                expected="--workers 0, which is what --cpu-clock takes by itself",
                found=f"--workers {asked}",
            )
        return 0
    return default_workers(device) if asked is None else asked


def default_workers(device: str) -> int:
    """Loader processes: one beside a CPU that trains, a few beside a GPU."""
    return 1 if device == "cpu" else max(1, min(MOST_PROCESSES, available_cores() - 1))
