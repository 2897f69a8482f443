"""Which structures a reflection would swap: found by name, and by where the structures lie."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import numpy as np

from samunet.artifacts.fingerprint import CaseFacts, MirrorPair
from samunet.core.geometry import ANATOMICAL_AXES

LEFT_RIGHT, ANTERIOR_POSTERIOR, SUPERIOR_INFERIOR = ANATOMICAL_AXES

# Long words may be glued to others ("leftKidney"); short ones must stand alone ("L_Thalamus", "thalamus-lh").
_LONG: tuple[tuple[str, str, str], ...] = (
    ("left", "right", LEFT_RIGHT),
    ("sinistra", "dextra", LEFT_RIGHT),
    ("sinister", "dexter", LEFT_RIGHT),
    ("anterior", "posterior", ANTERIOR_POSTERIOR),
    ("ventral", "dorsal", ANTERIOR_POSTERIOR),
    ("front", "back", ANTERIOR_POSTERIOR),
    ("front", "rear", ANTERIOR_POSTERIOR),
    ("superior", "inferior", SUPERIOR_INFERIOR),
    ("upper", "lower", SUPERIOR_INFERIOR),
    ("cranial", "caudal", SUPERIOR_INFERIOR),
    ("top", "bottom", SUPERIOR_INFERIOR),
)
_SHORT: tuple[tuple[str, str, str], ...] = (
    ("l", "r", LEFT_RIGHT),
    ("lh", "rh", LEFT_RIGHT),
    ("lt", "rt", LEFT_RIGHT),
    ("sin", "dex", LEFT_RIGHT),
    ("ant", "post", ANTERIOR_POSTERIOR),
    ("sup", "inf", SUPERIOR_INFERIOR),
)
_CONSISTENT = 0.9
_DOMINANT = 0.6


def find_mirror_pairs(names: Iterable[str], cases: Mapping[str, CaseFacts]) -> tuple[MirrorPair, ...]:
    """Pairs of structures that differ only in a word for a side, with the axis that separates them.

    Where at least one case holds both, their centroids decide the axis: the one along which they lie apart, in the
    same direction in nine cases of ten, by the larger part of their distance. Otherwise the word decides.

    Args:
        names: Structures in dataset.json's order.
        cases: Facts per case, with centroids in RAS mm.
    """
    ordered = list(names)
    pairs = []
    for index, first in enumerate(ordered):
        for second in ordered[index + 1 :]:
            axis = opposite_sides(first, second)
            if axis is not None:
                seen = _separating_axis(first, second, cases)
                evidence = "name" if seen is None else "name and geometry"
                pairs.append(MirrorPair(first=first, second=second, axis=seen or axis, evidence=evidence))
    return tuple(pairs)


def opposite_sides(first: str, second: str) -> str | None:
    """The anatomical axis on whose two sides two names lie, if they are the same but for a word for a side."""
    words, others = _words(first), _words(second)
    for a, b, axis in _LONG + _SHORT:
        for one, other in ((a, b), (b, a)):
            if _swap_word(words, one, other) == others and one in words:
                return axis
    for a, b, axis in _LONG:
        for one, other in ((a, b), (b, a)):
            if one in "".join(words) and "".join(words).replace(one, other, 1) == "".join(others):
                return axis
    return None


def _words(name: str) -> list[str]:
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name)
    return [word for word in re.split(r"[^a-z0-9]+", spaced.lower()) if word]


def _swap_word(words: list[str], one: str, other: str) -> list[str]:
    return [other if word == one else word for word in words]


def _separating_axis(first: str, second: str, cases: Mapping[str, CaseFacts]) -> str | None:
    both = [c.structures for c in cases.values() if first in c.structures and second in c.structures]
    if not both:
        return None
    gaps = np.array([np.subtract(s[first].centroid_mm, s[second].centroid_mm) for s in both])
    mean = gaps.mean(axis=0)
    world = int(np.argmax(np.abs(mean)))
    same_way = float(np.mean(np.sign(gaps[:, world]) == np.sign(mean[world])))
    dominant = abs(mean[world]) >= _DOMINANT * np.linalg.norm(mean)
    return ANATOMICAL_AXES[world] if same_way >= _CONSISTENT and dominant and mean[world] != 0 else None
