"""From what a user asks for to a method: preset, backbone, weights, configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Protocol, cast

from samunet.artifacts.fingerprint import Fingerprint
from samunet.artifacts.plan import Plan, ResolvedRecipe, WeightsKind, resolve_recipe, strip_reasons
from samunet.artifacts.probe import load_probes
from samunet.artifacts.workspace import Workspace
from samunet.core.config import load_schema
from samunet.core.errors import UsageError
from samunet.core.files import sha256_json
from samunet.models.device import device_class
from samunet.models.weights import AUTO as AUTO_WEIGHTS
from samunet.models.weights import weights_kind
from samunet.planners.method_recipes import automatic_recipe, preset_recipe, with_changes
from samunet.planners.presets import AUTO, get_preset

PLAIN_CONFIGURATION = "2d"


class MethodRequest(Protocol):
    """What of a training request says which method is meant; fields as in TrainingRequest."""

    @property
    def preset(self) -> str: ...  # noqa: D102

    @property
    def backbone(self) -> str | None: ...  # noqa: D102

    @property
    def changes(self) -> Mapping[str, Any]: ...  # noqa: D102

    @property
    def published(self) -> bool: ...  # noqa: D102

    @property
    def weights(self) -> str: ...  # noqa: D102


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
            todo="plan again; volumes of fewer than three slices have no slabs",
        )
    slabs = plan.configuration(recommended).slab_depth.value > 1
    return needed or (PLAIN_CONFIGURATION if slabs else recommended)


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
    """What tells runs of different methods apart in the results folder: the preset, and what was changed."""
    label = request.preset
    if request.backbone is not None:
        label += f"-{request.backbone}"
    changed = {**request.changes, **({"published": True} if request.published else {})}
    return f"{label}-{sha256_json(changed)[:6]}" if changed else label


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
    if request.preset == AUTO and request.backbone is None:
        recipe = resolve_recipe(plan.configuration(configuration), kind, place)
        return replace(recipe, method=with_changes(recipe.method, request.changes)) if request.changes else recipe
    fingerprint = load_schema(Fingerprint, workspace.fingerprint_file(plan.dataset))
    if request.preset == AUTO:
        assert request.backbone is not None
        planned = automatic_recipe(
            plan,
            fingerprint,
            configuration=configuration,
            weights=kind,
            device=place,
            backbone=request.backbone,
            changes=request.changes,
            probes=load_probes(workspace.probe_file(plan.dataset)),
        )
    else:
        planned = preset_recipe(
            get_preset(request.preset),
            plan,
            fingerprint,
            configuration=configuration,
            weights=kind,
            device=place,
            backbone=request.backbone,
            changes=request.changes,
            published=request.published,
        )
    return strip_reasons(planned, kind, place, slab_depth=plan.configuration(configuration).slab_depth.value)
