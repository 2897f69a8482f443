"""What may fail while a run goes on: it is told, and tried again later or done without."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from samunet.core.errors import CheckpointError, OutOfMemoryError
from samunet.core.log import Reporter
from samunet.models.device import ran_out, release_memory

Found = TypeVar("Found")


class Attempts:
    """Writes what a run can do without for now; a full disk or a lost share stops no training.

    Args:
        reporter: Is warned once for each cause until it works again.
    """

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter
        self._failing: dict[str, str] = {}

    def attempt(self, what: str, action: Callable[[], None]) -> bool:
        """Whether an action that writes files succeeded.

        Args:
            what: Its name for the user.
            action: Raises OSError or CheckpointError where it does not.
        """
        try:
            action()
        except (OSError, CheckpointError) as error:
            # Not the whole message: it names another temporary file every time.
            cause = error.problem if isinstance(error, CheckpointError) else error.strerror or str(error)
            if self._failing.get(what) != cause:
                self._reporter.warn(f"{what} failed, is tried again later, and training goes on: {error}")
            self._failing[what] = cause
            return False
        if self._failing.pop(what, None) is not None:
            self._reporter.info(f"{what} works again")
        return True

    def in_memory(self, what: str, action: Callable[[], Found]) -> Found | None:
        """What an action gives that a run can do without; None where memory does not suffice for it.

        Args:
            what: Its name for the user, with when it was.
            action: Raises what :func:`ran_out` knows, or OutOfMemoryError, where it does not.
        """
        try:
            return action()
        except (RuntimeError, MemoryError) as error:
            if not ran_out(error):
                raise
            found = str(error).split("\n")[0]
        except OutOfMemoryError as error:
            found = error.found or error.problem
        # Outside of the except clauses, whose tracebacks would keep the failed action's tensors.
        release_memory()
        self._reporter.warn(f"memory ran out while {what} ({found}): skipped; training goes on")
        return None
