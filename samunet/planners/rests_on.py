"""Which facts each decision rests on, and what changes it where neither hardware nor a threshold does."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

import numpy as np

from samunet.artifacts.fingerprint import CaseFacts, Fingerprint
from samunet.artifacts.plan import Plan
from samunet.artifacts.probe import NO_PROBES, Probes
from samunet.planners import rules
from samunet.planners.augmentation import TILT_PERCENTILE
from samunet.planners.planner import facts_of_plan

METHOD = "another method: --set, --preset, or an edit"
CONSTANT = "nothing in the data: an edit"
_HARDWARE = ("GPU or CPU memory", "minutes on a CPU")
_SIZE = ("slices in plane", "detail", "thinnest structure")

RESTS_ON: dict[str, tuple[Sequence[str], str]] = {
    "frame": (("spacing", "shape", "coherence", "orientation"), "other axes or orientations"),
    "target_spacing": (("spacing", "shape"), "other spacings"),
    "normalization": (("channels", "kept by the crop", "intensities"), "the names of the channels in dataset.json"),
    "mirror_axes": (("mirror pairs",), "a pair of structures that a reflection swaps, by name or place"),
    "recommended": (("coherence", "channels"), "labels that agree otherwise from slice to slice"),
    "spacing": (("spacing",), "another target_spacing"),
    "context_slices": (("channels", "shape"), "another configuration: 2d has none, 2.5d one to each side"),
    "slab_depth": (("coherence", "shape"), "another distance over which labels cohere; 1 in 2d and 2.5d"),
    "channels": (("channels",), "another number of channels or context_slices"),
    "tile_overlap": ((), CONSTANT),
    "depth_overlap": ((), "another slab_depth"),
    "backbone": (("weights", "device"), "other weights, or --backbone"),
    "input_size": ((*_SIZE, *_HARDWARE), "larger or smaller slices"),
    "tile_vox": ((*_SIZE, *_HARDWARE), "another input_size, or larger slices"),
    "encoder": (("weights", "slices", "structures", "probe"), METHOD),
    "depth": ((), "another slab_depth; or another method: --set depth.kind"),
    "decoder": (("weights", "device"), METHOD),
    "prompts": ((), METHOD),
    "fusion": (("weights",), METHOD),
    "attention": (("device",), "another input_size or backbone"),
    "intensity_map": (("weights", "intensities"), "other weights, or another normalization"),
    "loss": ((), CONSTANT),
    "learning_rate": (("weights",), "another rank, method or batch_size"),
    "weight_decay": ((), METHOD),
    "warmup_steps": ((), "fewer steps: a tenth of them at most"),
    "decay": ((), CONSTANT),
    "batch_size": (("slices", *_HARDWARE), "a dataset with more or fewer slices"),
    "accumulation_steps": (_HARDWARE, "less memory, or another batch_size"),
    "iterations": (("device",), "few steps on a CPU"),
    "epochs": (("slices", *_HARDWARE), "another number of labelled slices, or batch_size"),
    "minutes": (("minutes on a CPU",), "--minutes when planning, --time-limit when training"),
    "precision": (("device",), "another device"),
    "checkpointing": (("GPU or CPU memory",), "less memory"),
    "ema_decay": ((), "another number of steps"),
    "augmentation": (("obliqueness", "spacing", "mirror pairs"), "cases that lie more or less obliquely, or an edit"),
    "foreground_fraction": (("slices",), "slices that hold a structure more or less often"),
    "mirror_views": (("device", "mirror pairs"), "another device, or larger volumes"),
    "memory_gib": (_HARDWARE, "any other size, batch or method: it is what they need"),
}
"""By the field's name: names of facts, and in words what changes the decision."""


def measured(plan: Plan, fingerprint: Fingerprint, probes: Probes = NO_PROBES) -> dict[str, str]:
    """Every fact a decision rests on, by name, in a few words."""
    cases = [fingerprint.cases[name] for name in sorted(fingerprint.cases)]
    alike = [case for case in cases if case.codes == plan.frame.value.orientation]
    facts = facts_of_plan(plan, fingerprint)
    plane, budget = facts.plane, plan.budget
    tilts = [case.tilt_deg for case in cases if case.tilt_deg is not None]
    pairs = [f"{pair.first} and {pair.second} ({pair.axis})" for pair in fingerprint.mirror_pairs]
    return {
        "spacing": _spread([case.spacing for case in cases]) + " mm (Z, Y, X)",
        "shape": _spread([case.shape_after_crop for case in cases]) + " voxels after the crop to nonzero (Z, Y, X)",
        "kept by the crop": f"{median(case.relative_size_after_crop for case in cases):.2f} of a typical image",
        "orientation": _orientations(cases),
        "coherence": "labels one slice apart agree with Dice "
        + ", ".join(f"{a} {c:.2f}" for a, c in zip(rules.FILE_AXES, rules.mean_coherence(alike), strict=True))
        + _cohere(alike, plan.frame.value.slice_axis),
        "channels": ", ".join(fingerprint.channel_names),
        "intensities": _intensities(fingerprint),
        "slices": f"{facts.num_slices}, {facts.num_foreground_slices} of them with a structure",
        "structures": f"{facts.num_structures}",
        "thinnest structure": f"{plane.width_vox:.1f} voxels at its thickest place" if plane.width_vox else "none",
        "slices in plane": f"{plane.typical_vox} voxels typically, {plane.largest_vox} at most",
        "detail": f"up to {plane.resolution:.2f} of the grid's limit",
        "mirror pairs": ", ".join(pairs[:4]) + (f" and {len(pairs) - 4} more" if len(pairs) > 4 else "") or "none",
        "obliqueness": f"nine cases of ten within {np.percentile(tilts, TILT_PERCENTILE):.0f} degrees"
        if tilts
        else "not measured",
        "GPU or CPU memory": f"{budget.gpu_memory_gib:g} GiB and {budget.cpu_memory_gib:g} GiB",
        "minutes on a CPU": f"{budget.cpu_minutes:g}",
        "probe": ", ".join(f"{p.configuration}, {p.weights}, {p.backbone}" for p in probes.probes)
        or "none (samunet_probe measures one)",
        "weights": "the recipe's",
        "device": "the recipe's",
    }


def _spread(rows: Sequence[Sequence[float]]) -> str:
    """Median of each axis, and the range where cases differ."""
    columns = list(zip(*rows, strict=True))
    text = " x ".join(f"{median(column):.4g}" for column in columns)
    if all(min(column) == max(column) for column in columns):
        return text
    low, high = (" x ".join(f"{extreme(column):.4g}" for column in columns) for extreme in (min, max))
    return f"{text} (from {low} to {high})"


def _orientations(cases: Sequence[CaseFacts]) -> str:
    codes = ["-".join(case.codes) for case in cases]
    return ", ".join(
        f"{name} in {codes.count(name)}" for name in sorted(set(codes), key=lambda c: (-codes.count(c), c))
    )


def _cohere(cases: Sequence[CaseFacts], axis: int) -> str:
    lengths = [structure.coherence_mm[axis] for case in cases for structure in case.structures.values()]
    return f"; with one half {median(lengths):.3g} mm apart along the slice axis" if lengths else ""


def _intensities(fingerprint: Fingerprint) -> str:
    rows = [
        f"{name} without foreground"
        if facts is None
        else f"{name} {facts.percentile_00_5:.4g} to {facts.percentile_99_5:.4g}"
        for name, facts in zip(fingerprint.channel_names, fingerprint.foreground_intensities, strict=True)
    ]
    return "foreground's percentiles 0.5 to 99.5: " + ", ".join(rows)
