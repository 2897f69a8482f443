"""The plan: every decision with its reason, hand-editable.

A configuration says how volumes become slices; its recipes say, per kind of weights and class of device, what network
is trained on them and how. `resolve` strips the reasons for the code that follows the plan.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from pydantic import ConfigDict, Field, field_validator, model_validator

from samunet.artifacts.augmentation import Augmentation
from samunet.artifacts.method import (
    DecoderMethod,
    Depth,
    EncoderMethod,
    Fusion,
    Method,
    PromptMethod,
    faults_of,
    faults_with_weights,
)
from samunet.artifacts.model_spec import SPECS, TOKEN_SIZE
from samunet.core.config import Schema, load_schema, save_schema
from samunet.core.errors import ConfigError
from samunet.core.files import sha256_json
from samunet.core.geometry import ANATOMICAL_AXES, AxisOperation, Geometry, SpacingTriple, canonical_operation
from samunet.core.labels import LabelSpec

PLAN_VERSION = 2
WEIGHTS_KINDS = ("sam", "medsam", "mobile_sam", "ssl", "none")
DEVICE_CLASSES = ("gpu", "cpu")
METHOD_PARTS = ("encoder", "depth", "decoder", "prompts", "fusion")

WeightsKind = Literal["sam", "medsam", "mobile_sam", "ssl", "none"]
DeviceClass = Literal["gpu", "cpu"]
AttentionKind = Literal["upstream", "folded_global", "folded"]
Precision = Literal["fp32", "bf16", "fp16"]
Scheme = Literal["zscore", "ct", "rgb_to_01", "rescale_to_01", "window_to_01", "percentiles_to_01", "none"]

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
        lower: Clip below (scheme "ct": percentile 0.5 of the foreground; "window_to_01": lower end of the window).
        upper: Clip above (scheme "ct": percentile 99.5 of the foreground; "window_to_01": upper end).
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
    statistics. "identity" changes nothing; it and "unit_per_slice" have no bounds.

    Args:
        kind: "identity" for random weights, "sam_pixels" for SAM's pixel statistics, "unit" for [0, 1],
            "unit_per_slice" for [0, 1] with each slice's own extremes after the clip (MedSAM).
        lower: Per image channel; neighbouring slices share their channel's.
        upper: Per image channel.
    """

    kind: Literal["identity", "sam_pixels", "unit", "unit_per_slice"]
    lower: tuple[float, ...] = ()
    upper: tuple[float, ...] = ()

    @model_validator(mode="after")
    def _bounded(self) -> IntensityMap:
        unbounded = self.kind in ("identity", "unit_per_slice")
        if len(self.lower) != len(self.upper) or unbounded == bool(self.lower):
            raise ValueError(f"{self.kind} needs {'no bounds' if unbounded else 'lower and upper bounds'}")
        return self


class LossWeights(Schema):
    """Weights of the loss's two parts.

    Args:
        cross_entropy: Of cross-entropy (binary for regions and prompted masks).
        dice: Of 1 - soft Dice.
    """

    cross_entropy: float = Field(default=1.0, ge=0)
    dice: float = Field(default=1.0, ge=0)


class Decay(Schema):
    """How the learning rate falls over a run, after the warm-up.

    Args:
        kind: (1 - progress) ** power, half a cosine, or not at all.
        power: Of the polynomial.
    """

    kind: Literal["polynomial", "cosine", "constant"] = "polynomial"
    power: float = Field(default=0.9, gt=0)


class Recipe(Schema):
    """What is trained and how, for one kind of weights on one class of device.

    Sizes: ``tile_vox`` voxels of a slice are zoomed to ``input_size`` encoder pixels; slices larger than a tile are
    tiled, smaller ones are zero padded. encoder, depth, decoder, prompts and fusion together are the method.
    ``mirror_views`` is the most mirrored views of an image that prediction averages.
    """

    backbone: Decided[str]
    input_size: Decided[int]
    tile_vox: Decided[int]
    encoder: Decided[EncoderMethod]
    depth: Decided[Depth]
    decoder: Decided[DecoderMethod]
    prompts: Decided[PromptMethod]
    fusion: Decided[Fusion]
    attention: Decided[AttentionKind]
    intensity_map: Decided[IntensityMap]
    loss: Decided[LossWeights]
    learning_rate: Decided[float]
    weight_decay: Decided[float]
    warmup_steps: Decided[int]
    decay: Decided[Decay]
    batch_size: Decided[int]
    accumulation_steps: Decided[int]
    iterations: Decided[int]
    epochs: Decided[int]
    minutes: Decided[float | None]
    precision: Decided[Precision]
    checkpointing: Decided[bool]
    ema_decay: Decided[float]
    augmentation: Decided[Augmentation]
    foreground_fraction: Decided[float]
    mirror_views: Decided[Literal[1, 2, 4]] = Decided(value=4, reason="every view that the mirror axes allow")
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
        for name in ("tile_vox", "batch_size", "accumulation_steps", "iterations", "epochs"):
            if getattr(self, name).value < 1:
                raise ValueError(f"{name} must be at least 1, found {getattr(self, name).value}")
        if self.learning_rate.value <= 0:
            raise ValueError(f"learning_rate must be positive, found {self.learning_rate.value}")
        faults = faults_of(self.method_parts())
        if faults:
            raise ValueError("; ".join(faults))
        return self

    def method_parts(self) -> Method:
        """The method, unchecked."""
        return Method.model_construct(**{part: getattr(self, part).value for part in METHOD_PARTS})


class Configuration(Schema):
    """How volumes become network input.

    Args:
        spacing: Target spacing (slice, row, column) in mm; the first is None where cases keep their own.
        context_slices: Neighbouring slices on each side that become input channels.
        slab_depth: Slices of one volume that see each other (1: none).
        channels: How the slice's channels become the encoder's three.
        tile_overlap: Fraction by which neighbouring tiles overlap.
        depth_overlap: Fraction by which neighbouring slabs overlap.
        normalization: Per channel, where it is not the plan's (a method with a convention of its own).
        recipes: Kind of weights to device class to recipe.
    """

    spacing: Decided[tuple[float | None, float, float]]
    context_slices: Decided[int]
    slab_depth: Decided[int]
    channels: Decided[Literal["neighbours", "repeat", "direct", "projection"]]
    tile_overlap: Decided[float]
    depth_overlap: Decided[float] = Decided(value=0.5, reason="half of a slab")
    normalization: Decided[tuple[ChannelNormalization, ...]] | None = None
    recipes: dict[WeightsKind, dict[DeviceClass, Recipe]]

    @field_validator("tile_overlap", "depth_overlap")
    @classmethod
    def _partial(cls, value: Decided[float]) -> Decided[float]:
        if not 0 <= value.value < 1:
            raise ValueError(f"an overlap is a fraction from 0 to below 1, found {value.value}")
        return value

    @model_validator(mode="after")
    def _possible(self) -> Configuration:
        faults = [
            f"recipe {kind} on {device}: {text}"
            for kind, devices in self.recipes.items()
            for device, recipe in devices.items()
            for text in [*faults_with_weights(recipe.method_parts(), kind), *self._depth_faults(recipe)]
        ]
        if faults:
            raise ValueError("; ".join(faults))
        return self

    def _depth_faults(self, recipe: Recipe) -> list[str]:
        depth = self.slab_depth.value
        if depth > 1 and recipe.depth.value.kind == "none":
            return [f"slabs of {depth} slices need a depth mechanism: set depth.kind, or slab_depth to 1"]
        if recipe.batch_size.value % depth or recipe.batch_size.value < depth:
            return [f"batch_size {recipe.batch_size.value} is not a multiple of slab_depth {depth}: change one"]
        return []


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
        probes_sha256: Hash of the probes it was made from; None without any.
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
    probes_sha256: str | None = None
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

    def normalization_of(self, configuration: str | None = None) -> tuple[ChannelNormalization, ...]:
        """How the channels of a configuration are normalized."""
        own = self.configuration(configuration).normalization
        return (self.normalization if own is None else own).value

    def store_spec(self, configuration: str) -> dict[str, Any]:
        """All that the preprocessed voxels of a configuration depend on: no weights, device or input size."""
        chosen = self.configuration(configuration)
        return {
            "frame": self.frame.value.model_dump(mode="json"),
            "spacing": list(chosen.spacing.value),
            "normalization": [n.model_dump(mode="json") for n in self.normalization_of(configuration)],
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
    method: Method
    slab_depth: int
    attention: str
    intensity_map: IntensityMap
    loss: LossWeights
    learning_rate: float
    weight_decay: float
    warmup_steps: int
    decay: Decay
    batch_size: int
    accumulation_steps: int
    iterations: int
    epochs: int
    minutes: float | None
    precision: str
    checkpointing: bool
    ema_decay: float
    augmentation: Augmentation
    foreground_fraction: float
    memory_gib: float
    mirror_views: int = 4


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
    return strip_reasons(recipe, weights_kind, device_class, slab_depth=configuration.slab_depth.value)


def strip_reasons(recipe: Recipe, weights_kind: str, device_class: str, *, slab_depth: int) -> ResolvedRecipe:
    """A recipe's values."""
    values = {name: getattr(recipe, name).value for name in type(recipe).model_fields if name not in METHOD_PARTS}
    return ResolvedRecipe(
        weights_kind=weights_kind,
        device_class=device_class,
        method=recipe.method_parts(),
        slab_depth=slab_depth,
        **values,
    )


def load_plan(path: Path) -> Plan:
    """Read plans.json."""
    return load_schema(Plan, path)


def save_plan(plan: Plan, path: Path) -> None:
    """Write plans.json."""
    save_schema(plan, path)
