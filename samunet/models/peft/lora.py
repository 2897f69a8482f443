"""Low-rank updates of linear layers: any of q, k, v (rows of one fused layer), the attention's output, and the MLP.

Shapes: D token width, r rank, R rows of the adapted layer.

Source: Hu et al., LoRA, 2021; on SAM's q and v Zhang & Liu, SAMed, 2023.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from samunet.artifacts.method import Lora
from samunet.core.errors import ConfigError
from samunet.models.peft.blocks import chosen_blocks, linear_place
from samunet.models.peft.protocol import AdapterModule
from samunet.models.sam.encoder import SamEncoder

QKV = ("q", "k", "v")


class LoraLinear(nn.Linear):
    """A linear layer with low-rank updates of chosen groups of its output rows.

    ``weight`` and ``bias`` are the base layer's own parameters under their own names; each target t adds
    ``lora_a.t`` (r, in) and ``lora_b.t`` (rows of t, r). With ``lora_b`` at zero the output is the base layer's.

    Args:
        base: The layer it stands for; its parameters are shared, not copied.
        rows: Target name to the indices of its output rows.
        rank: r.
        alpha: The update is scaled by alpha / r.
    """

    kind = "lora"

    def __init__(self, base: nn.Linear, rows: Mapping[str, Tensor], *, rank: int, alpha: float) -> None:
        super().__init__(base.in_features, base.out_features, bias=base.bias is not None, device="meta")
        self.weight, self.bias = base.weight, base.bias
        self.training = base.training
        self.scaling = alpha / rank
        self.lora_a = nn.ParameterDict({t: base.weight.new_empty(rank, base.in_features) for t in rows})
        self.lora_b = nn.ParameterDict({t: base.weight.new_zeros(len(index), rank) for t, index in rows.items()})
        for factor in self.lora_a.values():
            nn.init.kaiming_uniform_(factor, a=math.sqrt(5))
        index = torch.cat(list(rows.values())).to(base.weight.device)
        self.register_buffer("_rows", index, persistent=False)

    def adapter_params(self) -> list[str]:
        """Names of the low-rank factors."""
        return [name for name, _ in self.named_parameters() if name.startswith("lora_")]

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        down = torch.cat(list(self.lora_a.values()))
        return super().forward(x) + functional.linear(functional.linear(x, down), self._up()) * self.scaling

    def merged(self) -> nn.Linear:
        """A plain linear layer with the update added to its weight."""
        with torch.no_grad():
            down = torch.cat(list(self.lora_a.values())).double()
            return with_update(self, (self._up().double() @ down) * self.scaling)

    def _up(self) -> Tensor:
        """The factors B of all targets, spread over the rows they update: (out, targets * r)."""
        return spread(self.lora_b.values(), self.get_buffer("_rows"), self.out_features)


def inject_lora(encoder: SamEncoder, choice: Lora) -> None:
    """Replace the chosen linear layers of the chosen blocks.

    Raises:
        ConfigError: If a block does not exist, the ranks are too few or many, or a layer was replaced before.
    """
    blocks = encoder.attention_blocks()
    chosen = chosen_blocks(encoder, choice.blocks)
    for index, rank in zip(chosen, choice.ranks_of(len(chosen)), strict=True):
        alpha = float(rank if choice.alpha is None else choice.alpha)
        fused = qkv_rows(encoder.attention_layers()[index], encoder.qkv_layout)
        parts: dict[str, Tensor] = {part: fused[part] for part in QKV if part in choice.targets}
        if parts:
            _replace(blocks[index], "qkv", parts, rank=rank, alpha=alpha)
        for target in dict.fromkeys(t for t in choice.targets if t not in QKV):
            _replace(blocks[index], target, None, rank=rank, alpha=alpha)


def _replace(block: nn.Module, target: str, rows: Mapping[str, Tensor] | None, *, rank: int, alpha: float) -> None:
    """Put a low-rank layer in the place of a plain one; ``rows`` is None where all of them are one target."""
    parent, name = linear_place(block, target)
    base = plain_linear(getattr(parent, name))
    whole = {target: torch.arange(base.out_features)}
    setattr(parent, name, LoraLinear(base, whole if rows is None else rows, rank=rank, alpha=alpha))


def qkv_rows(attention: nn.Module, layout: str) -> dict[str, Tensor]:
    """Indices of the output rows of q, k and v in a fused ``qkv`` layer.

    SAM's ViT stacks all of q, then k, then v; TinyViT stacks q, k and v of the first head, then of the next.

    Args:
        attention: Has ``qkv`` and ``num_heads``.
        layout: "stacked" or "per_head".
    """
    heads = int(attention.num_heads)  # type: ignore[arg-type]
    index = torch.arange(int(attention.qkv.out_features))  # type: ignore[union-attr, arg-type]
    grid = index.view(3, -1) if layout == "stacked" else index.view(heads, 3, -1).transpose(0, 1).reshape(3, -1)
    return dict(zip(QKV, grid.unbind(0), strict=True))


def spread(factors: Iterable[Tensor], rows: Tensor, num_rows: int) -> Tensor:
    """Factors (rows of a target, r) side by side, each in the rows it updates: (num_rows, targets * r)."""
    blocks: Tensor = torch.block_diag(*factors)  # type: ignore[no-untyped-call]
    return blocks.new_zeros(num_rows, blocks.shape[1]).index_copy(0, rows, blocks)


def with_update(layer: nn.Linear, update: Tensor) -> nn.Linear:
    """A plain linear layer that shares the bias of another and has its weight plus an update in float64."""
    weight = (layer.weight.double() + update).to(layer.weight.dtype)
    plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
    plain.weight = nn.Parameter(weight, requires_grad=layer.weight.requires_grad)
    plain.bias = layer.bias
    return plain.train(layer.training)


def plain_linear(module: object) -> nn.Linear:
    """The module, if it is a linear layer that nothing was injected into.

    Raises:
        ConfigError: If it is not.
    """
    if not isinstance(module, nn.Linear) or isinstance(module, AdapterModule):
        raise ConfigError(
            "low-rank updates adapt a plain linear layer",
            expected="Linear",
            found=type(module).__name__,
            todo="keep one of the adapters that rewrite this layer",
        )
    return module
