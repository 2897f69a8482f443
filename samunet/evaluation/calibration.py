"""Estimates of Dice from what a model says about its masks, calibrated on masks whose Dice is known.

The estimate before any calibration is the expected Dice of the probabilities. A calibration is linear least squares
with weights that are not negative, drawn towards that estimate: the fewer masks there are and the less they tell, the
less it moves away.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import lsq_linear

from samunet.artifacts.quality import CalibrationFit, Observation, StructureSigns

SIGNS = ("expected", "certainty", "agreement", "iou_head")
ANCHOR = "expected"
NOT_ALWAYS = ("agreement", "iou_head")
LEAST_CASES = 5
LEAST_OWN_CASES = 20
COVERAGE = 0.9
PRIOR_DEVIATION = 0.5
_MOST_REFITS = 20
_LEAST_SPREAD = 0.05
_LEAST_DEVIATION = 0.01

Values = NDArray[np.float64]
Estimate = tuple[float | None, float | None, float | None]


def fit_calibration(
    observations: Sequence[Observation], groups: Mapping[str, str] | None = None
) -> tuple[CalibrationFit, ...]:
    """Fits for every structure with enough cases and for any structure, each with and without what can be missing.

    Args:
        observations: Masks of known Dice; those that are empty tell nothing and are left out.
        groups: Case to group (patient); cases of a group are held out together, and count as one.

    Returns:
        Most specific first: with a structure, with more signs. None below 5 cases (groups).
    """
    known = [seen for seen in observations if seen.signs.expected is not None]
    fits: list[CalibrationFit] = []
    for structure in [*dict.fromkeys(seen.structure for seen in known), None]:
        own = [seen for seen in known if structure in (None, seen.structure)]
        if count_units((seen.case for seen in own), groups) < (LEAST_CASES if structure is None else LEAST_OWN_CASES):
            continue
        names = [name for name in SIGNS if all(getattr(seen.signs, name) is not None for seen in own)]
        fits += [_fit(structure, chosen, own, groups or {}) for chosen in _subsets(names)]
    return tuple(fits)


def count_units(cases: Iterable[str], groups: Mapping[str, str] | None) -> int:
    """How many independent cases there are: groups, where cases belong together."""
    return len({(groups or {}).get(case, case) for case in cases})


def estimate_dice(fits: Sequence[CalibrationFit], structure: str, signs: StructureSigns) -> Estimate:
    """Estimated Dice of a mask and its interval.

    Where several models disagree more than the estimate admits, it is what they agree to: no calibration knows how
    models disagree that were all trained on the cases it could be made from.

    Args:
        fits: As :func:`fit_calibration` gives them.
        structure: Whose mask.
        signs: What the model says about it.

    Returns:
        Dice and interval; no interval without a fit for these signs, no Dice for an empty mask.
    """
    if signs.expected is None:
        return None, None, None
    fit = next((fit for fit in fits if fit.structure in (None, structure) and _measured(fit, signs)), None)
    bound = 1.0 if signs.models_agree is None else signs.models_agree
    if fit is None:
        return min(signs.expected, bound), None, None
    value = min(apply_fit(fit, signs), bound)
    low, high = (float(np.clip(value + edge * spread(value), 0, 1)) for edge in (fit.low, fit.high))
    return value, low, high


def apply_fit(fit: CalibrationFit, signs: StructureSigns) -> float:
    """The estimate of one fit, in [0, 1]."""
    total = sum(weight * getattr(signs, name) for weight, name in zip(fit.weights, fit.signs, strict=True))
    return float(np.clip(fit.offset + total, 0, 1))


def spread(estimate: float) -> float:
    """The unit of an interval: errors grow with the distance from a perfect mask."""
    return max(1 - estimate, _LEAST_SPREAD)


def _subsets(names: Sequence[str]) -> list[tuple[str, ...]]:
    """All signs, and all but those missing where views are not mirrored or a model of an average has no IoU head."""
    missing = [gone for number in range(len(NOT_ALWAYS) + 1) for gone in combinations(NOT_ALWAYS, number)]
    return list(dict.fromkeys(tuple(name for name in names if name not in gone) for gone in missing))


def _measured(fit: CalibrationFit, signs: StructureSigns) -> bool:
    return all(getattr(signs, name) is not None for name in fit.signs)


def _fit(
    structure: str | None, names: tuple[str, ...], seen: Sequence[Observation], groups: Mapping[str, str]
) -> CalibrationFit:
    signs = np.array([[getattr(one.signs, name) for name in names] for one in seen], dtype=np.float64)
    dice = np.array([one.dice for one in seen], dtype=np.float64)
    parts = _parts([groups.get(one.case, one.case) for one in seen])
    held_out = np.empty_like(dice)
    for part in np.unique(parts):
        rest = parts != part
        weights, offset = _least_squares(signs[rest], dice[rest], names)
        held_out[~rest] = np.clip(signs[~rest] @ weights + offset, 0, 1)
    errors = (dice - held_out) / np.array([spread(float(value)) for value in held_out])
    low, high = _ends(errors)
    weights, offset = _least_squares(signs, dice, names)
    return CalibrationFit(
        structure=structure,
        signs=names,
        weights=tuple(round(float(weight), 6) for weight in weights),
        offset=round(offset, 6),
        low=round(low, 6),
        high=round(high, 6),
        error=round(float(np.abs(dice - held_out).mean()), 6),
        num_masks=len(seen),
    )


def _least_squares(signs: Values, dice: Values, names: Sequence[str]) -> tuple[Values, float]:
    """Weights (not negative) and offset with the least squared error, drawn towards weight 1 on the anchor alone.

    The pull is that of a normal prior around it, against noise as large as the anchor's own error.
    """
    anchor = np.array([float(name == ANCHOR) for name in names])
    noise = max(float(np.std(dice - signs @ anchor)), _LEAST_DEVIATION)
    pull = noise / PRIOR_DEVIATION * np.eye(len(names) + 1)
    rows = np.vstack([np.column_stack([signs, np.ones(len(signs))]), pull])
    wanted = np.concatenate([dice, pull @ np.append(anchor, 0.0)])
    least = np.append(np.zeros(len(names)), -np.inf)
    found = lsq_linear(rows, wanted, bounds=(least, np.full(len(names) + 1, np.inf))).x
    return np.maximum(found[:-1], 0.0), float(found[-1])


def _parts(units: Sequence[str]) -> NDArray[np.int64]:
    """What is held out together: all masks of a case or group; of a few each where there are many."""
    names = list(dict.fromkeys(units))
    place = {name: index % _MOST_REFITS for index, name in enumerate(names)}
    return np.array([place[name] for name in units])


def _ends(errors: Values) -> tuple[float, float]:
    """The errors between which the next one lies with the probability of the interval, as far as so few can tell."""
    ordered, tail = np.sort(errors), (1 - COVERAGE) / 2
    first = max(int(np.floor((len(ordered) + 1) * tail)) - 1, 0)
    return float(min(ordered[first], 0.0)), float(max(ordered[-1 - first], 0.0))
