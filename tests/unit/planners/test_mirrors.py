"""Pairs that a reflection would swap."""

from __future__ import annotations

import pytest

from samunet.core.geometry import ANATOMICAL_AXES
from samunet.planners.mirrors import find_mirror_pairs, opposite_sides
from tests.planning_facts import case, structure

LEFT_RIGHT, FRONT_BACK, UP_DOWN = ANATOMICAL_AXES


@pytest.mark.parametrize(
    ("first", "second", "axis"),
    [
        ("left_kidney", "right_kidney", LEFT_RIGHT),
        ("Kidney Left", "kidney right", LEFT_RIGHT),
        ("leftKidney", "rightKidney", LEFT_RIGHT),
        ("L_Thalamus", "R_Thalamus", LEFT_RIGHT),
        ("thalamus-l", "thalamus-r", LEFT_RIGHT),
        ("lh.cortex", "rh.cortex", LEFT_RIGHT),
        ("kidneyleft", "kidneyright", LEFT_RIGHT),
        ("anterior", "posterior", FRONT_BACK),
        ("lobe_upper_left", "lobe_lower_left", UP_DOWN),
        ("Superior colliculus", "inferior colliculus", UP_DOWN),
    ],
)
def test_names_of_pairs(first: str, second: str, axis: str) -> None:
    """Usual spellings of the two sides of a structure are recognised, in either order."""
    assert opposite_sides(first, second) == axis
    assert opposite_sides(second, first) == axis


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("left_kidney", "left_lung"),
        ("left_kidney", "right_lung"),
        ("liver", "river"),
        ("l_lung", "lung"),
        ("bright_spot", "dark_spot"),
        ("lobe_upper_left", "lobe_lower_right"),
    ],
)
def test_names_that_are_no_pair(first: str, second: str) -> None:
    """Different structures, and names that merely contain the letters, are no pair."""
    assert opposite_sides(first, second) is None


def test_geometry_decides_the_axis_where_it_can() -> None:
    """Where the two centroids lie apart along another axis than the name says, that axis is the one that swaps."""
    held = {
        "superior_part": structure(centroid_mm=(0.0, 12.0, 1.0)),
        "inferior_part": structure(centroid_mm=(0.0, -10.0, 2.0)),
    }
    (pair,) = find_mirror_pairs(held, {"a": case(structures=held)})
    assert (pair.axis, pair.evidence) == (FRONT_BACK, "name and geometry")


def test_names_decide_where_no_case_holds_both() -> None:
    """Without a case that shows both sides the name is the only evidence."""
    only_left = {"left_x": structure()}
    (pair,) = find_mirror_pairs(["left_x", "right_x"], {"a": case(structures=only_left)})
    assert (pair.first, pair.second, pair.axis, pair.evidence) == ("left_x", "right_x", LEFT_RIGHT, "name")
