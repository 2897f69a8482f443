"""What every injected module offers."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import nn


@runtime_checkable
class AdapterModule(Protocol):
    """A module that holds new parameters beside those of the module it stands for.

    It starts as the identity. ``kind``, if it has one, is what messages call it.

    Source: the protocol of torchtune's modules/peft.
    """

    def adapter_params(self) -> list[str]:
        """Names of the new parameters, relative to the module."""


@runtime_checkable
class MergeableModule(Protocol):
    """An adapter module whose effect can be written into the base weights exactly."""

    def merged(self) -> nn.Module | None:
        """The plain module that computes the same; None if nothing takes its place."""
