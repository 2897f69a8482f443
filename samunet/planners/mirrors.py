"""Which structures a reflection would swap: found by name, and by where the structures lie."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from itertools import combinations

import numpy as np

from samunet.artifacts.fingerprint import CaseFacts, MirrorPair
from samunet.core.geometry import ANATOMICAL_AXES

LEFT_RIGHT, ANTERIOR_POSTERIOR, SUPERIOR_INFERIOR = ANATOMICAL_AXES

# Long words may be glued to others ("leftKidney"); short ones must stand alone ("L_Thalamus", "thalamus-lh").
_LONG: tuple[tuple[str, str, str], ...] = (
    ("left", "right", LEFT_RIGHT),
    ("sinistra", "dextra", LEFT_RIGHT),
    ("sinister", "dexter", LEFT_RIGHT),
    # Italian, Portuguese and Spanish up to the ending, which follows the noun; German and Dutch; French.
    ("sinistr", "destr", LEFT_RIGHT),
    ("esquerd", "direit", LEFT_RIGHT),
    ("izquierd", "derech", LEFT_RIGHT),
    ("link", "recht", LEFT_RIGHT),
    ("gauche", "droite", LEFT_RIGHT),
    ("gauche", "droit", LEFT_RIGHT),
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
    ("izq", "der", LEFT_RIGHT),
    ("ant", "post", ANTERIOR_POSTERIOR),
    ("sup", "inf", SUPERIOR_INFERIOR),
)
_CONSISTENT = 0.9
_DOMINANT = 0.6
# Of structures without such names: how much larger one may be, and how far apart they lie, by their extent.
_ALIKE_VOLUME, _ALIKE_EXTENT = 2.0, 1.6
_APART = 0.5
_VOWELS = "aeiou"
_ABBREVIATION, _LEAST_STEM = 3, 3


def find_mirror_pairs(names: Iterable[str], cases: Mapping[str, CaseFacts]) -> tuple[MirrorPair, ...]:
    """Pairs of structures that a reflection would swap: told by a word for a side, or by their places.

    Of names that differ only in a word for a side, the centroids decide the axis where at least one case holds both:
    the one along which they lie apart, in the same direction in nine cases of ten, by the larger part of their
    distance. Otherwise the word decides.

    Of all other names, two structures of similar volume and extent that lie apart along left and right, in the same
    direction in nine cases of ten, are a pair: "1" and "2" may be kidneys. This errs on the side of pairs: one too many
    costs mirrored images along one axis, one too few teaches a network to swap sides.

    Args:
        names: Structures in dataset.json's order.
        cases: Facts per case, with centroids in RAS mm.
    """
    ordered = list(names)
    pairs = []
    for first, second in combinations(ordered, 2):
        axis = opposite_sides(first, second)
        if axis is not None:
            seen = _separating_axis(first, second, cases)
            evidence = "name" if seen is None else "name and geometry"
            pairs.append(MirrorPair(first=first, second=second, axis=seen or axis, evidence=evidence))
    named = {name for pair in pairs for name in (pair.first, pair.second) if pair.axis == LEFT_RIGHT}
    rest = [name for name in ordered if name not in named]
    pairs += [
        MirrorPair(first=first, second=second, axis=LEFT_RIGHT, evidence="geometry")
        for first, second in combinations(rest, 2)
        if _are_alike(first, second, cases) and _separating_axis(first, second, cases) == LEFT_RIGHT
    ]
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
    differing = [pair for pair in zip(words, others, strict=False) if pair[0] != pair[1]]
    if len(words) == len(others) and len(differing) == 1 and _has_letter_of_side(*differing[0]):
        return LEFT_RIGHT
    return None


def _has_letter_of_side(word: str, other: str) -> bool:
    """Whether two words are one with a glued l and r: "lkidney" and "rkidney", "LV" and "RV", "kidneyl" and "kidneyr".

    Before a vowel the letter may be the word's own ("liver" and "river"), except in abbreviations.
    """
    if {word[0], other[0]} == {"l", "r"} and word[1:] == other[1:]:
        return 1 < len(word) <= _ABBREVIATION or word[1:2] not in _VOWELS
    return {word[-1], other[-1]} == {"l", "r"} and word[:-1] == other[:-1] and len(word) > _LEAST_STEM


def _words(name: str) -> list[str]:
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", " ", name)
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


def _are_alike(first: str, second: str, cases: Mapping[str, CaseFacts]) -> bool:
    """Whether two structures are typically about as large, and lie beside rather than within each other."""
    volumes, extents, gaps = [], [], []
    for case in cases.values():
        if first not in case.structures or second not in case.structures:
            continue
        a, b = case.structures[first], case.structures[second]
        across = next(axis for axis, code in enumerate(case.codes) if code in "LR")
        volumes.append(_ratio(a.volume_mm3, b.volume_mm3))
        extents.append([_ratio(one, other) for one, other in zip(a.extent_mm, b.extent_mm, strict=True)])
        gaps.append(abs(a.centroid_mm[0] - b.centroid_mm[0]) / max(a.extent_mm[across], b.extent_mm[across]))
    if not volumes:
        return False
    return bool(
        np.median(volumes) <= _ALIKE_VOLUME
        and np.median(extents, axis=0).max() <= _ALIKE_EXTENT
        and np.median(gaps) >= _APART
    )


def _ratio(one: float, other: float) -> float:
    return max(one, other) / max(min(one, other), 1e-9)
