"""The same work on every case of a dataset, in several processes, where one bad case stops none of the others."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from samunet.core.errors import DataError, SamunetError
from samunet.core.log import Reporter

Item = TypeVar("Item")
Result = TypeVar("Result")

_SINGLE_THREADED = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "NUMEXPR_MAX_THREADS": "1",
}


@dataclass(frozen=True)
class Outcome(Generic[Result]):
    """What became of one case: a result, or the error that says why there is none.

    Args:
        name: Case name.
        result: What the function returned; None if it failed.
        error: Why it failed; None if it did not.
    """

    name: str
    result: Result | None
    error: SamunetError | None = None

    @property
    def succeeded(self) -> bool:
        """Whether the case has no error."""
        return self.error is None


def map_cases(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    *,
    processes: int,
    reporter: Reporter,
    what: str,
    name_of: Callable[[Item], str],
) -> list[Outcome[Result]]:
    """Apply a function to every item, showing progress; errors are kept per case instead of raised.

    With one process (or one item) everything runs in this process. Otherwise a dask cluster on this machine's
    loopback interface is started, one single-threaded process per worker. A case whose process was killed is tried
    once more alone: it may have been a victim of what ran beside it, or of memory that was short while others ran.

    Args:
        function: Picklable if there are several processes.
        items: Small and picklable, as file paths are.
        processes: Number of worker processes.
        reporter: Told about progress.
        what: Name of the work in the progress display.
        name_of: Case name of an item, for messages.

    Returns:
        One outcome per item, in the order of the items.
    """
    names = [name_of(item) for item in items]
    workers = min(processes, len(items))
    outcomes: dict[int, Outcome[Result]] = {}
    finished = _in_process(function, items, names) if workers <= 1 else _in_cluster(function, items, names, workers)
    for index, outcome in reporter.track(finished, total=len(items), what=what):
        outcomes[index] = outcome
    return [outcomes[index] for index in range(len(items))]


def _in_process(
    function: Callable[[Item], Result], items: Sequence[Item], names: Sequence[str]
) -> Iterator[tuple[int, Outcome[Result]]]:
    for index, (item, name) in enumerate(zip(items, names, strict=True)):
        yield index, _run_case(function, item, name)


def _in_cluster(
    function: Callable[[Item], Result], items: Sequence[Item], names: Sequence[str], workers: int
) -> Iterator[tuple[int, Outcome[Result]]]:
    """Yield (index, outcome) as cases finish; as many in flight as workers, so that none waits behind a doomed one."""
    from distributed import KilledWorker, as_completed

    with _local_client(workers) as client:

        def submit(index: int) -> Any:
            future = client.submit(_run_case, function, items[index], names[index], pure=False)
            future.case_index = index
            return future

        killed: list[int] = []
        waiting = iter(range(len(items)))
        first = [submit(index) for _, index in zip(range(workers), waiting, strict=False)]
        running = as_completed(first)  # type: ignore[no-untyped-call]
        for future in running:
            following = next(waiting, None)
            if following is not None:
                running.add(submit(following))  # type: ignore[no-untyped-call]
            if isinstance(future.exception(), KilledWorker):
                killed.append(future.case_index)
            else:
                yield future.case_index, _collect(future, names[future.case_index])
        for index in killed:
            yield index, _collect(submit(index), names[index])


def _run_case(function: Callable[[Item], Result], item: Item, name: str) -> Outcome[Result]:
    """Run one case; whatever it raises becomes its outcome's error, without a traceback."""
    try:
        return Outcome(name, function(item))
    except SamunetError as error:
        error.case = error.case or name
        return Outcome(name, None, error)
    except Exception as error:
        return Outcome(name, None, _unexpected(error, name))


def _collect(future: Any, name: str) -> Outcome[Any]:
    from distributed import KilledWorker

    try:
        outcome: Outcome[Any] = future.result()
    except KilledWorker:
        error = DataError(
            "the process working on this case was killed twice",
            case=name,
            todo="most often memory ran out: use fewer processes (-np), and check the size of this case",
        )
        return Outcome(name, None, error)
    except Exception as error:
        return Outcome(name, None, _unexpected(error, name))
    return outcome


def _unexpected(error: Exception, name: str) -> DataError:
    return DataError("this case failed unexpectedly", case=name, found=f"{type(error).__name__}: {error}")


@contextmanager
def _local_client(workers: int) -> Iterator[Any]:
    """A quiet dask client with fresh single-threaded processes that only this machine can reach."""
    import dask
    from distributed import Client, LocalCluster

    settings = {
        "distributed.scheduler.allowed-failures": 0,
        "distributed.worker.multiprocessing-method": "spawn",
        "distributed.nanny.pre-spawn-environ": _SINGLE_THREADED,
        "distributed.admin.low-level-log-length": 0,
        "logging": {"distributed": "critical", "bokeh": "critical", "tornado": "critical"},
    }
    with warnings.catch_warnings(), dask.config.set(settings):
        warnings.simplefilter("ignore")
        with (
            LocalCluster(  # type: ignore[no-untyped-call]
                n_workers=workers,
                threads_per_worker=1,
                processes=True,
                host="127.0.0.1",
                dashboard_address=None,
                memory_limit=0,
                silence_logs=logging.CRITICAL,
            ) as cluster,
            Client(cluster) as client,  # type: ignore[no-untyped-call]
        ):
            yield client
