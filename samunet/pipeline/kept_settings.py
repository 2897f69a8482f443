"""A run that exists keeps its settings: what is asked for again has to be what it was made with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from samunet.artifacts.checkpoint import BaseWeights, read_manifest
from samunet.artifacts.model_spec import get_spec
from samunet.artifacts.plan import ResolvedRecipe
from samunet.core.errors import SamunetError, UsageError
from samunet.core.log import Reporter
from samunet.models.device import usable_precision
from samunet.models.weights import AUTO, OFFICIAL, as_base, locate_weights
from samunet.pipeline.training_run import TrainingRequest, with_length
from samunet.training.checkpointing import RunIdentity, checkpoint_file
from samunet.training.clock import clock_of_run

CACHED = "cached_embeddings"
"""Whether a run trains on cached embeddings, in its provenance."""


@dataclass(frozen=True)
class Setting:
    """A setting of a run that is asked for again.

    Args:
        flag: Of the command line.
        asked: Its value there; None: not given.
        recorded: The run's; None or False: the run has none.
    """

    flag: str
    asked: float | str | None
    recorded: float | str | None


def continued_identity(request: TrainingRequest, identity: RunIdentity, device: str, folder: Path) -> RunIdentity:
    """What a run is when it is continued: as it was, on the device at hand and with the length asked for.

    Raises:
        UsageError: If another setting is asked for than it was made with.
    """
    clock = clock_of_run(identity.clock, processor=request.processor_clock, resume=True)
    refuse_others(_settings(request, identity), folder)
    recipe = replace(identity.recipe, precision=usable_precision(identity.recipe, device))
    provenance = {CACHED: request.cache_embeddings, **identity.provenance}
    return replace(identity, recipe=with_length(recipe, request), clock=clock, provenance=provenance)


def check_validated(request: TrainingRequest, identity: RunIdentity, folder: Path, reporter: Reporter) -> None:
    """A run that is only validated changes in nothing; says what is given and has no effect.

    Raises:
        UsageError: If another setting is asked for than it was made with.
    """
    clock_of_run(identity.clock, processor=request.processor_clock, resume=True)
    recipe = identity.recipe
    epochs = recipe.epochs if recipe.minutes is None else None
    length = [Setting("--epochs", request.epochs, epochs), Setting("--time-limit", request.minutes, recipe.minutes)]
    refuse_others([*_settings(request, identity), *length], folder)
    if request.num_workers is not None:
        reporter.warn("--workers has no effect with --val: nothing is trained")


def is_longer_or_shorter(recipe: ResolvedRecipe, before: ResolvedRecipe) -> bool:
    """Whether a run that is continued was given another length."""
    return (recipe.epochs, recipe.minutes) != (before.epochs, before.minutes)


def weights_setting(option: str, base: BaseWeights, backbone: str) -> Setting:
    """The weights of a run and those asked for, which are the same if kind and hash are, wherever the file lies.

    Args:
        option: As for --weights; "auto" asks for none in particular.
        base: The run's.
        backbone: The run's.

    Raises:
        WeightsError: If the weights asked for are not here or do not go with the backbone.
    """
    if option == AUTO:
        return Setting("--weights", None, None)
    asked = as_base(locate_weights(option, get_spec(backbone)))
    is_same = (asked.kind, asked.sha256) == (base.kind, base.sha256)
    return Setting("--weights", None if is_same else _named(asked), _named(base))


def ways_beside_a_run(option: str, folder: Path) -> str:
    """What can be done where a run is to begin and there is one: what begins with other weights may lie elsewhere.

    Args:
        option: As for --weights, of the run to begin.
        folder: Of the run that is there.
    """
    files = [checkpoint_file(folder, name) for name in ("final", "latest")]
    try:
        there = next((read_manifest(file) for file in files if file.is_file()), None)
        other = None if there is None else _other_weights(option, there.base, there.recipe["backbone"])
    except SamunetError:
        other = None
    if other is None:
        return "--c continues it, --overwrite replaces it"
    # without --weights, --c takes those that the run began with
    continued = "--c continues it, " if option == AUTO else ""
    return f"it began with {other}: --results FOLDER keeps both, {continued}--overwrite replaces it"


def _other_weights(option: str, base: BaseWeights, backbone: str) -> str | None:
    """What a run began with, if those are not the weights asked for; None if they are."""
    if option == AUTO:
        is_same = backbone in OFFICIAL and base.sha256 == OFFICIAL[backbone].sha256
        return None if is_same else _named(base)
    setting = weights_setting(option, base, backbone)
    return None if setting.asked is None else _named(base)


def refuse_others(settings: Sequence[Setting], folder: Path) -> None:
    """Refuse settings that are asked for and are others than the run's.

    Raises:
        UsageError: With the values of all of them.
    """
    others = [setting for setting in settings if setting.asked is not None and setting.asked != setting.recorded]
    if others:
        elsewhere = any(setting.flag == "--weights" for setting in others)
        raise UsageError(
            "a run that exists keeps its settings",
            expected=", ".join(_shown(setting.flag, setting.recorded) for setting in others),
            found=", ".join(_shown(setting.flag, setting.asked) for setting in others),
            file=folder,
            todo="leave them out (--c may change the length, with --epochs or --time-limit), or start again with "
            "--overwrite" + (", or with --results FOLDER, which keeps both" if elsewhere else ""),
        )


def _settings(request: TrainingRequest, identity: RunIdentity) -> list[Setting]:
    """All but the length and what the name of the run's folder says."""
    recipe = identity.recipe
    cached = identity.provenance.get(CACHED, request.cache_embeddings)
    return [
        weights_setting(request.weights, identity.base, recipe.backbone),
        Setting("--iterations", request.iterations, recipe.iterations),
        Setting("--lr", request.learning_rate, recipe.learning_rate),
        Setting("--batch-size", request.batch_size, recipe.batch_size),
        Setting("--no-augmentation", None if request.augment else True, not recipe.augmentation.enabled),
        Setting("--cache-embeddings", request.cache_embeddings or None, cached),
        Setting("--patience", request.patience, identity.patience),
        Setting("--seed", request.seed, identity.seed),
    ]


def _shown(flag: str, value: float | str | None) -> str:
    if value is None or value is False:
        return f"without {flag}"
    return flag if value is True else f"{flag} {value}"


def _named(base: BaseWeights) -> str:
    return f"{base.file} (SHA-256 {base.sha256[:12]}...)" if base.file else base.kind
