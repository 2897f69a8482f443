"""Models that are pretrained: SAM's encoder that completes masked images, and SAM that answers prompts.

One scheme serves every backbone: pixels are replaced, not tokens dropped, as convolutional stems and windows need the
whole grid. Shapes: B batch, S input side, p = 16 pixels of a token, N = S / p, E = 256 channels of the embedding.

Source: Xie et al., SimMIM, 2022 (masked pixels, a light head); He et al., Masked Autoencoders, 2022 (normalised
targets); Woo et al., ConvNeXt V2, 2023 (one convolutional block as the head, for hierarchical encoders).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from samunet.artifacts.method import EncoderMethod, Method
from samunet.artifacts.model_spec import PROMPT_DIM, STOCK_TOKENS, TOKEN_SIZE, get_spec
from samunet.artifacts.plan import ResolvedRecipe
from samunet.models.build import BuiltModel
from samunet.models.channels import ENCODER_CHANNELS
from samunet.models.loading import LoadReport, load_weights
from samunet.models.sam import imports
from samunet.models.sam.attention import fold_attention
from samunet.models.sam.network import SamNetwork, build_network
from samunet.models.segmentation import SegmentationModel
from samunet.models.weights import NONE, WeightsFile

PATCH_VALUES = ENCODER_CHANNELS * TOKEN_SIZE**2
PROMPT_ENCODER = "prompt_encoder."
_INIT_STD = 0.02


class MaskedInput(nn.Module):
    """Puts a learned patch in the place of every masked patch.

    For a ViT, whose first layer maps patches linearly, that is a learned token; an encoder with a convolutional stem
    takes it as well.
    """

    def __init__(self) -> None:
        super().__init__()
        self.mask_token = nn.Parameter(_INIT_STD * torch.randn(ENCODER_CHANNELS, TOKEN_SIZE, TOKEN_SIZE))

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3 + 1, S, S), the last channel 1 where the image is masked, to (B, 3, S, S)."""
        pixels, mask = images[:, :-1], images[:, -1:]
        repeats = images.shape[-1] // TOKEN_SIZE
        return torch.where(mask > 0, self.mask_token.repeat(1, repeats, repeats), pixels)


class PatchHead(nn.Module):
    """What patches look like, from the embedding: one convolutional block and a linear layer, thrown away later."""

    def __init__(self) -> None:
        super().__init__()
        self.block = imports.convnext.ConvNeXtBlock(PROMPT_DIM, use_grn=True, ls_init_value=None)
        self.linear = nn.Conv2d(PROMPT_DIM, PATCH_VALUES, kernel_size=1)
        nn.init.trunc_normal_(self.linear.weight, std=_INIT_STD)
        nn.init.zeros_(self.linear.bias)  # type: ignore[arg-type]

    def forward(self, images: Tensor, embeddings: Tensor) -> Tensor:
        """Embeddings (B, E, N, N) to values (B, 3 * p * p, N, N) as :func:`patches` lays them out; images unused."""
        del images
        result: Tensor = self.linear(self.block(embeddings))
        return result


def patches(images: Tensor) -> Tensor:
    """(B, C, S, S) to (B, C * p * p, N, N)."""
    return functional.pixel_unshuffle(images, TOKEN_SIZE)


def unpatched(values: Tensor) -> Tensor:
    """Undo :func:`patches`."""
    return functional.pixel_shuffle(values, TOKEN_SIZE)


def build_masked_model(recipe: ResolvedRecipe, *, weights: WeightsFile | None, seed: int) -> BuiltModel:
    """An encoder with its mask token and head; mask decoder and prompt encoder lie idle.

    Args:
        recipe: Backbone, input size, attention.
        weights: What the encoder continues from; None for random weights.
        seed: Decides every random value.

    Raises:
        WeightsError: If the file does not fit.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network, report = _network(recipe, weights)
        token, head = MaskedInput(), PatchHead()
    method = Method(encoder=EncoderMethod(train="full"))
    model = SegmentationModel(network, channel_input=token, method=method, unet=head)
    model.set_checkpointing(recipe.checkpointing)
    return BuiltModel(model, report)


def build_prompted_model(recipe: ResolvedRecipe, *, weights: WeightsFile | None, seed: int) -> BuiltModel:
    """SAM with its own tokens, encoder and mask decoder in training; a random prompt encoder trains with them.

    Args:
        recipe: A promptable method.
        weights: What it continues from; None for random weights.
        seed: Decides every random value.

    Raises:
        WeightsError: If the file does not fit.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network, report = _network(recipe, weights)
    model = SegmentationModel(network, channel_input=nn.Identity(), method=recipe.method)
    known = weights is not None and not any(key.startswith(PROMPT_ENCODER) for key in report.missing)
    network.prompt_encoder.requires_grad_(not known)
    model.set_checkpointing(recipe.checkpointing)
    return BuiltModel(model, report)


def _network(recipe: ResolvedRecipe, weights: WeightsFile | None) -> tuple[SamNetwork, LoadReport]:
    """SAM with its own tokens, its weights and its fast attention."""
    network = build_network(get_spec(recipe.backbone), image_size=recipe.input_size, num_tokens=STOCK_TOKENS)
    report = LoadReport(NONE) if weights is None else load_weights(network, weights, keep_heads=True)
    if recipe.attention != "upstream":
        fold_attention(network.image_encoder, global_only=recipe.attention == "folded_global")
    return network, report
