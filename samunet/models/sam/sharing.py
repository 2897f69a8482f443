"""What every module does that stands for an upstream one."""

from __future__ import annotations

from torch import nn


def share_weights(stand_in: nn.Module, upstream: nn.Module) -> None:
    """Give a module another one's own parameters, buffers and children, shared and under the same names.

    So keys of the weights stay, and what was or will be injected into the children works. The training mode is copied.

    Args:
        stand_in: Changed in place.
        upstream: What it stands for; its own buffers become ones that no state holds, as upstream's are.
    """
    for name, parameter in upstream.named_parameters(recurse=False):
        stand_in.register_parameter(name, parameter)
    for name, buffer in upstream.named_buffers(recurse=False):
        stand_in.register_buffer(name, buffer, persistent=False)
    for name, child in upstream.named_children():
        stand_in.add_module(name, child)
    stand_in.training = upstream.training
