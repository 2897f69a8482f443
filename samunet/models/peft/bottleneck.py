"""Bottleneck adapters after the attention and beside the MLP.

Shapes: D token width, h hidden width.

Source: Houlsby et al., Parameter-Efficient Transfer Learning, 2019; on SAM Wu et al., Medical SAM Adapter, 2025, and
Gu et al., finetune-SAM, 2025.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from samunet.artifacts.method import Bottleneck
from samunet.models.peft.blocks import adapt_block, chosen_blocks, match, put
from samunet.models.sam.encoder import SamEncoder

Activation = Literal["gelu", "relu"]
_ACTIVATIONS = {"gelu": nn.GELU, "relu": nn.ReLU}


class BottleneckAdapter(nn.Module):
    """Two linear layers with an activation between, which start at zero: 2 D h + h + D parameters.

    Args:
        dim: D.
        hidden: h.
        activation: Between the layers.
        skip: Add the input to the output.
        scale: Factor on the layers' output.
    """

    kind = "bottleneck"

    def __init__(
        self, dim: int, hidden: int, *, skip: bool, activation: Activation = "gelu", scale: float = 1.0
    ) -> None:
        super().__init__()
        self.skip, self.scale = skip, scale
        self.down = nn.Linear(dim, hidden)
        self.act = _ACTIVATIONS[activation]()
        self.up = nn.Linear(hidden, dim)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def adapter_params(self) -> list[str]:
        """Names of all its parameters."""
        return [name for name, _ in self.named_parameters()]

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to the same shape."""
        change = self.up(self.act(self.down(x))) * self.scale
        result: Tensor = x + change if self.skip else change
        return result


def hidden_width(dim: int, ratio: float) -> int:
    """Hidden width h of a ratio: rounded, at least 1."""
    return max(1, round(dim * ratio))


def inject_bottleneck(encoder: SamEncoder, choice: Bottleneck) -> None:
    """Put bottlenecks after the attention (in sequence) and beside the MLP (in parallel) of the chosen blocks.

    The parallel one sees the MLP's normalised input in both families; the published TinyViT code gives it the raw
    tokens instead.

    Raises:
        ConfigError: If a block does not exist, or a site is taken.
    """
    dims = encoder.token_dims()
    for index in chosen_blocks(encoder, choice.blocks):
        block = adapt_block(encoder, index)
        hidden = hidden_width(dims[index], choice.ratio)
        if "attention" in choice.sites:
            after = BottleneckAdapter(dims[index], hidden, skip=True, activation=choice.activation)
            put(block, "after_attention", match(after, encoder))
        if "mlp" in choice.sites:
            beside = BottleneckAdapter(
                dims[index], hidden, skip=False, activation=choice.activation, scale=choice.mlp_scale
            )
            put(block, "beside_mlp", match(beside, encoder))
