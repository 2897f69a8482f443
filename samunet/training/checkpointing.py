"""A run's checkpoints: the result (final, best) and the exact state to continue from (latest)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from samunet.artifacts.checkpoint import (
    ENDING,
    RECIPE_SCHEMAS,
    BaseWeights,
    Checkpoint,
    ClockName,
    Manifest,
    of_another_version,
    read_checkpoint,
    read_manifest,
    write_checkpoint,
)
from samunet.artifacts.dataset import DatasetDescription
from samunet.artifacts.plan import Plan, ResolvedRecipe
from samunet.inference.loading import locate_base
from samunet.models.state import load_trained_state, trained_state
from samunet.models.weights import WeightsFile
from samunet.training.run_state import RunState, snapshot
from samunet.training.trainer import Trainer

_OPTIMIZER, _AVERAGE, _RANDOM, _LIVE = "optimizer.", "average.", "random.", "model."


@dataclass(frozen=True)
class RunIdentity:
    """What a run is, the same in all of its checkpoints. Fields as in the manifest; ``clock`` counts its minutes."""

    dataset: str
    configuration: str
    preset: str
    fold: str
    recipe: ResolvedRecipe
    base: BaseWeights
    seed: int
    patience: int | None
    plan: Plan
    description: DatasetDescription
    fingerprint: dict[str, Any]
    provenance: dict[str, Any]
    load_report: dict[str, list[str]] = field(default_factory=dict)
    clock: ClockName | None = None

    def manifest(self) -> Manifest:
        """The manifest of a run that has not begun."""
        return Manifest(
            dataset=self.dataset,
            configuration=self.configuration,
            preset=self.preset,
            fold=self.fold,
            recipe=recipe_to_json(self.recipe),
            base=self.base,
            seed=self.seed,
            steps=0,
            epochs=0,
            minutes=0.0,
            load_report=self.load_report,
            provenance=self.provenance,
            state={"patience": self.patience, "clock": self.clock},
        )

    def weights_file(self) -> WeightsFile | None:
        """The base weights, located again by hash; None for random weights."""
        return locate_base(self.base)


def load_identity(folder: Path, name: str) -> RunIdentity:
    """What the run in a fold's folder is, from its "latest" or "final" checkpoint.

    Raises:
        CheckpointError: If there is no such checkpoint, or it is of another version.
    """
    file = checkpoint_file(folder, name)
    checkpoint = read_checkpoint(file)
    manifest = checkpoint.manifest
    if "patience" not in manifest.state:
        raise of_another_version(file, "a state without patience")
    return RunIdentity(
        dataset=manifest.dataset,
        configuration=manifest.configuration,
        preset=manifest.preset,
        fold=manifest.fold,
        recipe=manifest.resolved_recipe,
        base=manifest.base,
        seed=manifest.seed,
        patience=manifest.state["patience"],
        plan=checkpoint.plan,
        description=checkpoint.description,
        fingerprint=checkpoint.fingerprint,
        provenance=manifest.provenance,
        load_report=manifest.load_report,
        clock=manifest.clock,
    )


def recipe_to_json(recipe: ResolvedRecipe) -> dict[str, Any]:
    """A resolved recipe as plain JSON values."""
    values = {entry.name: getattr(recipe, entry.name) for entry in fields(recipe)}
    values["planes"] = list(recipe.planes)
    return values | {name: values[name].model_dump(mode="json") for name in RECIPE_SCHEMAS}


def checkpoint_file(folder: Path, name: str) -> Path:
    """Path of a checkpoint ("final", "best" or "latest") in a fold's folder."""
    return folder / f"checkpoint_{name}{ENDING}"


def save_result(folder: Path, name: str, trainer: Trainer, identity: RunIdentity) -> None:
    """Write the model as it is now: what was trained and what differs from its base."""
    tensors = trained_state(trainer.model)
    _write(folder, name, trainer, identity, tensors)


def save_resumable(folder: Path, trainer: Trainer, identity: RunIdentity) -> None:
    """Write the exact state of a run: live and averaged weights, optimizer, scaler, random state, progress."""
    tensors = {_LIVE + k: v for k, v in trained_state(trainer.model).items()}
    tensors |= {_AVERAGE + k: v for k, v in trainer.average.state().items()}
    tensors |= {_OPTIMIZER + k: v for k, v in _optimizer_tensors(trainer).items()}
    tensors |= {_RANDOM + k: v for k, v in _random_state(trainer.settings.device).items()}
    _write(folder, "latest", trainer, identity, tensors)


def _write(folder: Path, name: str, trainer: Trainer, identity: RunIdentity, tensors: Mapping[str, Tensor]) -> None:
    state = asdict(snapshot(trainer.state, trainer.elapsed))
    if math.isinf(state["best_score"]):
        state["best_score"] = None
    state["scaler"] = trainer.scaler.state_dict()
    state |= {"patience": identity.patience, "clock": identity.clock}
    manifest = identity.manifest().model_copy(
        update={
            "steps": trainer.state.step,
            "epochs": trainer.epoch,
            "minutes": trainer.elapsed / 60,
            "finished": trainer.state.finished,
            "metrics": {"best_monitor_dice": state["best_score"]},
            "state": state,
        }
    )
    checkpoint = Checkpoint(manifest, identity.plan, identity.description, identity.fingerprint, tensors)
    write_checkpoint(checkpoint_file(folder, name), checkpoint)


def resume(folder: Path, trainer: Trainer) -> None:
    """Put a trainer exactly where its latest checkpoint left off.

    A newer "best", written just before the run was killed, still has to be beaten.

    Raises:
        CheckpointError: If there is none, or it does not fit the model.
    """
    checkpoint = read_checkpoint(checkpoint_file(folder, "latest"))
    load_trained_state(trainer.model, _below(checkpoint.tensors, _LIVE))
    trainer.average.load_state(_below(checkpoint.tensors, _AVERAGE))
    _load_optimizer(trainer, _below(checkpoint.tensors, _OPTIMIZER))
    _restore_random_state(_below(checkpoint.tensors, _RANDOM), trainer.settings.device)
    values = dict(checkpoint.manifest.state) | _of_newer_best(folder, checkpoint.manifest)
    if scaler := values.pop("scaler", None):
        trainer.scaler.load_state_dict(scaler)
    trainer.state = _run_state(values, checkpoint_file(folder, "latest"))


def _run_state(values: Mapping[str, Any], file: Path) -> RunState:
    """Where a run stands, from what its manifest says.

    Raises:
        CheckpointError: If that was written by a version with another state.
    """
    own = {name: value for name, value in values.items() if name not in ("patience", "clock")}
    if own.get("best_score") is None:
        own["best_score"] = -math.inf
    try:
        return RunState(**own)
    except TypeError as error:
        raise of_another_version(file, f"its state: {error}") from None


def _of_newer_best(folder: Path, latest: Manifest) -> dict[str, Any]:
    """What a "best" that is newer than the latest state says of itself, and of the cases it was compared on."""
    path = checkpoint_file(folder, "best")
    if not path.is_file():
        return {}
    best = read_manifest(path)
    if best.steps <= latest.steps:
        return {}
    return {name: best.state[name] for name in ("best_score", "best_epoch", "evaluated_cases") if name in best.state}


def _random_state(device: str) -> dict[str, Tensor]:
    """Of the CPU's generator and of the one of the run's own GPU, which need not be the current one."""
    state = {"cpu": torch.get_rng_state()}
    if torch.device(device).type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _restore_random_state(state: Mapping[str, Tensor], device: str) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.device(device).type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _named_parameters(trainer: Trainer) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}


def _optimizer_tensors(trainer: Trainer) -> dict[str, Tensor]:
    """Optimizer state by parameter name, so that it does not depend on group order."""
    tensors = {}
    for name, parameter in _named_parameters(trainer).items():
        for key, value in trainer.optimizer.state.get(parameter, {}).items():
            tensors[f"{key}.{name}"] = torch.as_tensor(value)
    return tensors


def _load_optimizer(trainer: Trainer, tensors: Mapping[str, Tensor]) -> None:
    parameters = _named_parameters(trainer)
    fused = {p for group in trainer.optimizer.param_groups if group["fused"] for p in group["params"]}
    for key, value in tensors.items():
        kind, name = key.split(".", 1)
        parameter = parameters[name]
        if kind == "step":
            # As torch keeps it: beside the parameter where a fused step reads it, else on the CPU.
            restored = value.to(parameter.device if parameter in fused else "cpu", copy=True)
        else:
            # With the parameter's own strides: a fused step goes through memory, whatever the shapes say.
            restored = torch.empty_like(parameter).copy_(value)
        trainer.optimizer.state[parameter][kind] = restored
