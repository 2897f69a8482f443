"""Whether an image is like those a model was trained on: facts outside their range are flagged, never refused.

The margin rule: a range reaches from the 1st to the 99th percentile of the training cases. Sizes (spacing, extent,
slices, volumes) may leave it by a factor of 1.25, or by a quarter of the range's own ratio where that is more;
intensities by a quarter of the range, or by a tenth of the usual distance between an image's percentiles 0.5 and 99.5
where that is more; the tilt by 10 degrees.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from samunet.artifacts.fingerprint import CaseFacts
from samunet.artifacts.plan import Frame, Plan
from samunet.artifacts.quality import FactRange, Flag
from samunet.artifacts.store import CaseRecord
from samunet.core.config import parse_schema
from samunet.core.geometry import Geometry, code_directions
from samunet.planners.fingerprint import tilt_deg

AXES = ("slices", "rows", "columns")
INTENSITY_NAMES = ("percentile 0.5", "median", "percentile 99.5")
SIZE_FACTOR = 1.25
RANGE_SHARE = 0.25
INTENSITY_SHARE = 0.1
TILT_MARGIN_DEG = 10.0
USUAL_SHARE = 0.5
_EXTREMES = (1.0, 99.0)
_TILT = "tilt against the anatomical axes in degrees"


@dataclass(frozen=True)
class TrainingFacts:
    """What the images and masks of training were like.

    Args:
        sizes: Ranges of spacing, extent and number of slices.
        tilt: Range of the tilt; None where it was not measured.
        orientations: Anatomical axes of (slices, rows, columns) that occurred.
        volumes: Per structure the range of its volume; none where voxels may be ignored, as strokes are no volume.
        presence: Per structure in how many cases it is labelled, of how many; where voxels may be ignored it may be in
            more.
        intensities: Ranges of intensities; none where they were not measured.
    """

    sizes: tuple[FactRange, ...] = ()
    tilt: FactRange | None = None
    orientations: frozenset[tuple[str, ...]] = frozenset()
    volumes: Mapping[str, FactRange] = field(default_factory=dict)
    presence: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    intensities: tuple[FactRange, ...] = ()

    def usual(self, structure: str) -> bool:
        """Whether at least half of the training cases have a structure."""
        present, cases = self.presence.get(structure, (0, 0))
        return cases > 0 and present >= USUAL_SHARE * cases


def training_facts(
    fingerprint: Mapping[str, Any],
    plan: Plan,
    intensities: Sequence[FactRange] = (),
    *,
    cases: Collection[str] | None = None,
) -> TrainingFacts:
    """The facts of a fingerprint, in the plan's axes.

    Args:
        fingerprint: As embedded in a checkpoint; without cases nothing is known and nothing flagged.
        plan: Its frame and structures.
        intensities: As :func:`intensity_ranges` gives them.
        cases: Those that were trained on: a fingerprint holds the validation cases too. None: all of it.
    """
    known = fingerprint.get("cases", {}).items()
    facts = [parse_schema(CaseFacts, content) for name, content in known if cases is None or name in cases]
    if not facts:
        return TrainingFacts(intensities=tuple(intensities))
    grids = [_canonical(_grid_of(case), plan.frame.value) for case in facts]
    values: dict[str, list[float]] = {}
    for grid in grids:
        for fact, value in _sizes(grid).items():
            values.setdefault(fact, []).append(value)
    tilts = [case.tilt_deg for case in facts if case.tilt_deg is not None]
    names = plan.label_spec.names
    volumes = {n: [c.structures[n].volume_mm3 / 1000 for c in facts if n in c.structures] for n in names}
    measured = {} if plan.label_spec.ignore is not None else volumes
    return TrainingFacts(
        sizes=tuple(size_range(fact, found) for fact, found in values.items()),
        tilt=_range(_TILT, tilts, margin=TILT_MARGIN_DEG) if len(tilts) == len(facts) else None,
        orientations=frozenset(grid.anatomical_axes for grid in grids),
        volumes={n: size_range(f"volume of {n} in ml", found) for n, found in measured.items() if found},
        presence={n: (len(found), len(facts)) for n, found in volumes.items()},
        intensities=tuple(intensities),
    )


def intensity_ranges(records: Iterable[CaseRecord], channels: Sequence[str]) -> tuple[FactRange, ...]:
    """Ranges of the training images' intensities, from what preprocessing recorded; none where a record lacks them."""
    measured = [record.intensities for record in records]
    if not measured or any(len(case) != len(channels) for case in measured):
        return ()
    ranges = []
    for index, channel in enumerate(_distinct(channels)):
        for kind in ("raw", "normalized"):
            values = np.array([getattr(case[index], kind) for case in measured])
            scale = float(np.median(values[:, -1] - values[:, 0]))
            for place, name in enumerate(INTENSITY_NAMES):
                fact = _intensity_fact(channel, kind, name)
                ranges.append(_range(fact, values[:, place].tolist(), margin=INTENSITY_SHARE * scale))
    return tuple(ranges)


def widest(ranges: Sequence[Sequence[FactRange]]) -> tuple[FactRange, ...]:
    """The ranges that hold those of several trainings."""
    own: dict[str, list[FactRange]] = {}
    for known in (known for part in ranges for known in part):
        own.setdefault(known.fact, []).append(known)
    return tuple(
        FactRange(
            fact=fact,
            low=min(known.low for known in parts),
            high=max(known.high for known in parts),
            least=min(known.least for known in parts),
            most=max(known.most for known in parts),
        )
        for fact, parts in own.items()
    )


def size_range(fact: str, values: Sequence[float]) -> FactRange:
    """The range of a positive fact, with the margin of sizes."""
    low, high = _extremes(values)
    factor = max(SIZE_FACTOR, (high / low) ** RANGE_SHARE) if low > 0 else SIZE_FACTOR
    return FactRange(fact=fact, low=low, high=high, least=low / factor, most=high * factor)


def unfamiliar_image(facts: TrainingFacts, geometry: Geometry, record: CaseRecord, plan: Plan) -> list[Flag]:
    """What of an image lies outside its range in training.

    Args:
        facts: Of training.
        geometry: The image's grid as in its file.
        record: What preprocessing recorded.
        plan: Its frame and channels.
    """
    grid = _canonical(geometry, plan.frame.value)
    flags = [flag for known in facts.sizes if (flag := out_of_range(known, _sizes(grid)[known.fact])) is not None]
    if facts.orientations and grid.anatomical_axes not in facts.orientations:
        known = "; ".join(sorted(", ".join(axes) for axes in facts.orientations))
        flags.append(
            Flag(fact="axes of slices, rows and columns", found=", ".join(grid.anatomical_axes), training=known)
        )
    if facts.tilt is not None and (flag := out_of_range(facts.tilt, tilt_deg(geometry))) is not None:
        flags.append(flag)
    found = _intensities_of(record, plan.channel_names)
    ranges = [known for known in facts.intensities if known.fact in found]
    return flags + [flag for known in ranges if (flag := out_of_range(known, found[known.fact])) is not None]


def unfamiliar_mask(facts: TrainingFacts, structure: str, volume_ml: float) -> Flag | None:
    """Whether a structure's volume is outside its range in training; missing counts where it is usual."""
    if volume_ml == 0:
        present, cases = facts.presence.get(structure, (0, 0))
        if not facts.usual(structure):
            return None
        return Flag(fact=structure, found="not found", training=f"in {present} of {cases} cases")
    known = facts.volumes.get(structure)
    return None if known is None else out_of_range(known, volume_ml)


def out_of_range(known: FactRange, value: float) -> Flag | None:
    """A flag if a value is further outside a range than its margin."""
    if known.least <= value <= known.most:
        return None
    return Flag(fact=known.fact, found=f"{value:.4g}", training=f"{known.low:.4g} to {known.high:.4g}")


def _grid_of(case: CaseFacts) -> Geometry:
    return Geometry.from_spacing(case.shape, case.spacing, directions=code_directions(case.codes))


def _canonical(geometry: Geometry, frame: Frame) -> Geometry:
    return frame.operation_for(geometry).apply_geometry(geometry)


def _sizes(grid: Geometry) -> dict[str, float]:
    """Facts of an image in the plan's axes."""
    sizes = {f"spacing of {axis} in mm": float(step) for axis, step in zip(AXES, grid.spacing, strict=True)}
    for axis, step, number in zip(AXES, grid.spacing, grid.shape, strict=True):
        sizes[f"extent across {axis} in mm"] = float(step * number)
    return sizes | {"number of slices": float(grid.shape[0])}


def _intensities_of(record: CaseRecord, channels: Sequence[str]) -> dict[str, float]:
    return {
        _intensity_fact(channel, kind, name): value
        for channel, own in zip(_distinct(channels), record.intensities, strict=False)
        for kind in ("raw", "normalized")
        for name, value in zip(INTENSITY_NAMES, getattr(own, kind), strict=True)
    }


def _distinct(channels: Sequence[str]) -> list[str]:
    """Names of the channels; of those that share one, with their numbers."""
    return [f"{name} (channel {n})" if channels.count(name) > 1 else name for n, name in enumerate(channels)]


def _intensity_fact(channel: str, kind: str, name: str) -> str:
    return f"{name} of {channel}, {kind}"


def _range(fact: str, values: Sequence[float], *, margin: float) -> FactRange:
    low, high = _extremes(values)
    beyond = max(margin, RANGE_SHARE * (high - low))
    return FactRange(fact=fact, low=low, high=high, least=low - beyond, most=high + beyond)


def _extremes(values: Sequence[float]) -> tuple[float, float]:
    low, high = np.percentile(values, _EXTREMES, method="inverted_cdf") if len(values) else (0.0, 0.0)
    return float(low), float(high)
