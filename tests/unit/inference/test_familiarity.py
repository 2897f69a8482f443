"""What is flagged as unlike training: exactly beyond the documented margins, and never more than a warning."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from samunet.artifacts.quality import FactRange
from samunet.artifacts.store import ChannelIntensities
from samunet.core.geometry import Geometry
from samunet.core.volume import Volume
from samunet.inference.familiarity import (
    TrainingFacts,
    intensity_ranges,
    out_of_range,
    size_range,
    training_facts,
    unfamiliar_image,
    unfamiliar_mask,
    widest,
)
from samunet.preprocessing.pipeline import preprocess_case
from tests.samples import LABELS, make_case, make_plan

PLAN = make_plan()


def case_facts(**changes: Any) -> dict[str, Any]:
    """A training case as a fingerprint holds it."""
    ball = {"volume_mm3": 2000.0, "num_components": 1, "num_slices": (3, 9, 9), "extent_mm": (6, 9, 9), "width_mm": 6}
    ball |= {"centroid_mm": (0, 0, 0), "coherence": (0.5, 0.5, 0.5)}
    values = {"shape": (6, 30, 26), "spacing": (2.0, 1.0, 1.0), "codes": ("S", "A", "R"), "tilt_deg": 0.0}
    values |= {"shape_after_crop": (6, 30, 26), "relative_size_after_crop": 1.0, "num_foreground_voxels": 1000}
    values |= {"num_foreground_slices": (3, 9, 9), "effective_resolution": (1, 1, 1), "structures": {"ball": ball}}
    return values | changes


def facts(*cases: dict[str, Any], **options: Any) -> TrainingFacts:
    """Facts of a fingerprint with these cases."""
    return training_facts({"cases": {str(i): case for i, case in enumerate(cases)}}, PLAN, **options)


def flags(known: TrainingFacts, volume: Volume) -> dict[str, str]:
    """Fact to what was found, for an image."""
    record = preprocess_case(volume, None, plan=PLAN, configuration="2d", name="new").record
    return {flag.fact: flag.found for flag in unfamiliar_image(known, volume.geometry, record, PLAN)}


def volume_of(spacing: tuple[float, float, float], shape: tuple[int, int, int] = (6, 30, 26), **grid: Any) -> Volume:
    """Noise on a grid."""
    data = np.random.default_rng(0).normal(100, 10, (1, *shape)).astype(np.float32)
    return Volume(data, Geometry.from_spacing(shape, spacing, **grid))


def test_cases_that_were_not_trained_on_widen_nothing() -> None:
    """A fingerprint holds the validation cases too: only those named count, for ranges and for what is usual."""
    content = {"cases": {"trained": case_facts(), "validated": case_facts(shape=(40, 30, 26), structures={})}}
    known, every = training_facts(content, PLAN, cases=("trained",)), training_facts(content, PLAN)
    long = volume_of((2.0, 1.0, 1.0), (40, 30, 26))
    assert set(flags(known, long)) == {"number of slices", "extent across slices in mm"}
    assert flags(every, long) == {}
    assert (known.presence["ball"], every.presence["ball"]) == ((1, 1), (1, 2))


def test_ranges_of_several_trainings_are_joined() -> None:
    """What one of two models has seen is familiar to them together."""
    first, second = size_range("spacing", [1.0, 2.0]), size_range("spacing", [3.0])
    (joined,) = widest([(first,), (second,), ()])
    assert (joined.low, joined.high, joined.least, joined.most) == (1.0, 3.0, first.least, second.most)


def test_sizes_are_flagged_beyond_a_factor() -> None:
    """1.25 below and above a single value; a quarter of the ratio where the range is wide."""
    single, wide = size_range("spacing", [2.0]), size_range("spacing", [1.0, 16.0])
    assert (single.least, single.most) == (1.6, 2.5)
    assert (wide.least, wide.most) == (0.5, 32.0)
    assert out_of_range(single, 1.6) is None
    assert out_of_range(single, 2.5) is None
    assert out_of_range(single, 1.59) is not None
    flag = out_of_range(single, 2.51)
    assert flag is not None
    assert str(flag) == "spacing 2.51, in training 2 to 2"


def test_the_most_extreme_hundredth_does_not_widen_a_range() -> None:
    """One odd case of two hundred is no reason to find another one familiar."""
    assert size_range("extent", [100.0] * 199 + [900.0]).high == 100.0
    assert size_range("extent", [100.0] * 9 + [900.0]).high == 900.0


def test_a_familiar_image_has_no_flag_and_another_grid_has() -> None:
    """Thicker slices and a larger image are named with what was found."""
    known = facts(case_facts(), case_facts(shape=(7, 30, 26)))
    assert flags(known, volume_of((2.0, 1.0, 1.0))) == {}
    found = flags(known, volume_of((5.0, 1.0, 1.0)))
    assert found == {"spacing of slices in mm": "5", "extent across slices in mm": "30"}
    assert flags(known, volume_of((2.0, 1.0, 1.0), (12, 30, 26)))["number of slices"] == "12"


def test_other_file_axes_are_no_flag_but_other_anatomical_axes_are() -> None:
    """Storing the same image along other axes changes nothing; slices across another anatomical axis are flagged."""
    known, volume = facts(case_facts()), volume_of((2.0, 1.0, 1.0))
    turned = volume.geometry.directions[[2, 0, 1]]
    moved = volume_of((1.0, 2.0, 1.0), (26, 6, 30), directions=turned)
    assert flags(known, moved) == {}
    coronal = volume_of((2.0, 1.0, 1.0), directions=np.array([[0.0, 1, 0], [0, 0, 1], [1, 0, 0]]))
    assert set(flags(known, coronal)) == {"axes of slices, rows and columns"}


def test_a_tilted_image_is_flagged_from_ten_degrees_on() -> None:
    """Nine degrees are within the margin, eleven are not."""
    known = facts(case_facts())
    for angle, number in ((9, 0), (11, 1)):
        turn = np.radians(angle)
        tilted = [[1, 0, 0], [0, np.cos(turn), np.sin(turn)], [0, -np.sin(turn), np.cos(turn)]]
        directions = volume_of((2.0, 1.0, 1.0)).geometry.directions @ np.array(tilted)
        assert len(flags(known, volume_of((2.0, 1.0, 1.0), directions=directions))) == number


def test_intensities_are_compared_with_what_preprocessing_recorded() -> None:
    """A gain leaves the normalized values and is flagged raw; a margin of a tenth of the usual contrast holds."""
    records = [
        preprocess_case(make_case(seed)[0], None, plan=PLAN, configuration="2d", name="t").record for seed in range(5)
    ]
    ranges = intensity_ranges(records, PLAN.channel_names)
    assert len(ranges) == 6
    known = TrainingFacts(intensities=ranges)
    volume, _ = make_case(9)
    assert flags(known, volume) == {}
    brighter = set(flags(known, volume.with_data(volume.data * 3)))
    assert brighter == {f"{name} of MRI, raw" for name in ("percentile 0.5", "median", "percentile 99.5")}
    two = [record.model_copy(update={"intensities": record.intensities * 2}) for record in records]
    names = {known.fact for known in intensity_ranges(two, ["MRI", "MRI"])}
    assert len(names) == 12, "channels of one name are told apart"
    assert "median of MRI (channel 1), raw" in names
    bare = [record.model_copy(update={"intensities": ()}) for record in records]
    assert intensity_ranges([*records, *bare], PLAN.channel_names) == ()


def test_recorded_percentiles_are_those_of_the_nonzero_region() -> None:
    """Of all voxels where there are few, before and after normalization."""
    volume = volume_of((2.0, 1.0, 1.0))
    volume.data[:, :, :4] = 0
    record = preprocess_case(volume, None, plan=PLAN, configuration="2d", name="new").record
    inside = volume.data[volume.data != 0].astype(np.float64)
    (found,) = record.intensities
    assert isinstance(found, ChannelIntensities)
    np.testing.assert_allclose(found.raw, np.percentile(inside, (0.5, 50, 99.5)), rtol=1e-4)
    scaled = (np.array(found.raw) - inside.mean()) / inside.std()
    np.testing.assert_allclose(found.normalized, scaled, atol=1e-3)


def test_volumes_and_missing_structures() -> None:
    """Ten times the volume is flagged, an empty mask only of a structure that at least half of the cases have."""
    known = facts(case_facts(), case_facts(structures={}))
    assert known.presence["ball"] == (1, 2)
    assert unfamiliar_mask(known, "ball", 2.0) is None
    assert unfamiliar_mask(known, "ball", 20.0) is not None
    missing = unfamiliar_mask(known, "ball", 0.0)
    assert missing is not None
    assert str(missing) == "ball not found, in training in 1 of 2 cases"
    assert unfamiliar_mask(known, "cube", 0.0) is None


def test_strokes_are_no_volume() -> None:
    """Where voxels may be ignored no mask is too large; what strokes show is there all the same, and missed if not."""
    scribbled = make_plan(labels={**LABELS, "ignore": 3})
    known = training_facts({"cases": {"0": case_facts(), "1": case_facts()}}, scribbled)
    assert known.volumes == {}
    assert unfamiliar_mask(known, "ball", 200.0) is None
    assert known.sizes == facts(case_facts(), case_facts()).sizes
    missing = unfamiliar_mask(known, "ball", 0.0)
    assert missing is not None
    assert str(missing) == "ball not found, in training in 2 of 2 cases"


def test_a_checkpoint_without_facts_flags_nothing() -> None:
    """Without cases in the fingerprint nothing is known, so nothing is unfamiliar."""
    assert flags(training_facts({}, PLAN), volume_of((9.0, 9.0, 9.0))) == {}
    assert FactRange(fact="x", low=0, high=1, least=-1, most=2).least == pytest.approx(-1)
