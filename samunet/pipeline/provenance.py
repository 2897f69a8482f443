"""What a result was made with: versions, machine, command, time."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

PACKAGES = ("samunet", "torch", "segment-anything", "timm", "numpy", "batchgenerators", "nibabel", "blosc2")


def describe(command: Sequence[str] | None = None) -> dict[str, Any]:
    """Versions of the packages that decide a result, the machine, and the command line."""
    import torch

    return {
        "command": list(sys.argv if command is None else command),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "machine": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
