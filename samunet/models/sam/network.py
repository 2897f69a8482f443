"""SAM without prompts: encoder, prompt encoder and mask decoder under upstream's state-dict keys.

Shapes: B batch, S input side, E = 256 channels, T mask tokens.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

from torch import Tensor, nn

from samunet.artifacts.model_spec import PROMPT_DIM, TOKEN_SIZE, SamSpec
from samunet.models.decoders.semantic import predict_all_tokens
from samunet.models.decoders.side_path import SidePath, SidePathUpsampler
from samunet.models.sam import imports
from samunet.models.sam.encoder import SamEncoder, build_encoder

# What depends on the classes: no checkpoint of SAM can supply it for other classes.
CLASS_SPECIFIC = (
    "mask_decoder.mask_tokens.",
    "mask_decoder.output_hypernetworks_mlps.",
    "mask_decoder.iou_token.",
    "mask_decoder.iou_prediction_head.",
)
UNUSED_HEAD = "mask_decoder.iou_prediction_head."
PROGRESSIVE_WIDTHS = (64, 32, 16, 8)
_SHARED_STEPS = 4
Upsampler = Literal["sam", "progressive", "side_path"]
STOCK_PATH = SidePath()
NO_MASK_EMBED = "prompt_encoder.no_mask_embed.weight"
GAUSSIAN = "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"


class SamNetwork(nn.Module):
    """SAM at a given input size with a given number of mask tokens.

    Args:
        encoder: The image encoder.
        image_size: Input side S in pixels.
        num_tokens: Mask tokens T, at least 1.
        upsampler: As for :func:`build_mask_decoder`.
        path: As for it.
    """

    def __init__(
        self,
        encoder: SamEncoder,
        *,
        image_size: int,
        num_tokens: int,
        upsampler: Upsampler = "sam",
        path: SidePath = STOCK_PATH,
    ) -> None:
        super().__init__()
        grid = image_size // TOKEN_SIZE
        self.image_encoder = encoder
        self.prompt_encoder = imports.modeling.PromptEncoder(
            embed_dim=PROMPT_DIM,
            image_embedding_size=(grid, grid),
            input_image_size=(image_size, image_size),
            mask_in_chans=16,
        )
        self.mask_decoder = build_mask_decoder(num_tokens, upsampler, path=path)

    def forward(self, images: Tensor) -> Tensor:
        """One map per mask token, without any prompt.

        Args:
            images: (B, 3, S, S).

        Returns:
            Logits (B, T, S/4, S/4), or (B, T, S, S) with a progressive upsampler.
        """
        return predict_all_tokens(self.prompt_encoder, self.mask_decoder, self.image_encoder(images))


def build_mask_decoder(num_tokens: int, upsampler: Upsampler = "sam", *, path: SidePath = STOCK_PATH) -> nn.Module:
    """SAM's mask decoder with random weights.

    Args:
        num_tokens: Mask tokens T (stock: 4).
        upsampler: "sam" doubles the embedding's grid twice, "progressive" four times, to the input's own; "side_path"
            to where its path begins, and joins it with convolutions of the image on the way.
        path: What that path is like.

    Source: Chen et al., MA-SAM, 2024 (progressive upsampling).
    """
    decoder: nn.Module = imports.modeling.MaskDecoder(
        num_multimask_outputs=num_tokens - 1,
        transformer=imports.modeling.TwoWayTransformer(depth=2, embedding_dim=PROMPT_DIM, mlp_dim=2048, num_heads=8),
        transformer_dim=PROMPT_DIM,
        iou_head_depth=3,
        iou_head_hidden_dim=256,
    )
    if upsampler == "progressive":
        decoder.output_upscaling = _progressive_upsampler()
        decoder.output_hypernetworks_mlps = _hypernetworks(num_tokens, PROGRESSIVE_WIDTHS[-1])
    elif upsampler == "side_path":
        own = list(decoder.output_upscaling.children())  # type: ignore[union-attr]
        decoder.output_upscaling = SidePathUpsampler(own, path, num_maps=num_tokens)
        decoder.output_hypernetworks_mlps = _hypernetworks(num_tokens, path.width)
    return decoder


def _hypernetworks(num_tokens: int, width: int) -> nn.ModuleList:
    """What makes weights of the upsampler's features from each token."""
    return nn.ModuleList(imports.mask_decoder.MLP(PROMPT_DIM, PROMPT_DIM, width, 3) for _ in range(num_tokens))


def fresh_keys(mask_decoder: nn.Module) -> tuple[str, ...]:
    """Prefixes of keys that no checkpoint of SAM can supply because of the upsampler, beside the class-specific ones.

    The first two deconvolutions and the norm between them are SAM's own in either upsampler.

    Args:
        mask_decoder: What :func:`build_mask_decoder` gave.

    Returns:
        Prefixes of the network's names; none for SAM's own upsampler.
    """
    steps = list(mask_decoder.output_upscaling.named_children())[_SHARED_STEPS:]  # type: ignore[union-attr]
    return tuple(
        f"mask_decoder.output_upscaling.{name}." for name, step in steps if any(True for _ in step.parameters())
    )


def _progressive_upsampler() -> nn.Sequential:
    """Four deconvolutions, each followed by GELU, with a norm between but not at the end."""
    layers: list[nn.Module] = []
    for coarse, fine in pairwise((PROMPT_DIM, *PROGRESSIVE_WIDTHS)):
        layers.append(nn.ConvTranspose2d(coarse, fine, kernel_size=2, stride=2))
        if fine != PROGRESSIVE_WIDTHS[-1]:
            layers.append(imports.image_encoder.LayerNorm2d(fine))
        layers.append(nn.GELU())
    return nn.Sequential(*layers)


def build_network(
    spec: SamSpec,
    *,
    image_size: int,
    num_tokens: int,
    upsampler: Upsampler = "sam",
    path: SidePath = STOCK_PATH,
    initialise: bool = True,
) -> SamNetwork:
    """SAM of any size with random weights from torch's current generator.

    Args:
        spec: The encoder's widths and depths.
        image_size: Input side S in pixels.
        num_tokens: Mask tokens T, at least 1.
        upsampler: As for :func:`build_mask_decoder`.
        path: As for it.
        initialise: Draw the encoder's weights; without it they must be loaded.
    """
    encoder = build_encoder(spec, image_size=image_size, initialise=initialise)
    return SamNetwork(encoder, image_size=image_size, num_tokens=num_tokens, upsampler=upsampler, path=path)
