"""Case-wise work: order, errors per case, killed processes."""

from __future__ import annotations

import os
import signal
import time

import pytest

from samunet.core.errors import ConfigError, DataError
from samunet.core.log import SilentReporter
from samunet.distributed.casewise import Outcome, map_cases


def work(item: int) -> int:
    """Square a number; some numbers misbehave."""
    if item == 3:
        raise ConfigError("three is refused", expected="any other number")
    if item == 4:
        raise ZeroDivisionError("four is a bug")
    if item == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    if item == 0:
        time.sleep(0.3)
    return item * item


def threads(item: int) -> tuple[int, str | None]:
    """The worker's process and its thread setting."""
    time.sleep(0.2)
    return os.getpid(), os.environ.get("OMP_NUM_THREADS")


def run(items: list[int], processes: int) -> list[Outcome[int]]:
    return map_cases(
        work, items, processes=processes, reporter=SilentReporter(), what="squares", name_of=lambda item: f"case{item}"
    )


def check_errors(outcomes: list[Outcome[int]]) -> None:
    by_name = {outcome.name: outcome for outcome in outcomes}
    refused, bug = by_name["case3"].error, by_name["case4"].error
    assert isinstance(refused, ConfigError)
    assert refused.expected == "any other number"
    assert refused.case == "case3"
    assert isinstance(bug, DataError)
    assert bug.case == "case4"
    assert "ZeroDivisionError: four is a bug" in str(bug)
    assert "Traceback" not in str(bug)


def test_one_process_keeps_order_and_errors_per_case() -> None:
    """Inline work returns outcomes in order, a failed case among them."""
    outcomes = run([0, 1, 3, 4, 2], processes=1)
    assert [outcome.result for outcome in outcomes] == [0, 1, None, None, 4]
    assert [outcome.succeeded for outcome in outcomes] == [True, True, False, False, True]
    check_errors(outcomes)


def test_several_processes_survive_errors_and_a_killed_worker(capfd: pytest.CaptureFixture[str]) -> None:
    """A case that kills its process fails alone; the others arrive in order and nothing is printed."""
    outcomes = run([0, 5, 1, 3, 4, 2, 6, 7], processes=2)
    assert [outcome.result for outcome in outcomes] == [0, None, 1, None, None, 4, 36, 49]
    check_errors(outcomes)
    killed = outcomes[1].error
    assert isinstance(killed, DataError)
    assert killed.case == "case5"
    assert "killed" in str(killed)
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err == ""


def test_workers_are_separate_single_threaded_processes() -> None:
    """Two workers run in two other processes, each with one OpenMP thread."""
    outcomes = map_cases(threads, [0, 1, 2, 3], processes=2, reporter=SilentReporter(), what="", name_of=str)
    results = [outcome.result for outcome in outcomes if outcome.result is not None]
    assert len(results) == 4
    assert len({pid for pid, _ in results}) == 2
    assert os.getpid() not in {pid for pid, _ in results}
    assert {setting for _, setting in results} == {"1"}


def test_no_items_need_no_process() -> None:
    """Nothing to do gives an empty list without starting a cluster."""
    assert map_cases(work, [], processes=4, reporter=SilentReporter(), what="", name_of=str) == []
