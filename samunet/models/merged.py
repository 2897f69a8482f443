"""Which part of a trained model is plain SAM, once its adapters are merged."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from samunet.artifacts.model_spec import SAM_SIZE, STOCK_TOKENS, get_spec
from samunet.artifacts.plan import ResolvedRecipe
from samunet.core.errors import ConfigError
from samunet.models.peft.state import merge
from samunet.models.segmentation import SegmentationModel

WHOLE, ENCODER_ONLY = "whole", "encoder"


@dataclass(frozen=True)
class MergedWeights:
    """Tensors under segment-anything's keys.

    Args:
        scope: "whole" (keys of a SAM) or "encoder" (keys of its image encoder).
        tensors: On the CPU.
    """

    scope: str
    tensors: Mapping[str, Tensor]


def merge_for_sam(model: SegmentationModel, recipe: ResolvedRecipe) -> MergedWeights:
    """Merge a copy of a model and take what segment-anything can load.

    Args:
        model: Trained; not changed.
        recipe: As trained.

    Raises:
        ConfigError: If an adapter is not linear, or the encoder is not one of segment-anything's.
    """
    if get_spec(recipe.backbone).family != "vit":
        raise ConfigError(
            "segment-anything holds no TinyViT", expected="a ViT", found=recipe.backbone, todo="keep the model as it is"
        )
    network = copy.deepcopy(model.network).cpu()
    if recipe.method.depth.kind != "none":
        raise ConfigError(
            "segment-anything sees slices one by one", found=f"depth {recipe.method.depth.kind}", todo="keep the model"
        )
    stock = recipe.method.promptable and recipe.method.decoder.upsampler == "sam" and recipe.input_size == SAM_SIZE
    if stock and network.mask_decoder.num_mask_tokens == STOCK_TOKENS:
        merge(network)
        return MergedWeights(WHOLE, _detached(network.state_dict()))
    encoder = network.image_encoder
    merge(encoder)
    return MergedWeights(ENCODER_ONLY, _detached(encoder.state_dict()))


def _detached(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in state.items()}
