"""Checks of sentences about other facts of a dataset, by planning again with these."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from samunet.artifacts.fingerprint import CaseFacts
from samunet.artifacts.plan import Decided
from samunet.planners import rules
from samunet.planners.alterations import Inputs, Place, Planned
from samunet.planners.edits import decisions
from samunet.planners.planner import facts_of_plan
from tests import planning_facts as facts
from tests.planned_claims import Claims, of_channels


def turned(claims: Claims, case: CaseFacts) -> CaseFacts:
    """A case that lies as the majority does: the same in the plan's frame, in the files' order of axes."""
    frame = claims.plan.frame.value
    operation = rules.axis_operation(case, frame)
    axes = [claims.axis, *(axis for axis in range(3) if axis != claims.axis)]

    def in_file(values: Any) -> tuple[Any, ...]:
        placed = dict(zip(axes, operation.reorder(values), strict=True))
        return placed[0], placed[1], placed[2]

    fields = ("shape", "shape_after_crop", "spacing", "num_foreground_slices", "effective_resolution")
    return case.model_copy(
        update={"codes": frame.orientation, **{field: in_file(getattr(case, field)) for field in fields}}
    )


def spaced(claims: Claims, place: Place, what: str, mm: str, axis: str, now: str, stacked: str) -> bool:
    """Both with as many voxels and with so many fewer that the image is as large."""
    index = "ZYX".index(axis)
    if what == "a target_spacing of ":
        spacing = list(claims.plan.target_spacing.value)
        spacing[index] = float(mm)
        edit = {"target_spacing": Decided[Any](value=tuple(spacing), reason="edited", source="user")}
        edits = replace(claims.inputs.edits, choices={**claims.inputs.edits.choices, **edit})
        others = [claims.under(("target", mm, axis), lambda: replace(claims.inputs, edits=edits))]
    else:
        middle = sorted(case.spacing[index] for case in claims.inputs.fingerprint.cases.values())
        before = (middle[(len(middle) - 1) // 2] + middle[len(middle) // 2]) / 2
        assert math.isclose(before, float(now), rel_tol=1e-3)

        def spaced(case: CaseFacts, *, shorter: bool) -> CaseFacts:
            scale = [float(mm) / before if a == index else 1.0 for a in range(3)]
            changes: dict[str, Any] = {"spacing": tuple(a * b for a, b in zip(case.spacing, scale, strict=True))}
            for name in ("shape", "shape_after_crop") if shorter else ():
                sides = zip(getattr(case, name), scale, strict=True)
                changes[name] = tuple(max(1, round(side / factor)) for side, factor in sides)
            return case.model_copy(update=changes)

        others = [
            claims.under(
                ("spaced", mm, axis, shorter),
                lambda s=shorter: claims.with_cases(lambda case: spaced(case, shorter=s)),  # type: ignore[misc]
            )
            for shorter in (False, True)
        ]
    axes = {"ZYX"[other[place].value.slice_axis] for other in others}
    return axes == {stacked} and stacked != "ZYX"[claims.axis]


def any_spacing(claims: Claims, place: Place) -> bool:
    cases = [(s, a) for s in (0.01, 0.3, 3.0, 100.0) for a in range(3)]

    def scaled(case: CaseFacts, factor: float, axis: int) -> CaseFacts:
        return case.model_copy(
            update={"spacing": tuple(mm * (factor if i == axis else 1) for i, mm in enumerate(case.spacing))}
        )

    others = (claims.with_cases(lambda case, s=s, a=a: scaled(case, s, a)).plan() for s, a in cases)  # type: ignore[misc]
    return all(other.frame.value.slice_axis == claims.axis for other in others)


def ratio(claims: Claims, place: Place, axis: str, ratio: str, now: str, words: str) -> bool:
    """The rule takes the other branch at the ratio that is named, and not the same as now."""
    index = "ZYX".index(axis)

    def scaled(case: CaseFacts) -> CaseFacts:
        spacing = [mm * (float(ratio) / float(now) if a == index else 1.0) for a, mm in enumerate(case.spacing)]
        return case.model_copy(update={"spacing": tuple(spacing)})

    reasons = [plan.target_spacing.reason for plan in (claims.plan, claims.with_cases(scaled).plan())]
    return ["percentile" in reason for reason in reasons] == [words == "its median", words != "its median"]


def any_ratio(claims: Claims, place: Place, axis: str) -> bool:
    return all(
        "percentile"
        not in claims.with_cases(
            lambda case, f=f: case.model_copy(  # type: ignore[misc]
                update={"spacing": tuple(mm * (f if "ZYX"[a] == axis else 1) for a, mm in enumerate(case.spacing))}
            )
        )
        .plan()
        .target_spacing.reason
        for f in (1, 4, 30, 300)
    )


def cropped(claims: Claims, place: Place, *_: str) -> bool:
    now = [case.relative_size_after_crop for case in claims.inputs.fingerprint.cases.values()]
    kept = 0.75 if sorted(now)[len(now) // 2] < 0.75 else 0.74
    other = claims.under(
        ("kept", kept),
        lambda: claims.with_cases(lambda case: case.model_copy(update={"relative_size_after_crop": kept})),
    )
    return other[place].value != claims.now[place].value


def agreeing(claims: Claims, place: Place, lacking: str, side: str, name: str) -> bool:
    """With labels that agree a little more or less than the limit, with what else is named, and not without it."""
    limit = 0.49 if side == "less" else 0.51

    def agreeing(case: CaseFacts) -> CaseFacts:
        held = {n: s.model_copy(update={"coherence": (limit,) * 3}) for n, s in case.structures.items()}
        return case.model_copy(update={"structures": held or {"organ": facts.structure(coherence=(limit,) * 3)}})

    altered = claims.kept(claims.with_cases(agreeing))
    if "one channel" in lacking:
        altered = of_channels(altered, altered.fingerprint.channel_names[:1])
    if "slices or more" in lacking:

        def three(case: CaseFacts) -> CaseFacts:
            shape = [3 if axis == claims.axis else side for axis, side in enumerate(case.shape_after_crop)]
            return case.model_copy(update={"shape": tuple(shape), "shape_after_crop": tuple(shape)})

        cases = {n: three(case) for n, case in altered.fingerprint.cases.items()}
        altered = replace(altered, fingerprint=altered.fingerprint.model_copy(update={"cases": cases}))
    return altered.plan().recommended.value == name != claims.now[place].value


def cohering(claims: Claims, place: Place, mm: str, now: str, depth: str) -> bool:
    other = dict(decisions(claims.with_cases(lambda case: _coherent(case, float(mm))).plan()))
    same = dict(decisions(claims.with_cases(lambda case: _coherent(case, float(now))).plan()))
    return other[place].value == int(depth) != same[place].value == claims.now[place].value


def _coherent(case: CaseFacts, mm: float) -> CaseFacts:
    held = case.structures or {"organ": facts.structure()}
    changed = {name: held[name].model_copy(update={"coherence_mm": (mm,) * 3}) for name in held}
    return case.model_copy(update={"structures": changed})


def any_cohering(claims: Claims, place: Place) -> bool:
    others = [
        dict(decisions(claims.with_cases(lambda case, mm=mm: _coherent(case, mm)).plan()))  # type: ignore[misc]
        for mm in (0.0, 1.0, 10.0, 1e4)
    ]
    return all(other[place].value == claims.now[place].value for other in others)


def wanted(claims: Claims, place: Place, now: str, typical: str, others: str) -> bool:
    """Without limits of hardware, slices of the sizes that are named want the inputs that are named."""
    sides = [(now, typical), *re.findall(r"(\d+) px for typical slices of (\d+) voxels", others)]
    spacing = facts_of_spacing(claims, place[1])
    for size, vox in sides:

        def sized(case: CaseFacts, vox: str = vox) -> CaseFacts:
            upright = turned(claims, case)
            shape = [max(n, 5) if a == claims.axis else int(vox) for a, n in enumerate(upright.shape_after_crop)]
            detail = [
                min(1.0, share * target / mm)
                for share, target, mm in zip(upright.effective_resolution, spacing, upright.spacing, strict=True)
            ]
            changes = {"spacing": spacing, "effective_resolution": tuple(detail)}
            return upright.model_copy(update={**changes, "shape": tuple(shape), "shape_after_crop": tuple(shape)})

        def altered(sized: Callable[[CaseFacts], CaseFacts] = sized) -> Inputs:
            unlimited = {"gpu_memory_gib": 1e6, "cpu_memory_gib": 1e6, "cpu_minutes": 1e9}
            return claims.kept(claims.with_cases(sized).with_budget(**unlimited), spacing=spacing)

        key = ("wanted", vox, spacing)
        if claims.under(key, altered)[place].value != int(size):
            return False
    return True


def facts_of_spacing(claims: Claims, name: str) -> tuple[float, float, float]:
    """A configuration's spacing by file axis."""
    spacing = claims.plan.configurations[name].spacing.value
    target = claims.plan.target_spacing.value
    order = [claims.axis, *(axis for axis in range(3) if axis != claims.axis)]
    by_axis = {axis: target[axis] if mm is None else mm for axis, mm in zip(order, spacing, strict=True)}
    return by_axis[0], by_axis[1], by_axis[2]


def holding(claims: Claims, place: Place, side: str, percent: str, words: str) -> bool:
    """A slice more or fewer in a hundred than the limit holds a structure."""
    share = int(percent) / 100 - 0.02 if side == "fewer than" else int(percent) / 100 + 0.02
    hundred = {"shape": 100, "shape_after_crop": 100, "num_foreground_slices": round(100 * share)}

    def holding(case: CaseFacts) -> CaseFacts:
        upright = turned(claims, case)
        sizes = {
            name: tuple(number if a == claims.axis else n for a, n in enumerate(getattr(upright, name)))
            for name, number in hundred.items()
        }
        return upright.model_copy(update=sizes)

    other = claims.under(("holding", share), lambda: claims.kept(claims.with_cases(holding)))
    value = other[place].value
    return value != claims.now[place].value and math.isclose(value, float(words), rel_tol=0.02)


def labelled(claims: Claims, slices: int) -> Planned:
    """The plan of a dataset with so many labelled slices, all in its first case."""
    names = sorted(claims.inputs.fingerprint.cases)

    def altered() -> Inputs:
        cases = {}
        for index, name in enumerate(names):
            case, number = turned(claims, claims.inputs.fingerprint.cases[name]), 0 if index else slices
            kept = {f: list(getattr(case, f)) for f in ("shape", "shape_after_crop", "num_foreground_slices")}
            kept["num_foreground_slices"][claims.axis] = number
            for field in ("shape", "shape_after_crop"):
                kept[field][claims.axis] = max(kept[field][claims.axis], number)
            cases[name] = case.model_copy(update={field: tuple(sides) for field, sides in kept.items()})
        return claims.kept(claims.of_cases(cases))

    return claims.under(("labelled", slices), altered)


def ranked(claims: Claims, place: Place, slices: str, now: str, rank: str) -> bool:
    whole = facts_of_plan(claims.plan, claims.inputs.fingerprint, configuration=place[1])
    other = labelled(claims, int(slices))[place].value.adapters[0].rank
    return whole.num_foreground_slices == int(now) and other == int(rank) != claims.now[place].value.adapters[0].rank


def any_rank(claims: Claims, place: Place, rank: str) -> bool:
    ranks = {labelled(claims, slices)[place].value.adapters[0].rank for slices in (1, 100, 10_000, 1_000_000)}
    return ranks == {int(rank)}
