"""Checkpoints back into models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from samunet.artifacts.checkpoint import (
    ENDING,
    BaseWeights,
    Checkpoint,
    Manifest,
    read_checkpoint,
)
from samunet.artifacts.plan import Configuration, Plan
from samunet.artifacts.pretraining import differ_in_left_out, read_pretrained
from samunet.artifacts.subset import is_of_subset
from samunet.core.errors import CheckpointError, UsageError, WeightsError
from samunet.core.log import Reporter
from samunet.models.build import needs_base, restore_model
from samunet.models.device import place
from samunet.models.segmentation import SegmentationModel
from samunet.models.weights import WeightsFile, recorded_weights


@dataclass(frozen=True)
class Member:
    """One trained model of an ensemble: the model in eval mode, what it is, and the facts it was planned from."""

    model: SegmentationModel
    manifest: Manifest
    plan: Plan
    fingerprint: dict[str, Any] = field(default_factory=dict)


def finished_folds(model_folder: Path, checkpoint: str = "final") -> list[str]:
    """Finished folds of a model folder that have the given checkpoint: "0" to "4", or "all"."""
    finals = model_folder.glob(f"fold_*/checkpoint_final{ENDING}")
    finished = [path for path in finals if path.with_name(f"checkpoint_{checkpoint}{ENDING}").is_file()]
    return sorted(path.parent.name.removeprefix("fold_") for path in finished)


def choose_folds(model_folder: Path, folds: list[str] | None, checkpoint: str = "final") -> list[str]:
    """The folds to ensemble: those asked for, else every numbered one that is finished, else "all".

    Raises:
        UsageError: If a fold asked for is not finished, nothing is finished, or "all" is mixed with numbers.
    """
    finished = finished_folds(model_folder, checkpoint)
    if not finished:
        raise UsageError(
            f"no fold here has a {checkpoint} checkpoint", file=model_folder, todo="train one: samunet_train DATASET 0"
        )
    if folds is None:
        numbered = [fold for fold in finished if fold != "all"]
        return numbered or finished
    missing = [fold for fold in folds if fold not in finished]
    if missing:
        raise UsageError(
            "these folds are not finished", file=model_folder, expected=", ".join(finished), found=", ".join(missing)
        )
    if "all" in folds and len(folds) > 1:
        raise UsageError("fold 'all' has seen every case and is not mixed with others", found=", ".join(folds))
    return sorted(set(folds))


def load_member(path: Path, *, device: str) -> Member:
    """Build a checkpoint's model on a device, in eval mode.

    Raises:
        CheckpointError: If the file is damaged or does not fit.
        WeightsError: If its base weights are not at hand or differ from those it was trained on.
    """
    checkpoint = read_checkpoint(path)
    model = place(rebuild(checkpoint), device).eval()
    return Member(model, checkpoint.manifest, checkpoint.plan, checkpoint.fingerprint)


def rebuild(checkpoint: Checkpoint) -> SegmentationModel:
    """A checkpoint's model on the CPU."""
    manifest = checkpoint.manifest
    recipe = manifest.resolved_recipe
    configuration = checkpoint.plan.configuration(manifest.configuration)
    return restore_model(
        recipe,
        num_tokens=checkpoint.plan.label_spec.num_tokens,
        num_input_channels=num_input_channels(checkpoint.plan, configuration),
        channels=configuration.channels.value,
        weights=locate_base(manifest.base) if needs_base(recipe) else None,
        state=checkpoint.tensors,
    )


def locate_base(base: BaseWeights) -> WeightsFile | None:
    """The pretrained file a run started from, where it was or in the cache; None for random weights.

    Raises:
        WeightsError: If it is in neither place with the same hash.
    """
    return recorded_weights(base)


def num_input_channels(plan: Plan, configuration: Configuration) -> int:
    """Channels that the loader supplies per slice."""
    channels = len(plan.channel_names) * (2 * configuration.context_slices.value + 1)
    return 3 if channels == 1 else channels


def load_members(model_folder: Path, folds: list[str], *, checkpoint: str, device: str) -> list[Member]:
    """Load the folds of one model folder.

    Folds of one folder are one model: the same input, backbone and method. Two things in LoRA may differ, because they
    are decided fold by fold: its rank in runs on a subset of the cases, by the subset's labelled slices, and how the
    rank is spread over the blocks between folds that start from different weights, by which of these were probed.

    Raises:
        CheckpointError: If the folds were trained on input that cannot be averaged, or with different methods.
    """
    paths = [model_folder / f"fold_{fold}" / f"checkpoint_{checkpoint}{ENDING}" for fold in folds]
    members = [load_member(path, device=device) for path in paths]
    _check_alike(members, model_folder)
    return members


def tell_other_weights(manifests: Sequence[Manifest], folder: Path, reporter: Reporter) -> None:
    """Warn in one line where the folds of a model start from different files of pretrained weights.

    Files of one pretraining that left out other cases each time, as those of each fold, are taken for the same.

    Args:
        manifests: Of the folds.
        folder: Of the model.
        reporter: Who is told.
    """
    folds: dict[tuple[str, ...], list[Manifest]] = {}
    for manifest in manifests:
        folds.setdefault(manifest.base.identity, []).append(manifest)
    bases = [members[0].base for members in folds.values()]
    if all(_of_one_pretraining(bases[0], other) for other in bases[1:]):
        return
    named = "; ".join(
        f"fold {', '.join(m.fold for m in members)} from {members[0].base.file or 'random weights'}"
        for members in folds.values()
    )
    reporter.warn(f"the folds of {folder.name} start from different weights and are no one model: {named}")


def _of_one_pretraining(first: BaseWeights, other: BaseWeights) -> bool:
    """Whether weights are the same, or from one pretraining that left out other cases, at every stage."""
    if first.identity == other.identity:
        return True
    rests = {None if base.rest is None else base.rest.identity for base in (first, other)}
    if len(rests) > 1:
        return False
    try:
        files = [recorded_weights(base.model_copy(update={"rest": None})) for base in (first, other)]
    except WeightsError:
        return False
    ours, theirs = (None if file is None else read_pretrained(file.path) for file in files)
    if ours is None or theirs is None or not differ_in_left_out(ours, theirs):
        return False
    return _of_one_pretraining(ours.base, theirs.base)


def _check_alike(members: list[Member], folder: Path) -> None:
    first = members[0]
    for member in members[1:]:
        _compare(_input_of(first), _input_of(member), "on different input and cannot be averaged", member, folder)
        free = _decided_by_fold(first.manifest, member.manifest)
        problem = "with different methods and are not one model"
        _compare(_method_of(first, free), _method_of(member, free), problem, member, folder)


def _compare(first: dict[str, Any], other: dict[str, Any], problem: str, member: Member, folder: Path) -> None:
    """Refuse a fold that differs from the first one.

    Raises:
        CheckpointError: With the values that differ.
    """
    differing = [key for key in first if key in other and first[key] != other[key]]
    if differing:
        raise CheckpointError(
            f"the folds were trained {problem}",
            file=folder,
            expected=", ".join(f"{key} {first[key]}" for key in differing),
            found=f"fold {member.manifest.fold}: " + ", ".join(f"{key} {other[key]}" for key in differing),
            todo="name the folds that belong together with -f, or train the others again",
        )


def _input_of(member: Member) -> dict[str, Any]:
    name, recipe = member.manifest.configuration, member.manifest.resolved_recipe
    configuration = member.plan.configuration(name)
    return {
        "configuration": name,
        "input size": recipe.input_size,
        "tile": recipe.tile_vox,
        "planes": recipe.planes,
        "intensity map": recipe.intensity_map,
        "preprocessing": member.plan.store_key(name),
        "context": configuration.context_slices.value,
        "channels": configuration.channels.value,
        "mirror axes": member.plan.mirror_axes.value,
        "order of labels": tuple(member.plan.labels),
    }


def _decided_by_fold(first: Manifest, other: Manifest) -> set[str]:
    """What of LoRA may differ between two folds."""
    free = {"rank"} if is_of_subset(first.preset) else set()
    return free | ({"ranks"} if first.base.sha256 != other.base.sha256 else set())


def _method_of(member: Member, free: set[str]) -> dict[str, Any]:
    """Backbone and method by dotted path, without what of LoRA is free."""
    recipe = member.manifest.resolved_recipe
    adapters = recipe.method.encoder.adapters
    values = _values(recipe.method.model_dump(mode="json"))
    values |= {"backbone": recipe.backbone, "encoder.adapters": [adapter.kind for adapter in adapters]}
    left_out = {f"encoder.adapters.{i}.{name}" for i, a in enumerate(adapters) if a.kind == "lora" for name in free}
    return {path: value for path, value in values.items() if path not in left_out}


def _values(content: Any, *place: str) -> dict[str, Any]:
    """Dotted path to value."""
    if isinstance(content, list) and any(isinstance(entry, dict) for entry in content):
        content = {f"{index}": entry for index, entry in enumerate(content)}
    if not isinstance(content, dict):
        return {".".join(place): content}
    return {path: value for key, below in content.items() for path, value in _values(below, *place, key).items()}
