"""Convolutions over neighbouring slices inside bottlenecks.

Shapes: B slices, S slabs, d slices per slab, D token width, w bottleneck width.

Source: Chen et al., MA-SAM, 2024.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from samunet.artifacts.method import DepthConvolution
from samunet.models.peft.blocks import adapt_block, chosen_blocks, match, put
from samunet.models.sam.encoder import SamEncoder
from samunet.models.volumetric.slab import Slab

NEIGHBOURS = (3, 1, 1)


class DepthConvolutionAdapter(nn.Module):
    """x + up(GELU(convolution over depth(down(norm(x))))), on the unpartitioned map.

    ``up`` starts at zero, so that the module starts as the identity; the published code starts it at random.

    Args:
        dim: Token width D.
        width: Bottleneck width w.
        slab: Tells how many slices belong together.
    """

    kind = "depth convolution"

    def __init__(self, dim: int, width: int, *, slab: Slab) -> None:
        super().__init__()
        self.slab = slab
        self.norm = nn.LayerNorm(dim)
        self.down = nn.Linear(dim, width, bias=False)
        self.conv = nn.Conv3d(width, width, kernel_size=NEIGHBOURS, padding="same")
        self.up = nn.Linear(width, dim, bias=False)
        nn.init.zeros_(self.up.weight)

    def adapter_params(self) -> list[str]:
        """Names of all its parameters."""
        return [name for name, _ in self.named_parameters()]

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, D) to the same shape; a slice sees itself and its two neighbours in the slab.

        Raises:
            ConfigError: If the batch holds no whole slabs.
        """
        volume = self.slab.split(self.down(self.norm(x))).permute(0, 4, 1, 2, 3)
        mixed = functional.gelu(self.conv(volume)).permute(0, 2, 3, 4, 1).flatten(0, 1)
        result: Tensor = x + self.up(mixed)
        return result


def inject_depth_convolution(encoder: SamEncoder, choice: DepthConvolution) -> None:
    """Put convolutions over depth at the chosen sites of the chosen blocks.

    Raises:
        ConfigError: If a block does not exist, or a site is taken.
    """
    dims = encoder.token_dims()
    for index in chosen_blocks(encoder, choice.blocks):
        block = adapt_block(encoder, index)
        for site in choice.sites:
            adapter = DepthConvolutionAdapter(dims[index], choice.width, slab=encoder.slab)
            put(block, site, match(adapter, encoder))
