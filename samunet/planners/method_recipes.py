"""From a method to a recipe for a planned dataset: its method, in a size and schedule that fit facts and budget."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from samunet.artifacts.fingerprint import Fingerprint
from samunet.artifacts.method import SIDE_PATH_FIELDS, Method, summarise
from samunet.artifacts.method_faults import faults_with_blocks, faults_with_slabs, faults_with_weights
from samunet.artifacts.model_spec import SPECS, get_spec
from samunet.artifacts.plan import METHOD_PARTS, DeviceClass, Plan, Recipe, WeightsKind
from samunet.artifacts.plan_parts import STORED
from samunet.artifacts.probe import NO_PROBES, Probes
from samunet.core.config import parse_schema
from samunet.core.errors import ConfigError, UsageError
from samunet.planners import rules
from samunet.planners.edits import Reasoned
from samunet.planners.peft import has_place_for_path, without_side_path
from samunet.planners.planner import facts_of_plan
from samunet.planners.presets import MEDSAM_CONFIGURATION, Preset
from samunet.planners.recipes import Wish, automatic, plan_recipe


def with_changes(method: Method, changes: Mapping[str, Any], rank: int | None = None) -> Method:
    """A method with single values changed.

    Args:
        method: The method.
        changes: Dotted paths, numbers counting list entries, as "encoder.adapters.0.rank", to JSON values. A rank that
            is given holds in all blocks; another kind of depth or adapter starts from that kind's defaults.
        rank: Of every low-rank adapter, those of the decoder included, in all blocks.

    Raises:
        ConfigError: If a path does not exist or the result is not valid.
        UsageError: If a rank is given and there are no low-rank adapters.
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
        except (KeyError, IndexError, ValueError, TypeError):
            raise ConfigError(
                "the method has no such choice", found=path, expected=f"a path into {method.model_dump_json()}"
            ) from None
        if last == "kind" and (parents == ["depth"] or parents[:2] == ["encoder", "adapters"]):
            place.clear()
        if last == "rank" and f"{'.'.join(parents)}.ranks" not in changes and "ranks" in place:
            place["ranks"] = None
        place[final] = value
    if "decoder" not in changes:
        content["decoder"] = _with_path_that_fits(content, changes)
    try:
        changed = parse_schema(Method, content)
    except ConfigError as error:
        error.todo = "give other values with --set"
        raise
    return changed if rank is None else with_changes(changed, rank_changes(changed, rank))


def _with_path_that_fits(content: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The decoder's values without those of a side path that nobody asked for and that nothing would read.

    A planned path makes way for prompts, a U-Net or another upsampler; what is asked for stays, to be refused if it
    does not fit.
    """
    decoder: dict[str, Any] = content["decoder"]
    asked = {path.removeprefix("decoder.") for path in changes if path.startswith("decoder.")}
    if "upsampler" in asked:
        return decoder if decoder["upsampler"] == "side_path" else without_side_path(decoder, asked)
    kinds = {
        part: value.get("kind", default) if isinstance(value := content[part], Mapping) else default
        for part, default in (("prompts", "none"), ("fusion", "sam"))
    }
    is_free = decoder["upsampler"] == "side_path" and asked.isdisjoint(SIDE_PATH_FIELDS)
    return without_side_path(decoder) if is_free and not has_place_for_path(**kinds) else decoder


def rank_changes(method: Method, rank: int) -> dict[str, Any]:
    """The changes that one rank for all low-rank adapters stands for, those of the decoder included.

    Args:
        method: The method.
        rank: The rank.

    Raises:
        UsageError: If there are no low-rank adapters.
    """
    changes: dict[str, Any] = {}
    for index, adapter in enumerate(method.encoder.adapters):
        if hasattr(adapter, "rank"):
            changes[f"encoder.adapters.{index}.rank"] = rank
        if getattr(adapter, "ranks", None) is not None:
            changes[f"encoder.adapters.{index}.ranks"] = None
    if method.decoder.train == "lora":
        changes["decoder.rank"] = rank
    if not changes:
        raise UsageError("--rank has no effect here: this method has no low-rank adapters", found=summarise(method))
    return changes


def automatic_recipe(
    plan: Plan,
    fingerprint: Fingerprint,
    *,
    configuration: str,
    weights: WeightsKind,
    device: DeviceClass,
    backbone: str,
    changes: Mapping[str, Any],
    rank: int | None = None,
    probes: Probes = NO_PROBES,
    from_random: bool = False,
) -> Recipe:
    """The plan's own method on another backbone, or for weights that were pretrained from random ones.

    Arguments as for :func:`preset_recipe`, :func:`make_plan` and :func:`samunet.planners.recipes.automatic`.
    """
    facts = facts_of_plan(plan, fingerprint, probes, configuration=configuration)
    slab_depth = plan.configuration(configuration).slab_depth.value
    wish = automatic(
        facts,
        weights,
        device,
        configuration=configuration,
        slab_depth=slab_depth,
        backbone=(backbone, "given"),
        from_random=from_random,
    )
    method = with_changes(wish.method, changes, rank)
    check_method(method, weights=weights, backbone=backbone, configuration=configuration, slab_depth=slab_depth)
    parts = {name: (getattr(method, name), reason) for name, (_, reason) in wish.parts.items()}
    intensities = _own_intensities(plan, configuration, weights, device)
    wish = replace(wish, parts=parts, intensity_map=intensities or wish.intensity_map)
    return parse_schema(Recipe, plan_recipe(facts, wish))


def changed_recipe(
    recipe: Recipe,
    plan: Plan,
    fingerprint: Fingerprint,
    *,
    configuration: str,
    weights: WeightsKind,
    device: DeviceClass,
    changes: Mapping[str, Any],
    rank: int | None = None,
    probes: Probes = NO_PROBES,
) -> Recipe:
    """A planned recipe with its method changed: what depends on the method is planned anew, all else stays.

    Values that were edited by hand stay too: a rule does not know what they were chosen for.

    Args:
        recipe: As the plan holds it.
        plan: The dataset's plan.
        fingerprint: What the plan was made from.
        configuration: The recipe's.
        weights: The recipe's kind.
        device: The recipe's class.
        changes: Changes of the method, as :func:`with_changes` takes them.
        rank: As there.
        probes: What the plan was made with.

    Raises:
        ConfigError: If the changed method does not go with the weights, the backbone or the configuration.
    """
    facts = facts_of_plan(plan, fingerprint, probes, configuration=configuration)
    former = recipe.method_parts()
    method = with_changes(former, changes, rank)
    slab_depth, backbone = plan.configuration(configuration).slab_depth.value, recipe.backbone.value
    check_method(method, weights=weights, backbone=backbone, configuration=configuration, slab_depth=slab_depth)

    def planned(chosen: Method, fixed: dict[str, Reasoned]) -> Recipe:
        parts: dict[str, Reasoned] = {name: (getattr(chosen, name), "given") for name in METHOD_PARTS}
        intensities = recipe.intensity_map.value, recipe.intensity_map.reason
        wish = Wish(weights, device, (backbone, recipe.backbone.reason), parts, slab_depth, intensities, fixed)
        return parse_schema(Recipe, plan_recipe(facts, wish))

    by_rule, names = planned(former, {}), [name for name in Recipe.model_fields if name not in METHOD_PARTS]
    own = {name: getattr(recipe, name) for name in names}
    edited = {name: (v.value, v.reason) for name, v in own.items() if v.value != getattr(by_rule, name).value}
    before, after = planned(former, edited), planned(method, edited)
    parts = (name for name in METHOD_PARTS if getattr(method, name) != getattr(former, name))
    moved = (name for name in names if getattr(after, name).value != getattr(before, name).value)
    return recipe.model_copy(update={name: getattr(after, name) for name in (*parts, *moved)})


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
    rank: int | None = None,
    published: bool = False,
    from_random: bool = False,
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
        rank: As there.
        published: Take the published size and schedule instead of the plan's.
        from_random: Whether the weights were pretrained from random ones: images then come as they are stored, as they
            did in pretraining, unless the configuration has intensities of its own.

    Raises:
        ConfigError: If the method, the weights, the backbone and the configuration do not go together.
    """
    method = with_changes(preset.method, changes or {}, rank)
    slab_depth = plan.configuration(configuration).slab_depth.value
    _check_intensities(preset, plan, configuration, weights, device)
    check_method(
        method,
        weights=weights,
        backbone=backbone or preset.backbone,
        configuration=configuration,
        slab_depth=slab_depth,
        preset=preset,
    )
    facts = facts_of_plan(plan, fingerprint, configuration=configuration)
    parts: dict[str, Reasoned] = {name: (getattr(method, name), f"preset {preset.name}") for name in METHOD_PARTS}
    as_stored = rules.intensity_map("none", (), (), ()) if from_random else None
    wish = Wish(
        weights,
        device,
        (backbone or preset.backbone, "given" if backbone else f"as {preset.name} was published"),
        parts,
        slab_depth,
        intensity_map=_own_intensities(plan, configuration, weights, device) or as_stored,
        fixed=_published(preset, facts.num_foreground_slices) if published else None,
    )
    content = plan_recipe(facts, wish)
    for name in preset.published.left_to_plan if published else ():
        content[name]["reason"] += f"; {preset.published.left_because}"
    return parse_schema(Recipe, content)


def check_method(
    method: Method,
    *,
    weights: WeightsKind,
    backbone: str,
    configuration: str,
    slab_depth: int,
    preset: Preset | None = None,
) -> None:
    """Refuse a method that cannot be trained as asked, before anything is planned or loaded.

    Args:
        method: What is adapted and how.
        weights: Kind of weights it would start from.
        backbone: Its image encoder.
        configuration: Name of the planned configuration.
        slab_depth: Slices per slab there.
        preset: Where the method comes from one.

    Raises:
        ConfigError: With every fault, and what to change.
    """
    called = "the plan's own method" if preset is None else f"preset {preset.name}"
    spec = get_spec(backbone)
    if weights != "none" and weights not in spec.pretrained:
        raise ConfigError(
            f"there are no weights of kind {weights} for {backbone}",
            expected=f"one of {', '.join(spec.pretrained)}, as --weights KIND:FILE",
            found=weights,
            todo=f"give others, or --backbone {_first_backbone(weights)}",
        )
    if faults_with_slabs(method, slab_depth):
        raise ConfigError(
            f"{called} looks at slices one by one" if preset else "slices of a slab would not see each other",
            expected="a configuration without slabs, or a depth mechanism",
            found=f"{configuration} with slabs of {slab_depth} slices, and depth.kind none",
            todo="choose -c 2d or 2.5d, or --set depth.kind=attention with an encoder that trains",
        )
    faults = faults_with_weights(method, weights) + faults_with_blocks(method, spec.num_attention_blocks)
    if faults:
        raise ConfigError(
            f"{called} does not go with --weights {weights} on {backbone}",
            found=summarise(method),
            todo="; ".join(faults),
        )


def _first_backbone(weights: WeightsKind) -> str:
    """The first backbone that such weights exist for."""
    return next(name for name, spec in SPECS.items() if weights in spec.pretrained)


def _own_intensities(plan: Plan, configuration: str, weights: WeightsKind, device: DeviceClass) -> Reasoned | None:
    """The map that comes with a configuration's own normalization, or that the user decided on for these weights there.

    None where the rule decides: by the weights asked for, and by how the configuration's images are stored.
    """
    chosen = plan.configuration(configuration)
    if chosen.normalization is None:
        return None
    asked = chosen.recipes.get(weights, {}).get(device)
    if asked is not None and asked.intensity_map.by_user:
        return asked.intensity_map.value, asked.intensity_map.reason
    maps = [recipe.intensity_map for devices in chosen.recipes.values() for recipe in devices.values()]
    for planned in maps:
        if not planned.by_user and planned.value.kind == "unit_per_slice":
            return planned.value, planned.reason
    return None


def _check_intensities(
    preset: Preset, plan: Plan, configuration: str, weights: WeightsKind, device: DeviceClass
) -> None:
    """Refuse a configuration with other intensities than those that the preset was made with.

    Raises:
        ConfigError: If the configuration neither is that of the preset's intensities nor has the same.
    """
    if not preset.own_intensities or configuration == MEDSAM_CONFIGURATION:
        return

    def intensities(name: str) -> tuple[Any, ...]:
        own_map = _own_intensities(plan, name, weights, device)
        return plan.normalization_of(name), None if own_map is None else own_map[0]

    if MEDSAM_CONFIGURATION not in plan.configurations or intensities(configuration) != intensities(
        MEDSAM_CONFIGURATION
    ):
        raise ConfigError(
            f"preset {preset.name} has its own intensities",
            expected=f"-c {MEDSAM_CONFIGURATION}, or a configuration that inherits its intensities",
            found=configuration,
        )


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
        "loss": schedule.loss.model_copy(update={"estimated_iou": 1.0}),
        "iterations": iterations,
        "epochs": schedule.epochs,
        "minutes": None,
        "planes": STORED,
    }
    return {name: (value, reason) for name, value in values.items() if name not in schedule.left_to_plan}
