"""Low-rank updates of q and v whose outer factors are shared by all blocks of one width (tensor-train form).

The update of q in a block is s V S U: U (r, D) and V (D, r) are shared, S (r, r) is the block's and q's own.

Shapes: D token width, r rank.

Source: Jie & Deng, FacT, 2023; on SAM Chen et al., MA-SAM, 2024.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from samunet.artifacts.method import Fact
from samunet.core.errors import ConfigError
from samunet.models.peft.blocks import chosen_blocks, match
from samunet.models.peft.lora import plain_linear, qkv_rows, spread, with_update
from samunet.models.sam.encoder import SamEncoder

TARGETS = ("q", "v")


class SharedFactors(nn.Module):
    """The outer factors: ``fact_u.D`` (r, D) at random and ``fact_v.D`` (D, r) at zero, per width D.

    Args:
        dims: Widths.
        rank: r.
    """

    kind = "fact"

    def __init__(self, dims: Collection[int], *, rank: int) -> None:
        super().__init__()
        self.fact_u = nn.ParameterDict({str(dim): _random(rank, dim) for dim in sorted(set(dims))})
        self.fact_v = nn.ParameterDict({str(dim): torch.zeros(dim, rank) for dim in sorted(set(dims))})

    def adapter_params(self) -> list[str]:
        """Names of all factors."""
        return [name for name, _ in self.named_parameters()]

    def merged(self) -> None:
        """Nothing is left of it: the layers that use it hold their updates."""


class FactLinear(nn.Linear):
    """A fused linear layer with updates of q and v through shared factors.

    ``weight`` and ``bias`` are the base layer's own parameters under their own names; each target t adds
    ``fact_core.t`` (r, r). The shared factors are used, not held: they are registered once, in the encoder.

    Args:
        base: The layer it stands for; its parameters are shared, not copied.
        rows: Target name to the indices of its output rows.
        shared: The outer factors of all widths.
        rank: r.
        scale: s.
        dropout: On the inner factors' output, while the ``nn.Dropout`` inside is in train mode.
    """

    kind = "fact"

    def __init__(
        self,
        base: nn.Linear,
        rows: Mapping[str, Tensor],
        shared: SharedFactors,
        *,
        rank: int,
        scale: float,
        dropout: float,
    ) -> None:
        super().__init__(base.in_features, base.out_features, bias=base.bias is not None, device="meta")
        self.weight, self.bias = base.weight, base.bias
        self.training = base.training
        self.scale = scale
        self.fact_core = match(nn.ParameterDict({target: _random(rank, rank) for target in rows}), base)
        self.dropout = nn.Dropout(dropout).train(base.training)
        # Inside a tuple it is no submodule, so that its parameters appear once; copies of the encoder stay consistent.
        self._shared = (shared,)
        index = torch.cat(list(rows.values())).to(base.weight.device)
        self.register_buffer("_rows", index, persistent=False)

    def adapter_params(self) -> list[str]:
        """Names of the inner factors."""
        return [name for name, _ in self.named_parameters() if name.startswith("fact_core.")]

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., 3 D)."""
        inner = functional.linear(functional.linear(x, self._u), self._cores())
        return super().forward(x) + functional.linear(self.dropout(inner), self._v()) * self.scale

    def merged(self) -> nn.Linear:
        """A plain linear layer with the updates added to its weight."""
        with torch.no_grad():
            return with_update(self, (self._v().double() @ self._cores().double() @ self._u.double()) * self.scale)

    @property
    def _u(self) -> Tensor:
        outer: Tensor = self._shared[0].fact_u[str(self.in_features)]
        return outer

    def _cores(self) -> Tensor:
        """(targets * r, r)."""
        return torch.cat(list(self.fact_core.values()))

    def _v(self) -> Tensor:
        """V once per target, in the rows of the target: (3 D, targets * r)."""
        outer = self._shared[0].fact_v[str(self.in_features)]
        return spread([outer] * len(self.fact_core), self.get_buffer("_rows"), self.out_features)


def inject_fact(encoder: SamEncoder, choice: Fact) -> None:
    """Replace the fused layers of the chosen blocks; the shared factors become ``encoder.fact``.

    Raises:
        ConfigError: If a block does not exist, a layer was replaced before, or there are shared factors already.
    """
    if hasattr(encoder, "fact"):
        raise ConfigError("the encoder already has shared factors", todo="keep one fact adapter")
    chosen, dims, layers = chosen_blocks(encoder, choice.blocks), encoder.token_dims(), encoder.attention_layers()
    bases = {index: plain_linear(layers[index].qkv) for index in chosen}
    encoder.fact = match(SharedFactors({dims[index] for index in chosen}, rank=choice.rank), encoder)
    for index, base in bases.items():
        fused = qkv_rows(layers[index], encoder.qkv_layout)
        rows = {target: fused[target] for target in TARGETS}
        layers[index].qkv = FactLinear(
            base, rows, encoder.fact, rank=choice.rank, scale=choice.scale, dropout=choice.dropout
        )


def _random(rows: int, columns: int) -> Tensor:
    """A factor as torch initialises a linear layer's weight."""
    factor = torch.empty(rows, columns)
    nn.init.kaiming_uniform_(factor, a=math.sqrt(5))
    return factor
