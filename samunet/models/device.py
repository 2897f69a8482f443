"""Which device a run uses, how a model is laid out on it, and what it says of its memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from samunet.core.errors import UsageError

if TYPE_CHECKING:
    from torch import nn

    from samunet.artifacts.plan import DeviceClass, ResolvedRecipe

Model = TypeVar("Model", bound="nn.Module")

_ALLOCATOR = "DefaultCPUAllocator: "
# What allocators and libraries say that raise no torch.OutOfMemoryError.
_REFUSALS = (
    f"{_ALLOCATOR}can't allocate memory",
    f"{_ALLOCATOR}not enough memory",
    "MPS backend out of memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)


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


def free_bytes(device: str) -> int:
    """Memory of a GPU that tensors may still take: what nobody holds, and what torch holds without using it.

    Args:
        device: "cuda", "cuda:N" or "mps".
    """
    import torch

    if device == "mps":
        return max(0, torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory())
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def ran_out(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a GPU or on the CPU."""
    import torch

    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _REFUSALS)


def release_memory() -> None:
    """Give back what is no longer held: graphs in reference cycles, blocks that the GPU's allocator keeps."""
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if torch.backends.mps.is_available():
        torch.mps.empty_cache()


def device_class(device: str) -> DeviceClass:
    """The plan's class of a device: "cpu", or "gpu" for everything else."""
    return "cpu" if device == "cpu" else "gpu"
