"""samunet: self-configuring adaptation of the Segment Anything Model to any 3D medical dataset."""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "Geometry": "samunet.core.geometry",
    "Volume": "samunet.core.volume",
    "SamunetError": "samunet.core.errors",
    "Plan": "samunet.artifacts.plan",
    "Workspace": "samunet.artifacts.workspace",
    "read_volume": "samunet.imageio",
    "write_labels": "samunet.imageio",
    "plan_and_preprocess": "samunet.pipeline.plan",
    "train": "samunet.pipeline.train",
    "predict": "samunet.pipeline.predict",
    "evaluate": "samunet.pipeline.evaluate",
    "Predictor": "samunet.inference.predictor",
}

__all__ = ["__version__", *sorted(_PUBLIC)]


def __getattr__(name: str) -> Any:
    """Import public names on first use, so that ``import samunet`` loads no torch."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'samunet' has no attribute '{name}'")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
