"""How a stage tells what it is doing without knowing who listens: only cli/render prints."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol, TypeVar

Item = TypeVar("Item")


class Reporter(Protocol):
    """Receives messages and progress."""

    def info(self, message: str) -> None:
        """A line worth reading."""

    def warn(self, message: str) -> None:
        """A line the user should act on."""

    def status(self, message: str) -> None:
        """The current state, replacing the previous one on a terminal."""

    def track(self, items: Iterable[Item], *, total: int, what: str) -> Iterator[Item]:
        """Pass items through while showing progress."""


class SilentReporter:
    """Keeps messages and shows nothing; the default for the Python API and for tests."""

    def __init__(self) -> None:
        self.messages: list[str] = []
        self.warnings: list[str] = []

    def info(self, message: str) -> None:
        """Keep a line."""
        self.messages.append(message)

    def warn(self, message: str) -> None:
        """Keep a warning."""
        self.warnings.append(message)

    def status(self, message: str) -> None:
        """Drop a transient line."""

    def track(self, items: Iterable[Item], *, total: int, what: str) -> Iterator[Item]:
        """Pass items through."""
        yield from items
