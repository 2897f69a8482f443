"""A recipe for a subset of the training cases: what depends on how much is labelled is decided for the subset.

Images are all known, whatever is labelled of them: input size, tile, intensities and augmentation stay the dataset's.
What was changed by hand in the plan stays too, but for a batch that is too large for so few cases.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from samunet.artifacts.fingerprint import Fingerprint
from samunet.artifacts.method import Lora, Method
from samunet.artifacts.model_spec import get_spec
from samunet.artifacts.plan import Plan, ResolvedRecipe
from samunet.artifacts.plan_parts import Planes
from samunet.core.errors import ConfigError
from samunet.core.geometry import Triple
from samunet.planners import peft, planes, rules, schedule, sizes
from samunet.planners.batches import least_batch, split_batch
from samunet.planners.edits import Reasoned
from samunet.planners.load import Load
from samunet.planners.planner import facts_of_plan


@dataclass(frozen=True)
class Labelled:
    """How much is labelled.

    Args:
        num_cases: Cases.
        shapes: Voxels (slices, rows, columns) of each at target spacing.
        num_slices: Slices of all of them.
        num_foreground_slices: Those that hold a structure.
        num_structures: Structures of the dataset.
        num_tokens: Mask tokens.
        planes: Axes across which slices can be cut, with the reason.
    """

    num_cases: int
    shapes: Sequence[Triple]
    num_slices: int
    num_foreground_slices: int
    num_structures: int
    num_tokens: int
    planes: Reasoned


def labelled(plan: Plan, fingerprint: Fingerprint, cases: Sequence[str] | None = None) -> Labelled:
    """How much is labelled of a dataset or of some of its cases, in the plan's frame and spacing.

    Raises:
        ConfigError: If the fingerprint lacks a case.
    """
    chosen = fingerprint.cases
    if cases is not None:
        missing = sorted(set(cases) - set(chosen))
        if missing:
            raise ConfigError(
                "the fingerprint lacks cases of the subset", found=", ".join(missing[:5]), todo="plan again"
            )
        chosen = {name: chosen[name] for name in cases}
    facts = facts_of_plan(plan, fingerprint.model_copy(update={"cases": chosen}))
    return Labelled(
        num_cases=len(chosen),
        shapes=facts.shapes,
        num_slices=facts.num_slices,
        num_foreground_slices=facts.num_foreground_slices,
        num_structures=facts.num_structures,
        num_tokens=facts.num_tokens,
        planes=facts.planes,
    )


def subset_recipe(
    recipe: ResolvedRecipe, whole: Labelled, part: Labelled, *, published: bool = False, keep_rank: bool = False
) -> tuple[ResolvedRecipe, dict[str, str]]:
    """A recipe for a part of the cases it was planned for.

    Args:
        recipe: For the whole dataset.
        whole: What is labelled of the dataset.
        part: What is labelled of the subset.
        published: Whether a publication's schedule is followed: then an epoch is still a pass over the slices, and
            nothing else changes.
        keep_rank: Whether the rank was asked for.

    Returns:
        The recipe, and the reason of each field that may have changed.
    """
    if published:
        iterations = max(1, round(part.num_foreground_slices / recipe.batch_size))
        reason = f"a pass over {part.num_foreground_slices} labelled slices, as published"
        return replace(recipe, iterations=iterations), {"iterations": reason}
    wanted, batch_reason = subset_batch(recipe, part)
    batch, parts = split_batch(recipe, wanted, is_fixed=False)
    if batch < wanted:
        batch_reason += f"; {batch} instead of {wanted}, as no part of a step may have too few for batch norm"
    method, rank_reason = (recipe.method, "as asked for") if keep_rank else subset_rank(recipe.method, whole, part)
    rate, rate_reason = _rate(recipe, method, batch)
    fraction, fraction_reason = _fraction(recipe, whole, part)
    changed = replace(
        recipe,
        batch_size=batch,
        accumulation_steps=parts,
        method=method,
        learning_rate=rate,
        foreground_fraction=fraction,
    )
    changed, steps_reason = _with_steps(changed, recipe, whole, part)
    planes_chosen, planes_reason = _planes(changed, recipe, whole, part)
    return replace(changed, planes=planes_chosen), {
        "batch_size": batch_reason,
        "rank": rank_reason,
        "learning_rate": rate_reason,
        "foreground_fraction": fraction_reason,
        "steps": steps_reason,
        "planes": planes_reason,
    }


def subset_batch(recipe: ResolvedRecipe, part: Labelled) -> tuple[int, str]:
    """Slices per step: no more than five percent of the labelled pixels, nor than planned, at least the least batch.

    Args:
        recipe: For the whole dataset.
        part: What is labelled of the subset.

    Source: nnU-Net (Isensee et al., Nature Methods 2021), limit on the batch size.
    """
    depth = recipe.slab_depth
    least = least_batch(get_spec(recipe.backbone), recipe.method, depth)
    share = sizes.five_percent(part.shapes, recipe.tile_vox)
    batch = min(recipe.batch_size, max(least, share // depth * depth))
    return batch, (
        f"5 % of {part.num_cases} case{'s' * (part.num_cases != 1)} are {share} slices, {least} at least, "
        f"{recipe.batch_size} planned for the dataset"
    )


def subset_rank(method: Method, whole: Labelled, part: Labelled) -> tuple[Method, str]:
    """The method with the rank that the subset's labelled slices are worth, where the planned one followed that rule.

    Args:
        method: For the whole dataset.
        whole: What is labelled of the dataset.
        part: What is labelled of the subset.
    """
    planned, _ = peft.lora_rank(whole.num_foreground_slices, whole.num_structures)
    rank, reason = peft.lora_rank(part.num_foreground_slices, part.num_structures)
    adapters = tuple(
        adapter.model_copy(update={"rank": rank})
        if isinstance(adapter, Lora) and adapter.ranks is None and adapter.rank == planned
        else adapter
        for adapter in method.encoder.adapters
    )
    encoder = method.encoder.model_copy(update={"adapters": adapters})
    return method.model_copy(update={"encoder": encoder}), reason


def _rate(recipe: ResolvedRecipe, method: Method, batch: int) -> tuple[float, str]:
    kind = recipe.weights_kind
    by_rule, _ = peft.learning_rate(recipe.method, weights=kind, batch=recipe.batch_size)  # type: ignore[arg-type]
    if recipe.learning_rate != by_rule:
        return recipe.learning_rate, "as in the plan, where it is no rule's"
    return peft.learning_rate(method, weights=kind, batch=batch)  # type: ignore[arg-type]


def _fraction(recipe: ResolvedRecipe, whole: Labelled, part: Labelled) -> tuple[float, str]:
    by_rule, _ = rules.foreground_fraction(whole.num_slices, whole.num_foreground_slices)
    if recipe.foreground_fraction != by_rule:
        return recipe.foreground_fraction, "as in the plan, where it is no rule's"
    return rules.foreground_fraction(part.num_slices, part.num_foreground_slices)


def _planes(changed: ResolvedRecipe, planned: ResolvedRecipe, whole: Labelled, part: Labelled) -> tuple[Planes, str]:
    """More planes where few cases are seen often; which are possible is the dataset's, as all images are known."""
    if planned.planes != _planes_by_rule(planned, whole, whole)[0]:
        return planned.planes, "as in the plan, where they are no rule's"
    return _planes_by_rule(changed, whole, part)


def _planes_by_rule(recipe: ResolvedRecipe, whole: Labelled, part: Labelled) -> tuple[Planes, str]:
    batch, side, tokens = recipe.batch_size, recipe.tile_vox, whole.num_tokens
    load = Load(
        get_spec(recipe.backbone),
        recipe.input_size,
        side,
        tokens,
        batch,
        recipe.method,
        slab_depth=recipe.slab_depth,
        precision=recipe.precision,
        attention=recipe.attention,
    )
    return planes.of_recipe(
        whole.planes,
        device=recipe.device_class,  # type: ignore[arg-type]
        promptable=recipe.method.promptable,
        slab_depth=recipe.slab_depth,
        passes=planes.passes(recipe.iterations * recipe.epochs, batch, part.shapes, side),
        seconds=planes.seconds_per_view(load, whole.shapes, whole.planes[0], batch, tokens, sizes.TILE_OVERLAP, None),
    )


def _with_steps(
    changed: ResolvedRecipe, planned: ResolvedRecipe, whole: Labelled, part: Labelled
) -> tuple[ResolvedRecipe, str]:
    """The changed recipe with as many steps as the subset is worth, or as fit the same minutes."""
    if planned.minutes is not None:
        before, steps = (_cpu_steps(each, part, planned.minutes) for each in (planned, changed))
        reason = f"about {steps} steps fit the same {planned.minutes:g} minutes"
        return _of_length(changed, planned, before, steps, on_cpu=True), reason
    before, _ = _dataset_steps(planned, whole)
    steps, reason = _dataset_steps(changed, part)
    if schedule.epochs(before, on_cpu=False) != (planned.iterations, planned.epochs):
        return changed, "as in the plan, where they are no rule's"
    return _of_length(changed, planned, before, steps, on_cpu=False), reason


def _dataset_steps(recipe: ResolvedRecipe, part: Labelled) -> tuple[int, str]:
    tiles = sizes.tiles_per_slice(part.shapes, recipe.tile_vox)
    return schedule.dataset_steps(part.num_foreground_slices, recipe.batch_size, tiles_per_slice=tiles)


def _cpu_steps(recipe: ResolvedRecipe, part: Labelled, minutes: float) -> int:
    spec, size, batch = get_spec(recipe.backbone), recipe.input_size, recipe.batch_size
    options = {"batch": batch, "tile_vox": recipe.tile_vox, "minutes": minutes}
    return max(1, schedule.cpu_steps(spec, recipe.method, size, part.num_tokens, **options))  # type: ignore[arg-type]


def _of_length(
    changed: ResolvedRecipe, planned: ResolvedRecipe, before: int, steps: int, *, on_cpu: bool
) -> ResolvedRecipe:
    """The recipe with a number of steps; warm-up and averaging follow where they followed their rules before."""
    if before == steps:
        return changed
    iterations, epochs = schedule.epochs(steps, on_cpu=on_cpu)
    follows: Mapping[str, tuple[float, float]] = {
        "warmup_steps": (schedule.warmup_steps(before)[0], schedule.warmup_steps(steps)[0]),
        "ema_decay": (schedule.ema_decay(before)[0], schedule.ema_decay(steps)[0]),
    }
    values = {name: new for name, (old, new) in follows.items() if getattr(planned, name) == old}
    return replace(changed, iterations=iterations, epochs=epochs, **values)  # type: ignore[arg-type]
