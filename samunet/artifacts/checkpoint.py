"""One safetensors file per checkpoint: what was trained, and in its metadata everything needed to use it.

The metadata holds, as JSON texts, the manifest, the plan, dataset.json and the fingerprint. Nothing is pickled.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from samunet.artifacts.augmentation import Augmentation
from samunet.artifacts.dataset import DatasetDescription
from samunet.artifacts.method import Method
from samunet.artifacts.plan import Decay, IntensityMap, LossWeights, Plan, ResolvedRecipe
from samunet.core.config import Schema, SchemaType, parse_schema
from samunet.core.errors import CheckpointError, ConfigError
from samunet.core.files import atomic_path, sha256_json

CHECKPOINT_VERSION = 2
ENDING = ".safetensors"
ClockName = Literal["wall", "processor"]
RECIPE_SCHEMAS: dict[str, type[Schema]] = {
    "method": Method,
    "intensity_map": IntensityMap,
    "loss": LossWeights,
    "decay": Decay,
    "augmentation": Augmentation,
}


class BaseWeights(Schema):
    """The pretrained file a model was adapted from; without it the checkpoint is complete in itself.

    Args:
        kind: Kind of weights, "none" for random.
        file: Where it was; found again there or in the cache by its name and hash.
        sha256: Its full hash.
        rest: The file that supplied the decoder when the first holds an encoder only.
    """

    kind: str
    file: str = ""
    sha256: str = ""
    rest: BaseWeights | None = None

    @property
    def identity(self) -> tuple[str, ...]:
        """What makes weights the same wherever their files lie: kinds and hashes."""
        return (self.kind, self.sha256, *(() if self.rest is None else self.rest.identity))


class Manifest(Schema):
    """What a checkpoint is.

    Args:
        version: Schema version.
        dataset: Folder name.
        configuration: Planned configuration.
        preset: Preset name, "auto" for the plan's own recipe.
        fold: "0" to "4", or "all".
        recipe: The recipe as trained, after command-line overrides.
        base: The base weights.
        seed: Seed of initialisation and data.
        steps: Optimizer steps taken.
        epochs: Epochs finished.
        minutes: Elapsed training minutes over all resumes.
        finished: Whether the run reached its end.
        metrics: What was measured when it was written.
        load_report: Keys that were missing, unexpected, re-initialised or resized on loading the base.
        provenance: Versions, machine, command and times.
        state: Scalars of a resumable run, and the settings that no recipe holds.
    """

    version: int = CHECKPOINT_VERSION
    dataset: str
    configuration: str
    preset: str
    fold: str
    recipe: dict[str, Any]
    base: BaseWeights
    seed: int
    steps: int
    epochs: int
    minutes: float
    finished: bool = False
    metrics: dict[str, float | None] = Field(default_factory=dict)
    load_report: dict[str, list[str]] = Field(default_factory=dict)
    provenance: dict[str, Any] = Field(default_factory=dict)
    state: dict[str, Any] = Field(default_factory=dict)

    @property
    def identity(self) -> str:
        """Hash of what the checkpoint says it is, the time of its training included."""
        return sha256_json(self.model_dump(mode="json"))

    @property
    def clock(self) -> ClockName | None:
        """What counted the minutes: the wall's clock or this process's; None where an older version did not say."""
        return self.state.get("clock")

    @property
    def resolved_recipe(self) -> ResolvedRecipe:
        """The recipe as the code that builds models takes it."""
        values = dict(self.recipe)
        for name, schema in RECIPE_SCHEMAS.items():
            values[name] = parse_schema(schema, values[name])
        if "planes" in values:
            values["planes"] = tuple(values["planes"])
        return ResolvedRecipe(**values)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in memory.

    Args:
        manifest: What it is.
        plan: The plan it was trained with.
        description: dataset.json.
        fingerprint: The fingerprint, as JSON.
        tensors: Name to torch tensor (or numpy array before writing).
    """

    manifest: Manifest
    plan: Plan
    description: DatasetDescription
    fingerprint: dict[str, Any]
    tensors: Mapping[str, Any]


def write_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint atomically.

    Args:
        path: File to write, ending in .safetensors.
        checkpoint: Its tensors may live on any device.

    Raises:
        CheckpointError: If it cannot be written, as on a full disk; an earlier one under that name is kept.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    metadata = {
        "manifest": checkpoint.manifest.model_dump_json(),
        "plan": checkpoint.plan.model_dump_json(),
        "dataset": checkpoint.description.model_dump_json(exclude_none=True),
        "fingerprint": json.dumps(checkpoint.fingerprint),
    }
    tensors = {name: t.detach().cpu().contiguous().clone() for name, t in checkpoint.tensors.items()}
    try:
        with atomic_path(path) as temporary:
            save_file(tensors, temporary, metadata=metadata)
    except (OSError, SafetensorError) as error:
        size = sum(tensor.nbytes for tensor in tensors.values()) / 1e6
        raise CheckpointError(
            "the checkpoint cannot be written",
            file=path,
            expected=f"{size:.1f} MB of room in {path.parent}, and leave to write there",
            found=str(error),
            todo="make room; a training run then goes on with --c",
        ) from None


def read_manifest(path: Path) -> Manifest:
    """Read only what a checkpoint is, not its tensors.

    Raises:
        CheckpointError: As for :func:`read_checkpoint`.
    """
    return _manifest(_metadata(path)["manifest"], path)


def read_plan(path: Path) -> Plan:
    """Read only the plan of a checkpoint.

    Raises:
        CheckpointError: As for :func:`read_checkpoint`.
    """
    metadata = _metadata(path)
    _manifest(metadata["manifest"], path)
    return _parsed(Plan, metadata["plan"], path)


def read_checkpoint(path: Path, *, device: str = "cpu") -> Checkpoint:
    """Read a checkpoint.

    Raises:
        CheckpointError: If it is missing, truncated, no samunet checkpoint, or one of another version.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    metadata = _metadata(path)
    manifest = _manifest(metadata["manifest"], path)
    try:
        tensors = load_file(path, device=device)
    except SafetensorError as error:
        raise CheckpointError("the checkpoint's tensors cannot be read", file=path, found=str(error)) from None
    return Checkpoint(
        manifest,
        _parsed(Plan, metadata["plan"], path),
        _description(metadata["dataset"], path),
        metadata["fingerprint"],
        tensors,
    )


def of_another_version(path: Path, found: str) -> CheckpointError:
    """The error for a checkpoint whose content this version of samunet does not know.

    Args:
        path: The checkpoint.
        found: What of it is not known, or its version.
    """
    return CheckpointError(
        "the checkpoint was written by another version of samunet",
        file=path,
        expected=f"checkpoint version {CHECKPOINT_VERSION}, with the content of samunet as it is installed",
        found=found,
        todo="use the version of samunet that wrote it, or train again with --overwrite",
    )


def _manifest(content: Any, path: Path) -> Manifest:
    """The manifest of a file, and in it a recipe that can be used."""
    version = content.get("version") if isinstance(content, dict) else None
    if version != CHECKPOINT_VERSION:
        raise of_another_version(path, "no version" if version is None else f"checkpoint version {version}")
    manifest = _parsed(Manifest, content, path)
    try:
        _ = manifest.resolved_recipe
    except (KeyError, TypeError, ConfigError) as error:
        raise of_another_version(path, f"version {version}, recipe: {error}") from None
    return manifest


def _parsed(cls: type[SchemaType], content: Any, path: Path) -> SchemaType:
    try:
        return parse_schema(cls, content)
    except ConfigError as error:
        raise of_another_version(path, error.problem) from None


def _description(content: Any, path: Path) -> DatasetDescription:
    try:
        return DatasetDescription.model_validate(content)
    except ValidationError as error:
        places = ", ".join(".".join(map(str, fault["loc"])) for fault in error.errors())
        raise of_another_version(path, f"dataset.json: {places}") from None


def _metadata(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as stream:
            texts = stream.metadata() or {}
        return {name: json.loads(texts[name]) for name in ("manifest", "plan", "dataset", "fingerprint")}
    except FileNotFoundError:
        raise CheckpointError("the checkpoint does not exist", file=path) from None
    except (SafetensorError, KeyError, json.JSONDecodeError, OSError, ConfigError) as error:
        raise CheckpointError(
            "the file is no samunet checkpoint, or it is damaged", file=path, found=str(error), todo="train again"
        ) from None
