"""Processor cores that this process may use."""

from __future__ import annotations

import os

MOST_PROCESSES = 8


def available_cores() -> int:
    """How many there are, less those that the system keeps from this process."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_processes() -> int:
    """Processes that share work over cases where nobody said how many: one per core, at most 8."""
    return min(MOST_PROCESSES, available_cores())
