"""Which device a run uses, and how a model is laid out on it."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from samunet.core.errors import UsageError

if TYPE_CHECKING:
    from torch import nn

    from samunet.artifacts.plan import DeviceClass, ResolvedRecipe

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


def usable_precision(recipe: ResolvedRecipe, device: str) -> str:
    """The precision a recipe runs in on a device.

    A GPU recipe runs in float32 on a CPU, and bfloat16 becomes float16 on a GPU that does not compute in it.
    """
    import torch

    if device == "cpu" and recipe.device_class != "cpu":
        return "fp32"
    lacks_bf16 = device.startswith("cuda") and not torch.cuda.is_bf16_supported(including_emulation=False)
    return "fp16" if recipe.precision == "bf16" and lacks_bf16 else recipe.precision


def place(model: Model, device: str) -> Model:
    """Move a model to a device, with its 2D convolutions laid out channels last, which they compute faster in."""
    import torch
    from torch import nn

    model.to(device)
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            module.to(memory_format=torch.channels_last)
    return model


def release(device: str) -> None:
    """Give back the memory of what is no longer held."""
    import gc

    import torch

    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()


def device_class(device: str) -> DeviceClass:
    """The plan's class of a device: "cpu", or "gpu" for everything else."""
    return "cpu" if device == "cpu" else "gpu"
