"""The trainable model: SAM behind its channel input, with what trains and what stays fixed.

Shapes: B batch, C input channels, S input side, T mask tokens.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from samunet.core.errors import ConfigError
from samunet.models.peft.state import adapter_parameters, freeze_all_but
from samunet.models.sam.network import NO_MASK_EMBED, UNUSED_HEAD, SamNetwork

FULL, LORA, FROZEN = "full", "lora", "frozen"
NETWORK = "network."
NO_DECAY_NAMES = ("pos_embed", "rel_pos_", "attention_biases", "iou_token.", "mask_tokens.", "no_mask_embed.")


class SegmentationModel(nn.Module):
    """SAM that gives one map per class.

    The mask decoder, the "no mask" embedding and the channel input always train; the rest of the prompt encoder and the
    mask-quality head feed no output here and stay fixed. The encoder trains as ``encoder_tuning`` says.

    Args:
        network: SAM, adapters injected.
        channel_input: What makes three channels of C.
        encoder_tuning: "full", "lora" (its adapters only) or "frozen".
    """

    def __init__(
        self, network: SamNetwork, *, channel_input: nn.Module, encoder_tuning: Literal["full", "lora", "frozen"] | str
    ) -> None:
        super().__init__()
        if encoder_tuning not in (FULL, LORA, FROZEN):
            raise ConfigError("unknown encoder_tuning", expected="full, lora or frozen", found=encoder_tuning)
        self.network = network
        self.channel_input = channel_input
        self.encoder_tuning = encoder_tuning
        self.untouched: frozenset[str] = frozenset()
        freeze_all_but(self, self._names_to_train())
        self.train()

    def forward(self, images: Tensor) -> Tensor:
        """One map per mask token.

        Args:
            images: (B, C, S, S), zoomed and normalised.

        Returns:
            Logits (B, T, S/4, S/4).
        """
        result: Tensor = self.network(self.channel_input(images))
        return result

    def train(self, mode: bool = True) -> SegmentationModel:
        """Set the mode; an encoder that is frozen or adapted stays in eval, so that its batch norm does not move."""
        super().train(mode)
        if self.encoder_tuning != FULL:
            self.network.image_encoder.eval()
        return self

    def set_checkpointing(self, enabled: bool) -> None:
        """Recompute the encoder's blocks in the backward pass instead of keeping their activations."""
        self.network.image_encoder.checkpointing = enabled

    def trainable_parameters(self) -> dict[str, list[nn.Parameter]]:
        """The parameters that train, as "decay" and "no_decay".

        Norms, biases, tokens and all kinds of position embeddings are not decayed.
        """
        groups: dict[str, list[nn.Parameter]] = {"decay": [], "no_decay": []}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                undecayed = parameter.ndim <= 1 or any(part in name for part in NO_DECAY_NAMES)
                groups["no_decay" if undecayed else "decay"].append(parameter)
        return groups

    def unused_parameters(self) -> set[str]:
        """Names of the parameters that no output depends on."""
        unused = {n for n, _ in self.named_parameters() if n.startswith(f"{NETWORK}prompt_encoder.")}
        unused |= {n for n, _ in self.named_parameters() if n.startswith(NETWORK + UNUSED_HEAD)}
        return unused - {NETWORK + NO_MASK_EMBED}

    def _names_to_train(self) -> set[str]:
        encoder = f"{NETWORK}image_encoder."
        names = {n for n, _ in self.named_parameters() if not n.startswith(encoder)} - self.unused_parameters()
        if self.encoder_tuning == FULL:
            names |= {n for n, _ in self.named_parameters() if n.startswith(encoder)}
        return names | set(adapter_parameters(self))
