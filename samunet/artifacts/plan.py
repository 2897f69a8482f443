"""The plan: every decision with its reason, hand-editable.

A configuration says how volumes become slices; its recipes say, per kind of weights and class of device, what network
is trained on them and how. `resolve` strips the reasons for the code that follows the plan.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from pydantic import ConfigDict, field_validator, model_validator

from samunet.artifacts.model_spec import SPECS, TOKEN_SIZE
from samunet.core.config import Schema, load_schema, save_schema
from samunet.core.errors import ConfigError
from samunet.core.files import sha256_json
from samunet.core.geometry import ANATOMICAL_AXES, AxisOperation, Geometry, SpacingTriple, canonical_operation
from samunet.core.labels import LabelSpec

PLAN_VERSION = 1
WEIGHTS_KINDS = ("sam", "medsam", "mobile_sam", "ssl", "none")
DEVICE_CLASSES = ("gpu", "cpu")

WeightsKind = Literal["sam", "medsam", "mobile_sam", "ssl", "none"]
DeviceClass = Literal["gpu", "cpu"]
EncoderTuning = Literal["full", "lora", "frozen"]
Precision = Literal["fp32", "bf16", "fp16"]
Scheme = Literal["zscore", "ct", "rgb_to_01", "rescale_to_01", "none"]

ValueType = TypeVar("ValueType")


class Decided(Schema, Generic[ValueType]):
    """A decision and why it was taken.

    Args:
        value: The decision; edit it by hand if you know better.
        reason: One sentence with the numbers it was derived from.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    value: ValueType
    reason: str


class Frame(Schema):
    """The axes in which all cases are processed: slices first, then the two in-plane axes.

    Args:
        slice_axis: The file axis (0 Z, 1 Y, 2 X) across which slices are stacked.
        orientation: Majority orientation codes of the training cases per file axis (Z, Y, X).
        spacing: Median spacing of the cases of that orientation, per file axis, in mm.
    """

    slice_axis: Literal[0, 1, 2]
    orientation: tuple[str, str, str]
    spacing: SpacingTriple

    def operation_for(self, geometry: Geometry) -> AxisOperation:
        """The exact, invertible axis operation from a case's file axes to (slice, row, column)."""
        return canonical_operation(
            geometry,
            reference_codes=self.orientation,
            reference_spacing=self.spacing,
            slice_axis=self.slice_axis,
        )


class ChannelNormalization(Schema):
    """How one channel is normalized (nnU-Net's schemes).

    Args:
        scheme: nnU-Net's scheme, chosen by channel name.
        use_nonzero_mask: Restrict mean and standard deviation to nonzero voxels, and leave the rest at zero.
        mean: Foreground mean of the dataset (scheme "ct").
        std: Foreground standard deviation of the dataset (scheme "ct").
        lower: Clip below (scheme "ct": percentile 0.5 of the foreground).
        upper: Clip above (scheme "ct": percentile 99.5 of the foreground).
    """

    scheme: Scheme
    use_nonzero_mask: bool = False
    mean: float = 0.0
    std: float = 1.0
    lower: float = 0.0
    upper: float = 0.0


class IntensityMap(Schema):
    """The one map from stored intensities to what the encoder sees.

    Stored values are clipped to [lower, upper] and scaled to [0, 1]; "sam_pixels" goes on to [0, 255] and SAM's pixel
    statistics. "identity" changes nothing and has no bounds.

    Args:
        kind: "identity" for random weights, "sam_pixels" for SAM's pixel statistics, "unit" for [0, 1] (MedSAM).
        lower: Per image channel; neighbouring slices share their channel's.
        upper: Per image channel.
    """

    kind: Literal["identity", "sam_pixels", "unit"]
    lower: tuple[float, ...] = ()
    upper: tuple[float, ...] = ()

    @model_validator(mode="after")
    def _bounded(self) -> IntensityMap:
        if len(self.lower) != len(self.upper) or (self.kind != "identity") != bool(self.lower):
            raise ValueError(
                f"{self.kind} needs {'no bounds' if self.kind == 'identity' else 'lower and upper bounds'}"
            )
        return self


class Recipe(Schema):
    """What is trained and how, for one kind of weights on one class of device.

    Sizes: ``tile_vox`` voxels of a slice are zoomed to ``input_size`` encoder pixels; slices larger than a tile are
    tiled, smaller ones are zero padded.
    """

    backbone: Decided[str]
    input_size: Decided[int]
    tile_vox: Decided[int]
    encoder_tuning: Decided[EncoderTuning]
    lora_rank: Decided[int]
    lora_targets: Decided[tuple[str, ...]]
    intensity_map: Decided[IntensityMap]
    learning_rate: Decided[float]
    weight_decay: Decided[float]
    warmup_steps: Decided[int]
    batch_size: Decided[int]
    accumulation_steps: Decided[int]
    iterations: Decided[int]
    epochs: Decided[int]
    minutes: Decided[float | None]
    precision: Decided[Precision]
    checkpointing: Decided[bool]
    ema_decay: Decided[float]
    foreground_fraction: Decided[float]
    memory_gib: Decided[float]

    @field_validator("backbone")
    @classmethod
    def _known_backbone(cls, value: Decided[str]) -> Decided[str]:
        if value.value not in SPECS:
            raise ValueError(f"unknown backbone '{value.value}', expected one of {', '.join(SPECS)}")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        if self.input_size.value % TOKEN_SIZE or self.input_size.value <= 0:
            raise ValueError(f"input_size {self.input_size.value} is not a positive multiple of {TOKEN_SIZE}")
        for name in ("tile_vox", "batch_size", "accumulation_steps", "iterations", "epochs", "lora_rank"):
            if getattr(self, name).value < 1:
                raise ValueError(f"{name} must be at least 1, found {getattr(self, name).value}")
        if self.learning_rate.value <= 0:
            raise ValueError(f"learning_rate must be positive, found {self.learning_rate.value}")
        if not set(self.lora_targets.value) <= {"q", "k", "v", "o"} or not self.lora_targets.value:
            raise ValueError(f"lora_targets must be among q, k, v, o, found {self.lora_targets.value}")
        return self


class Configuration(Schema):
    """How volumes become network input.

    Args:
        spacing: Target spacing (slice, row, column) in mm; the first is None where cases keep their own.
        context_slices: Neighbouring slices on each side that become input channels.
        slab_depth: Slices of one volume that see each other (1: none).
        channels: How the slice's channels become the encoder's three.
        tile_overlap: Fraction by which neighbouring tiles overlap.
        recipes: Kind of weights to device class to recipe.
    """

    spacing: Decided[tuple[float | None, float, float]]
    context_slices: Decided[int]
    slab_depth: Decided[int]
    channels: Decided[Literal["neighbours", "repeat", "direct", "projection"]]
    tile_overlap: Decided[float]
    recipes: dict[WeightsKind, dict[DeviceClass, Recipe]]


class Budget(Schema):
    """What the plan was made for.

    Args:
        gpu_memory_gib: Memory of the GPU planned for.
        cpu_memory_gib: Memory planned for on a CPU.
        cpu_minutes: Training minutes planned for on a CPU.
        reason: Where these figures come from.
    """

    gpu_memory_gib: float
    cpu_memory_gib: float
    cpu_minutes: float
    reason: str = ""


class Plan(Schema):
    """Everything samunet decided about a dataset.

    Args:
        version: Schema version.
        dataset: Folder name.
        fingerprint_sha256: Hash of the fingerprint it was made from.
        channel_names: In order.
        file_ending: Ending of predicted masks.
        labels: As in dataset.json.
        regions_class_order: As in dataset.json.
        frame: Axes of processing.
        target_spacing: nnU-Net's target spacing per file axis (Z, Y, X), in mm.
        normalization: Per channel.
        mirror_axes: Anatomical axes along which images may be mirrored.
        configurations: By name.
        recommended: The configuration that training takes without -c.
        budget: Hardware planned for.
        left_out: Training cases that were skipped.
    """

    version: int = PLAN_VERSION
    dataset: str
    fingerprint_sha256: str
    channel_names: tuple[str, ...]
    file_ending: str
    labels: dict[str, int | list[int]]
    regions_class_order: tuple[int, ...] | None = None
    frame: Decided[Frame]
    target_spacing: Decided[SpacingTriple]
    normalization: Decided[tuple[ChannelNormalization, ...]]
    mirror_axes: Decided[tuple[str, ...]]
    configurations: dict[str, Configuration]
    recommended: Decided[str]
    budget: Budget
    left_out: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _consistent(self) -> Plan:
        if self.version != PLAN_VERSION:
            raise ValueError(f"plan version {self.version} cannot be read, expected {PLAN_VERSION}: plan again")
        if self.recommended.value not in self.configurations:
            raise ValueError(f"recommended configuration '{self.recommended.value}' is not planned")
        unknown = set(self.mirror_axes.value) - set(ANATOMICAL_AXES)
        if unknown:
            raise ValueError(f"unknown mirror axes {sorted(unknown)}, expected some of {ANATOMICAL_AXES}")
        return self

    @property
    def label_spec(self) -> LabelSpec:
        """The labels as the pipeline uses them."""
        return LabelSpec.from_dataset_json({"labels": self.labels, "regions_class_order": self.regions_class_order})

    def configuration(self, name: str | None = None) -> Configuration:
        """A configuration by name, or the recommended one.

        Raises:
            ConfigError: If it is not planned; the message lists those that are.
        """
        name = name or self.recommended.value
        if name not in self.configurations:
            raise ConfigError("no such configuration", expected=f"one of {', '.join(self.configurations)}", found=name)
        return self.configurations[name]

    def store_spec(self, configuration: str) -> dict[str, Any]:
        """All that the preprocessed voxels of a configuration depend on: no weights, device or input size."""
        chosen = self.configuration(configuration)
        return {
            "frame": self.frame.value.model_dump(mode="json"),
            "spacing": list(chosen.spacing.value),
            "normalization": [n.model_dump(mode="json") for n in self.normalization.value],
            "labels": self.labels,
            "regions_class_order": self.regions_class_order,
            "format": 1,
        }

    def store_key(self, configuration: str) -> str:
        """Name of the store folder: "slices" or "volumes" and a hash of the store spec."""
        spec = self.store_spec(configuration)
        kind = "slices" if spec["spacing"][0] is None else "volumes"
        return f"{kind}_{sha256_json(spec)[:10]}"


@dataclass(frozen=True)
class ResolvedRecipe:
    """A recipe's values without their reasons, for one kind of weights and device class."""

    weights_kind: str
    device_class: str
    backbone: str
    input_size: int
    tile_vox: int
    encoder_tuning: str
    lora_rank: int
    lora_targets: tuple[str, ...]
    intensity_map: IntensityMap
    learning_rate: float
    weight_decay: float
    warmup_steps: int
    batch_size: int
    accumulation_steps: int
    iterations: int
    epochs: int
    minutes: float | None
    precision: str
    checkpointing: bool
    ema_decay: float
    foreground_fraction: float
    memory_gib: float


def resolve_recipe(configuration: Configuration, weights_kind: str, device_class: str) -> ResolvedRecipe:
    """The recipe for a kind of weights and a device, values only.

    Raises:
        ConfigError: If the plan holds none for that pair.
    """
    by_device = configuration.recipes.get(weights_kind)  # type: ignore[call-overload]
    if by_device is None or device_class not in by_device:
        planned = [f"{kind} on {device}" for kind, devices in configuration.recipes.items() for device in devices]
        raise ConfigError(
            "the plan holds no recipe for these weights on this device",
            expected=f"one of {', '.join(planned)}",
            found=f"{weights_kind} on {device_class}",
            todo="plan again, or choose other weights",
        )
    recipe: Recipe = by_device[device_class]
    values = {name: getattr(recipe, name).value for name in type(recipe).model_fields}
    return ResolvedRecipe(weights_kind=weights_kind, device_class=device_class, **values)


def load_plan(path: Path) -> Plan:
    """Read plans.json."""
    return load_schema(Plan, path)


def save_plan(plan: Plan, path: Path) -> None:
    """Write plans.json."""
    save_schema(plan, path)
