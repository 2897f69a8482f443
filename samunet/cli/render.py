"""The only place that prints: messages, tables, progress, and errors as one message without a traceback."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from samunet.core.errors import SamunetError

Item = TypeVar("Item")
DEBUG_VARIABLE = "SAMUNET_DEBUG"


class TerminalReporter:
    """Shows progress with rich on a terminal, as plain lines otherwise."""

    def __init__(self) -> None:
        self._live = sys.stderr.isatty()
        self._status_shown = False
        self._last_plain_status = 0.0

    def info(self, message: str) -> None:
        """Print a line."""
        self._clear_status()
        print(message, flush=True)

    def warn(self, message: str) -> None:
        """Print a line the user should act on, to standard error."""
        self._clear_status()
        print(f"warning: {message}", file=sys.stderr, flush=True)

    def status(self, message: str) -> None:
        """Show the current state: one rewritten line on a terminal, a line every ten seconds elsewhere."""
        if self._live:
            print(f"\r\x1b[2K{message}", end="", file=sys.stderr, flush=True)
            self._status_shown = True
            return
        from time import monotonic

        if monotonic() - self._last_plain_status >= 10:
            self._last_plain_status = monotonic()
            print(message, file=sys.stderr, flush=True)

    def track(self, items: Iterable[Item], *, total: int, what: str) -> Iterator[Item]:
        """Show a progress bar on a terminal, a line at every tenth elsewhere."""
        self._clear_status()
        if self._live:
            yield from self._track_live(items, total, what)
            return
        step = max(1, total // 10)
        for count, item in enumerate(items, start=1):
            yield item
            if count % step == 0 or count == total:
                print(f"{what}: {count}/{total}", file=sys.stderr, flush=True)

    def _track_live(self, items: Iterable[Item], total: int, what: str) -> Iterator[Item]:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
            yield from progress.track(items, total=total, description=what)

    def _clear_status(self) -> None:
        if self._status_shown:
            print("\r\x1b[2K", end="", file=sys.stderr, flush=True)
            self._status_shown = False


def format_table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A plain aligned table: text left, numbers right with three decimals."""

    def cell(value: Any) -> str:
        return f"{value:.3f}" if isinstance(value, float) else str(value)

    body = [[cell(v) for v in row] for row in rows]
    numeric = [all(_looks_numeric(row[i]) for row in body) for i in range(len(header))]
    widths = [max([len(header[i]), *(len(row[i]) for row in body)]) for i in range(len(header))]

    def line(values: Sequence[str]) -> str:
        cells = [v.rjust(w) if n else v.ljust(w) for v, w, n in zip(values, widths, numeric, strict=True)]
        return "  ".join(cells).rstrip()

    return "\n".join([line(list(header)), line(["-" * w for w in widths]), *(line(row) for row in body)])


def run_command(main: Callable[[], int]) -> int:
    """Run a command body; errors become one message.

    Returns:
        The body's own exit code (0 all well, 1 some cases failed), 2 if an error ended it, 130 if the user did.
    """
    try:
        return main()
    except SamunetError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; what was written is kept", file=sys.stderr, flush=True)
        return 130
    except BrokenPipeError:
        return 1
    except Exception as error:
        if os.environ.get(DEBUG_VARIABLE):
            raise
        print(
            f"error: {type(error).__name__}: {error}\n  what to do: this was not foreseen; set {DEBUG_VARIABLE}=1 to "
            "see where it happened, and report it",
            file=sys.stderr,
            flush=True,
        )
        return 2


def _looks_numeric(text: str) -> bool:
    try:
        float(text.rstrip("%"))
    except ValueError:
        return text in ("", "-", "nan")
    return True
