"""Low-rank adaptation of attention, on any subset of q, k, v (rows of one fused linear layer) and o.

Shapes: D token width, r rank, R rows of the adapted layer.

Source: Hu et al., LoRA, 2021; on SAM's q and v Zhang & Liu, SAMed, 2023.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from samunet.core.errors import ConfigError
from samunet.models.sam.encoder import SamEncoder

QKV = ("q", "k", "v")
OUTPUT = "o"


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

    def __init__(self, base: nn.Linear, rows: Mapping[str, Tensor], *, rank: int, alpha: float) -> None:
        super().__init__(base.in_features, base.out_features, bias=base.bias is not None, device="meta")
        self.weight, self.bias = base.weight, base.bias
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
            update = (self._up().double() @ down) * self.scaling
            weight = (self.weight.double() + update).to(self.weight.dtype)
        plain = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        plain.weight = nn.Parameter(weight, requires_grad=self.weight.requires_grad)
        plain.bias = self.bias
        return plain.train(self.training)

    def _up(self) -> Tensor:
        """The factors B of all targets, spread over the rows they update: (out, targets * r)."""
        blocks: Tensor = torch.block_diag(*self.lora_b.values())  # type: ignore[no-untyped-call]
        full = blocks.new_zeros(self.out_features, blocks.shape[1])
        return full.index_copy(0, self.get_buffer("_rows"), blocks)


@dataclass(frozen=True)
class LoraInjector:
    """LoRA on the attention of an image encoder.

    Args:
        targets: Some of q, k, v, o.
        rank: r.
        alpha: Scale times r; r where None, so that the update is not scaled.
        blocks: Attention blocks that are adapted, counted over the whole encoder; all where None.
    """

    targets: tuple[str, ...] = ("q", "v")
    rank: int = 4
    alpha: float | None = None
    blocks: tuple[int, ...] | None = None

    def inject(self, encoder: SamEncoder) -> None:
        """Replace ``qkv`` and ``proj`` of the chosen blocks.

        Raises:
            ConfigError: If a target, the rank or a block does not exist.
        """
        layers = encoder.attention_layers()
        chosen = range(len(layers)) if self.blocks is None else self.blocks
        self._check(len(layers))
        alpha = float(self.rank if self.alpha is None else self.alpha)
        for index in chosen:
            attention = layers[index]
            rows = {t: r for t, r in qkv_rows(attention, encoder.qkv_layout).items() if t in self.targets}
            if rows:
                attention.qkv = LoraLinear(_linear(attention.qkv), rows, rank=self.rank, alpha=alpha)
            if OUTPUT in self.targets:
                base = _linear(attention.proj)
                everything = {OUTPUT: torch.arange(base.out_features)}
                attention.proj = LoraLinear(base, everything, rank=self.rank, alpha=alpha)

    def _check(self, num_blocks: int) -> None:
        unknown = set(self.targets) - {*QKV, OUTPUT}
        if unknown or not self.targets:
            raise ConfigError("LoRA cannot adapt this", expected="some of q, k, v, o", found=", ".join(self.targets))
        if self.rank < 1:
            raise ConfigError("LoRA needs a positive rank", expected="at least 1", found=str(self.rank))
        if self.blocks is not None and not set(self.blocks) <= set(range(num_blocks)):
            raise ConfigError(
                "LoRA cannot adapt blocks that do not exist", expected=f"0 to {num_blocks - 1}", found=str(self.blocks)
            )


def qkv_rows(attention: nn.Module, layout: str) -> dict[str, Tensor]:
    """Indices of the output rows of q, k and v in a fused ``qkv`` layer.

    SAM's ViT stacks all of q, then k, then v; TinyViT stacks q, k and v of the first head, then of the next.

    Args:
        attention: Has ``qkv`` and ``num_heads``.
        layout: "stacked" or "per_head".
    """
    heads = int(attention.num_heads)  # type: ignore[arg-type]
    index = torch.arange(_linear(attention.qkv).out_features)
    grid = index.view(3, -1) if layout == "stacked" else index.view(heads, 3, -1).transpose(0, 1).reshape(3, -1)
    return dict(zip(QKV, grid.unbind(0), strict=True))


def _linear(module: object) -> nn.Linear:
    if not isinstance(module, nn.Linear) or isinstance(module, LoraLinear):
        raise ConfigError("LoRA adapts a plain linear layer", expected="Linear", found=type(module).__name__)
    return module
