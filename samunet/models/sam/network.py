"""SAM without prompts: encoder, prompt encoder and mask decoder under upstream's state-dict keys.

Shapes: B batch, S input side, E = 256 channels, T mask tokens.
"""

from __future__ import annotations

from torch import Tensor, nn

from samunet.artifacts.model_spec import PROMPT_DIM, TOKEN_SIZE, SamSpec
from samunet.models.decoders.semantic import predict_all_tokens
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
NO_MASK_EMBED = "prompt_encoder.no_mask_embed.weight"
GAUSSIAN = "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"


class SamNetwork(nn.Module):
    """SAM at a given input size with a given number of mask tokens.

    Args:
        encoder: The image encoder.
        image_size: Input side S in pixels.
        num_tokens: Mask tokens T, at least 1.
    """

    def __init__(self, encoder: SamEncoder, *, image_size: int, num_tokens: int) -> None:
        super().__init__()
        grid = image_size // TOKEN_SIZE
        self.image_encoder = encoder
        self.prompt_encoder = imports.modeling.PromptEncoder(
            embed_dim=PROMPT_DIM,
            image_embedding_size=(grid, grid),
            input_image_size=(image_size, image_size),
            mask_in_chans=16,
        )
        self.mask_decoder = build_mask_decoder(num_tokens)

    def forward(self, images: Tensor) -> Tensor:
        """One map per mask token, without any prompt.

        Args:
            images: (B, 3, S, S).

        Returns:
            Logits (B, T, S/4, S/4).
        """
        return predict_all_tokens(self.prompt_encoder, self.mask_decoder, self.image_encoder(images))


def build_mask_decoder(num_tokens: int) -> nn.Module:
    """SAM's mask decoder with ``num_tokens`` mask tokens (stock: 4) and random weights."""
    decoder: nn.Module = imports.modeling.MaskDecoder(
        num_multimask_outputs=num_tokens - 1,
        transformer=imports.modeling.TwoWayTransformer(depth=2, embedding_dim=PROMPT_DIM, mlp_dim=2048, num_heads=8),
        transformer_dim=PROMPT_DIM,
        iou_head_depth=3,
        iou_head_hidden_dim=256,
    )
    return decoder


def build_network(spec: SamSpec, *, image_size: int, num_tokens: int, initialise: bool = True) -> SamNetwork:
    """SAM of any size with random weights from torch's current generator.

    Args:
        spec: The encoder's widths and depths.
        image_size: Input side S in pixels.
        num_tokens: Mask tokens T, at least 1.
        initialise: Draw the encoder's weights; without it they must be loaded.
    """
    encoder = build_encoder(spec, image_size=image_size, initialise=initialise)
    return SamNetwork(encoder, image_size=image_size, num_tokens=num_tokens)
