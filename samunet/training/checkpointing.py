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
    read_checkpoint,
    write_checkpoint,
)
from samunet.artifacts.dataset import DatasetDescription
from samunet.artifacts.plan import Plan, ResolvedRecipe
from samunet.inference.loading import locate_base
from samunet.models.state import load_trained_state, trained_state
from samunet.models.weights import WeightsFile
from samunet.training.trainer import RunState, Trainer, snapshot

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
        CheckpointError: If there is no such checkpoint.
    """
    checkpoint = read_checkpoint(checkpoint_file(folder, name))
    manifest = checkpoint.manifest
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
    tensors[_RANDOM + "cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors[_RANDOM + "cuda"] = torch.cuda.get_rng_state()
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

    Raises:
        CheckpointError: If there is none, or it does not fit the model.
    """
    checkpoint = read_checkpoint(checkpoint_file(folder, "latest"))
    load_trained_state(trainer.model, _below(checkpoint.tensors, _LIVE))
    trainer.average.load_state(_below(checkpoint.tensors, _AVERAGE))
    _load_optimizer(trainer, _below(checkpoint.tensors, _OPTIMIZER))
    random = _below(checkpoint.tensors, _RANDOM)
    torch.set_rng_state(random["cpu"])
    if "cuda" in random and torch.cuda.is_available():
        torch.cuda.set_rng_state(random["cuda"])
    values = dict(checkpoint.manifest.state)
    for name in ("patience", "clock"):
        values.pop(name, None)
    scaler = values.pop("scaler")
    if scaler:
        trainer.scaler.load_state_dict(scaler)
    values["best_score"] = -math.inf if values["best_score"] is None else values["best_score"]
    trainer.state = RunState(**values)


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
