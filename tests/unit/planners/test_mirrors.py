"""Pairs that a reflection would swap."""

from __future__ import annotations

import pytest

from samunet.artifacts.fingerprint import CaseFacts, StructureFacts
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
        ("LLung", "RLung", LEFT_RIGHT),
        ("LtLung", "RtLung", LEFT_RIGHT),
        ("lkidney", "rkidney", LEFT_RIGHT),
        ("kidneyl", "kidneyr", LEFT_RIGHT),
        ("LK", "RK", LEFT_RIGHT),
        ("la_wall", "ra_wall", LEFT_RIGHT),
        ("Niere links", "Niere rechts", LEFT_RIGHT),
        ("linke_Niere", "rechte_Niere", LEFT_RIGHT),
        ("rein_gauche", "rein_droit", LEFT_RIGHT),
        ("oreillette_gauche", "oreillette_droite", LEFT_RIGHT),
        ("rinon_izquierdo", "rinon_derecho", LEFT_RIGHT),
        ("mama_izquierda", "mama_derecha", LEFT_RIGHT),
        ("mano sinistra", "mano destra", LEFT_RIGHT),
        ("rene_sinistro", "rene_destro", LEFT_RIGHT),
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
        ("lesion", "region"),
        ("L1", "L2"),
        ("left_kidney", "rkidney"),
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


def seen(*rows: dict[str, StructureFacts]) -> dict[str, CaseFacts]:
    """Cases that hold these structures."""
    return {f"case_{index}": case(structures=row) for index, row in enumerate(rows)}


def sides(gap: float, **changes: object) -> dict[str, StructureFacts]:
    """Two structures whose centroids lie apart from left to right."""
    return {
        "1": structure(centroid_mm=(gap / 2, 3.0, 5.0)),
        "2": structure(centroid_mm=(-gap / 2, 0.0, 0.0)).model_copy(update=changes),
    }


def test_two_structures_on_two_sides_are_a_pair_whatever_their_names() -> None:
    """Alike in size and apart to the same side in nine cases of ten: a reflection would swap them."""
    rows = [sides(80.0)] * 9
    for last in (sides(80.0), sides(-80.0)):
        (pair,) = find_mirror_pairs(["1", "2"], seen(*rows, last))
        assert (pair.first, pair.second, pair.axis, pair.evidence) == ("1", "2", LEFT_RIGHT, "geometry")
    assert find_mirror_pairs(["1", "2"], seen(*rows[:8], sides(-80.0), sides(-80.0))) == ()


@pytest.mark.parametrize(
    "changes",
    [{"volume_mm3": 10_000.0}, {"extent_mm": (20.0, 20.0, 40.0)}, {"centroid_mm": (-40.0, 200.0, 0.0)}],
)
def test_what_is_not_alike_or_not_beside_is_no_pair(changes: dict[str, object]) -> None:
    """Another volume, another extent, or farther apart along another axis."""
    assert find_mirror_pairs(["1", "2"], seen(sides(80.0, **changes))) == ()
    assert len(find_mirror_pairs(["1", "2"], seen(sides(80.0)))) == 1


def test_what_lies_within_each_other_is_no_pair() -> None:
    """A wall and its cavity have about the same centroid."""
    assert find_mirror_pairs(["1", "2"], seen(sides(9.0))) == ()


def test_named_structures_are_not_paired_again_by_their_places() -> None:
    """A left kidney and a right adrenal gland of its size are no further pair."""
    held = {"left_x": sides(80.0)["1"], "right_x": sides(80.0)["2"], "y": sides(80.0)["2"]}
    assert [pair.second for pair in find_mirror_pairs(held, seen(held))] == ["right_x"]
