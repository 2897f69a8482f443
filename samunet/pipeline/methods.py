"""From what a user asks for to a method: preset, backbone, weights, configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, cast

from samunet.artifacts.fingerprint import Fingerprint
from samunet.artifacts.method import summarise
from samunet.artifacts.method_faults import faults_with_weights
from samunet.artifacts.plan import (
    Configuration,
    DeviceClass,
    Plan,
    ResolvedRecipe,
    WeightsKind,
    resolve_recipe,
    strip_reasons,
)
from samunet.artifacts.pretraining import Pretrained
from samunet.artifacts.probe import load_probes
from samunet.artifacts.workspace import Workspace
from samunet.core.config import load_schema
from samunet.core.errors import ConfigError, UsageError
from samunet.core.files import sha256_json
from samunet.models.device import device_class
from samunet.models.weights import AUTO as AUTO_WEIGHTS
from samunet.models.weights import pretrained_weights, supplies_decoder, weights_kind
from samunet.pipeline.subsets import SubsetRequest, subset_tag
from samunet.pipeline.unlabelled import unlabelled_tag
from samunet.planners.method_recipes import automatic_recipe, changed_recipe, preset_recipe, rank_changes, with_changes
from samunet.planners.presets import AUTO, SLAB_CONFIGURATION, Preset, get_preset, without_depth

PLAIN_CONFIGURATION = "2d"
# What the own method becomes for weights without a mask decoder: one that starts from random values trains whole.
WHOLE_DECODER: Mapping[str, Any] = {"decoder.train": "full"}


class MethodRequest(SubsetRequest, Protocol):
    """What of a training request says which method is meant; fields as in TrainingRequest."""

    @property
    def preset(self) -> str: ...  # noqa: D102

    @property
    def backbone(self) -> str | None: ...  # noqa: D102

    @property
    def changes(self) -> Mapping[str, Any]: ...  # noqa: D102

    @property
    def rank(self) -> int | None: ...  # noqa: D102

    @property
    def published(self) -> bool: ...  # noqa: D102

    @property
    def weights(self) -> str: ...  # noqa: D102

    @property
    def unlabelled(self) -> Sequence[str]: ...  # noqa: D102


def default_configuration(request: MethodRequest, plan: Plan) -> str:
    """The configuration a method is trained with when none is named.

    Raises:
        UsageError: If the preset needs one that is not planned.
    """
    recommended = plan.recommended.value
    if request.preset == AUTO:
        return recommended
    preset = get_preset(request.preset)
    needed = preset.configuration
    if needed is not None and needed not in plan.configurations:
        raise UsageError(
            f"preset {preset.name} needs configuration {needed}, which is not planned for this dataset",
            expected=needed,
            found=", ".join(plan.configurations),
            todo=_instead_of_slabs(preset) if needed == SLAB_CONFIGURATION else "plan again",
        )
    # where nothing trains, neighbours as channels would be colours to SAM
    plain = plan.configuration(recommended).slab_depth.value > 1 or not preset.method.trains_anything
    return needed or (PLAIN_CONFIGURATION if plain else recommended)


def _instead_of_slabs(preset: Preset) -> str:
    """What helps where no slabs are planned because volumes have too few slices."""
    plain = without_depth(preset)
    other = "" if plain is None else f", or --preset {plain.name}, which has none"
    alone = f"-c {PLAIN_CONFIGURATION} (its depth path then sees one slice){other}"
    return f"{alone}; slabs are only planned where volumes have three slices"


def chosen_kind(request: MethodRequest) -> WeightsKind:
    """The kind of weights a run starts from."""
    if request.weights == AUTO_WEIGHTS and request.preset != AUTO:
        return get_preset(request.preset).weights
    return cast(WeightsKind, weights_kind(request.weights))


def chosen_weights(request: MethodRequest) -> str:
    """What to look for on disk or to download.

    Raises:
        UsageError: If the preset starts from weights that have no official file and none are given.
    """
    kind = chosen_kind(request)
    if request.weights == AUTO_WEIGHTS and kind != "sam":
        raise UsageError(
            f"preset {request.preset} starts from {kind} weights, which are given by path",
            expected=f"--weights {kind}:FILE",
            found="--weights auto",
        )
    return request.weights


def run_label(request: MethodRequest) -> str:
    """What tells runs apart in the results folder: the preset, what was changed, other images, the subset of cases.

    The rank counts as the changes of the preset that it stands for. Those of the plan's own method only the plan knows:
    there it counts by its own name.
    """
    label = request.preset
    if request.backbone is not None:
        label += f"-{request.backbone}"
    changed = dict(request.changes)
    if request.rank is not None and request.preset == AUTO:
        changed["rank"] = request.rank
    elif request.rank is not None:
        changed |= rank_changes(with_changes(get_preset(request.preset).method, request.changes), request.rank)
    if request.published:
        changed["published"] = True
    tags = [sha256_json(changed)[:6] if changed else "", unlabelled_tag(request.unlabelled), subset_tag(request)]
    return "-".join([label, *(tag for tag in tags if tag)])


def method_recipe(
    request: MethodRequest, plan: Plan, configuration: str, device: str, workspace: Workspace
) -> ResolvedRecipe:
    """The recipe of the method asked for.

    Raises:
        UsageError: If the preset does not exist, or "auto" is to be trained as published.
        ConfigError: If the method does not go with the weights or the configuration.
    """
    kind, place = chosen_kind(request), device_class(device)
    if request.preset == AUTO and request.published:
        raise UsageError("--recipe published needs a published method", expected="--preset NAME", found=AUTO)
    chosen, about = plan.configuration(configuration), pretrained_weights(request.weights)
    from_random = about is not None and about.from_random
    backbone = _backbone(request, about, _planned_backbone(chosen, kind, place))
    changes = request.changes
    if request.preset == AUTO and backbone is None:
        recipe = resolve_recipe(chosen, kind, place)
        if _would_stay_random(recipe, request):
            changes = {**WHOLE_DECODER, **changes}
        if not changes and request.rank is None:
            return recipe
        # a change that cannot be made is told before anything is read
        with_changes(recipe.method, changes, request.rank)
    fingerprint = load_schema(Fingerprint, workspace.fingerprint_file(plan.dataset))
    asked: dict[str, Any] = {
        "configuration": configuration,
        "weights": kind,
        "device": place,
        "changes": changes,
        "rank": request.rank,
    }
    if request.preset != AUTO:
        preset, published = get_preset(request.preset), request.published
        planned = preset_recipe(
            preset, plan, fingerprint, **asked, backbone=backbone, published=published, from_random=from_random
        )
    else:
        asked["probes"] = load_probes(workspace.probe_file(plan.dataset))
        if backbone is not None:
            planned = automatic_recipe(plan, fingerprint, **asked, backbone=backbone, from_random=from_random)
            own = strip_reasons(planned, kind, place, slab_depth=chosen.slab_depth.value)
            if "decoder.train" not in changes and _would_stay_random(own, request):
                asked["changes"] = {**WHOLE_DECODER, **changes}
                planned = automatic_recipe(plan, fingerprint, **asked, backbone=backbone, from_random=from_random)
        else:
            planned = changed_recipe(chosen.recipes[kind][place], plan, fingerprint, **asked)
    recipe = strip_reasons(planned, kind, place, slab_depth=chosen.slab_depth.value)
    _refuse_random_decoder(recipe, request)
    return recipe


def _would_stay_random(recipe: ResolvedRecipe, request: MethodRequest) -> list[str]:
    """What would have to be trained too, as the weights do not hold it; nothing if they hold a mask decoder."""
    kind = chosen_kind(request)
    faults = [] if kind == "none" else faults_with_weights(recipe.method, kind, has_decoder=False)
    # the file is read only where it matters
    return [] if not faults or supplies_decoder(request.weights, recipe.backbone) else faults


def _refuse_random_decoder(recipe: ResolvedRecipe, request: MethodRequest) -> None:
    """Refuse a method that leaves parts of the decoder as the weights do not hold them: at random values.

    Raises:
        ConfigError: With what to change.
    """
    if faults := _would_stay_random(recipe, request):
        raise ConfigError(
            f"{'the plan' if request.preset == AUTO else f'preset {request.preset}'} does not go with these weights",
            expected="weights with a mask decoder, or a method that trains all of it",
            found=f"{request.weights}, and {summarise(recipe.method)}",
            todo="; ".join(faults),
        )


def _backbone(request: MethodRequest, about: Pretrained | None, planned: str | None) -> str | None:
    """The image encoder to plan for: asked for, or that of the weights; None where the plan's recipe already has it."""
    if request.backbone is not None or about is None:
        return request.backbone
    is_planned = request.preset == AUTO and about.backbone == planned and not about.from_random
    return None if is_planned else about.backbone


def _planned_backbone(configuration: Configuration, kind: WeightsKind, place: DeviceClass) -> str | None:
    recipe = configuration.recipes.get(kind, {}).get(place)
    return None if recipe is None else recipe.backbone.value
