"""Rotation from what says what is up, overlap from the slab, views from the time they take."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from samunet.artifacts.augmentation import Augmentation
from samunet.artifacts.fingerprint import CaseFacts
from samunet.artifacts.plan import Frame, Plan, Recipe, resolve_recipe
from samunet.core.config import parse_schema
from samunet.core.errors import ConfigError
from samunet.core.geometry import ANATOMICAL_AXES, Geometry, code_directions
from samunet.inference.sliding import slab_starts
from samunet.inference.tta import mirror_combinations
from samunet.planners import augmentation
from samunet.planners.fingerprint import tilt_deg
from samunet.planners.method_recipes import automatic_recipe
from samunet.planners.planner import make_plan
from samunet.preprocessing.slicing import tile_positions
from tests import planning_facts as facts
from tests.samples import make_recipe

FRAME = Frame(slice_axis=0, orientation=("S", "A", "R"), spacing=(5.0, 1.0, 1.0))
ISOTROPIC = (1.0, 1.0)


def picture(angle: float | None, *, size: tuple[int, int] = (60, 80)) -> CaseFacts:
    """A picture whose structure lies in a direction from the middle (degrees from the columns' axis); None: nowhere."""
    held = {}
    if angle is not None:
        row = (size[0] - 1) / 2 + 0.3 * size[0] * math.sin(math.radians(angle))
        column = (size[1] - 1) / 2 + 0.3 * size[1] * math.cos(math.radians(angle))
        held = {"spot": facts.structure(centroid_mm=(column, row, 0.0))}
    return facts.case(shape=(1, *size), spacing=(999, 1, 1), structures=held)


def rotation(cases: list[CaseFacts], *, mirror: tuple[str, ...] = ANATOMICAL_AXES) -> tuple[float, str]:
    return augmentation.rotation_deg(cases, FRAME, mirror, ISOTROPIC)


@pytest.mark.parametrize(("tilt", "angle"), [(0.0, 15.0), (15.0, 15.0), (15.1, 20.0), (33.0, 35.0), (54.0, 45.0)])
def test_scans_are_turned_as_far_as_they_lie_obliquely(tilt: float, angle: float) -> None:
    """Fifteen degrees at least and 45 at most, in steps of five, with the measured tilt in the reason."""
    found, reason = rotation([facts.case(tilt=tilt)] * 5)
    assert found == angle
    assert f"within {tilt:.0f} degrees" in reason


def test_one_oblique_case_of_twenty_changes_nothing() -> None:
    """The range follows what nine cases of ten need."""
    assert rotation([facts.case()] * 19 + [facts.case(tilt=40.0)])[0] == 15.0
    assert rotation([facts.case()] * 8 + [facts.case(tilt=40.0)] * 2)[0] == 40.0


def test_facts_without_tilt_are_planned_narrowly() -> None:
    """A fingerprint that was made before tilts were measured still gives a plan and says so."""
    found, reason = rotation([facts.case(tilt=None)] * 3)
    assert found == 15.0
    assert "not measured" in reason
    held = facts.fingerprint([facts.case(tilt=None)])
    old = held.model_dump(mode="json")
    del old["cases"]["case_000"]["tilt_deg"]
    assert parse_schema(type(held), old).facts_sha256 == held.facts_sha256


def test_pictures_without_an_up_are_turned_by_any_angle() -> None:
    """Structures all around the middle, or too few pictures to tell, leave every direction alike."""
    around = [picture(angle) for angle in range(0, 360, 30)]
    assert rotation(around) == (180.0, "turned by any angle, as nothing says what is up in these pictures")
    assert rotation([picture(10.0)] * 3)[0] == 180.0
    assert rotation([picture(None)] * 9)[0] == 180.0


def test_pictures_with_an_up_are_turned_narrowly() -> None:
    """A structure that keeps to one side, or a pair that mirroring would swap, says what is up."""
    aside, reason = rotation([picture(angle) for angle in range(-40, 41, 10)])
    assert aside == 15.0
    assert "'spot' keeps to one side" in reason
    around = [picture(angle) for angle in range(0, 360, 30)]
    assert rotation(around, mirror=("anterior-posterior",))[0] == 15.0
    scans = [facts.case(shape=(1, 60, 80), spacing=(5, 1, 1), structures=c.structures) for c in around]
    assert rotation(scans)[0] == 15.0


def test_long_pixels_are_not_turned_far() -> None:
    """Where rows and columns differ in size by more than a half a rotation would shear."""
    around = [picture(angle) for angle in range(0, 360, 30)]
    for spacing, angle in (((1.0, 1.5), 180.0), ((1.0, 1.6), 15.0)):
        assert augmentation.rotation_deg(around, FRAME, ANATOMICAL_AXES, spacing)[0] == angle


def test_tilt_of_a_grid() -> None:
    """Nothing along the axes whatever the flips; the angle of a rotation about one axis otherwise."""
    assert tilt_deg(Geometry.from_spacing((4, 5, 6), (3, 1, 1), directions=code_directions(("I", "P", "L")))) == 0
    turned = code_directions(("S", "A", "R")) @ Rotation.from_euler("x", 20, degrees=True).as_matrix().T
    assert tilt_deg(Geometry.from_spacing((4, 5, 6), (3, 1, 1), directions=turned)) == pytest.approx(20, abs=1e-3)


@pytest.mark.parametrize("depth", range(2, 20))
def test_two_slabs_see_each_slice_but_the_outermost(depth: int) -> None:
    """With the planned overlap, of volumes of any length, and no closer than half a slab."""
    overlap, _ = augmentation.depth_overlap(depth)
    for length in (depth + 1, 2 * depth, 5 * depth + 3):
        starts = slab_starts(length, depth, overlap)
        seen = np.zeros(length, int)
        for start in starts:
            seen[start : start + depth] += 1
        inner = seen[depth // 2 : length - depth // 2] if length >= 2 * depth else seen[length // 2]
        assert np.min(inner) >= 2
        assert len(starts) == 1 + math.ceil((length - depth) / (depth // 2))


def test_single_slices_do_not_overlap() -> None:
    """A depth of one has nothing to overlap."""
    assert augmentation.depth_overlap(1)[0] == 0


def test_tiles_are_counted_as_they_are_laid_out() -> None:
    """The estimate of a typical volume's tiles is the number that prediction cuts."""
    for plane in ((50, 50), (101, 40), (300, 210)):
        assert augmentation.num_tiles([(7, *plane)], 50, 0.5) == 7 * len(tile_positions(plane, 50, 0.5))


def views(seconds: float, *, mirrors: int = 2, device: str = "cpu", promptable: bool = False) -> int:
    return augmentation.mirror_views(device=device, promptable=promptable, mirrors=mirrors, seconds=seconds)[0]


def test_fewer_views_where_prediction_would_take_long() -> None:
    """Four views while they take a minute, then two, then one; a GPU averages all, prompts allow one."""
    assert [views(s) for s in (15, 15.1, 30, 30.1)] == [4, 2, 2, 1]
    assert [views(s, mirrors=1) for s in (30, 30.1)] == [4, 1]
    assert views(60, mirrors=0) == 4
    assert views(1000, device="gpu") == 4
    assert views(1, promptable=True, device="gpu") == 1


def test_views_of_test_time_mirroring() -> None:
    """All subsets of the axes, or none and all, or none."""
    assert mirror_combinations((0, 1), 4) == [(), (0,), (1,), (0, 1)]
    assert mirror_combinations((0, 1), 2) == [(), (0, 1)]
    assert mirror_combinations((1,), 2) == [(), (1,)]
    assert mirror_combinations((0, 1), 1) == mirror_combinations((), 4) == [()]


def plan_of(cases: list[CaseFacts], minutes: float = 60.0) -> Plan:
    return make_plan(facts.fingerprint(cases), facts.description(), facts.budget(minutes=minutes))


def test_the_plan_holds_the_decisions() -> None:
    """Rotation, overlap and views stand in the plan with a reason and reach the resolved recipe."""
    found = plan_of([facts.case(tilt=32.0)] * 4)
    recipe = found.configuration("3d").recipes["none"]["cpu"]
    assert recipe.augmentation.value == Augmentation(rotation_deg=35.0)
    assert "32 degrees" in recipe.augmentation.reason
    resolved = resolve_recipe(found.configuration("3d"), "none", "cpu")
    assert resolved.augmentation.rotation_deg == 35.0
    assert resolved.mirror_views == recipe.mirror_views.value
    assert found.configuration("3d").depth_overlap.value == augmentation.depth_overlap(resolved.slab_depth)[0]
    assert found.configuration("2d").depth_overlap.value == 0


def test_a_slow_network_averages_fewer_views() -> None:
    """The same volumes get fewer views from ViT-B on a CPU than from the thin encoder."""
    recipes = plan_of([facts.case(shape=(100, 200, 200), spacing=(5, 1, 1))] * 4).configuration("2d").recipes
    assert recipes["sam"]["cpu"].mirror_views.value < recipes["none"]["cpu"].mirror_views.value == 4


def test_edited_mirror_axes_decide_further_recipes() -> None:
    """A method planned later takes the plan's own mirror axes: with none, pictures keep an up."""
    data = facts.fingerprint([picture(angle) for angle in range(0, 360, 30)])
    found = make_plan(data, facts.description(), facts.budget())
    edited = found.model_copy(update={"mirror_axes": found.mirror_axes.model_copy(update={"value": ()})})
    angles = [
        automatic_recipe(
            p, data, configuration="2d", weights="none", device="cpu", backbone="vit_t_xs", changes={}
        ).augmentation.value.rotation_deg
        for p in (found, edited)
    ]
    assert angles == [180.0, 15.0]


def test_older_plans_are_understood() -> None:
    """The words of earlier plans, and plans without the later fields, mean what they meant."""
    content = make_recipe().model_dump(mode="json")
    del content["mirror_views"]
    for word, enabled in (("full", True), ("none", False)):
        old = parse_schema(Recipe, content | {"augmentation": {"value": word, "reason": ""}})
        assert old.augmentation.value == Augmentation(enabled=enabled, rotation_deg=15.0, scale=(0.7, 1.4))
        assert old.mirror_views.value == 4


@pytest.mark.parametrize("wrong", [{"rotation_deg": 200}, {"scale": (1.4, 0.7)}, {"scale": (0, 1)}, "some"])
def test_impossible_augmentation_is_refused(wrong: object) -> None:
    """A hand-edited plan with an impossible range does not load."""
    content = make_recipe().model_dump(mode="json")
    with pytest.raises(ConfigError, match="augmentation"):
        parse_schema(Recipe, content | {"augmentation": {"value": wrong, "reason": ""}})


@pytest.mark.parametrize("name", ["tile_overlap", "depth_overlap"])
def test_impossible_overlap_is_refused(name: str) -> None:
    """An overlap of a whole tile or slab is refused when the plan is read, not after training."""
    content = plan_of([facts.case()] * 2).model_dump(mode="json")
    content["configurations"]["2d"][name]["value"] = 1.0
    with pytest.raises(ConfigError, match=name):
        parse_schema(Plan, content)
