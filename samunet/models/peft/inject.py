"""Inject a list of adaptations into an encoder."""

from __future__ import annotations

from collections.abc import Sequence

from samunet.models.peft.protocol import Injector
from samunet.models.sam.encoder import SamEncoder


def inject(encoder: SamEncoder, injectors: Sequence[Injector]) -> None:
    """Apply the injectors in order.

    Args:
        encoder: Changed in place; its output stays the same until the new parameters are trained.
        injectors: May be empty.

    Raises:
        ConfigError: If one does not fit the encoder.
    """
    for injector in injectors:
        injector.inject(encoder)
