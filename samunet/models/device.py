"""Which device a run uses, and how a model is laid out on it."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from samunet.core.errors import UsageError

if TYPE_CHECKING:
    from torch import nn

Model = TypeVar("Model", bound="nn.Module")


def resolve_device(name: str) -> str:
    """A torch device that exists, from "auto", "cpu", "cuda", "cuda:N" or "mps".

    Raises:
        UsageError: If it does not exist here; the message lists those that do.
    """
    import torch

    there = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if torch.backends.mps.is_available():
        there.append("mps")
    if name == "auto":
        return "cuda" if len(there) > 1 and there[1].startswith("cuda") else there[-1]
    if name in there or (name == "cuda" and torch.cuda.is_available()):
        return name
    raise UsageError("this device does not exist here", expected=f"auto, {', '.join(there)}", found=name)


def place(model: Model, device: str) -> Model:
    """Move a model to a device, with its convolutions laid out channels last, which they compute faster in."""
    import torch

    return model.to(device).to(memory_format=torch.channels_last)


def device_class(device: str) -> str:
    """The plan's class of a device: "cpu", or "gpu" for everything else."""
    return "cpu" if device == "cpu" else "gpu"
