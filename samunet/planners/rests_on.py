"""Which facts each decision rests on, by device and weights, and what changes it whatever the plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np

from samunet.artifacts.fingerprint import CaseFacts, Fingerprint
from samunet.artifacts.plan import Plan
from samunet.artifacts.probe import NO_PROBES, Probes
from samunet.planners import rules
from samunet.planners.augmentation import TILT_PERCENTILE
from samunet.planners.planner import facts_of_plan

EDIT = "an edit"
METHOD = "another method: --set, --preset, or an edit"
CONSTANT = "nothing in the data or the hardware: an edit"
MEMORY: dict[str, str] = {"gpu": "GPU memory", "cpu": "CPU memory"}
MINUTES = "minutes on a CPU"


@dataclass(frozen=True)
class Only:
    """Facts that matter for some recipes only.

    Args:
        facts: Their names.
        device: Class of device; empty for both.
        weights: Kinds of weights; empty for all.
    """

    facts: Sequence[str]
    device: str = ""
    weights: Sequence[str] = ()

    def of(self, weights: str, device: str) -> Sequence[str]:
        """The facts that matter for one recipe."""
        fits = self.device in ("", device) and (not self.weights or weights in self.weights)
        return self.facts if fits else ()


_PRETRAINED = ("sam", "medsam", "mobile_sam", "ssl")
_WINDOWED = ("mobile_sam", "none")
_VIT = tuple(weights for weights in _PRETRAINED if weights not in _WINDOWED)
_HARDWARE = (*MEMORY.values(), MINUTES)
_SIZE = ("slices in plane", "detail", "thinnest structure", "small structures")
_FITTED = (*_SIZE, "slices", "structures", *_HARDWARE)
_PLANES = ("orientation", "spacing", "shape", "coherence", "mirror pairs", *_FITTED)

RESTS_ON: dict[str, Sequence[str | Only]] = {
    "frame": ("spacing", "shape", "coherence", "orientation"),
    "target_spacing": ("spacing", "shape"),
    "normalization": ("channels", "kept by the crop", "intensities"),
    "mirror_axes": ("mirror pairs",),
    "recommended": ("coherence", "channels", "shape"),
    "spacing": ("spacing",),
    "context_slices": ("channels", "shape"),
    "slab_depth": ("coherence", "shape"),
    "channels": ("channels",),
    "tile_overlap": (),
    "depth_overlap": (),
    "backbone": ("weights", "device"),
    "input_size": (*_SIZE, "structures", *_HARDWARE),
    "tile_vox": (*_SIZE, "structures", *_HARDWARE),
    "encoder": ("weights", Only(("slices", "structures", "probe"), weights=_PRETRAINED)),
    "depth": (),
    "decoder": ("weights", "device"),
    "prompts": (),
    "fusion": (),
    "attention": ("weights", "device", Only((*_SIZE, "structures", *_HARDWARE), device="cpu", weights=_VIT)),
    "intensity_map": ("weights", Only(("channels", "intensities"), weights=_PRETRAINED)),
    "loss": (),
    "learning_rate": (
        "weights",
        Only(("slices", "structures"), weights=_PRETRAINED),
        Only((*_SIZE, *_HARDWARE), device="gpu", weights=_PRETRAINED),
    ),
    "weight_decay": ("weights",),
    "warmup_steps": _FITTED,
    "decay": (),
    "batch_size": _FITTED,
    "accumulation_steps": _FITTED,
    "iterations": ("device", Only(_FITTED, device="cpu")),
    "epochs": _FITTED,
    "minutes": ("device", Only((MINUTES,), device="cpu")),
    "precision": ("device",),
    "checkpointing": _FITTED,
    "ema_decay": _FITTED,
    "augmentation": ("obliqueness", "spacing", "mirror pairs"),
    "foreground_fraction": ("slices",),
    "planes": ("weights", "device", *_PLANES),
    "mirror_views": ("device", Only(_PLANES, device="cpu")),
    "memory_gib": ("weights", "device", *_FITTED),
}
"""By the field's name: names of the facts that it rests on."""

_NOT_OF: dict[str, Sequence[str]] = {"gpu": (MEMORY["cpu"], MINUTES), "cpu": (MEMORY["gpu"],)}
_OTHERWISE: dict[str, str] = {
    "spacing": "another target_spacing",
    "tile_overlap": CONSTANT,
    "backbone": "--backbone, or an edit",
    **dict.fromkeys(("encoder", "depth", "decoder", "prompts", "fusion"), METHOD),
    "loss": CONSTANT,
    "decay": CONSTANT,
}
_MINUTES: dict[str, str] = {
    "gpu": "--time-limit when training, or an edit; --minutes when planning is for CPUs only",
    "cpu": "--minutes when planning, --time-limit when training",
}


def rests_on(place: Sequence[str]) -> tuple[str, ...]:
    """Names of the facts that a decision rests on.

    Args:
        place: Of the decision in the plan; a recipe's ends with weights, device and field.
    """
    entries = RESTS_ON[place[-1]]
    weights, device = (place[-3], place[-2]) if "recipes" in place else ("", "")
    named = [name for each in entries for name in ((each,) if isinstance(each, str) else each.of(weights, device))]
    return tuple(dict.fromkeys(name for name in named if name not in _NOT_OF.get(device, ())))


def otherwise(place: Sequence[str]) -> str | None:
    """In words what changes a decision whatever the plan; None where that differs from plan to plan."""
    return _MINUTES[place[-2]] if place[-1] == "minutes" else _OTHERWISE.get(place[-1])


def measured(plan: Plan, fingerprint: Fingerprint, probes: Probes = NO_PROBES) -> dict[str, str]:
    """Every fact a decision rests on, by name, in a few words."""
    cases = [fingerprint.cases[name] for name in sorted(fingerprint.cases)]
    alike = [case for case in cases if case.codes == plan.frame.value.orientation]
    facts = facts_of_plan(plan, fingerprint)
    plane, budget = facts.plane, plan.budget
    believed = [probe for probe in probes.probes if probe.fault_with(fingerprint) is None]
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
        "small structures": f"{plane.area_vox:.0f} square voxels in a slice that holds them"
        if plane.area_vox
        else "none",
        "slices in plane": f"{plane.typical_vox} voxels typically, {plane.largest_vox} at most",
        "detail": f"up to {plane.resolution:.2f} of the grid's limit",
        "mirror pairs": ", ".join(pairs[:4]) + (f" and {len(pairs) - 4} more" if len(pairs) > 4 else "") or "none",
        "obliqueness": f"nine cases of ten within {np.percentile(tilts, TILT_PERCENTILE):.0f} degrees"
        if tilts
        else "not measured",
        MEMORY["gpu"]: f"{budget.gpu_memory_gib:g} GiB",
        MEMORY["cpu"]: f"{budget.cpu_memory_gib:g} GiB",
        MINUTES: f"{budget.cpu_minutes:g}",
        "probe": ", ".join(f"{p.configuration}, {p.weights}, {p.backbone}" for p in believed)
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
