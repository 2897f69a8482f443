"""How many consecutive slices of a batch belong together."""

from __future__ import annotations

from torch import Tensor

from samunet.core.errors import ConfigError


class Slab:
    """The number of slices per slab, shared by an encoder and the depth modules inside it.

    Set ``depth`` before each forward; a batch holds the slices of one slab one after another, then the next slab's.
    """

    def __init__(self) -> None:
        self.depth = 1

    def split(self, x: Tensor) -> Tensor:
        """Give the slices of a slab their own axis.

        Args:
            x: (slabs * depth, ...).

        Returns:
            (slabs, depth, ...).

        Raises:
            ConfigError: If the batch does not consist of whole slabs.
        """
        if self.depth < 1 or x.shape[0] % self.depth:
            raise ConfigError(
                "the batch does not consist of whole slabs",
                expected=f"a multiple of {self.depth} slices",
                found=str(x.shape[0]),
            )
        return x.reshape(-1, self.depth, *x.shape[1:])
