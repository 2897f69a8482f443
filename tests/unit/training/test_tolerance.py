"""Writing that fails is told and tried again."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from samunet.core.errors import CheckpointError
from samunet.core.log import SilentReporter
from samunet.training.tolerance import Attempts


def failing(error: Exception):
    """An action that fails."""

    def action() -> None:
        raise error

    return action


def full(name: str) -> OSError:
    """What a full disk answers."""
    return OSError(errno.ENOSPC, "No space left on device", name)


def test_each_cause_is_told_once_until_it_works_again():
    """Names of temporary files make no other cause; another error does, and so does the same one later."""
    reporter = SilentReporter()
    attempts = Attempts(reporter)
    assert not attempts.attempt("saving", failing(full(".partial-1")))
    assert not attempts.attempt("saving", failing(full(".partial-2")))
    assert len(reporter.warnings) == 1
    assert "No space left" in reporter.warnings[0]
    assert not attempts.attempt("logging", failing(full("log")))
    assert not attempts.attempt("saving", failing(CheckpointError("cannot be written", file=Path("x"))))
    assert len(reporter.warnings) == 3
    assert attempts.attempt("saving", lambda: None)
    assert reporter.messages == ["saving works again"]
    assert not attempts.attempt("saving", failing(full(".partial-3")))
    assert len(reporter.warnings) == 4


def test_a_fault_of_the_program_is_not_hidden():
    """Only what writing files can raise is tried again."""
    with pytest.raises(ValueError, match="planted"):
        Attempts(SilentReporter()).attempt("saving", failing(ValueError("planted")))
