"""Composes the rules into a plan: every decision with its reason, for every kind of weights and class of device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import median
from typing import Any, get_args

from samunet.artifacts.dataset import DatasetDescription
from samunet.artifacts.fingerprint import CaseFacts, Fingerprint
from samunet.artifacts.plan import Budget, ChannelNormalization, DeviceClass, Frame, Plan, WeightsKind
from samunet.artifacts.probe import NO_PROBES, Probes
from samunet.core.config import parse_schema
from samunet.core.errors import ConfigError
from samunet.core.geometry import AxisOperation, SpacingTriple, Triple
from samunet.planners import augmentation, planes, rules, sizes
from samunet.planners.edited_recipes import plan_edited_recipe
from samunet.planners.edits import NO_EDITS, Choices, ConfigurationEdits, Edits, Reasoned, Settling, root_of
from samunet.planners.recipes import Facts, automatic

_CORRECT_OR_DROP = "correct plans.json, or plan without its edits with --overwrite-plan"
ALONE: Reasoned = (1, "slices are predicted on their own")


def make_plan(
    fingerprint: Fingerprint,
    description: DatasetDescription,
    budget: Budget,
    *,
    probes: Probes = NO_PROBES,
    edits: Edits = NO_EDITS,
) -> Plan:
    """Decide everything about a dataset; the same facts, budget and edits always give the same plan.

    Args:
        fingerprint: The dataset's facts.
        description: Its dataset.json.
        budget: The hardware to plan for.
        probes: What samunet_probe measured.
        edits: What the user decided; all else is planned around it.

    Raises:
        ConfigError: If what the user decided does not go with the rest.
    """
    cases = [fingerprint.cases[name] for name in sorted(fingerprint.cases)]
    take = Settling(edits.choices)
    spacing = take(
        "target_spacing", rules.target_spacing([c.spacing for c in cases], [c.shape_after_crop for c in cases])
    )
    frame = take("frame", rules.frame(fingerprint, spacing))
    _check_orientation(frame, cases)
    normalization = take("normalization", rules.normalization(fingerprint))
    _check_channels(normalization, fingerprint)
    mirror = take("mirror_axes", rules.mirror_axes(fingerprint.mirror_pairs))
    given = _Given(fingerprint, description, budget, probes, frame, spacing, normalization, mirror)
    coherence = rules.mean_coherence(given.alike)[frame.slice_axis]
    configurations = _configurations(given, edits)
    distance = frame.spacing[frame.slice_axis]
    planned = {"has_neighbours": "2.5d" in configurations, "has_slabs": "3d" in configurations}
    take("recommended", rules.recommended(coherence, distance, **planned))
    content = {
        "dataset": fingerprint.dataset,
        "fingerprint_sha256": fingerprint.facts_sha256,
        "probes_sha256": probes.facts_sha256,
        "channel_names": fingerprint.channel_names,
        "file_ending": description.file_ending,
        "labels": description.labels,
        "regions_class_order": description.regions_class_order,
        "configurations": configurations,
        "budget": budget,
        "left_out": fingerprint.left_out,
    }
    return parse_schema(Plan, content | take.content)


def _check_orientation(frame: Frame, cases: Sequence[CaseFacts]) -> None:
    """Refuse a frame whose orientation no case has, as along its axes nothing was measured."""
    known = sorted({case.codes for case in cases})
    if frame.orientation not in known:
        raise ConfigError(
            "frame: no case has the orientation that was decided on in plans.json",
            expected=" or ".join("-".join(codes) for codes in known),
            found="-".join(frame.orientation),
            todo=_CORRECT_OR_DROP,
        )


def _check_channels(
    normalization: Sequence[ChannelNormalization], fingerprint: Fingerprint, *, configuration: str | None = None
) -> None:
    """Refuse intensities that were decided on for another number of channels."""
    names = fingerprint.channel_names
    if len(normalization) != len(names):
        raise ConfigError(
            f"{'' if configuration is None else f'{configuration}.'}normalization: the number of entries in plans.json "
            "is not that of the channels",
            expected=f"{len(names)}, for {', '.join(names)}",
            found=str(len(normalization)),
            todo=_CORRECT_OR_DROP,
        )


def _check_depths(configuration: str, edited: Choices, most: int) -> None:
    """Refuse slabs and neighbourhoods that the user decided on and that reach beyond every volume.

    Args:
        configuration: Its name.
        edited: What was decided in it.
        most: Slices of the volume that has most.
    """
    limits = {"slab_depth": (1, most), "context_slices": (0, most - 1)}
    wrong = {name: span for name, span in limits.items() if name in edited and edited[name].value > span[1]}
    if wrong:
        names = [f"configurations.{configuration}.{name}" for name in wrong]
        raise ConfigError(
            f"{' and '.join(names)}: more slices than any volume has",
            expected=", ".join(f"{name} {low} to {high}" for name, (low, high) in wrong.items())
            + f", as no volume has more than {most} slice{'s' * (most != 1)} at this spacing",
            found=", ".join(f"{edited[name].value}" for name in wrong),
            todo=_CORRECT_OR_DROP,
        )


@dataclass(frozen=True)
class _Given:
    """What all configurations are planned from."""

    fingerprint: Fingerprint
    description: DatasetDescription
    budget: Budget
    probes: Probes
    frame: Frame
    spacing: SpacingTriple
    normalization: Sequence[ChannelNormalization]
    mirror: Sequence[str]

    @cached_property
    def cases(self) -> list[CaseFacts]:
        return [self.fingerprint.cases[name] for name in sorted(self.fingerprint.cases)]

    @cached_property
    def alike(self) -> list[CaseFacts]:
        return [case for case in self.cases if case.codes == self.frame.orientation]

    @cached_property
    def facts(self) -> Facts:
        return self.facts_at(self.spacing)

    def facts_at(self, spacing: SpacingTriple) -> Facts:
        facts = gather(
            self.fingerprint, self.description, self.budget, self.frame, spacing, self.normalization, self.mirror
        )
        return replace(facts, probes=self.probes)

    def facts_of(self, spacing: Sequence[float | None], own: Sequence[ChannelNormalization] | None) -> Facts:
        """The facts in a configuration's spacing (slice, row, column) and with normalization of its own."""
        in_file = per_file_axis(self.frame, spacing, self.spacing)
        facts = self.facts if in_file == self.spacing else self.facts_at(in_file)
        return facts if own is None else replace(facts, normalization=own)

    def slab_depth(self, spacing: Sequence[float | None]) -> Reasoned:
        """How many slices the slabs of a configuration with this spacing (slice, row, column) have."""
        in_file = per_file_axis(self.frame, spacing, self.spacing)
        shapes = rules.slab_shapes(self.cases, self.frame, in_file)
        return rules.slab_depth(self.alike, self.frame, shapes, in_file[self.frame.slice_axis])

    def most_slices(self, spacing: Sequence[float | None]) -> int:
        """Slices of the volume that has most, at a configuration's spacing (slice, row, column)."""
        slice_mm, rows, columns = spacing
        assert rows is not None
        assert columns is not None
        shapes = rules.canonical_shapes(self.cases, self.frame, (rows, columns), slice_mm=slice_mm)
        return max(shape[0] for shape in shapes)


def per_file_axis(frame: Frame, spacing: Sequence[float | None], target: SpacingTriple) -> SpacingTriple:
    """A configuration's spacing (slice, row, column) by file axis; where slices keep their own, the target's."""
    found = dict(zip(frame.file_axes, spacing, strict=True))
    z, y, x = (target[axis] if found[axis] is None else found[axis] for axis in range(3))
    return z, y, x  # type: ignore[return-value]


def gather(
    fingerprint: Fingerprint,
    description: DatasetDescription,
    budget: Budget,
    frame: Frame,
    spacing: tuple[float, float, float],
    normalization: Sequence[ChannelNormalization],
    mirror: Sequence[str],
) -> Facts:
    """Everything that recipes are derived from.

    Args:
        fingerprint: The dataset's facts.
        description: Its dataset.json.
        budget: The hardware to plan for.
        frame: Axes of processing.
        spacing: Target spacing per file axis in mm.
        normalization: Per channel.
        mirror: Anatomical axes along which images may be mirrored.
    """
    cases = [fingerprint.cases[name] for name in sorted(fingerprint.cases)]
    in_plane = _in_plane(frame, spacing)
    shapes = rules.canonical_shapes(cases, frame, in_plane)
    longer = sorted(max(rows, columns) for _, rows, columns in shapes)
    turned = [rules.axis_operation(case, frame) for case in cases]
    widths: dict[str, list[float]] = {}
    areas: dict[str, list[float]] = {}
    for case, operation in zip(cases, turned, strict=True):
        for name, structure in case.structures.items():
            widths.setdefault(name, []).append(structure.width_mm)
            depth_mm = operation.reorder(structure.num_slices)[0] * operation.reorder(case.spacing)[0]
            areas.setdefault(name, []).append(structure.volume_mm3 / depth_mm)
    plane = sizes.InPlane(
        typical_vox=round(median(longer)),
        largest_vox=longer[-1],
        width_vox=min((median(w) for w in widths.values()), default=0.0) / max(in_plane),
        area_vox=sizes.area_of_small([median(a) for a in areas.values()]) / (in_plane[0] * in_plane[1]),
        resolution=median(_detail(case, operation, in_plane) for case, operation in zip(cases, turned, strict=True)),
    )
    labels = description.label_spec
    return Facts(
        fingerprint=fingerprint,
        normalization=normalization,
        shapes=shapes,
        plane=plane,
        num_tokens=labels.num_tokens,
        num_structures=labels.num_foreground,
        num_slices=sum(shape[0] for shape in shapes),
        num_foreground_slices=sum(
            min(operation.reorder(case.num_foreground_slices)[0], shape[0])
            for case, operation, shape in zip(cases, turned, shapes, strict=True)
        ),
        augmentation=augmentation.augmentation(cases, frame, mirror, in_plane),
        mirrors=[axis in mirror for axis in augmentation.anatomical_axes(frame)],
        planes=_planes(cases, frame, spacing, mirror, shapes=shapes, num_tokens=labels.num_tokens),
        budget=budget,
    )


def _planes(
    cases: Sequence[CaseFacts],
    frame: Frame,
    spacing: SpacingTriple,
    mirror: Sequence[str],
    *,
    shapes: Sequence[Triple],
    num_tokens: int,
) -> Reasoned:
    """Across which axes slices can be cut, at each case's own distance of slices."""
    rows, columns = _in_plane(frame, spacing)
    voxels = [(rules.axis_operation(case, frame).reorder(case.spacing)[0], rows, columns) for case in cases]
    coherence = rules.mean_coherence([case for case in cases if case.codes == frame.orientation])
    canonical = [coherence[axis] for axis in frame.file_axes]
    return planes.planes(voxels, shapes, canonical, augmentation.anatomical_axes(frame), mirror, num_tokens=num_tokens)


def _detail(case: CaseFacts, operation: AxisOperation, in_plane: tuple[float, float]) -> float:
    """Fraction of the target grid's limit up to which a case carries detail, along its finer in-plane axis.

    A slice of 1 mm that is resampled to 0.62 mm reaches 0.62 of that grid's limit at most. One zoom takes both axes to
    the encoder, so the axis with more detail says how many of its pixels a voxel needs.
    """
    own, spacing = operation.reorder(case.effective_resolution)[1:], operation.reorder(case.spacing)[1:]
    return max(min(1.0, share * target / mm) for share, mm, target in zip(own, spacing, in_plane, strict=True))


@dataclass(frozen=True)
class _Design:
    """How a configuration is planned: what the rules say of it, apart from its recipes."""

    spacing: Reasoned
    context: int = 0
    in_slabs: bool = False
    weights: Sequence[WeightsKind] = get_args(WeightsKind)
    normalization: Reasoned | None = None
    intensity_map: Reasoned | None = None


def _configurations(given: _Given, edits: Edits) -> dict[str, Any]:
    """Those the data allow, and those that the user added."""
    designs = _designs(given, edits)
    planned = {name: _configuration(given, name, design, edits.of(name)) for name, design in designs.items()}
    for name, own in edits.own.items():
        root = root_of(name, edits.own)
        if root in designs:
            content = _configuration(given, root, designs[root], edits.of(name))
            planned[name] = {"inherits_from": own.inherits_from, **content}
        else:
            planned[name] = own.model_dump() | {"inherits_from": None}
    return planned


def _designs(given: _Given, edits: Edits) -> dict[str, _Design]:
    """Slices, slices with their neighbours, slabs, and slices in MedSAM's own intensities, as far as the data allow."""
    facts, spacing, frame = given.facts, given.spacing, given.frame
    in_plane = _in_plane(frame, spacing)
    kept: Reasoned = (None, *in_plane), "slices keep each case's own distance; in plane nnU-Net's target spacing"
    designs = {"2d": _Design(kept)}
    neighbours = rules.allows_neighbours(len(given.fingerprint.channel_names), facts.shapes)
    if neighbours:
        designs["2.5d"] = _Design(kept, context=1)
    cubic: Reasoned = (spacing[frame.slice_axis], *in_plane), "nnU-Net's target spacing along all axes"
    edited = edits.of("3d").choices
    if "slab_depth" in edited or given.slab_depth(edited["spacing"].value if "spacing" in edited else cubic[0])[0] > 1:
        designs["3d"] = _Design(cubic, context=1 if neighbours else 0, in_slabs=True)
    normalization = rules.medsam_normalization(given.fingerprint.channel_names)
    intensities = rules.medsam_intensities()
    designs["2d_medsam"] = _Design(kept, 0, False, ("medsam", "sam"), normalization, intensities)
    return designs


def _configuration(given: _Given, name: str, design: _Design, edits: ConfigurationEdits) -> dict[str, Any]:
    """A configuration's content.

    Args:
        given: What it is planned from.
        name: Of the rules it follows.
        design: What they say.
        edits: What the user decided in it.
    """
    take = Settling(edits.choices)
    spacing = take("spacing", design.spacing)
    own = edits.choices.get("normalization")
    if design.normalization is not None:
        take("normalization", design.normalization)
    elif own is not None:
        take("normalization", (given.normalization, "as the plan's"))
    if own is not None:
        _check_channels(own.value, given.fingerprint, configuration=name)
    facts = given.facts_of(spacing, None if own is None else own.value)
    context = take("context_slices", (design.context, "neighbours as channels" if design.context else "single slices"))
    depth = take("slab_depth", given.slab_depth(spacing) if design.in_slabs else ALONE)
    _check_depths(name, edits.choices, given.most_slices(spacing))
    take("channels", rules.encoder_channels(len(given.fingerprint.channel_names), context))
    overlap = take("tile_overlap", (sizes.TILE_OVERLAP, "nnU-Net's half, where slices are tiled at all"))
    facts = replace(facts, tile_overlap=overlap, depth_overlap=take("depth_overlap", augmentation.depth_overlap(depth)))

    def recipe(kind: WeightsKind, device: DeviceClass) -> dict[str, Any]:
        wish = replace(automatic(facts, kind, device, configuration=name, slab_depth=depth), intensity_map=intensities)
        return plan_edited_recipe(facts, wish, edits.recipes.get((kind, device), {}))

    intensities = design.intensity_map
    added = {kind for kind, _ in edits.recipes}
    others = (kind for kind in get_args(WeightsKind) if kind in added and kind not in design.weights)
    kinds: list[WeightsKind] = [*design.weights, *others]
    recipes = {kind: {device: recipe(kind, device) for device in get_args(DeviceClass)} for kind in kinds}
    return take.content | {"recipes": recipes}


def _in_plane(frame: Frame, spacing: tuple[float, float, float]) -> tuple[float, float]:
    _, rows, columns = (spacing[axis] for axis in frame.file_axes)
    return rows, columns


def facts_of_plan(
    plan: Plan, fingerprint: Fingerprint, probes: Probes = NO_PROBES, *, configuration: str | None = None
) -> Facts:
    """What further recipes for a planned dataset are derived from: its facts in the plan's own frame and spacing.

    Args:
        plan: The plan.
        fingerprint: What it was made from.
        probes: Those it was made with.
        configuration: In whose spacing, with whose intensities and overlaps; None: in the plan's own.
    """
    given = _Given(
        fingerprint,
        described(plan),
        plan.budget,
        probes,
        plan.frame.value,
        plan.target_spacing.value,
        plan.normalization.value,
        plan.mirror_axes.value,
    )
    if configuration is None:
        return given.facts
    chosen = plan.configuration(configuration)
    facts = given.facts_of(chosen.spacing.value, plan.normalization_of(configuration))
    return replace(facts, tile_overlap=chosen.tile_overlap.value, depth_overlap=chosen.depth_overlap.value)


def described(plan: Plan) -> DatasetDescription:
    """What of dataset.json a plan holds."""
    return DatasetDescription(
        channel_names={str(index): name for index, name in enumerate(plan.channel_names)},
        labels=plan.labels,
        regions_class_order=None if plan.regions_class_order is None else list(plan.regions_class_order),
        file_ending=plan.file_ending,
    )
