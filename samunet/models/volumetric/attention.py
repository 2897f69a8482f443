"""Attention over the slices of a slab at every position, beside a block's attention inside each slice.

Shapes: B slices, S slabs, d slices per slab, N positions, D token width.

Source: Wu et al., Medical SAM Adapter, 2025, SD-Trans.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from samunet.artifacts.method import DepthAttention
from samunet.core.errors import ConfigError
from samunet.models.peft.blocks import adapt_block, chosen_blocks, match, put
from samunet.models.peft.bottleneck import Activation, BottleneckAdapter, hidden_width
from samunet.models.sam.encoder import SamEncoder
from samunet.models.volumetric.slab import Slab


class DepthAttentionBranch(nn.Module):
    """The depth branch: the block's own q, k, v and output layers over depth, then a bottleneck that starts at zero.

    ``depth_bias`` (2 * max_depth - 1, heads), zero at the start, is added to the scores by the distance of two slices,
    so that their order counts. The published code attends over whatever lies side by side in the batch, which after
    window partitioning are windows of one slice, and has no depth positions; here the whole map is regrouped.

    Args:
        dim: Token width D.
        num_heads: Of the block's attention.
        ratio: Hidden width of the bottleneck over D.
        layout: How q, k and v lie in the fused layer.
        slab: Tells how many slices belong together.
        max_depth: Most slices of a slab.
        activation: Inside the bottleneck.
    """

    kind = "depth attention"

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        ratio: float,
        layout: Literal["stacked", "per_head"],
        slab: Slab,
        max_depth: int,
        activation: Activation = "gelu",
    ) -> None:
        super().__init__()
        self.num_heads, self.layout, self.slab, self.max_depth = num_heads, layout, slab, max_depth
        self.depth_bias = nn.Parameter(torch.zeros(2 * max_depth - 1, num_heads))
        self.adapter = BottleneckAdapter(dim, hidden_width(dim, ratio), skip=False, activation=activation)

    def adapter_params(self) -> list[str]:
        """Names of the position table; the bottleneck names its own."""
        return ["depth_bias"]

    def forward(self, normed: Tensor, attention: nn.Module) -> Tensor:
        """What is added to the residual.

        Args:
            normed: Normalised tokens (B, H, W, D) of the unpartitioned map.
            attention: The block's attention module, for its ``qkv`` and ``proj``.

        Raises:
            ConfigError: If a slab is deeper than the position table, or the batch holds no whole slabs.
        """
        self._check_depth()
        q, k, v = self._heads(attention.qkv(normed))  # type: ignore[operator]
        # The d x d scores of a position are smaller than its q, k and v; fused kernels limit the number of sequences.
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1) + self._bias()
        mixed = scores.softmax(dim=-1) @ v
        tokens = mixed.permute(0, 3, 1, 2, 4).reshape(normed.shape)
        result: Tensor = self.adapter(attention.proj(tokens))  # type: ignore[operator]
        return result

    def _heads(self, fused: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, H, W, 3 D) to q, k and v, each (S, N, heads, d, D / heads)."""
        positions = self.slab.split(fused).flatten(2, 3)
        if self.layout == "stacked":
            parts = positions.reshape(*positions.shape[:3], 3, self.num_heads, -1).permute(3, 0, 2, 4, 1, 5)
        else:
            parts = positions.reshape(*positions.shape[:3], self.num_heads, 3, -1).permute(4, 0, 2, 3, 1, 5)
        q, k, v = parts.unbind(0)
        return q, k, v

    def _bias(self) -> Tensor:
        """(heads, d, d)."""
        steps = torch.arange(self.slab.depth, device=self.depth_bias.device)
        distance = steps[:, None] - steps[None, :] + self.max_depth - 1
        return self.depth_bias[distance].permute(2, 0, 1)

    def _check_depth(self) -> None:
        if self.slab.depth > self.max_depth:
            raise ConfigError(
                "the slab is deeper than the depth attention was built for",
                expected=f"at most {self.max_depth} slices",
                found=str(self.slab.depth),
                todo="train with a larger slab_depth, or give shallower slabs",
            )


def inject_depth_attention(encoder: SamEncoder, choice: DepthAttention, *, max_depth: int) -> None:
    """Put a depth branch beside the attention of the chosen blocks.

    Raises:
        ConfigError: If a block does not exist or has a depth branch, or the depth is not positive.
    """
    if max_depth < 1:
        raise ConfigError("depth attention needs slices", expected="at least 1", found=str(max_depth))
    dims, layers = encoder.token_dims(), encoder.attention_layers()
    for index in chosen_blocks(encoder, choice.blocks):
        branch = DepthAttentionBranch(
            dims[index],
            int(layers[index].num_heads),  # type: ignore[arg-type]
            ratio=choice.ratio,
            layout=encoder.qkv_layout,
            slab=encoder.slab,
            max_depth=max_depth,
            activation=choice.activation,
        )
        put(adapt_block(encoder, index), "beside_attention", match(branch, encoder))
