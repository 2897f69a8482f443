"""How training images are varied, as a plan says it."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from samunet.artifacts.decided import Finite
from samunet.core.config import Schema


class Augmentation(Schema):
    """How training images are varied. The words "full" and "none" of older plans are understood.

    Args:
        enabled: Whether images are varied at all, mirrored ones included.
        rotation_deg: Largest in-plane rotation to either side, in degrees.
        scale: Least and largest factor by which a tile is scaled.
        frequency: Factor on the probabilities of nnU-Net's table.
    """

    enabled: bool = True
    rotation_deg: float = Field(default=15.0, ge=0, le=180)
    scale: tuple[Finite, Finite] = (0.7, 1.4)
    frequency: float = Field(default=1.0, ge=0, le=10)

    @model_validator(mode="before")
    @classmethod
    def _from_word(cls, content: Any) -> Any:
        return {"enabled": content == "full"} if content in ("full", "none") else content

    @model_validator(mode="after")
    def _ordered(self) -> Augmentation:
        if not 0 < self.scale[0] <= self.scale[1]:
            raise ValueError(f"scale needs 0 < least <= largest, found {self.scale}")
        return self

    def __str__(self) -> str:
        """In a few words."""
        if not self.enabled:
            return "none"
        least, largest = self.scale
        words = [f"{self.rotation_deg:g} deg, x {least:g} to {largest:g}"]
        words += [f"{self.frequency:g} times as often"] * (self.frequency != 1)
        return ", ".join(words)
