"""The plan: every decision with its reason, hand-editable.

A configuration says how volumes become slices; its recipes say, per kind of weights and class of device, what network
is trained on them and how. `resolve` strips the reasons for the code that follows the plan.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationInfo, field_validator, model_validator

from samunet.artifacts.augmentation import Augmentation
from samunet.artifacts.decided import Count, NotNegative, Overlap, Positive, PositiveTriple, Share, Whole
from samunet.artifacts.decided import Decided as Decided
from samunet.artifacts.method import (
    DecoderMethod,
    Depth,
    EncoderMethod,
    Fusion,
    Method,
    PromptMethod,
    faults_of,
)
from samunet.artifacts.method_faults import (
    faults_with_blocks,
    faults_with_planes,
    faults_with_slabs,
    faults_with_weights,
)
from samunet.artifacts.model_spec import SPECS, TOKEN_SIZE
from samunet.artifacts.plan_document import COPY, EDITED, marked, read_record, reduced, resolved, write_with_record
from samunet.artifacts.plan_parts import STORED, Planes
from samunet.artifacts.plan_parts import Budget as Budget
from samunet.artifacts.plan_parts import ChannelNormalization as ChannelNormalization
from samunet.artifacts.plan_parts import Decay as Decay
from samunet.artifacts.plan_parts import Frame as Frame
from samunet.artifacts.plan_parts import IntensityMap as IntensityMap
from samunet.artifacts.plan_parts import LossWeights as LossWeights
from samunet.artifacts.plan_parts import Scheme as Scheme
from samunet.core.config import Schema, parse_schema
from samunet.core.errors import ConfigError
from samunet.core.files import read_json, sha256_json, write_json
from samunet.core.geometry import ANATOMICAL_AXES
from samunet.core.labels import LabelSpec

PLAN_VERSION = 2
WEIGHTS_KINDS = ("sam", "medsam", "mobile_sam", "ssl", "none")
DEVICE_CLASSES = ("gpu", "cpu")
METHOD_PARTS = ("encoder", "depth", "decoder", "prompts", "fusion")

WeightsKind = Literal["sam", "medsam", "mobile_sam", "ssl", "none"]
DeviceClass = Literal["gpu", "cpu"]
AttentionKind = Literal["upstream", "folded_global", "folded"]
Precision = Literal["fp32", "bf16", "fp16"]


class Recipe(Schema):
    """What is trained and how, for one kind of weights on one class of device.

    Sizes: ``tile_vox`` voxels of a slice are zoomed to ``input_size`` encoder pixels; slices larger than a tile are
    tiled, smaller ones are zero padded. encoder, depth, decoder, prompts and fusion together are the method.
    ``mirror_views`` is the most mirrored views of an image that prediction averages; ``planes`` the axes of the stored
    volumes across which slices are cut, for training and for prediction, which averages them.
    """

    backbone: Decided[str]
    input_size: Decided[int]
    tile_vox: Decided[Count]
    encoder: Decided[EncoderMethod]
    depth: Decided[Depth]
    decoder: Decided[DecoderMethod]
    prompts: Decided[PromptMethod]
    fusion: Decided[Fusion]
    attention: Decided[AttentionKind]
    intensity_map: Decided[IntensityMap]
    loss: Decided[LossWeights]
    learning_rate: Decided[Positive]
    weight_decay: Decided[NotNegative]
    warmup_steps: Decided[Whole]
    decay: Decided[Decay]
    batch_size: Decided[Count]
    accumulation_steps: Decided[Count]
    iterations: Decided[Count]
    epochs: Decided[Count]
    minutes: Decided[Positive | None]
    precision: Decided[Precision]
    checkpointing: Decided[bool]
    ema_decay: Decided[Overlap]
    augmentation: Decided[Augmentation]
    foreground_fraction: Decided[Share]
    mirror_views: Decided[Literal[1, 2, 4]] = Decided(value=4, reason="every view that the mirror axes allow")
    planes: Decided[Planes] = Decided(value=STORED, reason="as they are stored")
    memory_gib: Decided[Positive]

    @field_validator("backbone")
    @classmethod
    def _known_backbone(cls, value: Decided[str]) -> Decided[str]:
        if value.value not in SPECS:
            raise ValueError(f"unknown backbone '{value.value}', expected one of {', '.join(SPECS)}")
        return value

    @model_validator(mode="after")
    def _consistent(self, info: ValidationInfo) -> Recipe:
        if self.input_size.value % TOKEN_SIZE or self.input_size.value <= 0:
            raise ValueError(f"input_size {self.input_size.value} is not a positive multiple of {TOKEN_SIZE}")
        # Parts of a method that was edited are put together by the planner, which checks them then.
        method = self.method_parts()
        faults = [] if info.context == EDITED else faults_of(method) + faults_with_planes(method, self.planes.value)
        faults += faults_with_blocks(method, SPECS[self.backbone.value].num_attention_blocks)
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
        inherits_from: The configuration that everything it does not name in plans.json comes from.
    """

    inherits_from: str | None = None
    spacing: Decided[tuple[Positive | None, Positive, Positive]]
    context_slices: Decided[Whole]
    slab_depth: Decided[Count]
    channels: Decided[Literal["neighbours", "repeat", "direct", "projection"]]
    tile_overlap: Decided[Overlap]
    depth_overlap: Decided[Overlap] = Decided(value=0.5, reason="half of a slab")
    normalization: Decided[tuple[ChannelNormalization, ...]] | None = None
    recipes: dict[WeightsKind, dict[DeviceClass, Recipe]]

    @model_validator(mode="after")
    def _possible(self, info: ValidationInfo) -> Configuration:
        if info.context == EDITED:
            return self
        faults = [
            f"recipe {kind} on {device}: {text}"
            for kind, devices in self.recipes.items()
            for device, recipe in devices.items()
            for text in [
                *faults_with_weights(recipe.method_parts(), kind),
                *self._depth_faults(recipe),
                *self._step_faults(recipe),
            ]
        ]
        if faults:
            raise ValueError("; ".join(faults))
        return self

    def _depth_faults(self, recipe: Recipe) -> list[str]:
        depth = self.slab_depth.value
        if faults := faults_with_slabs(recipe.method_parts(), depth):
            return faults
        if recipe.batch_size.value % depth or recipe.batch_size.value < depth:
            return [f"batch_size {recipe.batch_size.value} is not a multiple of slab_depth {depth}: change one"]
        return []

    def _step_faults(self, recipe: Recipe) -> list[str]:
        """What the user decided of a step or the warm-up and a training cannot do; rules keep within these limits."""
        batch, depth = recipe.batch_size.value, self.slab_depth.value
        parts, warmup, faults = recipe.accumulation_steps, recipe.warmup_steps, []
        if parts.by_user and parts.value > (most := max(1, batch // depth)):
            slabs = f" in slabs of {depth}" if depth > 1 else ""
            faults.append(
                f"accumulation_steps {parts.value}: a step of {batch} slices{slabs} has 1 to {most} parts; change it, "
                "or batch_size"
            )
        steps = recipe.iterations.value * recipe.epochs.value
        if warmup.by_user and warmup.value > steps:
            faults.append(
                f"warmup_steps {warmup.value}: the training has {steps} steps (iterations x epochs), of which the "
                f"warm-up takes 0 to {steps}"
            )
        return faults


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
    target_spacing: Decided[PositiveTriple]
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
        if faults := self._normalization_faults():
            raise ValueError("; ".join(faults))
        return self

    def _normalization_faults(self) -> list[str]:
        own = {f"configurations.{name}.": chosen.normalization for name, chosen in self.configurations.items()}
        known = {"": self.normalization, **own}
        return [
            f"{place}normalization: expected one entry for each of {len(self.channel_names)} channels "
            f"({', '.join(self.channel_names)}), found {len(decided.value)}"
            for place, decided in known.items()
            if decided is not None and len(decided.value) != len(self.channel_names)
        ]

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
    planes: Planes = STORED


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


def load_plan(path: Path, *, edited: bool = False, record: dict[str, Any] | None = None) -> Plan:
    """Read plans.json: edits marked as the user's, configurations that inherit complete.

    Args:
        path: The file.
        edited: Whether it is about to be planned anew, so that what depends on an edit need not fit it yet.
        record: Content that the plan had as it was written, where no copy of it lies beside.

    Raises:
        ConfigError: With every fault, its place, what was expected and found.
    """
    content = read_json(path)
    if isinstance(content, dict):
        content = marked(content, read_record(path, content) or record)
        content.pop(COPY, None)
    return parse_schema(Plan, resolved(content, file=path), file=path, context=EDITED if edited else None)


def save_plan(plan: Plan, path: Path, *, as_planned: bool = False) -> None:
    """Write plans.json.

    Args:
        plan: The plan.
        path: The file.
        as_planned: Whether this is the planner's work, which later edits are told from by a copy beside it.
    """
    write = write_with_record if as_planned else write_json
    write(path, reduced(plan.model_dump(mode="json")))
