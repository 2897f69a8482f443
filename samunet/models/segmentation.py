"""The trainable model: SAM behind its channel input, with what trains and what stays fixed.

Shapes: B batch, C input channels, S input side, E = 256 channels, T mask tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn

from samunet.artifacts.method import Method
from samunet.artifacts.model_spec import STOCK_TOKENS
from samunet.models.decoders.adapters import decoder_parameters_to_train
from samunet.models.decoders.promptable import PromptBatch, predict_prompted
from samunet.models.decoders.semantic import estimate_all_tokens, predict_all_tokens
from samunet.models.decoders.side_path import SidePathUpsampler
from samunet.models.peft.state import adapter_parameters, freeze_all_but
from samunet.models.sam.network import NO_MASK_EMBED, SamNetwork

NETWORK = "network."
ENCODER = f"{NETWORK}image_encoder."
DECODER = f"{NETWORK}mask_decoder."
PROMPT_ENCODER = f"{NETWORK}prompt_encoder."
ESTIMATOR = f"{DECODER}iou_prediction_head."
OTHER_MASKS = tuple(f"output_hypernetworks_mlps.{index}." for index in range(1, STOCK_TOKENS))
NO_DECAY_NAMES = (
    "pos_embed",
    "rel_pos_",
    "attention_biases",
    "iou_token.",
    "mask_tokens.",
    "no_mask_embed.",
    "depth_bias",
)


class SegmentationModel(nn.Module):
    """SAM that gives one map per class, or one mask per prompt.

    The channel input always trains. The encoder, the mask decoder and the U-Net train as the method says; the "no mask"
    embedding trains with a decoder that works without prompts. The prompt encoder stays as it is.

    A decoder that works without prompts can estimate the IoU of its masks as SAM's does. That estimate reads what the
    masks are made from and sends no gradient back, so that masks train as if it were not there.

    Args:
        network: SAM, adapters injected.
        channel_input: What makes three channels of C.
        method: What trains.
        unet: Makes the masks instead of the mask decoder, from the images and the embedding.
        estimate_iou: Train the estimate of masks made without prompts, where the mask decoder trains at all.
    """

    def __init__(
        self,
        network: SamNetwork,
        *,
        channel_input: nn.Module,
        method: Method,
        unet: nn.Module | None = None,
        estimate_iou: bool = False,
    ) -> None:
        super().__init__()
        self.network = network
        self.channel_input = channel_input
        self.unet = unet
        self.method = method
        self.untouched: frozenset[str] = frozenset()
        self.estimates_iou = estimate_iou and not method.promptable and unet is None and method.decoder.train != "none"
        if self.estimates_iou:
            network.mask_decoder.iou_prediction_head.register_forward_pre_hook(_detached)  # type: ignore[union-attr]
        freeze_all_but(self, self._names_to_train())
        self.train()

    def forward(self, images: Tensor, *, depth: int = 1) -> Tensor:
        """One map per class.

        Args:
            images: (B, C, S, S), zoomed and normalised; the slices of a slab one after another.
            depth: Slices per slab.

        Returns:
            Logits (B, T, S/4, S/4), or those of finer decoders: (B, T, S, S), or half of that.
        """
        if self.unet is not None:
            result: Tensor = self.unet(images, self.encode(images, depth=depth))
            return result
        embeddings = self.encode(images, depth=depth)
        with self._beside(images):
            return self.decode(embeddings)

    def estimated(self, images: Tensor, *, depth: int = 1) -> tuple[Tensor, Tensor | None]:
        """What forward gives, and the estimated IoU (B, T) of each map; None where nothing estimates it."""
        if not self.estimates_iou:
            return self(images, depth=depth), None
        embeddings = self.encode(images, depth=depth)
        with self._beside(images):
            return self.decode_estimated(embeddings)

    def take_coarse(self) -> tuple[Tensor, ...]:
        """Coarser logits of the last pass in train mode, finest first, given away; none without deep supervision."""
        upsampler = self.network.mask_decoder.output_upscaling
        return upsampler.take_coarse() if isinstance(upsampler, SidePathUpsampler) else ()

    def decode_estimated(self, embeddings: Tensor) -> tuple[Tensor, Tensor]:
        """One map per class of embeddings, without a prompt, and the estimated IoU (B, T) of each."""
        return estimate_all_tokens(self.network.prompt_encoder, self.network.mask_decoder, embeddings)

    def estimator_parameters(self) -> list[nn.Parameter]:
        """The parameters that estimate the masks' IoU and that no mask depends on; none where nothing does so."""
        return [p for name, p in self.named_parameters() if self.estimates_iou and name.startswith(ESTIMATOR)]

    def encode(self, images: Tensor, *, depth: int = 1) -> Tensor:
        """Image embeddings (B, E, S/16, S/16)."""
        self.network.image_encoder.slab.depth = depth
        with self._encoder_gradients():
            result: Tensor = self.network.image_encoder(self.channel_input(images))
        return result

    def decode(self, embeddings: Tensor) -> Tensor:
        """One map per class of embeddings, without a prompt."""
        return predict_all_tokens(self.network.prompt_encoder, self.network.mask_decoder, embeddings)

    def prompted(self, embeddings: Tensor, prompts: PromptBatch) -> tuple[Tensor, Tensor]:
        """Masks of what prompts point at: logits (B, T, S/4, S/4) and their estimated IoU (B, T)."""
        return predict_prompted(self.network.prompt_encoder, self.network.mask_decoder, embeddings, prompts)

    def train(self, mode: bool = True) -> SegmentationModel:
        """Set the mode; an encoder that is frozen or adapted stays in eval, so that its batch norm does not move.

        Its adapters follow the mode (dropout).
        """
        super().train(mode)
        if self.method.encoder.train != "full":
            self.network.image_encoder.eval()
            for module in self.network.image_encoder.modules():
                if isinstance(module, nn.Dropout):
                    module.train(mode)
        return self

    def set_checkpointing(self, enabled: bool) -> None:
        """Recompute the encoder's blocks in the backward pass instead of keeping their activations."""
        self.network.image_encoder.checkpointing = enabled

    def trainable_parameters(self) -> dict[str, list[nn.Parameter]]:
        """The parameters that train, as "decay" and "no_decay".

        Norms, biases, tokens and all kinds of position embeddings are not decayed; nor, in a promptable model, are the
        networks of the tokens that no loss reaches, so that they stay SAM's.
        """
        groups: dict[str, list[nn.Parameter]] = {"decay": [], "no_decay": []}
        kept = (*NO_DECAY_NAMES, *(OTHER_MASKS if self.method.promptable else ()))
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                undecayed = parameter.ndim <= 1 or any(part in name for part in kept)
                groups["no_decay" if undecayed else "decay"].append(parameter)
        return groups

    def count_parameters(self) -> dict[str, int]:
        """Trained parameters of the encoder, the decoder (with the U-Net) and the rest, and their sum.

        Those that only estimate the quality of masks made without prompts are no part of a method and of its sum; they
        stand apart, as "estimator".
        """
        counts = {"encoder": 0, "decoder": 0, "other": 0}
        estimator = self.estimator_parameters()
        apart = {id(parameter) for parameter in estimator}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad and id(parameter) not in apart:
                decoder = name.startswith((DECODER, "unet."))
                counts["encoder" if name.startswith(ENCODER) else "decoder" if decoder else "other"] += (
                    parameter.numel()
                )
        return counts | {"total": sum(counts.values()), "estimator": sum(p.numel() for p in estimator)}

    def unused_parameters(self) -> set[str]:
        """Names of the parameters that no mask depends on."""
        names = {name for name, _ in self.named_parameters()}
        if self.unet is not None:
            return {name for name in names if name.startswith((DECODER, PROMPT_ENCODER))}
        if self.method.promptable:
            return set()
        return {n for n in names if n.startswith((PROMPT_ENCODER, ESTIMATOR))} - {NETWORK + NO_MASK_EMBED}

    @contextmanager
    def _beside(self, images: Tensor) -> Iterator[None]:
        """Show the images to a decoder that has a path beside the encoder."""
        upsampler = self.network.mask_decoder.output_upscaling
        if not isinstance(upsampler, SidePathUpsampler):
            yield
            return
        upsampler.images = self.channel_input(images)
        try:
            yield
        finally:
            upsampler.images = None

    def _encoder_gradients(self) -> AbstractContextManager[object]:
        """Nothing is recorded in an encoder of which nothing trains, behind an input that does not train either."""
        parts = (self.channel_input, self.network.image_encoder)
        trains = any(p.requires_grad for part in parts for p in part.parameters())
        return nullcontext() if trains else torch.no_grad()

    def _names_to_train(self) -> set[str]:
        every = [name for name, _ in self.named_parameters()]
        names = {n for n in every if n.startswith(("channel_input.", "unet."))}
        if self.method.encoder.train == "full":
            names |= {n for n in every if n.startswith(ENCODER)}
        if self.unet is None:
            decoder = self.network.mask_decoder
            trained = decoder_parameters_to_train(decoder, self.method.decoder, promptable=self.method.promptable)
            names |= {DECODER + name for name in trained}
            if not self.method.promptable:
                names.add(NETWORK + NO_MASK_EMBED)
            if self.estimates_iou:
                names |= {n for n in every if n.startswith(ESTIMATOR)}
        return names | set(adapter_parameters(self))


def _detached(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(tensor.detach() for tensor in inputs)
