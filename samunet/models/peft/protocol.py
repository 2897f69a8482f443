"""What every injected module and every injector offers."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import nn

from samunet.models.sam.encoder import SamEncoder


@runtime_checkable
class AdapterModule(Protocol):
    """A module that holds new parameters beside those of the module it stands for.

    Source: the protocol of torchtune's modules/peft.
    """

    def adapter_params(self) -> list[str]:
        """Names of the new parameters, relative to the module."""


@runtime_checkable
class MergeableModule(Protocol):
    """An adapter module whose effect can be written into the base weights exactly."""

    def merged(self) -> nn.Module:
        """The plain module that computes the same."""


class Injector(Protocol):
    """A choice of what to inject, as data."""

    def inject(self, encoder: SamEncoder) -> None:
        """Put the modules into the encoder; upstream keys of the base weights stay as they are.

        Raises:
            ConfigError: If it does not fit the encoder.
        """
