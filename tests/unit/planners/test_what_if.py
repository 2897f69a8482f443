"""What-ifs are what they say: planned again under their condition, the decision is the one they name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from samunet.artifacts.fingerprint import CaseFacts, Fingerprint
from samunet.artifacts.plan import Decided, Plan
from samunet.planners import sizes
from samunet.planners.alterations import Place
from samunet.planners.edits import Edits, decisions
from samunet.planners.other_facts import _input_size, by_facts
from samunet.planners.planner import facts_of_plan, make_plan
from samunet.planners.rests_on import CONSTANT, METHOD
from samunet.planners.what_if import CPU_MINUTES, what_ifs
from samunet.planners.words import short
from tests import planning_facts as facts

CASES = [
    facts.case(
        shape=(30, 240, 240),
        spacing=(5, 1, 1),
        structures={"organ": facts.structure(coherence_mm=(12.0, 9.0, 9.0))},
    )
] * 10
BUDGET = {"gpu": 8.0, "cpu": 16.0, "minutes": 60.0}
AT = ("configurations", "2.5d", "recipes")


def plan(cases: list[CaseFacts] | None = None, **budget: float) -> Plan:
    return make_plan(measured(cases), facts.description(), facts.budget(**{**BUDGET, **budget}))


def measured(cases: list[CaseFacts] | None = None) -> Fingerprint:
    return facts.fingerprint(CASES if cases is None else cases)


@pytest.fixture(scope="module")
def found() -> Mapping[Place, tuple[str, ...]]:
    return what_ifs(plan(), measured())


def number(sentence: str, pattern: str) -> float:
    match = re.search(pattern, sentence)
    assert match, sentence
    return float(match[1])


def test_every_what_if_about_hardware_holds(found: Mapping[Place, tuple[str, ...]]) -> None:
    """Planning for the GPU, memory or minutes it names gives the value it names, which is not the planned one."""
    plans: dict[tuple[str, float], dict[Place, Any]] = {}
    checked = 0
    now = dict(decisions(plan()))
    for place, sentences in found.items():
        for sentence in sentences:
            match = re.fullmatch(r"with (\d+) (GiB|minutes): (.*)", sentence)
            if match is None:
                continue
            kind = {"minutes": "minutes", "GiB": place[-2]}[match[2]]
            key = (kind, float(match[1]))
            if key not in plans:
                plans[key] = dict(decisions(plan(**{key[0]: key[1]})))
            assert short(plans[key][place].value) == match[3] != short(now[place].value)
            checked += 1
    assert checked > 50
    assert {kind for kind, _ in plans} == {"gpu", "cpu", "minutes"}


def test_the_nearest_change_is_named(found: Mapping[Place, tuple[str, ...]]) -> None:
    """Sizes between the present and the one that is named decide alike."""
    place = (*AT, "none", "cpu", "input_size")
    minutes = sorted(
        int(number(sentence, r"with (\d+) minutes")) for sentence in found[place] if "minutes:" in sentence
    )
    now = dict(decisions(plan()))[place].value
    between = [m for m in CPU_MINUTES if m != 60 and (minutes[0] < m < 60 or 60 < m < minutes[-1])]
    assert minutes
    assert all(dict(decisions(plan(minutes=m)))[place].value == now for m in between)


def test_a_decision_that_hangs_on_nothing_has_no_what_if(found: Mapping[Place, tuple[str, ...]]) -> None:
    """Only an edit changes the loss, and only another method what is fused."""
    always = {"loss": (CONSTANT,), "decay": (CONSTANT,), "tile_overlap": (CONSTANT,), "fusion": (METHOD,)}
    assert all(sentences == always[place[-1]] for place, sentences in found.items() if place[-1] in always)


def test_memory_follows_the_hardware(found: Mapping[Place, tuple[str, ...]]) -> None:
    """A plan for a GPU of 4 GiB needs less than one for 8 GiB, and the page says so."""
    place = (*AT, "sam", "gpu", "memory_gib")
    assert any(re.fullmatch(r"with 4 GiB: [\d.]+|with 6 GiB: [\d.]+", sentence) for sentence in found[place])
    assert not any(sentence.startswith("the same") for sentence in found[place])


def test_no_configuration_is_named_that_is_not_planned() -> None:
    """Pictures have neither neighbours nor slabs, and only what would bring them speaks of these."""
    flat = [facts.case(shape=(1, 300, 300), spacing=(999.0, 1.0, 1.0))] * 4
    changes = what_ifs(plan(flat), measured(flat))
    words = re.compile(r"\b(2\.5d|3d|slab_depth)\b")
    named = [place for place, sentences in changes.items() if words.search(" ".join(sentences))]
    assert named == [("recommended",)]
    assert "3d" not in plan(flat).recommended.reason


def test_random_weights_have_one_rate(found: Mapping[Place, tuple[str, ...]]) -> None:
    """Neither rank nor batch is said to change it."""
    for device in ("gpu", "cpu"):
        assert not re.search("batch_size|rank", " ".join(found[*AT, "none", device, "learning_rate"]))
    assert not any("batch_size" in sentence for sentence in found[*AT, "sam", "cpu", "learning_rate"])


def test_the_ratio_of_spacings_is_the_rules(found: Mapping[Place, tuple[str, ...]]) -> None:
    """Below the ratio it names an anisotropic axis keeps its median, above it takes the percentile."""
    ratio = number(found["target_spacing",][0], r"with axis Z ([\d.]+) times")
    reasons = [
        plan([case.model_copy(update={"spacing": (ratio * factor, 1, 1)}) for case in CASES]).target_spacing.reason
        for factor in (1.03, 0.97)
    ]
    assert ["percentile" in reason for reason in reasons] == [True, False]


def test_pictures_are_told_the_rules_ratio_too() -> None:
    """However far 999 mm are from the threshold, the sentence names it and what is true beyond."""
    flat = [facts.case(shape=(1, 300, 300), spacing=(999.0, 1.0, 1.0))] * 4
    sentence = what_ifs(plan(flat), measured(flat))["target_spacing",][0]
    assert sentence.endswith("(now 999): its median")
    ratio = number(sentence, r"with axis Z ([\d.]+) times")
    for factor, is_thick in ((1.03, True), (0.97, False)):
        case = flat[0].model_copy(update={"spacing": (ratio * factor, 1.0, 1.0)})
        assert ("percentile" in plan([case] * 4).target_spacing.reason) == is_thick


def test_few_slices_are_told_how_many_another_rank_needs() -> None:
    """Forty times as many are named rather than none."""
    few = [facts.case(shape=(50, 240, 240), spacing=(5, 1, 1))] * 4
    assert rank_at(100) == rank_at(3990) < rank_at(4000)
    place = ("configurations", "2d", "recipes", "sam", "gpu", "encoder")
    (sentence,) = [s for s in what_ifs(plan(few), measured(few))[place] if "labelled" in s]
    assert abs(number(sentence, r"with (\d+) labelled slices \(now 100\)") - 4000) < 10


def test_the_slice_axis_changes_at_the_spacing_that_is_named() -> None:
    """A hair above it slices are stacked along the other axis."""
    cubes = [facts.case(shape=(100, 100, 100), spacing=(1.2, 1, 1))] * 4
    sentence = what_ifs(plan(cubes), measured(cubes))["frame",][0]
    match = re.fullmatch(r"with ([\d.]+) mm along axis (.) \(now 1\): axis (.)", sentence)
    assert match, sentence
    axis = "ZYX".index(match[2])

    def stacked(mm: float) -> int:
        spacing = [1.2, 1.0, 1.0]
        spacing[axis] = mm
        return plan([facts.case(shape=(100, 100, 100), spacing=tuple(spacing))] * 4).frame.value.slice_axis  # type: ignore[arg-type]

    assert stacked(float(match[1]) * 1.01) == "ZYX".index(match[3]) != stacked(1.0)


def test_labelled_slices_and_coherence_are_the_rules(found: Mapping[Place, tuple[str, ...]]) -> None:
    """The rank grows at the number of slices that is named, the slabs at the distance."""
    slices = number(found[(*AT, "sam", "gpu", "encoder")][0], r"with (\d+) labelled slices")
    assert rank_at(round(slices) + 10) == rank_at(round(slices) - 10) + 1
    sentence = found["configurations", "3d", "slab_depth"][0]
    mm, depth = number(sentence, r"over ([\d.]+) mm"), number(sentence, r": (\d)$")
    held = {"organ": facts.structure(coherence_mm=(mm, 9.0, 9.0))}
    changed = plan([case.model_copy(update={"structures": held}) for case in CASES])
    assert changed.configurations["3d"].slab_depth.value == depth != plan().configurations["3d"].slab_depth.value


def test_a_depth_is_named_for_the_shapes_that_it_is_planned_from() -> None:
    """Volumes that resampling would deepen are as shallow as they come, for the plan and for its page."""
    shallow = [facts.case(shape=(4, 240, 240), spacing=(9, 1, 1))] * 9
    finer = Decided[Any](value=(5.5, 1.0, 1.0), reason="finer", source="user")

    def planned(coherence_mm: float) -> tuple[Plan, Fingerprint]:
        held = {"organ": facts.structure(coherence_mm=(coherence_mm, 9.0, 9.0))}
        known = measured([case.model_copy(update={"structures": held}) for case in shallow])
        edits = Edits(choices={"target_spacing": finer})
        return make_plan(known, facts.description(), facts.budget(**BUDGET), edits=edits), known

    found, known = planned(40.0)
    now = found.configurations["3d"].slab_depth.value
    sentence = dict(by_facts(found, known))["configurations", "3d", "slab_depth"]
    mm, depth = number(sentence, r"over ([\d.]+) mm"), number(sentence, r": (\d)$")
    changed, _ = planned(mm)
    assert changed.configurations["3d"].slab_depth.value == depth != now


@pytest.mark.parametrize("side", [1, 2, 56, 61, 240, 1003, 3000])
def test_the_nearest_sizes_of_slices_are_named(side: int) -> None:
    """The search finds what trying every size would, below and above."""
    pictures = [facts.case(shape=(1, side, side), spacing=(999, 1, 1))] * 4
    found, known = plan(pictures), measured(pictures)
    facts_now = facts_of_plan(found, known)
    for grid in (sizes.SAM_GRID, *sizes.PATH_GRIDS.values()):

        def wanted(vox: int, grid: sizes.Grid = grid) -> int:
            return sizes.wanted_input(replace(facts_now.plane, typical_vox=vox), grid)[0]

        sentence = _input_size(facts_now, grid)
        now = wanted(side)
        above = [vox for vox in range(side + 1, 8 * side + 64) if wanted(vox) != now][:1]
        below = [vox for vox in range(side - 1, 0, -1) if wanted(vox) != now][:1]
        named = [int(vox) for vox in re.findall(r"typical slices of (\d+) voxels", sentence)]
        assert named == [*above, *below]


def test_huge_slices_are_not_searched_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few dozen sizes are tried, however large slices are."""
    tried: list[int] = []
    plane = sizes.InPlane(typical_vox=200_000, largest_vox=200_000, width_vox=0.0, area_vox=0.0, resolution=1.0)
    asked = sizes.wanted_input

    def counted(plane: sizes.InPlane, grid: sizes.Grid) -> tuple[int, str]:
        tried.append(plane.typical_vox)
        return asked(plane, grid)

    known = replace(facts_of_plan(plan(), measured()), plane=plane)
    monkeypatch.setattr(sizes, "wanted_input", counted)
    assert "px for typical slices of" in _input_size(known, sizes.SAM_GRID)
    assert len(tried) < 60


def rank_at(slices: int) -> int:
    """The planned rank of a dataset with so many labelled slices, in one case."""
    case = CASES[0].model_copy(update={"shape": (slices, 240, 240), "shape_after_crop": (slices, 240, 240)})
    found = plan([case.model_copy(update={"num_foreground_slices": (slices, 9, 9)})])
    return found.configuration("2d").recipes["sam"]["gpu"].encoder.value.adapters[0].rank


def test_the_sizes_of_slices_are_the_rules(found: Mapping[Place, tuple[str, ...]]) -> None:
    """Slices as large as it says want the input it says, where hardware allows it."""
    sentence = found[(*AT, "sam", "gpu", "input_size")][-1]
    size, side = (int(number(sentence, rf"; {p}")) for p in (r"(\d+) px", r"\d+ px for typical slices of (\d+)"))
    large = [case.model_copy(update={"shape_after_crop": (30, side, side)}) for case in CASES]
    assert plan(large, gpu=200.0).configuration().recipes["sam"]["gpu"].input_size.value == size


def test_the_other_thresholds_are_the_rules(found: Mapping[Place, tuple[str, ...]]) -> None:
    """Coherence, the nonzero crop and rare foreground change their decisions at the numbers that are named."""
    agree = number(found["recommended",][0], r"Dice ([\d.]+) or less")
    held = {"organ": facts.structure(coherence=(agree - 0.01,) * 3)}
    assert plan([case.model_copy(update={"structures": held}) for case in CASES]).recommended.value == "2d"
    kept = number(found["normalization",][0], r"less than ([\d.]+)")
    cropped = [case.model_copy(update={"relative_size_after_crop": kept - 0.01}) for case in CASES]
    assert plan(cropped).normalization.value[0].use_nonzero_mask
    sentence = found[(*AT, "none", "gpu", "foreground_fraction")][-1]
    rare = [case.model_copy(update={"num_foreground_slices": (7, 9, 9)}) for case in CASES]
    fraction = plan(rare).configuration().recipes["none"]["gpu"].foreground_fraction.value
    assert sentence.startswith("if fewer than 25%")
    assert sentence.endswith(f": {fraction:g}")
