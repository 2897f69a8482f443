"""Attention of SAM's ViT that never holds the score matrix, with upstream's parameters under upstream's names.

Upstream adds a position term to every score: q_i . (Rh[row i - row j] + Rw[column i - column j]), which depends on the
key only through its row and its column. With [] for concatenation the score is therefore one dot product,

    [scale q_i, q_i Rh^T, q_i Rw^T] . [k_j, onehot(row j), onehot(column j)],

and fused attention needs no mask. The one-hot parts are constants and exact in every precision.

Shapes: B images or windows, H x W tokens, N = H W, D token width, n heads, C = D / n, E folded width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from samunet.core.errors import ConfigError
from samunet.models.sam import imports
from samunet.models.sam.encoder import SamEncoder, VitEncoder
from samunet.models.sam.positions import resize_relative
from samunet.models.sam.sharing import share_weights

# Fused kernels want head widths of whole 16-byte vectors of half-precision numbers.
WIDTH_STEP = 8


class PositionTables:
    """The constant tensors that folding needs, made once per size, device and precision; no module, so in no state."""

    def __init__(self) -> None:
        self._distances: dict[tuple[int, torch.device], Tensor] = {}
        self._places: dict[tuple[int, int, int, torch.device, torch.dtype], Tensor] = {}

    def distances(self, side: int, device: torch.device) -> Tensor:
        """Where a table of relative positions holds every pair: index (side, side) of (query, key)."""
        key = (side, device)
        if key not in self._distances:
            # A tensor made in inference mode could not be saved for a later backward pass.
            with torch.inference_mode(False):
                steps = torch.arange(side, device=device)
                self._distances[key] = steps[:, None] - steps[None, :] + side - 1
        return self._distances[key]

    def places(self, height: int, width: int, padding: int, like: Tensor) -> Tensor:
        """One-hot row, one-hot column and zeros of every token: (N, height + width + padding), dtype of ``like``."""
        key = (height, width, padding, like.device, like.dtype)
        if key not in self._places:
            with torch.inference_mode(False):
                rows = torch.eye(height, dtype=like.dtype, device=like.device).repeat_interleave(width, dim=0)
                columns = torch.eye(width, dtype=like.dtype, device=like.device).repeat(height, 1)
                self._places[key] = functional.pad(torch.cat([rows, columns], dim=1), (0, padding))
        return self._places[key]


class FoldedAttention(nn.Module):
    """Stands for segment-anything's attention: same output, same gradients, no score matrix.

    Parameters and layers are the base's own, shared and under the same names, so that what was or will be injected
    into ``qkv`` and ``proj`` works. Tables of relative positions of another length are interpolated as upstream does.

    Args:
        attention: Upstream's module with relative positions.
        tables: Constants, shared by the blocks of an encoder.

    Source: Li et al., MViTv2, 2022, eq. 4 (decomposed relative positions); Dao et al., FlashAttention, 2022.
    """

    qkv: nn.Module
    proj: nn.Module
    rel_pos_h: nn.Parameter
    rel_pos_w: nn.Parameter

    def __init__(self, attention: nn.Module, tables: PositionTables) -> None:
        super().__init__()
        share_weights(self, attention)
        self.num_heads = int(attention.num_heads)  # type: ignore[arg-type]
        self.scale = float(attention.scale)  # type: ignore[arg-type]
        self.tables = tables

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, D) to the same shape."""
        B, H, W, _ = x.shape
        fused = self.qkv(x).reshape(B, H * W, 3, self.num_heads, -1)
        q, k, v = fused.permute(2, 0, 3, 1, 4).unbind(0)
        C = q.shape[-1]
        padding = -(C + H + W) % WIDTH_STEP
        places = self.tables.places(H, W, padding, like=k).expand(B, self.num_heads, -1, -1)
        keys = torch.cat([k, places], dim=-1)
        queries = torch.cat([q * self.scale, *self._positions(q, H, W, padding)], dim=-1)
        # Values are as wide as keys because the fused kernels of CPUs, and the fastest of GPUs, take no other.
        values = functional.pad(v, (0, H + W + padding))
        mixed = functional.scaled_dot_product_attention(queries, keys, values, scale=1.0)[..., :C]
        result: Tensor = self.proj(mixed.transpose(1, 2).reshape(B, H, W, -1))
        return result

    def _positions(self, q: Tensor, H: int, W: int, padding: int) -> tuple[Tensor, Tensor, Tensor]:
        """What a query adds for every row (B, n, N, H) and every column (B, n, N, W), and zeros."""
        grid = q.reshape(*q.shape[:2], H, W, -1)
        rows = torch.einsum("bnhwc,hkc->bnhwk", grid, self._relative(self.rel_pos_h, H)).flatten(2, 3)
        columns = torch.einsum("bnhwc,wkc->bnhwk", grid, self._relative(self.rel_pos_w, W)).flatten(2, 3)
        return rows, columns, q.new_zeros(()).expand(*q.shape[:3], padding)

    def _relative(self, table: Tensor, side: int) -> Tensor:
        """(side, side, C): the table's entry for every (query, key)."""
        return resize_relative(table, 2 * side - 1)[self.tables.distances(side, table.device)]


def fold_attention(encoder: SamEncoder, *, global_only: bool = False) -> None:
    """Replace the attention of an encoder's blocks by its folded form; output and keys of the weights stay.

    Args:
        encoder: Changed in place; blocks that are folded stay as they are, whatever was injected into any of them.
        global_only: Leave the blocks whose attention stays inside windows.

    Raises:
        ConfigError: If the encoder is a TinyViT, which stays as it is.
    """
    if not isinstance(encoder, VitEncoder):
        raise ConfigError(
            "the attention of this encoder cannot be folded",
            expected="segment-anything's ViT",
            found="TinyViT, whose attention stays in small windows and has other positions",
            todo='set "attention" to "upstream"',
        )
    tables = PositionTables()
    for block in encoder.attention_blocks():
        windowed = int(block.window_size) > 0  # type: ignore[arg-type]
        if isinstance(block.attn, imports.image_encoder.Attention) and not (global_only and windowed):
            block.attn = FoldedAttention(block.attn, tables)
