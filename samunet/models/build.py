"""A resolved recipe into a ready model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from samunet.artifacts.method_faults import faults_with_weights
from samunet.artifacts.model_spec import STOCK_TOKENS, get_spec
from samunet.artifacts.plan import ResolvedRecipe
from samunet.core.errors import ConfigError
from samunet.models.channels import build_channel_input
from samunet.models.decoders.adapters import inject_decoder
from samunet.models.decoders.side_path import SidePath
from samunet.models.fusion import FusionUNet
from samunet.models.loading import LoadReport, load_weights
from samunet.models.peft.inject import inject_adapters, inject_depth
from samunet.models.peft.state import validate
from samunet.models.sam.attention import fold_attention
from samunet.models.sam.network import SamNetwork, build_network
from samunet.models.segmentation import SegmentationModel
from samunet.models.state import load_trained_state, note_base
from samunet.models.weights import NONE, WeightsFile


@dataclass(frozen=True)
class BuiltModel:
    """A model and what its weights are.

    Args:
        model: In train mode, on the CPU.
        load_report: What was loaded, resized and re-initialised.
    """

    model: SegmentationModel
    load_report: LoadReport


def build_model(
    recipe: ResolvedRecipe,
    *,
    num_tokens: int,
    num_input_channels: int,
    channels: str,
    weights: WeightsFile | None,
    seed: int,
) -> BuiltModel:
    """Build the model that a recipe describes, ready to be trained.

    Args:
        recipe: Backbone, input size, method.
        num_tokens: Mask tokens T of the dataset; a promptable model keeps SAM's own instead.
        num_input_channels: Channels of the images given to the model.
        channels: How they become the encoder's three; only "projection" accepts other than three.
        weights: The file of the recipe's kind; None for random weights.
        seed: Decides every random value, whatever torch's global generator is at.

    Raises:
        ConfigError: If something would be frozen at random values, or the weights are not of the recipe's kind.
        WeightsError: If the file does not fit.
    """
    _check_weights(recipe, weights)
    initialise = weights is None
    model, report, base = _assemble(
        recipe, num_tokens, num_input_channels, channels, weights, seed=seed, initialise=initialise
    )
    validate(model, covered=base, unused=model.unused_parameters())
    return BuiltModel(model, report)


def restore_model(
    recipe: ResolvedRecipe,
    *,
    num_tokens: int,
    num_input_channels: int,
    channels: str,
    weights: WeightsFile | None,
    state: Mapping[str, Tensor],
) -> SegmentationModel:
    """Build a trained model from its base and a checkpoint's tensors, in eval mode.

    Args:
        recipe: As trained.
        num_tokens: As trained.
        num_input_channels: As trained.
        channels: As trained.
        weights: The base; None where :func:`needs_base` says no.
        state: What :func:`samunet.models.state.trained_state` gave.

    Raises:
        CheckpointError: If the state does not fit, or needs a base that is not given.
        WeightsError: If the base does not fit.
    """
    base = weights if needs_base(recipe) else None
    model, _, _ = _assemble(recipe, num_tokens, num_input_channels, channels, base, seed=0, initialise=False)
    load_trained_state(model, state)
    return model.eval()


def needs_base(recipe: ResolvedRecipe) -> bool:
    """Whether a checkpoint of this recipe is only complete together with its base weights."""
    return recipe.weights_kind != NONE and recipe.method.encoder.train != "full"


def _assemble(
    recipe: ResolvedRecipe,
    num_tokens: int,
    num_input_channels: int,
    channels: str,
    weights: WeightsFile | None,
    *,
    seed: int,
    initialise: bool,
) -> tuple[SegmentationModel, LoadReport, set[str]]:
    """The model, what was loaded, and the names of the tensors that are the base's (positions resized or not)."""
    method = recipe.method
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = build_network(
            get_spec(recipe.backbone),
            image_size=recipe.input_size,
            num_tokens=STOCK_TOKENS if method.promptable else num_tokens,
            upsampler=method.decoder.upsampler,
            path=SidePath.of(method.decoder),
            initialise=initialise,
        )
        report = LoadReport(NONE) if weights is None else load_weights(network, weights, keep_heads=method.promptable)
        tensors = {id(t): name for name, t in network.state_dict(keep_vars=True).items() if name in set(report.loaded)}
        before = set(network.state_dict())
        _adapt(network, recipe)
        channel_input = build_channel_input(channels, num_input_channels)
        unet = None
        if method.fusion.kind == "unet":
            unet = FusionUNet(num_input_channels, num_tokens, width=method.fusion.width)
    estimate = recipe.loss.estimated_iou > 0
    model = SegmentationModel(network, channel_input=channel_input, method=method, unet=unet, estimate_iou=estimate)
    model.set_checkpointing(recipe.checkpointing)
    state = model.state_dict(keep_vars=True)
    base = {name: tensors[id(tensor)] for name, tensor in state.items() if id(tensor) in tensors}
    note_base(model, {name for name, key in base.items() if key not in report.resized})
    new = tuple(key for key in network.state_dict() if key not in before and ".base_layer." not in key)
    if weights is not None:
        report = replace(report, missing=report.missing + new)
    return model, report, set(base)


def _adapt(network: SamNetwork, recipe: ResolvedRecipe) -> None:
    """Put the method's modules into a network that holds its weights."""
    method = recipe.method
    if recipe.attention != "upstream":
        fold_attention(network.image_encoder, global_only=recipe.attention == "folded_global")
    inject_adapters(network.image_encoder, method.encoder.adapters)
    inject_depth(network.image_encoder, method.depth, max_depth=recipe.slab_depth)
    if method.fusion.kind == "sam":
        inject_decoder(network.mask_decoder, method.decoder)


def _check_weights(recipe: ResolvedRecipe, weights: WeightsFile | None) -> None:
    found = NONE if weights is None else weights.kind
    if found != recipe.weights_kind:
        raise ConfigError(
            "the weights are not of the kind the recipe was planned for",
            expected=recipe.weights_kind,
            found=found,
            todo="take the recipe of these weights: their intensity map differs",
        )
    faults = faults_with_weights(recipe.method, found)
    if faults:
        raise ConfigError("the method does not go with these weights", found="; ".join(faults))
