"""One pure function per decision about the data: facts in, (value, reason) out."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from statistics import median

import numpy as np

from samunet.artifacts.fingerprint import CaseFacts, Fingerprint, IntensityStatistics, MirrorPair, ZScoreRange
from samunet.artifacts.plan import ChannelNormalization, Frame, IntensityMap, WeightsKind
from samunet.core.geometry import ANATOMICAL_AXES, AxisOperation, Geometry, SpacingTriple, Triple, code_directions
from samunet.planners.fingerprint import majority_orientation
from samunet.preprocessing.normalization import scheme_for_channel

ANISOTROPY = 3.0
LOW_PERCENTILE = 10
THICK_SLICES = 1.5
COHERENCE_TIE = 0.02
COHERENT = 0.5
NONZERO_MASK_BELOW = 0.75
FOREGROUND_FRACTION = 1 / 3
RARE_FOREGROUND, RARE_FOREGROUND_FRACTION = 0.25, 0.5
LEAST_SLICES = 3
LEAST_SLAB, MOST_SLAB = 3, 5
MEDSAM_CT_WINDOW = (40.0, 400.0)
FILE_AXES = ("Z", "Y", "X")
ENCODER_CHANNELS = 3
# Decided by the type of configuration rather than from data, because nothing was measured that a rule could rest on.
NOT_BY_MEMORY = "not chosen by memory or minutes, for which there is no measurement yet"
NEVER_BY_RULE = "3d is chosen with -c: in equal minutes on a CPU it stayed behind 2.5d on each of three datasets"


def target_spacing(spacings: Sequence[SpacingTriple], shapes: Sequence[Triple]) -> tuple[SpacingTriple, str]:
    """nnU-Net's target spacing: the median per axis, the 10th percentile where one axis is much coarser.

    Args:
        spacings: Per case (Z, Y, X) in mm.
        shapes: Per case, voxels after the crop.

    Source: nnU-Net (Isensee et al., Nature Methods 2021), target spacing.
    """
    target = np.median(np.asarray(spacings, dtype=np.float64), axis=0)
    size = np.median(np.asarray(shapes, dtype=np.float64), axis=0)
    worst = int(np.argmax(target))
    others = [axis for axis in range(3) if axis != worst]
    finest_other = float(target[others].max())
    thick = target[worst] > ANISOTROPY * finest_other and size[worst] * ANISOTROPY < size[others].min()
    if thick:
        low = float(np.percentile(np.asarray(spacings)[:, worst], LOW_PERCENTILE))
        target[worst] = low if low >= finest_other else finest_other + 1e-5
    z, y, x = (float(v) for v in target)
    reason = f"median of {len(spacings)} cases per axis"
    if thick:
        reason += (
            f"; axis {FILE_AXES[worst]} is more than {ANISOTROPY:g} times coarser than the others and has less than "
            f"a third of their voxels, so it takes the {LOW_PERCENTILE}th percentile"
        )
    return (z, y, x), reason


def frame(fingerprint: Fingerprint, target: SpacingTriple) -> tuple[Frame, str]:
    """Slice axis, majority orientation and its median spacing.

    Slices are stacked along the single-slice axis of 2D data, else along an axis more than 1.5 times coarser than the
    others (a plane across it would be blurred in one direction only), else along the axis on which labels change
    least from slice to slice, so that the axis that changes most stays in plane.
    """
    cases = list(fingerprint.cases.values())
    codes = majority_orientation(cases)
    alike = [case for case in cases if case.codes == codes]
    spacing = tuple(float(median(case.spacing[axis] for case in alike)) for axis in range(3))
    axis, reason = slice_axis(alike, target)
    turned = len(cases) - len(alike)
    if turned:
        reason += f"; {turned} of {len(cases)} cases lie otherwise than {'-'.join(codes)} and are turned to it"
    return Frame(slice_axis=axis, orientation=codes, spacing=(spacing[0], spacing[1], spacing[2])), reason


def slice_axis(cases: Sequence[CaseFacts], target: SpacingTriple) -> tuple[int, str]:
    """The file axis across which slices are stacked.

    Args:
        cases: Facts of the cases of one orientation.
        target: Target spacing (Z, Y, X) in mm.
    """
    size = np.median([case.shape for case in cases], axis=0)
    flat = [axis for axis in range(3) if size[axis] == 1]
    if flat:
        return flat[0], f"axis {FILE_AXES[flat[0]]} has one slice: the data are 2D"
    ordered = sorted(range(3), key=lambda axis: -target[axis])
    ratio = target[ordered[0]] / target[ordered[1]]
    if ratio > THICK_SLICES:
        return ordered[0], (
            f"axis {FILE_AXES[ordered[0]]} is {ratio:.1f} times coarser than the next (more than {THICK_SLICES:g})"
        )
    coherence = mean_coherence(cases)
    near = [axis for axis in range(3) if coherence[axis] >= max(coherence) - COHERENCE_TIE]
    best = max(near, key=lambda axis: (round(target[axis] / min(target), 2), -size[axis], -axis))
    shown = ", ".join(f"{FILE_AXES[a]} {coherence[a]:.2f}" for a in range(3))
    start = f"no axis is much coarser; labels of neighbouring slices agree with Dice {shown}: "
    if len(near) == 1:
        return best, f"{start}slices are stacked along {FILE_AXES[best]}, the axes that change more stay in plane"
    names = " and ".join(FILE_AXES[axis] for axis in near)
    return best, f"{start}{names} agree alike, and of these {FILE_AXES[best]} is the coarsest or has fewest slices"


def mean_coherence(cases: Sequence[CaseFacts]) -> tuple[float, float, float]:
    """Dice of a structure between neighbouring slices per axis, averaged over structures, then over cases."""
    rows = [np.mean([s.coherence for s in case.structures.values()], axis=0) for case in cases if case.structures]
    if not rows:
        return 0.0, 0.0, 0.0
    z, y, x = (float(v) for v in np.mean(rows, axis=0))
    return z, y, x


def axis_operation(case: CaseFacts, chosen: Frame) -> AxisOperation:
    """How a case is turned into the frame."""
    return _axis_operation(case.shape, case.spacing, case.codes, chosen)


@lru_cache(maxsize=4096)
def _axis_operation(shape: Triple, spacing: SpacingTriple, codes: tuple[str, str, str], chosen: Frame) -> AxisOperation:
    return chosen.operation_for(Geometry.from_spacing(shape, spacing, directions=code_directions(codes)))


def canonical_shapes(
    cases: Sequence[CaseFacts], chosen: Frame, spacing: tuple[float, float], *, slice_mm: float | None = None
) -> list[Triple]:
    """Voxels (slices, rows, columns) of every cropped case in the frame at the target in-plane spacing.

    Args:
        cases: Facts of the cases.
        chosen: Axes of processing.
        spacing: Target spacing of rows and columns in mm.
        slice_mm: Target distance of slices; None where cases keep their own.
    """
    shapes = []
    for case in cases:
        operation = axis_operation(case, chosen)
        size, mm = operation.reorder(case.shape_after_crop), operation.reorder(case.spacing)
        rows, columns = (max(1, round(size[a + 1] * mm[a + 1] / spacing[a])) for a in range(2))
        slices = size[0] if slice_mm is None else max(1, round(size[0] * mm[0] / slice_mm))
        shapes.append((slices, rows, columns))
    return shapes


def normalization(fingerprint: Fingerprint) -> tuple[tuple[ChannelNormalization, ...], str]:
    """nnU-Net's scheme per channel name, and whether statistics come from nonzero voxels only."""
    relative = median(case.relative_size_after_crop for case in fingerprint.cases.values())
    masked = relative < NONZERO_MASK_BELOW
    channels, reasons = [], []
    for name, facts in zip(fingerprint.channel_names, fingerprint.foreground_intensities, strict=True):
        chosen, reason = _channel_normalization(name, facts, masked=masked)
        channels.append(chosen)
        reasons.append(f"'{name}': {reason}")
    # a channel of CT without foreground is scored over the whole image, whatever the crop keeps
    if any(scheme_for_channel(name) == "zscore" for name in fingerprint.channel_names):
        side = "below" if masked else "not below"
        reasons.append(
            f"the crop to nonzero keeps {relative:.2f} of a typical image, {side} {NONZERO_MASK_BELOW:g}, so z-scores "
            + ("use nonzero voxels only" if masked else "use the whole image")
        )
    return tuple(channels), "; ".join(reasons)


def _channel_normalization(
    name: str, facts: IntensityStatistics | None, *, masked: bool
) -> tuple[ChannelNormalization, str]:
    scheme = scheme_for_channel(name)
    if scheme != "ct":
        reason = "z-score per image" if scheme == "zscore" else f"scheme {scheme} by its name"
        return ChannelNormalization(scheme=scheme, use_nonzero_mask=masked and scheme == "zscore"), reason
    if facts is None:
        return ChannelNormalization(
            scheme="zscore"
        ), "z-score per image, as no case has foreground to take CT statistics from"
    clipped = ChannelNormalization(
        scheme="ct", mean=facts.mean, std=facts.std, lower=facts.percentile_00_5, upper=facts.percentile_99_5
    )
    return clipped, (
        f"CT: clipped to the foreground's percentiles {facts.percentile_00_5:.0f} to {facts.percentile_99_5:.0f}, then "
        f"its mean {facts.mean:.0f} and standard deviation {facts.std:.0f}"
    )


def mirror_axes(pairs: Sequence[MirrorPair]) -> tuple[tuple[str, ...], str]:
    """Anatomical axes along which images may be mirrored: none that swaps a pair of structures."""
    forbidden: dict[str, list[MirrorPair]] = {}
    for pair in pairs:
        forbidden.setdefault(pair.axis, []).append(pair)
    allowed = tuple(axis for axis in ANATOMICAL_AXES if axis not in forbidden)
    if not forbidden:
        return allowed, "no two structures would be swapped by a reflection"
    texts = [
        f"{axis} would swap {len(found)} pair{'s' * (len(found) > 1)} such as {found[0].first} and {found[0].second} "
        f"(by {found[0].evidence})"
        for axis, found in forbidden.items()
    ]
    return allowed, "; ".join(texts)


def encoder_channels(num_channels: int, context: int) -> tuple[str, str]:
    """How a slice's channels become the encoder's three."""
    given = num_channels * (2 * context + 1)
    if context and given == ENCODER_CHANNELS:
        return "neighbours", "one channel: the slice before, the slice and the slice after fill the encoder's three"
    if context:
        return "projection", (
            f"{num_channels} channel{'s' * (num_channels > 1)} of {2 * context + 1} slices are {given}: a learned "
            "projection to three"
        )
    if num_channels == 1:
        return "repeat", "one channel, given three times"
    if num_channels == ENCODER_CHANNELS:
        return "direct", "three channels fit the encoder's three"
    return "projection", f"{num_channels} channels: a learned projection to three"


def allows_neighbours(num_channels: int, shapes: Sequence[Triple]) -> bool:
    """Whether a configuration with neighbouring slices as channels makes sense: one channel, at least three slices."""
    return num_channels == 1 and median(shape[0] for shape in shapes) >= LEAST_SLICES


def recommended(coherence: float, spacing_mm: float, *, has_neighbours: bool, has_slabs: bool) -> tuple[str, str]:
    """The configuration that training takes by default.

    Args:
        coherence: Mean Dice of labels one slice apart along the slice axis.
        spacing_mm: Typical distance of slices in mm.
        has_neighbours: Whether "2.5d" is planned.
        has_slabs: Whether "3d" is planned.
    """
    never = f"; {NEVER_BY_RULE}" if has_slabs else ""
    if not has_neighbours:
        return "2d", f"2.5d needs one channel and {LEAST_SLICES} slices or more{never}"
    facts = f"labels {spacing_mm:.3g} mm apart along the slice axis agree with Dice {coherence:.2f}"
    if coherence > COHERENT:
        return "2.5d", f"{facts}, above {COHERENT:g}: neighbouring slices help and cost nothing{never}"
    return "2d", f"{facts}, not above {COHERENT:g}: neighbouring slices show something else{never}"


def slab_shapes(cases: Sequence[CaseFacts], chosen: Frame, spacing: SpacingTriple) -> list[Triple]:
    """Voxels (slices, rows, columns) of every case, with its own slices or resampled ones, whichever are fewer.

    Args:
        cases: Facts of the cases.
        chosen: Axes of processing.
        spacing: Target spacing per file axis in mm.
    """
    rows, columns = (spacing[axis] for axis in range(3) if axis != chosen.slice_axis)
    distances = (None, spacing[chosen.slice_axis])
    own, resampled = (canonical_shapes(cases, chosen, (rows, columns), slice_mm=mm) for mm in distances)
    return [min(pair) for pair in zip(own, resampled, strict=True)]


def slab_depth(
    cases: Sequence[CaseFacts], frame: Frame, shapes: Sequence[Triple], spacing_mm: float
) -> tuple[int, str]:
    """Slices of a slab: the distance over which labels cohere, to both sides, within limits.

    Args:
        cases: Facts of the cases of the majority orientation.
        frame: Axes of processing.
        shapes: Voxels of all cases, as :func:`slab_shapes` says.
        spacing_mm: Distance of slices after resampling.

    Returns:
        1 where volumes have fewer than three slices. Where labels do not cohere from slice to slice, the fewest, as the
        methods that need slabs can be chosen anyway.

    Source: MA-SAM (Chen et al. 2024): five slices, fewer are worse.
    """
    return slab_depth_of(coherence_mm(cases, frame), shapes, spacing_mm)


def coherence_mm(cases: Sequence[CaseFacts], frame: Frame) -> float:
    """Distance along the slice axis at which labels agree with Dice one half: the median; 0 where none was measured."""
    lengths = [s.coherence_mm[frame.slice_axis] for case in cases for s in case.structures.values()]
    return float(median(lengths)) if lengths else 0.0


def slab_depth_of(length: float, shapes: Sequence[Triple], spacing_mm: float) -> tuple[int, str]:
    """Slices of a slab by the distance over which labels cohere.

    Args:
        length: That distance in mm.
        shapes: As in :func:`slab_depth`.
        spacing_mm: As in :func:`slab_depth`.
    """
    typical = int(median(shape[0] for shape in shapes))
    if typical < LEAST_SLAB:
        return 1, f"volumes have {typical} slice{'s' * (typical != 1)}"
    wanted = round(2 * length / spacing_mm)
    if length <= spacing_mm:
        return LEAST_SLAB, (
            f"labels agree with Dice one half over {length:.3g} mm, no farther than from one slice to the next "
            f"({spacing_mm:.3g} mm): they do not cohere, and nothing is expected of depth; {LEAST_SLAB}, the fewest, "
            "for methods that need slabs"
        )
    depth = max(LEAST_SLAB, min(MOST_SLAB, wanted, typical))
    return depth, (
        f"labels agree with Dice one half over {length:.3g} mm, {wanted} slices of {spacing_mm:.3g} mm to both sides; "
        f"within {LEAST_SLAB} to {MOST_SLAB} and the {typical} slices of a typical volume; {NOT_BY_MEMORY}"
    )


def medsam_normalization(channel_names: Sequence[str]) -> tuple[tuple[ChannelNormalization, ...], str]:
    """MedSAM's own intensities: a soft-tissue window for CT, percentiles of the positive voxels otherwise.

    Source: MedSAM (Ma et al., Nature Communications 2024), preprocessing.
    """
    level, width = MEDSAM_CT_WINDOW
    window = ChannelNormalization(scheme="window_to_01", lower=level - width / 2, upper=level + width / 2)
    others = ChannelNormalization(scheme="percentiles_to_01")
    specs = tuple(window if scheme_for_channel(name) == "ct" else others for name in channel_names)
    return specs, f"MedSAM's: CT at level {level:g}, width {width:g}; else percentiles 0.5 to 99.5 of positive voxels"


def medsam_intensities() -> tuple[IntensityMap, str]:
    """MedSAM's last step: every slice scaled to [0, 1] by its own extremes."""
    return IntensityMap(kind="unit_per_slice"), "MedSAM scales every slice to [0, 1]"


def foreground_fraction(num_slices: int, num_foreground: int) -> tuple[float, str]:
    """Fraction of training slices drawn for a structure they hold."""
    share = num_foreground / max(1, num_slices)
    if share < RARE_FOREGROUND:
        return RARE_FOREGROUND_FRACTION, f"only {share:.0%} of slices hold a structure"
    return round(FOREGROUND_FRACTION, 4), f"nnU-Net's third; {share:.0%} of slices hold a structure anyway"


def intensity_map(
    weights: WeightsKind,
    normalized: Sequence[ChannelNormalization],
    facts: Sequence[IntensityStatistics | None],
    zscores: Sequence[ZScoreRange | None],
) -> tuple[IntensityMap, str]:
    """The one map from stored intensities to the encoder's: identity from random weights, else the foreground's range.

    Args:
        weights: Kind of weights.
        normalized: The store's normalization per channel.
        facts: Raw foreground statistics per channel.
        zscores: Foreground range after the z-score per channel; empty for old fingerprints.
    """
    if weights == "none":
        return IntensityMap(kind="identity"), "random weights expect no particular intensities"
    ranges = [_stored_range(n, f, z) for n, f, z in zip(normalized, facts, zscores or [None] * len(facts), strict=True)]
    lower, upper = tuple(r[0] for r in ranges), tuple(r[1] for r in ranges)
    shown = _shown_ranges(ranges)
    if weights == "medsam":
        return IntensityMap(kind="unit", lower=lower, upper=upper), f"MedSAM was trained on [0, 1]: {shown} maps to it"
    return (
        IntensityMap(kind="sam_pixels", lower=lower, upper=upper),
        f"{shown} maps to [0, 255] and to SAM's pixel statistics",
    )


def _shown_ranges(ranges: Sequence[tuple[float, float, str]]) -> str:
    """Ranges of stored intensities, and where they come from."""
    texts, origins = [f"{low:.2f} to {high:.2f}" for low, high, _ in ranges], [origin for _, _, origin in ranges]
    if len(set(origins)) == 1:
        return f"{', '.join(texts)} ({origins[0]})"
    return ", ".join(f"{text} ({origin})" for text, origin in zip(texts, origins, strict=True))


def _stored_range(
    normalized: ChannelNormalization, facts: IntensityStatistics | None, zscore: ZScoreRange | None
) -> tuple[float, float, str]:
    """The foreground's range in the store's units, never empty, and where it comes from."""
    scheme, measured = normalized.scheme, "percentiles 0.5 to 99.5 of the foreground as stored"
    if scheme.endswith("_to_01"):
        return 0.0, 1.0, f"all that {scheme} stores"
    low, high, origin = -2.0, 2.0, "assumed, as no foreground was measured"
    if scheme == "zscore" and zscore is not None:
        of_nonzero = zscore.lower_nonzero, zscore.upper_nonzero
        low, high = of_nonzero if normalized.use_nonzero_mask else (zscore.lower, zscore.upper)
        origin = measured
    elif scheme == "none" and facts is not None:
        low, high, origin = facts.percentile_00_5, facts.percentile_99_5, measured
    elif scheme == "ct":
        ends = (normalized.lower, normalized.upper)
        values = ends if facts is None else (facts.percentile_00_5, facts.percentile_99_5)
        low, high = (
            (min(max(value, ends[0]), ends[1]) - normalized.mean) / max(normalized.std, 1e-8) for value in values
        )
        origin = measured if facts is not None else "what the clip leaves"
    if high - low > 1e-3:
        return round(low, 4), round(high, 4), origin
    return round(low - 1, 4), round(low + 1, 4), f"1 to both sides of a single value; {origin}"
