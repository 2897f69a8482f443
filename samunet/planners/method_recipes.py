"""From a method to a recipe for a planned dataset: its method, in a size and schedule that fit facts and budget."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from samunet.artifacts.fingerprint import Fingerprint
from samunet.artifacts.method import Method
from samunet.artifacts.plan import METHOD_PARTS, DeviceClass, Plan, Recipe, WeightsKind
from samunet.artifacts.probe import NO_PROBES, Probes
from samunet.core.config import parse_schema
from samunet.core.errors import ConfigError
from samunet.planners.planner import facts_of_plan
from samunet.planners.presets import MEDSAM_CONFIGURATION, Preset
from samunet.planners.recipes import Reasoned, Wish, automatic, plan_recipe


def with_changes(method: Method, changes: Mapping[str, Any]) -> Method:
    """A method with single values changed.

    Args:
        method: The method.
        changes: Dotted paths, numbers counting list entries, as "encoder.adapters.0.rank", to JSON values.

    Raises:
        ConfigError: If a path does not exist or the result is not valid.
    """
    content = method.model_dump(mode="json")
    for path, value in changes.items():
        *parents, last = path.split(".")
        place: Any = content
        try:
            for key in parents:
                place = place[int(key)] if isinstance(place, list) else place[key]
            final = int(last) if isinstance(place, list) else last
            _ = place[final]
            place[final] = value
        except (KeyError, IndexError, ValueError, TypeError):
            raise ConfigError(
                "the method has no such choice", found=path, expected=f"a path into {method.model_dump_json()}"
            ) from None
    return parse_schema(Method, content)


def automatic_recipe(
    plan: Plan,
    fingerprint: Fingerprint,
    *,
    configuration: str,
    weights: WeightsKind,
    device: DeviceClass,
    backbone: str,
    changes: Mapping[str, Any],
    probes: Probes = NO_PROBES,
) -> Recipe:
    """The plan's own method on another backbone; arguments as for :func:`preset_recipe` and :func:`make_plan`."""
    facts = facts_of_plan(plan, fingerprint, probes)
    slab_depth = plan.configuration(configuration).slab_depth.value
    wish = automatic(
        facts, weights, device, configuration=configuration, slab_depth=slab_depth, backbone=(backbone, "given")
    )
    method = with_changes(wish.method, changes)
    parts = {name: (getattr(method, name), reason) for name, (_, reason) in wish.parts.items()}
    intensities = _intensities(plan, configuration, device)
    wish = replace(wish, parts=parts, intensity_map=intensities)
    return parse_schema(Recipe, plan_recipe(facts, wish))


def preset_recipe(
    preset: Preset,
    plan: Plan,
    fingerprint: Fingerprint,
    *,
    configuration: str,
    weights: WeightsKind,
    device: DeviceClass,
    backbone: str | None = None,
    changes: Mapping[str, Any] | None = None,
    published: bool = False,
) -> Recipe:
    """A preset's recipe for a planned dataset: its method, in a size and schedule that fit facts and budget.

    Args:
        preset: The method.
        plan: The dataset's plan.
        fingerprint: What the plan was made from.
        configuration: Planned configuration it is trained with.
        weights: Kind of weights it starts from.
        device: Class of device.
        backbone: Another image encoder than the published one.
        changes: Changes of the method, as :func:`with_changes` takes them.
        published: Take the published size and schedule instead of the plan's.

    Raises:
        ConfigError: If the method, the weights and the configuration do not go together.
    """
    method = with_changes(preset.method, changes or {})
    chosen = plan.configuration(configuration)
    slab_depth = chosen.slab_depth.value
    _check(preset, method, configuration, slab_depth)
    facts = facts_of_plan(plan, fingerprint)
    parts: dict[str, Reasoned] = {name: (getattr(method, name), f"preset {preset.name}") for name in METHOD_PARTS}
    wish = Wish(
        weights,
        device,
        (backbone or preset.backbone, "given" if backbone else f"as {preset.name} was published"),
        parts,
        slab_depth,
        intensity_map=_intensities(plan, configuration, device),
        fixed=_published(preset, facts.num_foreground_slices) if published else None,
    )
    return parse_schema(Recipe, plan_recipe(facts, wish))


def _check(preset: Preset, method: Method, configuration: str, slab_depth: int) -> None:
    if preset.own_intensities and configuration != MEDSAM_CONFIGURATION:
        raise ConfigError(
            f"preset {preset.name} has its own intensities",
            expected=f"-c {MEDSAM_CONFIGURATION}",
            found=configuration,
        )
    if slab_depth > 1 and method.depth.kind == "none":
        raise ConfigError(
            f"preset {preset.name} looks at slices one by one",
            expected="a configuration without slabs",
            found=f"{configuration} with slabs of {slab_depth} slices",
            todo="leave -c out, or choose 2d or 2.5d",
        )


def _intensities(plan: Plan, configuration: str, device: DeviceClass) -> Reasoned | None:
    """The configuration's own map where it has its own normalization; else what the weights ask for."""
    chosen = plan.configuration(configuration)
    if chosen.normalization is None:
        return None
    planned = next(iter(chosen.recipes.values()))[device].intensity_map
    return planned.value, planned.reason


def _published(preset: Preset, num_slices: int) -> dict[str, Reasoned]:
    """The published values as fixed fields of a recipe."""
    schedule, reason = preset.published, f"published with {preset.name}"
    iterations = max(1, round(num_slices / schedule.batch_size))
    values = {
        "input_size": schedule.input_size,
        "batch_size": schedule.batch_size,
        "learning_rate": schedule.learning_rate,
        "weight_decay": schedule.weight_decay,
        "warmup_steps": schedule.warmup_steps,
        "decay": schedule.decay,
        "loss": schedule.loss,
        "iterations": iterations,
        "epochs": schedule.epochs,
        "minutes": None,
    }
    return {name: (value, reason) for name, value in values.items()}
