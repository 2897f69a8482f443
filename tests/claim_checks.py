"""Checks of every kind of sentence about what would change a plan, by planning again."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from samunet.artifacts.augmentation import Augmentation
from samunet.artifacts.fingerprint import CaseFacts, MirrorPair
from samunet.artifacts.method import PromptMethod
from samunet.artifacts.plan import Decided
from samunet.planners.alterations import Place, Planned
from samunet.planners.rests_on import CONSTANT, EDIT, METHOD, MINUTES
from tests import claims_about_data as about
from tests.planned_claims import PAIR, Claims, becomes, of_channels

Check = Callable[..., bool]


def _hardware(claims: Claims, place: Place, size: str, unit: str, words: str) -> bool:
    kind = "cpu_minutes" if unit == "minutes" else f"{place[-2]}_memory_gib"
    other = claims.under((kind, float(size)), lambda: claims.inputs.with_budget(**{kind: float(size)}))
    fact = MINUTES if unit == "minutes" else f"{place[-2].upper()} memory"
    return becomes(claims, place, other, words, fact)


def _same(claims: Claims, place: Place, sizes: str) -> bool:
    others = [
        claims.under(("gpu_memory_gib", gib), lambda gib=gib: claims.inputs.with_budget(gpu_memory_gib=gib))  # type: ignore[misc]
        for gib in map(float, re.findall(r"\d+", sizes))
    ]
    return len(others) > 5 and all(other[place].value == claims.now[place].value for other in others)


def _times_over(claims: Claims, place: Place, times: str, words: str) -> bool:
    cases = claims.inputs.fingerprint.cases
    more = {f"{copy}_{name}": case for name, case in cases.items() for copy in range(int(times))}
    return becomes(claims, place, claims.under(("over", times), lambda: claims.of_cases(more)), words, "slices")


def _every(claims: Claims, place: Place, step: str, words: str) -> bool:
    kept = sorted(claims.inputs.fingerprint.cases.items())[:: int(step)]
    return becomes(claims, place, claims.under(("every", step), lambda: claims.of_cases(dict(kept))), words, "slices")


def _longer(claims: Claims, place: Place, times: str, words: str) -> bool:
    def longer(case: CaseFacts) -> CaseFacts:
        names = ("shape", "shape_after_crop", "num_foreground_slices")
        scale = [int(times) if axis == claims.axis else 1 for axis in range(3)]
        sizes = {n: tuple(a * b for a, b in zip(getattr(case, n), scale, strict=True)) for n in names}
        return case.model_copy(update=sizes)

    other = claims.under(("longer", times), lambda: claims.with_cases(longer))
    return becomes(claims, place, other, words, "shape")


def _renamed(claims: Claims, place: Place, before: str, after: str, words: str) -> bool:
    first, *rest = claims.inputs.fingerprint.channel_names
    other = claims.under(("renamed", after), lambda: of_channels(claims.inputs, (after, *rest)))
    return first == before and becomes(claims, place, other, words, "channels")


def _num_channels(claims: Claims, place: Place, number: str, words: str) -> bool:
    names = claims.inputs.fingerprint.channel_names
    other = claims.under(("channels", number), lambda: of_channels(claims.inputs, (*names, *names * 3)[: int(number)]))
    return becomes(claims, place, other, words, "channels")


def _pairs(claims: Claims, *pairs: MirrorPair) -> Planned:
    known = claims.inputs.fingerprint.model_copy(update={"mirror_pairs": pairs})
    return claims.under(("pairs", *pairs), lambda: replace(claims.inputs, fingerprint=known))


def _swapped(claims: Claims, place: Place, words: str) -> bool:
    before = claims.inputs.fingerprint.mirror_pairs
    return becomes(claims, place, _pairs(claims, *before, PAIR), words, "mirror pairs")


def _unswapped(claims: Claims, place: Place, words: str) -> bool:
    return becomes(claims, place, _pairs(claims), words, "mirror pairs")


def _not_mirrored(claims: Claims, place: Place, axis: str) -> bool:
    before = claims.inputs.fingerprint.mirror_pairs
    other = _pairs(claims, *before, PAIR.model_copy(update={"axis": axis}))
    return axis in claims.now[place].value and axis not in other[place].value


def _tilted(claims: Claims, place: Place, degrees: str, words: str) -> bool:
    def tilted(case: CaseFacts) -> CaseFacts:
        return case.model_copy(update={"tilt_deg": float(degrees)})

    other = claims.under(("tilt", degrees), lambda: claims.with_cases(tilted))
    assert isinstance(other[place].value, Augmentation)
    return becomes(claims, place, other, words, "obliqueness")


def _edit(claims: Claims, place: Place, field: str, value: str, words: str) -> bool:
    named = f"{field} {value}"
    if field in ("slab_depth", "context_slices"):
        return becomes(claims, place, claims.edited(place, field, int(value), named), words)
    return becomes(claims, place, claims.edited_recipes(field, lambda _: int(value), named), words)


def _rank(claims: Claims, place: Place, rank: str, words: str) -> bool:
    def ranked(at: Place) -> Any:
        encoder = claims.now[(*at[:-1], "encoder")].value
        lora = encoder.adapters[0].model_copy(update={"rank": int(rank), "ranks": None})
        return encoder.model_copy(update={"adapters": (lora, *encoder.adapters[1:])})

    return becomes(claims, place, claims.edited_recipes("encoder", ranked, f"LoRA's rank {rank}"), words)


def _train(claims: Claims, place: Place, train: str, words: str) -> bool:
    def trained(at: Place) -> Any:
        return claims.now[(*at[:-1], "encoder")].value.model_copy(update={"train": train})

    return becomes(claims, place, claims.edited_recipes("encoder", trained, f"encoder.train {train}"), words)


def _prompted(claims: Claims, place: Place, words: str) -> bool:
    box = PromptMethod(kind="box")
    return becomes(claims, place, claims.edited_recipes("prompts", lambda _: box, "prompts (prompts.kind)"), words)


def _input(claims: Claims, place: Place, size: str, words: str) -> bool:
    number = int(re.findall(r"\d+", size)[0])
    sizes = (number // 2, number - 16) if size.startswith("below") else (number, number + 224)
    named = f"input_size {size}"
    others = (claims.edited_recipes("input_size", lambda _, s=s: s, f"{named}, {s}", named) for s in sizes)  # type: ignore[misc]
    return all(becomes(claims, place, other, words) for other in others)


def _beside(claims: Claims, place: Place, other: Place, words: str) -> bool:
    return becomes(claims, place, {place: claims.now[other]}, words)


def _in_configuration(claims: Claims, place: Place, name: str, words: str) -> bool:
    return _beside(claims, place, ("configurations", name, *place[2:]), words)


def _with_weights(claims: Claims, place: Place, weights: str, words: str) -> bool:
    return _beside(claims, place, (*place[:3], weights, *place[4:]), words)


def _on_device(claims: Claims, place: Place, device: str, words: str) -> bool:
    return _beside(claims, place, (*place[:4], device.lower(), *place[5:]), words)


def _minutes_on_gpu(claims: Claims, place: Place) -> bool:
    other = claims.under(("cpu_minutes", 601.0), lambda: claims.inputs.with_budget(cpu_minutes=601.0))
    return place[-2] == "gpu" and other[place].value is None is claims.now[place].value


def _minutes_on_cpu(claims: Claims, place: Place) -> bool:
    other = claims.under(("cpu_minutes", 601.0), lambda: claims.inputs.with_budget(cpu_minutes=601.0))
    return place[-2] == "cpu" and other[place].value == 601.0 != claims.now[place].value


def _target(claims: Claims, place: Place) -> bool:
    spacing = tuple(2 * mm for mm in claims.plan.target_spacing.value)
    edit = {"target_spacing": Decided[Any](value=spacing, reason="edited", source="user")}
    kept = claims.kept(claims.inputs)
    edits = replace(kept.edits, choices={**kept.edits.choices, **edit})
    other = claims.under(("target", "twice"), lambda: replace(kept, edits=edits))
    return other[place].value != claims.now[place].value


def _always(_: Claims, place: Place) -> bool:
    """An edit of an entry changes that entry; a method is made of these five."""
    return True


def _method(_: Claims, place: Place) -> bool:
    return place[-1] in ("encoder", "depth", "decoder", "prompts", "fusion")


NUMBER = r"([\d.e+]+)"
CHECKS: list[tuple[str, Callable[..., bool]]] = [
    (rf"with {NUMBER} (GiB|minutes): (.+)", _hardware),
    (r"the same with (.+) GiB", _same),
    (r"with the dataset (\d+) times over: (.+)", _times_over),
    (r"with every (\d+)th case only: (.+)", _every),
    (r"with (\d+) times as many slices in each volume: (.+)", _longer),
    (r"with channel (.+) named (.+) in dataset\.json: (.+)", _renamed),
    (r"with (\d+) channels: (.+)", _num_channels),
    (r"with a left and a right structure that mirroring swaps: (.+)", _swapped),
    (r"with no structures that mirroring swaps: (.+)", _unswapped),
    (r"with a pair of structures that a (.+) reflection swaps, by name or place: not \1", _not_mirrored),
    (r"without pairs of structures that a reflection swaps: (.+)", _unswapped),
    (rf"with cases that lie {NUMBER} degrees obliquely: (.+)", _tilted),
    (r"with (batch_size|input_size|slab_depth|context_slices) (\d+): (.+)", _edit),
    (r"with LoRA's rank (\d+): (.+)", _rank),
    (r"with encoder\.train (\w+): (.+)", _train),
    (r"with prompts \(prompts\.kind\): (.+)", _prompted),
    (r"with input_size (\d+ or more|below \d+): (.+)", _input),
    (r"in (\S+): (.+)", _in_configuration),
    (r"with weights (\S+): (.+)", _with_weights),
    (r"on a (GPU|CPU): (.+)", _on_device),
    (
        rf"with (a target_spacing of |a median of |){NUMBER} mm along axis (.) \(now {NUMBER}\): axis (.)",
        about.spaced,
    ),
    (r"whatever the spacing: only one axis has a single slice", about.any_spacing),
    (rf"with axis (.) {NUMBER} times coarser than the others \(now {NUMBER}\): (.+)", about.ratio),
    (r"however coarse axis (.) is, its median: .+", about.any_ratio),
    (r"if the crop to nonzero kept (.+) of a typical image.* \(now .+\): over (.+)", about.cropped),
    (r"with (.*)labels of neighbouring slices that agree with Dice.* (more|less).*\(now .+\): (.+)", about.agreeing),
    (
        rf"with labels that agree with Dice one half over {NUMBER} mm along the slice axis \(now {NUMBER}\): (\d+)",
        about.cohering,
    ),
    (r"however far labels cohere: volumes are too short for another depth", about.any_cohering),
    (r"without limits of hardware (\d+) px for (\d+) voxels; (.+)", about.wanted),
    (r"if (fewer than|)\s?(\d+)% of slices.* held a structure \(now .+\): (.+)", about.holding),
    (r"with (\d+) labelled slices \(now (\d+)\): rank (\d+)", about.ranked),
    (r"no number of labelled slices: rank (\d+) is set by the structures", about.any_rank),
    (r"--time-limit when training, or an edit; --minutes when planning is for CPUs only", _minutes_on_gpu),
    (r"--minutes when planning, --time-limit when training", _minutes_on_cpu),
    (r"another target_spacing", _target),
    (re.escape(METHOD), _method),
    (rf"{EDIT}|--backbone, or an edit|{re.escape(CONSTANT)}", _always),
]


def holds(claims: Claims, place: Place, sentence: str) -> bool:
    for pattern, check in CHECKS:
        if match := re.fullmatch(pattern, sentence):
            return check(claims, place, *match.groups())
    raise AssertionError(f"no check knows the sentence of {'.'.join(place)}: {sentence}")
