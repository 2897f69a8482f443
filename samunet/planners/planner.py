"""Composes the rules into a plan: every decision with its reason, for every kind of weights and class of device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from statistics import median
from typing import Any, get_args

from samunet.artifacts.dataset import DatasetDescription
from samunet.artifacts.fingerprint import CaseFacts, Fingerprint
from samunet.artifacts.plan import Budget, ChannelNormalization, DeviceClass, Frame, Plan, WeightsKind
from samunet.artifacts.probe import NO_PROBES, Probes
from samunet.core.config import parse_schema
from samunet.planners import augmentation, rules, sizes
from samunet.planners.recipes import Facts, automatic, decided, plan_recipe, valued


def make_plan(
    fingerprint: Fingerprint, description: DatasetDescription, budget: Budget, *, probes: Probes = NO_PROBES
) -> Plan:
    """Decide everything about a dataset; the same facts and budget always give the same plan.

    Args:
        fingerprint: The dataset's facts.
        description: Its dataset.json.
        budget: The hardware to plan for.
        probes: What samunet_probe measured.
    """
    cases = [fingerprint.cases[name] for name in sorted(fingerprint.cases)]
    spacing = rules.target_spacing([c.spacing for c in cases], [c.shape_after_crop for c in cases])
    frame = rules.frame(fingerprint, spacing[0])
    normalization = rules.normalization(fingerprint)
    mirror = rules.mirror_axes(fingerprint.mirror_pairs)
    facts = gather(fingerprint, description, budget, frame[0], spacing[0], normalization[0], mirror[0])
    facts = replace(facts, probes=probes)
    axis = frame[0].slice_axis
    alike = [c for c in cases if c.codes == frame[0].orientation]
    coherence = rules.mean_coherence(alike)[axis]
    neighbours = rules.allows_neighbours(len(fingerprint.channel_names), facts.shapes)
    content = {
        "dataset": fingerprint.dataset,
        "fingerprint_sha256": fingerprint.facts_sha256,
        "probes_sha256": probes.facts_sha256,
        "channel_names": fingerprint.channel_names,
        "file_ending": description.file_ending,
        "labels": description.labels,
        "regions_class_order": description.regions_class_order,
        "frame": decided(frame),
        "target_spacing": decided(spacing),
        "normalization": decided(normalization),
        "mirror_axes": decided(mirror),
        "configurations": _configurations(facts, frame[0], spacing[0], alike, neighbours=neighbours),
        "recommended": decided(rules.recommended(coherence, frame[0].spacing[axis], has_neighbours=neighbours)),
        "budget": budget,
        "left_out": fingerprint.left_out,
    }
    return parse_schema(Plan, content)


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
    for case in cases:
        for name, structure in case.structures.items():
            widths.setdefault(name, []).append(structure.width_mm)
    plane = sizes.InPlane(
        typical_vox=round(median(longer)),
        largest_vox=longer[-1],
        width_vox=min((median(w) for w in widths.values()), default=0.0) / max(in_plane),
        resolution=median(
            min(operation.reorder(case.effective_resolution)[1:]) for case, operation in zip(cases, turned, strict=True)
        ),
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
        mirrors=augmentation.in_plane_mirrors(frame, mirror),
        budget=budget,
    )


def _configurations(
    facts: Facts,
    frame: Frame,
    spacing: tuple[float, float, float],
    alike: Sequence[CaseFacts],
    *,
    neighbours: bool,
) -> dict[str, Any]:
    """Slices, slices with their neighbours, slabs, and slices in MedSAM's own intensities, as far as the data allow."""
    in_plane = _in_plane(frame, spacing)
    kept = valued((None, *in_plane), "slices keep each case's own distance; in plane nnU-Net's target spacing")
    planned = {"2d": _configuration(facts, "2d", kept, 0)}
    if neighbours:
        planned["2.5d"] = _configuration(facts, "2.5d", kept, 1)
    slice_mm = spacing[frame.slice_axis]
    cases = [facts.fingerprint.cases[name] for name in sorted(facts.fingerprint.cases)]
    resampled = rules.canonical_shapes(cases, frame, in_plane, slice_mm=slice_mm)
    fewer = [min(own, new) for own, new in zip(facts.shapes, resampled, strict=True)]
    depth = rules.slab_depth(alike, frame, fewer, slice_mm)
    if depth[0] > 1:
        cubic = valued((slice_mm, *in_plane), "nnU-Net's target spacing along all axes")
        planned["3d"] = _configuration(facts, "3d", cubic, 1 if neighbours else 0, depth)
    normalization, reason = rules.medsam_normalization(facts.fingerprint.channel_names)
    medsam = _configuration(
        facts, "2d_medsam", kept, 0, weights=("medsam", "sam"), intensity_map=rules.medsam_intensities()
    )
    planned["2d_medsam"] = medsam | {"normalization": valued(normalization, reason)}
    return planned


def _configuration(
    facts: Facts,
    name: str,
    spacing: dict[str, Any],
    context: int,
    depth: tuple[int, str] = (1, "slices are predicted on their own"),
    *,
    weights: Sequence[WeightsKind] = get_args(WeightsKind),
    intensity_map: tuple[Any, str] | None = None,
) -> dict[str, Any]:
    def recipe(kind: WeightsKind, device: DeviceClass) -> dict[str, Any]:
        wish = automatic(facts, kind, device, configuration=name, slab_depth=depth[0])
        return plan_recipe(facts, replace(wish, intensity_map=intensity_map))

    return {
        "spacing": spacing,
        "context_slices": valued(context, "neighbours as channels" if context else "single slices"),
        "slab_depth": decided(depth),
        "channels": decided(rules.encoder_channels(len(facts.fingerprint.channel_names), context)),
        "tile_overlap": valued(sizes.TILE_OVERLAP, "nnU-Net's half, where slices are tiled at all"),
        "depth_overlap": decided(augmentation.depth_overlap(depth[0])),
        "recipes": {kind: {device: recipe(kind, device) for device in get_args(DeviceClass)} for kind in weights},
    }


def _in_plane(frame: Frame, spacing: tuple[float, float, float]) -> tuple[float, float]:
    rows, columns = (spacing[axis] for axis in range(3) if axis != frame.slice_axis)
    return rows, columns


def facts_of_plan(plan: Plan, fingerprint: Fingerprint, probes: Probes = NO_PROBES) -> Facts:
    """What further recipes for a planned dataset are derived from: its facts in the plan's own frame and spacing."""
    description = DatasetDescription(
        channel_names={str(index): name for index, name in enumerate(plan.channel_names)},
        labels=plan.labels,
        regions_class_order=None if plan.regions_class_order is None else list(plan.regions_class_order),
        file_ending=plan.file_ending,
    )
    facts = gather(
        fingerprint,
        description,
        plan.budget,
        plan.frame.value,
        plan.target_spacing.value,
        plan.normalization.value,
        plan.mirror_axes.value,
    )
    return replace(facts, probes=probes)
