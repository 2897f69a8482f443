"""What is trained at once, as far as memory is concerned."""

from __future__ import annotations

from dataclasses import dataclass

from samunet.artifacts.method import Method
from samunet.artifacts.model_spec import SamSpec


@dataclass(frozen=True)
class Load:
    """What is trained at once, as far as memory is concerned.

    Args:
        spec: The backbone.
        input_size: Encoder side S in pixels.
        tile_vox: Side V of the loss's grid in voxels.
        num_tokens: Mask tokens T.
        slices: Slices per forward.
        method: What trains.
        slab_depth: Slices per slab.
        checkpointing: Whether blocks keep only their input.
        precision: "fp32", "bf16" or "fp16" (autocast: weights stay float32).
        attention: "upstream" keeps score matrices, "folded" none, "folded_global" those of windows.
        accumulates: Whether a step has several such parts, so that gradients of those before are there all the time.
    """

    spec: SamSpec
    input_size: int
    tile_vox: int
    num_tokens: int
    slices: int
    method: Method
    slab_depth: int = 1
    checkpointing: bool = False
    precision: str = "fp32"
    attention: str = "upstream"
    accumulates: bool = False

    @property
    def is_half(self) -> bool:
        """Whether matrix products are computed in two bytes."""
        return self.precision != "fp32"

    @property
    def width(self) -> int:
        """Bytes of a number that autocast makes smaller."""
        return 2 if self.is_half else 4
