"""A resolved recipe into a ready model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from samunet.artifacts.model_spec import get_spec
from samunet.artifacts.plan import ResolvedRecipe
from samunet.core.errors import ConfigError
from samunet.models.channels import build_channel_input
from samunet.models.loading import LoadReport, load_weights
from samunet.models.peft.inject import inject
from samunet.models.peft.lora import LoraInjector
from samunet.models.peft.protocol import Injector
from samunet.models.peft.state import validate
from samunet.models.sam.network import build_network
from samunet.models.segmentation import FULL, LORA, NETWORK, SegmentationModel
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
        recipe: Backbone, input size, what trains.
        num_tokens: Mask tokens T.
        num_input_channels: Channels of the images given to the model.
        channels: How they become the encoder's three; only "projection" accepts other than three.
        weights: The file of the recipe's kind; None for random weights.
        seed: Decides every random value, whatever torch's global generator is at.

    Raises:
        ConfigError: If the encoder would be frozen at random values, or the weights are not of the recipe's kind.
        WeightsError: If the file does not fit.
    """
    _check_weights(recipe, weights)
    initialise = weights is None
    model, report = _assemble(
        recipe, num_tokens, num_input_channels, channels, weights, seed=seed, initialise=initialise
    )
    covered = {NETWORK + key for key in report.loaded}
    validate(model, covered=covered, unused=model.unused_parameters())
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
    model, _ = _assemble(recipe, num_tokens, num_input_channels, channels, base, seed=0, initialise=False)
    load_trained_state(model, state)
    return model.eval()


def needs_base(recipe: ResolvedRecipe) -> bool:
    """Whether a checkpoint of this recipe is only complete together with its base weights."""
    return recipe.weights_kind != NONE and recipe.encoder_tuning != FULL


def _assemble(
    recipe: ResolvedRecipe,
    num_tokens: int,
    num_input_channels: int,
    channels: str,
    weights: WeightsFile | None,
    *,
    seed: int,
    initialise: bool,
) -> tuple[SegmentationModel, LoadReport]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = build_network(
            get_spec(recipe.backbone), image_size=recipe.input_size, num_tokens=num_tokens, initialise=initialise
        )
        inject(network.image_encoder, encoder_injectors(recipe))
        channel_input = build_channel_input(channels, num_input_channels)
    report = LoadReport(NONE) if weights is None else load_weights(network, weights)
    model = SegmentationModel(network, channel_input=channel_input, encoder_tuning=recipe.encoder_tuning)
    model.set_checkpointing(recipe.checkpointing)
    note_base(model, report)
    return model, report


def encoder_injectors(recipe: ResolvedRecipe) -> Sequence[Injector]:
    """What a recipe injects into the encoder."""
    if recipe.encoder_tuning != LORA:
        return ()
    return (LoraInjector(targets=recipe.lora_targets, rank=recipe.lora_rank),)


def _check_weights(recipe: ResolvedRecipe, weights: WeightsFile | None) -> None:
    if recipe.encoder_tuning != FULL and (recipe.weights_kind == NONE or weights is None):
        raise ConfigError(
            "an encoder with random weights cannot be frozen or adapted: there is nothing to preserve",
            expected="encoder_tuning = full, or pretrained weights",
            found=f"encoder_tuning = {recipe.encoder_tuning} with weights = {recipe.weights_kind}",
            todo="set encoder_tuning to full in the recipe, or give --weights",
        )
    found = NONE if weights is None else weights.kind
    if found != recipe.weights_kind:
        raise ConfigError(
            "the weights are not of the kind the recipe was planned for",
            expected=recipe.weights_kind,
            found=found,
            todo="take the recipe of these weights: their intensity map differs",
        )
