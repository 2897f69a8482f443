"""Low-rank updates and bottlenecks in the mask decoder's transformer, and what of the decoder trains.

Shapes: B batch, N tokens, E = 256 channels, h hidden width, P prompt tokens.

Source: SAMed_s (Zhang and Liu 2023), low-rank updates of q and v; Medical SAM Adapter (Wu et al. 2025), three adapters
per layer of which the first depends on the prompt (HyP-Adpt).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from samunet.artifacts.method import DecoderMethod
from samunet.artifacts.model_spec import PROMPT_DIM
from samunet.core.errors import ConfigError
from samunet.models.peft.blocks import match
from samunet.models.peft.bottleneck import hidden_width
from samunet.models.peft.lora import LoraLinear
from samunet.models.peft.protocol import AdapterModule

Conditioning = Literal["none", "add", "concat", "hyper"]
MLP_SCALE = 0.5
HYPER_STD = 0.002
_TRANSFORMER, _QUALITY = "transformer.", "iou_prediction_head."


class DecoderContext:
    """What the conditioned adapters of one decoder read: the embedding of the prompts at hand.

    Not a module: it has no place in a state dict, and a deep copy of the decoder gets one of its own.
    """

    def __init__(self) -> None:
        self.prompt: Tensor | None = None

    def set_prompts(self, sparse: Tensor | None) -> None:
        """Let the adapters read the mean over the prompt tokens (B, P, E); zeros if there are none."""
        self.prompt = None if sparse is None or sparse.shape[1] == 0 else sparse.mean(1)

    def read(self, like: Tensor) -> Tensor:
        """(B or 1, E) in the precision of another tensor."""
        return like.new_zeros(1, PROMPT_DIM) if self.prompt is None else self.prompt.to(like.dtype)


class DecoderBottleneck(nn.Module):
    """Two linear layers around an activation, which start at zero; between them the prompt may have its say.

    "add" adds a projection of the prompt's embedding, "concat" mixes it in through a linear layer, "hyper" multiplies
    by a matrix that a linear layer makes of the prompt's embedding (at first near the identity), before a layer norm.

    Args:
        hidden: h.
        conditioning: How the prompt is used.
        context: Where it is read; needed unless "none".
        scale: Factor on the output.
    """

    kind = "decoder bottleneck"

    def __init__(
        self,
        hidden: int,
        *,
        conditioning: Conditioning = "none",
        context: DecoderContext | None = None,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.hidden, self.conditioning, self.scale = hidden, conditioning, scale
        self._context = context
        self.down = nn.Linear(PROMPT_DIM, hidden)
        self.up = nn.Linear(hidden, PROMPT_DIM)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)
        if conditioning in ("add", "concat"):
            self.prompt = nn.Linear(PROMPT_DIM, hidden)
        if conditioning == "concat":
            self.mix = nn.Linear(2 * hidden, hidden)
        if conditioning == "hyper":
            self.generator = nn.Linear(PROMPT_DIM, hidden * hidden)
            self.norm = nn.LayerNorm(hidden)
            nn.init.normal_(self.generator.weight, std=HYPER_STD)
            with torch.no_grad():
                self.generator.bias.copy_(torch.eye(hidden).flatten())

    def adapter_params(self) -> list[str]:
        """Names of all its parameters."""
        return [name for name, _ in self.named_parameters()]

    def forward(self, tokens: Tensor) -> Tensor:
        """What is added to (B, N, E) tokens."""
        result: Tensor = self.up(functional.relu(self._conditioned(self.down(tokens)))) * self.scale
        return result

    def _conditioned(self, reduced: Tensor) -> Tensor:
        if self.conditioning == "none":
            return reduced
        assert self._context is not None
        prompt = self._context.read(reduced)
        if self.conditioning == "hyper":
            matrix = self.generator(prompt).view(-1, self.hidden, self.hidden)
            normed: Tensor = self.norm(reduced @ matrix)
            return normed
        projected = self.prompt(prompt)[:, None].expand_as(reduced)
        if self.conditioning == "add":
            return reduced + projected  # type: ignore[no-any-return]
        mixed: Tensor = self.mix(torch.cat([reduced, projected], dim=-1))
        return mixed


class AdaptedNorm(nn.LayerNorm):
    """A layer norm whose input first goes through a bottleneck with a skip; weight and bias are the base's own.

    Args:
        base: The layer it stands for.
        adapter: The bottleneck.
    """

    def __init__(self, base: nn.LayerNorm, adapter: DecoderBottleneck) -> None:
        super().__init__(base.normalized_shape, eps=base.eps, device="meta")
        self.weight, self.bias = base.weight, base.bias
        self.adapter = adapter

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, E) to the same shape."""
        return super().forward(x + self.adapter(x))


class AdaptedMlp(nn.Module):
    """An MLP with a bottleneck beside it; its layers keep their names.

    Args:
        base: segment-anything's MLPBlock.
        adapter: The bottleneck.
    """

    def __init__(self, base: nn.Module, adapter: DecoderBottleneck) -> None:
        super().__init__()
        self.lin1, self.lin2, self.act = base.lin1, base.lin2, base.act
        self.adapter = adapter

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, E) to the same shape."""
        result: Tensor = self.lin2(self.act(self.lin1(x))) + self.adapter(x)  # type: ignore[operator]
        return result


def inject_decoder(mask_decoder: nn.Module, method: DecoderMethod) -> None:
    """Put a method's modules into a mask decoder; its masks stay the same until they are trained.

    Args:
        mask_decoder: segment-anything's MaskDecoder, changed in place; with conditioned adapters it gets an attribute
            ``conditioning_context``.
        method: What to inject.

    Raises:
        ConfigError: If something was injected before.
    """
    if any(isinstance(module, AdapterModule) for module in mask_decoder.modules()):
        raise ConfigError("the mask decoder is adapted already", todo="build a new network for another method")
    transformer = mask_decoder.transformer
    if method.train == "lora":
        for layer in transformer.layers:  # type: ignore[union-attr]
            for attention in (layer.self_attn, layer.cross_attn_token_to_image, layer.cross_attn_image_to_token):
                _inject_lora(attention, method.rank)
        _inject_lora(transformer.final_attn_token_to_image, method.rank)  # type: ignore[arg-type, union-attr]
    if method.train == "adapters":
        hidden = hidden_width(PROMPT_DIM, method.ratio)
        context = None
        if method.conditioning != "none":
            context = mask_decoder.conditioning_context = DecoderContext()  # type: ignore[assignment]
        for layer in transformer.layers:  # type: ignore[union-attr]
            conditioned = DecoderBottleneck(hidden, conditioning=method.conditioning, context=context)
            layer.norm2 = AdaptedNorm(layer.norm2, match(conditioned, mask_decoder))
            layer.mlp = AdaptedMlp(layer.mlp, match(DecoderBottleneck(hidden, scale=MLP_SCALE), mask_decoder))
            layer.norm4 = AdaptedNorm(layer.norm4, match(DecoderBottleneck(hidden), mask_decoder))


def _inject_lora(attention: nn.Module, rank: int) -> None:
    for name in ("q_proj", "v_proj"):
        base = getattr(attention, name)
        rows = {name[0]: torch.arange(base.out_features)}
        setattr(attention, name, LoraLinear(base, rows, rank=rank, alpha=float(rank)))


def decoder_parameters_to_train(mask_decoder: nn.Module, method: DecoderMethod, *, promptable: bool) -> set[str]:
    """Names of the parameters of a mask decoder that train.

    Args:
        mask_decoder: With what the method injects.
        method: What trains.
        promptable: Whether the estimated quality of the masks is used; without prompts no output depends on it.

    Returns:
        Names relative to the mask decoder.
    """
    names = {name for name, _ in mask_decoder.named_parameters()}
    if method.train == "none":
        return set()
    if not promptable:
        names = {name for name in names if not name.startswith(_QUALITY)}
    if method.train == "full":
        return names
    return {n for n in names if not n.startswith(_TRANSFORMER) or ".adapter." in n or ".lora_" in n}
