"""Every rule about the data at its threshold."""

from __future__ import annotations

import numpy as np
import pytest

from samunet.artifacts.fingerprint import MirrorPair
from samunet.artifacts.plan import ChannelNormalization
from samunet.core.geometry import ANATOMICAL_AXES
from samunet.planners import rules
from tests import planning_facts as facts


def test_target_spacing_is_the_median_per_axis() -> None:
    """Without a much coarser axis every axis takes its median."""
    found, _ = rules.target_spacing([(1, 1, 1), (2, 1, 1), (2.5, 1.5, 1)], [(50, 100, 100)] * 3)
    assert found == (2, 1, 1)


@pytest.mark.parametrize(
    ("coarse", "slices", "expected"),
    [
        (3.0, 20, 3.0),  # exactly three times coarser is not more
        (3.2, 20, 2.4),  # 10th percentile of 2, 3.2, 3.2, 4, 4 is 2.48 before the clamp
        (3.2, 34, 3.2),  # 34 * 3 is not less than 100 voxels
    ],
)
def test_target_spacing_of_a_coarse_axis(coarse: float, slices: int, expected: float) -> None:
    """The 10th percentile is taken only where the axis is more than 3 times coarser and has fewer voxels."""
    values = [2.0, coarse, coarse, 4.0, 4.0]
    found, _ = rules.target_spacing([(v, 1, 1) for v in values], [(slices, 100, 100)] * 5)
    if expected == 2.4:
        expected = float(np.percentile(values, 10))
    assert found == pytest.approx((expected, 1, 1))


def test_target_spacing_never_falls_below_the_other_axes() -> None:
    """A 10th percentile finer than the other axes is clamped to just above them."""
    spacings = [(0.2, 1.0, 0.8)] * 3 + [(5.0, 1.0, 0.8)] * 9
    assert rules.target_spacing(spacings, [(10, 100, 100)] * 12)[0] == (1.0 + 1e-5, 1.0, 0.8)


@pytest.mark.parametrize(("ratio", "axis"), [(1.6, 1), (1.4, 2)])
def test_slices_are_stacked_along_a_coarse_axis(ratio: float, axis: int) -> None:
    """Above a ratio of 1.5 the coarse axis is the slice axis, below it the most coherent one."""
    held = {"organ": facts.structure(coherence=(0.6, 0.7, 0.9))}
    cases = [facts.case(structures=held)]
    assert rules.slice_axis(cases, (1.0, ratio, 1.0))[0] == axis


def test_slices_of_flat_data() -> None:
    """An axis with one slice is the slice axis whatever the spacing."""
    assert rules.slice_axis([facts.case(shape=(60, 1, 60))], (5.0, 1.0, 1.0))[0] == 1


def test_coherence_ties_go_to_the_axis_with_fewest_slices() -> None:
    """Within 0.02 of each other the axis with the fewest slices is taken; beyond it the most coherent."""
    tie = [facts.case(shape=(60, 40, 50), structures={"organ": facts.structure(coherence=(0.81, 0.8, 0.7))})]
    clear = [facts.case(shape=(60, 40, 50), structures={"organ": facts.structure(coherence=(0.83, 0.8, 0.7))})]
    assert rules.slice_axis(tie, (1, 1, 1))[0] == 1
    assert rules.slice_axis(clear, (1, 1, 1))[0] == 0


def test_frame_follows_the_majority() -> None:
    """Orientation and spacing are those of most cases; the others are counted in the reason."""
    usual = facts.case(shape=(10, 60, 60), spacing=(8, 1, 1))
    other = facts.case(shape=(60, 10, 60), spacing=(1, 8, 1), codes=("A", "I", "L"))
    frame, reason = rules.frame(facts.fingerprint([usual, other, usual]), (8.0, 1.0, 1.0))
    assert (frame.slice_axis, frame.orientation, frame.spacing) == (0, ("S", "A", "R"), (8, 1, 1))
    assert "1 of 3 cases" in reason


def test_canonical_shapes_turn_each_case_into_the_frame() -> None:
    """A case whose slices lie along another file axis contributes its slices as slices, at target spacing."""
    usual = facts.case(shape=(10, 60, 80), spacing=(8, 1, 1))
    other = facts.case(shape=(90, 12, 70), spacing=(2, 8, 1), codes=("A", "S", "R"))
    frame, _ = rules.frame(facts.fingerprint([usual, usual, other]), (8.0, 1.0, 1.0))
    assert rules.canonical_shapes([usual, other], frame, (1.0, 1.0)) == [(10, 60, 80), (12, 180, 70)]


@pytest.mark.parametrize(("kept", "masked"), [(74, True), (75, False)])
def test_normalization_uses_nonzero_voxels_below_three_quarters(kept: int, masked: bool) -> None:
    """The mask is used if the typical crop keeps less than 0.75 of the image, and only for z-scores."""
    data = facts.fingerprint([facts.case(shape=(100, 10, 10), crop=(kept, 10, 10))], channels=("MRI", "CT"))
    (mri, ct), reason = rules.normalization(data)
    assert (mri.scheme, mri.use_nonzero_mask) == ("zscore", masked)
    assert (ct.scheme, ct.use_nonzero_mask, ct.lower, ct.mean) == ("ct", False, -60.0, 80.0)
    assert reason


def test_ct_without_foreground_falls_back_to_zscore() -> None:
    """CT statistics cannot be taken from nothing."""
    data = facts.fingerprint([facts.case(structures={})], channels=("CT",), foreground=False)
    assert rules.normalization(data)[0][0].scheme == "zscore"


def test_mirror_axes_exclude_those_that_swap_structures() -> None:
    """An axis with a pair is not mirrored; all others are."""
    pair = MirrorPair(first="left", second="right", axis=ANATOMICAL_AXES[0], evidence="name")
    assert rules.mirror_axes([])[0] == ANATOMICAL_AXES
    allowed, reason = rules.mirror_axes([pair])
    assert allowed == ANATOMICAL_AXES[1:]
    assert "left and right" in reason


@pytest.mark.parametrize(
    ("channels", "context", "expected"),
    [
        (1, 1, "neighbours"),
        (1, 2, "projection"),
        (2, 1, "projection"),
        (3, 1, "projection"),
        (1, 0, "repeat"),
        (2, 0, "projection"),
        (3, 0, "direct"),
        (4, 0, "projection"),
    ],
)
def test_encoder_channels(channels: int, context: int, expected: str) -> None:
    """Every number of channels has its way to the encoder's three."""
    assert rules.encoder_channels(channels, context)[0] == expected


def test_neighbours_need_one_channel_and_three_slices() -> None:
    """2.5d makes sense for one channel and volumes of at least three slices."""
    assert rules.allows_neighbours(1, [(3, 9, 9)])
    assert not rules.allows_neighbours(1, [(2, 9, 9)])
    assert not rules.allows_neighbours(2, [(30, 9, 9)])


@pytest.mark.parametrize(("coherence", "expected"), [(0.51, "2.5d"), (0.5, "2d")])
def test_recommended_by_coherence(coherence: float, expected: str) -> None:
    """Neighbours are recommended where labels one slice apart agree with Dice above one half."""
    assert rules.recommended(coherence, 3.0, has_neighbours=True, has_slabs=True)[0] == expected
    value, reason = rules.recommended(coherence, 3.0, has_neighbours=False, has_slabs=True)
    assert value == "2d"
    assert "only configuration" not in reason  # 3d is planned too
    assert "3d is chosen with -c" in reason
    assert "3d" not in rules.recommended(coherence, 3.0, has_neighbours=False, has_slabs=False)[1]


def test_rare_foreground_is_drawn_more_often() -> None:
    """Below a quarter of slices with a structure half of the draws look for one."""
    assert rules.foreground_fraction(100, 24)[0] == 0.5
    assert rules.foreground_fraction(100, 25)[0] == pytest.approx(1 / 3, abs=1e-3)


def _map(weights: str, scheme: str, **options: object) -> object:
    channel = ChannelNormalization(scheme=scheme, **options)  # type: ignore[arg-type]
    return rules.intensity_map(weights, [channel], [facts.STATISTICS], [facts.SCORES])[0]  # type: ignore[arg-type]


def test_intensity_maps_by_weights_and_normalization() -> None:
    """The map's bounds are the foreground's percentiles in the store's units; none changes nothing."""
    assert _map("none", "zscore").kind == "identity"  # type: ignore[attr-defined]
    assert _map("sam", "zscore").lower == (-0.5,)  # type: ignore[attr-defined]
    assert _map("sam", "zscore", use_nonzero_mask=True).upper == (2.5,)  # type: ignore[attr-defined]
    ct = _map("medsam", "ct", mean=80.0, std=40.0, lower=-60.0, upper=260.0)
    assert (ct.kind, ct.lower, ct.upper) == ("unit", (-3.5,), (4.5,))  # type: ignore[attr-defined]
    rgb = _map("sam", "rgb_to_01")
    assert (rgb.lower, rgb.upper) == ((0.0,), (1.0,))  # type: ignore[attr-defined]


@pytest.mark.parametrize("scheme", ["rgb_to_01", "rescale_to_01", "window_to_01", "percentiles_to_01"])
def test_what_is_stored_from_0_to_1_is_mapped_from_0_to_1(scheme: str) -> None:
    """Whatever the foreground was measured to be, and the reason says so instead of naming percentiles."""
    channel = ChannelNormalization(scheme=scheme, lower=-160.0, upper=240.0)  # type: ignore[arg-type]
    for weights in ("sam", "medsam"):
        found, reason = rules.intensity_map(weights, [channel], [facts.STATISTICS], [facts.SCORES])  # type: ignore[arg-type]
        assert (found.lower, found.upper) == ((0.0,), (1.0,))
        assert f"0.00 to 1.00 (all that {scheme} stores)" in reason


def test_the_reason_of_an_intensity_map_says_where_its_range_comes_from() -> None:
    """Measured, given by a clip, or assumed; per channel where they differ."""
    ct = ChannelNormalization(scheme="ct", mean=40.0, std=100.0, lower=-60.0, upper=140.0)
    plain, rgb = ChannelNormalization(scheme="none"), ChannelNormalization(scheme="rgb_to_01")

    def reason(*channels: ChannelNormalization, measured: bool = True) -> str:
        known = [facts.STATISTICS if measured else None] * len(channels)
        return rules.intensity_map("sam", channels, known, [])[1]

    assert "-60.00 to 260.00 (percentiles 0.5 to 99.5 of the foreground as stored)" in reason(plain)
    assert "-2.00 to 2.00 (assumed, as no foreground was measured)" in reason(plain, measured=False)
    assert "-1.00 to 1.00 (what the clip leaves)" in reason(ct, measured=False)
    # the clip of an edited window leaves less than was measured
    assert "-1.00 to 1.00 (percentiles" in reason(ct)
    assert "-2.00 to 2.00 (assumed, as no foreground was measured), 0.00 to 1.00 (all" in reason(
        plain, rgb, measured=False
    )


def test_intensity_map_is_never_empty() -> None:
    """Constant foreground still gives a range to divide by."""
    flat = facts.SCORES.model_copy(update={"lower": 1.0, "upper": 1.0})
    found, _ = rules.intensity_map("sam", [ChannelNormalization(scheme="zscore")], [facts.STATISTICS], [flat])
    assert found.upper[0] - found.lower[0] == pytest.approx(2.0)


@pytest.mark.parametrize(("length", "coheres"), [(3.0, False), (6.0, False), (6.5, True)])
def test_nothing_is_expected_of_depth_where_labels_do_not_cohere(length: float, coheres: bool) -> None:
    """Slabs are then as thin as they can be, for the methods that need them, and the reason claims nothing."""
    held = {"organ": facts.structure(coherence=(0.0, 0.8, 0.8), coherence_mm=(length, 9.0, 9.0))}
    cases = [facts.case(shape=(30, 100, 100), spacing=(6, 1, 1), structures=held)] * 4
    frame, _ = rules.frame(facts.fingerprint(cases), (6, 1, 1))
    depth, reason = rules.slab_depth(cases, frame, rules.slab_shapes(cases, frame, (6, 1, 1)), 6.0)
    assert depth == rules.LEAST_SLAB
    assert ("nothing is expected of depth" in reason) != coheres
    assert ("to both sides" in reason) == coheres
