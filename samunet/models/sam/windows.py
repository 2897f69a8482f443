"""Attention without the work on padding, for maps that are smaller than a window.

Upstream pads such a map with zeros to the window's size and attends from and to all tokens, though the padded ones are
thrown away. They are all alike: each has one key k' and one value v', which are what zeros become (after TinyViT's
norm, its bias; in a ViT, the biases of the projection). To a query i they add

    sum_p exp(q_i . k' + b_ip) v' = exp(q_i . k' + log sum_p exp b_ip) v',    p over padded places,

which is what one key with a bias of its own adds. Only the map's own tokens are left to project and to attend. In a ViT
b_ip = r_i[row p] + c_i[column p], so that the sum is a sum over rows times a sum over columns.

Shapes: B windows, w x w tokens of a window, H x W of the map, n = H W, N = w w, D token width, h heads, C = D / h.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from samunet.models.sam import imports
from samunet.models.sam.positions import resize_relative
from samunet.models.sam.sharing import share_weights


class PaddedTinyAttention(nn.Module):
    """Stands for timm's TinyViT attention: the map's tokens get the same output and all weights the same gradients.

    Parameters, layers and buffers are the base's own under the same names. What padded tokens get is zero instead of
    something that the block throws away.

    Args:
        attention: Upstream's module.
    """

    norm: nn.LayerNorm
    qkv: nn.Module
    proj: nn.Module
    attention_biases: nn.Parameter
    attention_bias_idxs: Tensor

    def __init__(self, attention: Any) -> None:
        super().__init__()
        share_weights(self, attention)
        self.num_heads, self.resolution = int(attention.num_heads), attention.resolution
        self.key_dim, self.val_dim = int(attention.key_dim), int(attention.val_dim)
        self.map_size: tuple[int, int] | None = None
        self._places: dict[tuple[int, int, torch.device], tuple[Tensor, Tensor]] = {}

    def forward(self, x: Tensor) -> Tensor:
        """Windows (B, N, D), zeros where the map of :attr:`map_size` ends, to the same shape."""
        side = self.resolution[0]
        height, width = self.map_size or (side, side)
        if height > side or width > side or height == width == side:
            biases = self.attention_biases[:, self.attention_bias_idxs]
            return self._attend(self._split(x), biases, x.shape[1])
        tokens = x.reshape(len(x), side, side, -1)[:, :height, :width].flatten(1, 2)
        q, k, v = self._split(tokens)
        _, key, value = (part.expand(len(x), -1, -1, -1) for part in self._split(torch.zeros_like(x[:1, :1])))
        joined = (q, torch.cat([k, key], dim=2), torch.cat([v, value], dim=2))
        attended = self._attend(joined, self._biases(height, width), height * width)
        mapped = attended.view(len(x), height, width, -1)
        return functional.pad(mapped, (0, 0, 0, side - width, 0, side - height)).flatten(1, 2)

    def _split(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens (B, n, D) to queries, keys and values, each (B, h, n, D / h)."""
        fused = self.qkv(self.norm(tokens)).view(*tokens.shape[:2], self.num_heads, -1).transpose(1, 2)
        q, k, v = fused.split([self.key_dim, self.key_dim, self.val_dim], dim=-1)
        return q, k, v

    def _attend(self, split: tuple[Tensor, Tensor, Tensor], biases: Tensor, number: int) -> Tensor:
        mixed = functional.scaled_dot_product_attention(*split, attn_mask=biases)
        result: Tensor = self.proj(mixed.transpose(1, 2).reshape(-1, number, self.num_heads * self.val_dim))
        return result

    def _biases(self, height: int, width: int) -> Tensor:
        """(h, n, n + 1): of the map's tokens for each other, and for all padded ones together."""
        own, padded = self._pairs(height, width)
        together = self.attention_biases[:, padded].logsumexp(dim=-1, keepdim=True)
        return torch.cat([self.attention_biases[:, own], together.to(self.attention_biases.dtype)], dim=-1)

    def _pairs(self, height: int, width: int) -> tuple[Tensor, Tensor]:
        """Which bias each token of the map has for each other (n, n) and for each padded place (n, N - n)."""
        key = (height, width, self.attention_bias_idxs.device)
        if key not in self._places:
            # A tensor made in inference mode could not be saved for a later backward pass.
            with torch.inference_mode(False):
                side = self.resolution[0]
                inside = torch.zeros(side, side, dtype=torch.bool, device=key[2])
                inside[:height, :width] = True
                rows = self.attention_bias_idxs[inside.flatten()]
                self._places[key] = (rows[:, inside.flatten()], rows[:, ~inside.flatten()])
        return self._places[key]


class PaddedVitAttention(nn.Module):
    """Stands for segment-anything's attention in windows: as :class:`PaddedTinyAttention`.

    Args:
        attention: Upstream's module with relative positions.
    """

    qkv: nn.Module
    proj: nn.Module
    rel_pos_h: nn.Parameter
    rel_pos_w: nn.Parameter

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        share_weights(self, attention)
        self.num_heads = int(attention.num_heads)  # type: ignore[arg-type]
        self.scale = float(attention.scale)  # type: ignore[arg-type]
        self.map_size: tuple[int, int] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Windows (B, w, w, D), zeros where the map of :attr:`map_size` ends, to the same shape."""
        side = x.shape[1]
        height, width = (min(size, side) for size in self.map_size or (side, side))
        q, k, v = self._split(x[:, :height, :width])
        rows, columns = self._positions(q, height, width, side)
        scores = (q * self.scale) @ k.transpose(-2, -1)
        scores = scores + (rows[..., :height, None] + columns[..., None, :width]).flatten(-2)
        if height < side or width < side:
            _, key, value = (part.expand(len(x), -1, -1, -1) for part in self._split(torch.zeros_like(x[:1, :1, :1])))
            together = (q * self.scale) @ key.transpose(-2, -1) + _padded_sum(rows, columns, height, width)
            scores, v = torch.cat([scores, together.to(scores.dtype)], dim=-1), torch.cat([v, value], dim=2)
        mixed = scores.softmax(dim=-1).to(v.dtype) @ v
        result: Tensor = self.proj(mixed.transpose(1, 2).reshape(len(x), height, width, -1))
        return functional.pad(result, (0, 0, 0, side - width, 0, side - height))

    def _split(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens (B, H, W, D) to queries, keys and values, each (B, h, n, C)."""
        fused = self.qkv(tokens).reshape(len(tokens), -1, 3, self.num_heads, self.rel_pos_h.shape[-1])
        q, k, v = fused.permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v

    def _positions(self, q: Tensor, height: int, width: int, side: int) -> tuple[Tensor, Tensor]:
        """What a query adds for every row and for every column of the window, each (B, h, n, w)."""
        grid = q.reshape(*q.shape[:2], height, width, -1)
        steps = torch.arange(side, device=q.device)
        distances = steps[:, None] - steps[None, :] + side - 1
        by_row = resize_relative(self.rel_pos_h, 2 * side - 1)[distances[:height]]
        by_column = resize_relative(self.rel_pos_w, 2 * side - 1)[distances[:width]]
        rows = torch.einsum("bnhwc,hkc->bnhwk", grid, by_row).flatten(2, 3)
        columns = torch.einsum("bnhwc,wkc->bnhwk", grid, by_column).flatten(2, 3)
        return rows, columns


def _padded_sum(rows: Tensor, columns: Tensor, height: int, width: int) -> Tensor:
    """Log of the summed exp of r + c over a window's places outside of H x W: (B, h, n, 1), from (B, h, n, w) each."""
    exact = torch.promote_types(rows.dtype, torch.float32)
    rows, columns = rows.to(exact), columns.to(exact)
    parts = []
    if width < columns.shape[-1]:
        parts.append(rows[..., :height].logsumexp(-1) + columns[..., width:].logsumexp(-1))
    if height < rows.shape[-1]:
        parts.append(rows[..., height:].logsumexp(-1) + columns.logsumexp(-1))
    return torch.stack(parts).logsumexp(0)[..., None]


def spare_padding(block: nn.Module) -> None:
    """Let a block's attention in windows leave out the work on padding; output and keys of the weights stay.

    Args:
        block: timm's TinyViT block or segment-anything's, changed in place.
    """
    tiny = isinstance(block, imports.tiny_vit.TinyVitBlock)
    block.attn = PaddedTinyAttention(block.attn) if tiny else PaddedVitAttention(block.attn)  # type: ignore[arg-type]
    block.register_forward_pre_hook(_tell_map_size)


def _tell_map_size(block: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    block.attn.map_size = tuple(inputs[0].shape[1:3])  # type: ignore[union-attr]
