"""Blocks of SAM's encoders with places where modules can be put, otherwise as upstream's.

Shapes: B batch, H x W tokens, D token width, n windows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch.nn.functional as functional
from torch import Tensor, nn

from samunet.core.errors import ConfigError
from samunet.models.sam import imports
from samunet.models.sam.encoder import SamEncoder

SITES = ("before_attention", "after_attention", "beside_attention", "before_mlp", "beside_mlp")

ModuleT = TypeVar("ModuleT", bound=nn.Module)


class AdaptedBlock(nn.Module):
    """A block that stands for an upstream one and shares its children under their names.

    Modules are put into ``sites``; where there are none the output is the upstream block's:

    - ``before_attention``: the map (B, H, W, D) to one of the same shape, ahead of everything.
    - ``after_attention``: the attention's output, windows put together, to the same shape, ahead of the residual.
    - ``beside_attention``: (normalised map, attention module) to a map that is added to the residual.
    - ``before_mlp``: the map to one of the same shape, between attention and MLP.
    - ``beside_mlp``: the normalised map that enters the MLP to a map that is added to the residual.

    Args:
        block: The upstream block.
    """

    # What these are depends on the backbone and on what else was injected.
    attn: Any
    mlp: Any

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        for name, child in block.named_children():
            self.add_module(name, child)
        self.window_size = int(block.window_size)  # type: ignore[arg-type]
        self.sites = nn.ModuleDict()
        self.training = block.training

    def _through(self, site: str, x: Tensor) -> Tensor:
        result: Tensor = self.sites[site](x) if site in self.sites else x
        return result

    def _add(self, x: Tensor, site: str, *inputs: Tensor | nn.Module) -> Tensor:
        return x + self.sites[site](*inputs) if site in self.sites else x


class AdaptedVitBlock(AdaptedBlock):
    """segment-anything's block with sites; as there, tokens are normalised before zeros pad the windows.

    (finetune-SAM's and Med-SA's adapted blocks normalise after padding, which changes SAM itself.)
    """

    norm1: nn.LayerNorm
    norm2: nn.LayerNorm

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, D) to the same shape."""
        x = self._through("before_attention", x)
        normed = self.norm1(x)
        x = x + self._through("after_attention", self._attend(normed))
        x = self._add(x, "beside_attention", normed, self.attn)
        x = self._through("before_mlp", x)
        normed = self.norm2(x)
        x = x + self.mlp(normed)
        return self._add(x, "beside_mlp", normed)

    def _attend(self, normed: Tensor) -> Tensor:
        if self.window_size == 0:
            whole: Tensor = self.attn(normed)
            return whole
        size = (normed.shape[1], normed.shape[2])
        self.attn.map_size = size
        windows, padded = imports.image_encoder.window_partition(normed, self.window_size)
        attended = self.attn(windows)
        result: Tensor = imports.image_encoder.window_unpartition(attended, self.window_size, padded, size)
        return result


class AdaptedTinyBlock(AdaptedBlock):
    """TinyViT's block with sites; as there, windows are padded before the attention normalises its own input.

    ``beside_attention`` and ``beside_mlp`` get what the attention and the MLP normalise inside themselves: the papers'
    adapter sees the MLP's normalised input, while the published TinyViT code gives it the raw tokens.
    """

    local_conv: nn.Module
    drop_path1: nn.Module
    drop_path2: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, D) to the same shape."""
        x = self._through("before_attention", x)
        attended = self._through("after_attention", self._attend(x))
        inputs: tuple[Tensor | nn.Module, ...] = ()
        if "beside_attention" in self.sites:
            inputs = (self.attn.norm(x), self.attn)
        x = self._add(x + self.drop_path1(attended), "beside_attention", *inputs)
        x = self.local_conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        x = self._through("before_mlp", x)
        beside = (self.mlp.norm(x),) if "beside_mlp" in self.sites else ()
        return self._add(x + self.drop_path2(self.mlp(x)), "beside_mlp", *beside)

    def _attend(self, x: Tensor) -> Tensor:
        side = self.window_size
        height, width = x.shape[1:3]
        self.attn.map_size = (height, width)
        padded = functional.pad(x, (0, 0, 0, -width % side, 0, -height % side))
        rows, columns = padded.shape[1] // side, padded.shape[2] // side
        windows = padded.view(len(x), rows, side, columns, side, -1).transpose(2, 3).flatten(3, 4).flatten(0, 2)
        attended = self.attn(windows).view(len(x), rows, columns, side, side, -1).transpose(2, 3)
        result: Tensor = attended.reshape(padded.shape)[:, :height, :width]
        return result


def adapt_block(encoder: SamEncoder, index: int) -> AdaptedBlock:
    """Give an attention block sites; a block that has them is returned as it is.

    Args:
        encoder: Changed in place; its output and the keys of its weights stay.
        index: Of the attention block, counted over the whole encoder.
    """
    block = encoder.attention_blocks()[index]
    if isinstance(block, AdaptedBlock):
        return block
    kind = AdaptedVitBlock if encoder.qkv_layout == "stacked" else AdaptedTinyBlock
    adapted = kind(block)
    encoder.set_attention_block(index, adapted)
    return adapted


def put(block: AdaptedBlock, site: str, module: nn.Module) -> None:
    """Put a module at a site of a block.

    Raises:
        ConfigError: If there is no such site, or it is taken.
    """
    if site not in SITES:
        raise ConfigError("a block has no such site", expected=f"one of {', '.join(SITES)}", found=site)
    if site in block.sites:
        raise ConfigError(
            f"two modules meet at {site} of one block",
            found=f"{_kind(block.sites[site])} and {_kind(module)}",
            todo="keep one of them, or give them different blocks",
        )
    block.sites[site] = module.train(block.training)


def chosen_blocks(encoder: SamEncoder, blocks: Sequence[int] | None) -> list[int]:
    """Indices of attention blocks, each once and in order.

    Args:
        encoder: Its attention blocks are counted.
        blocks: Negative ones count from the end; None: all.

    Raises:
        ConfigError: If one does not exist.
    """
    number = len(encoder.token_dims())
    if blocks is None:
        return list(range(number))
    unknown = [index for index in blocks if not -number <= index < number]
    if unknown:
        raise ConfigError(
            "the encoder does not have these blocks",
            expected=f"0 to {number - 1}, or -{number} to -1 from the end",
            found=", ".join(map(str, unknown)),
        )
    return sorted({index % number for index in blocks})


def linear_place(block: nn.Module, target: str) -> tuple[nn.Module, str]:
    """Where a block keeps a linear layer.

    Args:
        block: An attention block of either family, adapted or not.
        target: qkv, o (the attention's output), mlp1 or mlp2.

    Returns:
        The module that holds it, and its name there.
    """
    attention, mlp = block.get_submodule("attn"), block.get_submodule("mlp")
    first, second = ("lin1", "lin2") if hasattr(mlp, "lin1") else ("fc1", "fc2")
    return {"qkv": (attention, "qkv"), "o": (attention, "proj"), "mlp1": (mlp, first), "mlp2": (mlp, second)}[target]


def match(module: ModuleT, encoder: nn.Module) -> ModuleT:
    """Move a new module to the device and precision of an encoder's parameters."""
    reference = next(encoder.parameters())
    return module.to(device=reference.device, dtype=reference.dtype)


def _kind(module: nn.Module) -> str:
    return str(getattr(module, "kind", type(module).__name__))
