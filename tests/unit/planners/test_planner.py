"""Whole plans, above all for odd datasets."""

from __future__ import annotations

import subprocess
import sys

import pytest

from samunet.artifacts.fingerprint import CaseFacts, Fingerprint
from samunet.artifacts.plan import DEVICE_CLASSES, WEIGHTS_KINDS, Plan, ResolvedRecipe, resolve_recipe
from samunet.planners import recipes, schedule, sizes
from samunet.planners.explain import explain, summary
from samunet.planners.planner import facts_of_plan, make_plan
from tests import planning_facts as facts


def plan(cases: list[CaseFacts], *, channels: tuple[str, ...] = ("MRI",), **budget: float) -> Plan:
    return make_plan(
        facts.fingerprint(cases, channels=channels), facts.description(channels=channels), facts.budget(**budget)
    )


def recipe(found: Plan, weights: str = "none", device: str = "cpu") -> ResolvedRecipe:
    return resolve_recipe(found.configuration(), weights, device)


def test_a_volume_dataset_plans_both_configurations() -> None:
    """One channel and many slices give 2d and 2.5d, each with a recipe for every weights and device."""
    found = plan([facts.case()] * 5)
    assert list(found.configurations) == ["2d", "2.5d", "3d", "2d_medsam"]
    assert found.recommended.value == "2.5d"
    assert found.configurations["2.5d"].context_slices.value == 1
    assert found.configurations["2d"].channels.value == "repeat"
    for name, configuration in found.configurations.items():
        kinds = {"medsam", "sam"} if name == "2d_medsam" else set(WEIGHTS_KINDS)
        assert set(configuration.recipes) == kinds
        assert all(set(devices) == set(DEVICE_CLASSES) for devices in configuration.recipes.values())
    assert found.store_key("2d") == found.store_key("2.5d")


def test_flat_rgb_images() -> None:
    """2D RGB goes to the encoder directly and eight bits straight to SAM's pixel statistics."""
    found = plan(
        [facts.case(shape=(1, 300, 400), spacing=(999, 1, 1))] * 8, channels=("rgb_to_0_1", "rgb_to_0_1", "rgb_to_0_1")
    )
    assert list(found.configurations) == ["2d", "2d_medsam"]
    assert found.configuration().channels.value == "direct"
    assert recipe(found, "sam", "gpu").intensity_map.lower == (0.0, 0.0, 0.0)
    assert recipe(found, "sam", "gpu").intensity_map.upper == (1.0, 1.0, 1.0)


def test_one_case_without_foreground() -> None:
    """A single unlabelled case is planned for all the same."""
    data = facts.fingerprint([facts.case(structures={})], foreground=False)
    found = make_plan(data, facts.description(), facts.budget())
    assert found.recommended.value == "2d"
    assert recipe(found, "sam", "gpu").intensity_map.upper[0] > recipe(found, "sam", "gpu").intensity_map.lower[0]


def test_very_thin_and_very_tall_volumes() -> None:
    """Three slices allow neighbours, two do not; two thousand slices change no size."""
    assert "2.5d" in plan([facts.case(shape=(3, 100, 100), spacing=(5, 1, 1))]).configurations
    assert "2.5d" not in plan([facts.case(shape=(2, 100, 100), spacing=(5, 1, 1))]).configurations
    tall = plan([facts.case(shape=(2000, 100, 100), spacing=(5, 1, 1))])
    assert recipe(tall).input_size == recipe(plan([facts.case(shape=(20, 100, 100), spacing=(5, 1, 1))])).input_size


def test_four_channels_are_projected() -> None:
    """More channels than three go through a projection and get no neighbours."""
    found = plan([facts.case()] * 3, channels=("T1", "T1c", "T2", "FLAIR"))
    assert list(found.configurations) == ["2d", "3d", "2d_medsam"]
    assert found.configuration().channels.value == "projection"
    assert len(recipe(found, "sam", "gpu").intensity_map.lower) == 4


def test_a_hundred_labels_and_regions() -> None:
    """Many labels raise the rank and the memory; overlapping regions plan like labels."""
    labels = {"background": 0, **{f"label_{i}": i for i in range(1, 101)}}
    data = facts.fingerprint([facts.case()] * 4)
    many = make_plan(data, facts.description(labels=labels), facts.budget())
    few = make_plan(data, facts.description(), facts.budget())
    ranks = [recipe(p, "sam", "gpu").method.adapter("lora").rank for p in (many, few)]
    assert ranks[0] > ranks[1]
    assert recipe(many).memory_gib > recipe(few).memory_gib
    regions = facts.description(labels={"background": 0, "whole": [1, 2], "core": 2}, order=[1, 2])
    assert make_plan(data, regions, facts.budget()).label_spec.num_tokens == 2


def test_spacing_that_varies_tenfold() -> None:
    """Sizes are judged at target spacing: a finely sampled case is no larger than the others in millimetres."""
    fine = facts.case(shape=(20, 1000, 1000), spacing=(5, 0.1, 0.1))
    usual = facts.case(shape=(20, 100, 100), spacing=(5, 1, 1))
    assert recipe(plan([usual, usual, fine])).tile_vox == 100


def test_pathology_like_images_are_tiled() -> None:
    """4096 voxels a side are cut into tiles on every device, on a CPU with coarser cells."""
    found = plan([facts.case(shape=(1, 4096, 4096), spacing=(999, 1, 1))] * 3)
    for device in DEVICE_CLASSES:
        chosen = recipe(found, "sam", device)
        assert chosen.tile_vox < 1200
        assert chosen.tile_vox * 4 / chosen.input_size < {"gpu": 4.7, "cpu": 5.8}[device]
        # beside the side path of random weights a cell is two pixels
        chosen = recipe(found, "none", device)
        assert chosen.tile_vox < 1400
        assert chosen.tile_vox / chosen.input_size < 2.9


def test_a_cpu_gets_enough_steps() -> None:
    """Few minutes shrink the steps' slices, then the input; 448 px is the most within the default minutes."""
    cases = [facts.case(shape=(30, 500, 500), spacing=(5, 1, 1))] * 10
    for weights, least in (("sam", schedule.LEAST_CPU_STEPS), ("none", sizes.PATH_GRIDS[2].least_steps)):
        found = {minutes: recipe(plan(cases, minutes=minutes), weights) for minutes in (60.0, 600.0, 60000.0)}
        inputs = [one.input_size for one in found.values()]
        assert inputs == sorted(inputs)
        assert inputs[0] <= recipes.CPU_INPUT_CAP < inputs[-1]
        assert all(one.iterations * one.epochs >= least for one in found.values())
    assert recipe(plan(cases, minutes=1.0), "none").input_size == sizes.PATH_GRIDS[2].smallest
    assert recipe(plan(cases), "sam", "gpu").input_size == 1120


def test_batch_norm_that_trains_gets_eight_slices() -> None:
    """TinyViT from random weights never sees fewer than eight slices per forward where memory allows it."""
    found = plan([facts.case(shape=(5, 200, 200), spacing=(5, 1, 1))] * 3)
    for device in DEVICE_CLASSES:
        chosen = recipe(found, "none", device)
        assert chosen.batch_size // chosen.accumulation_steps >= 8


def test_detail_is_that_of_the_finer_axis_in_the_target_grid() -> None:
    """Fewer cells are enough only where neither axis in plane has more detail, measured against the target spacing."""

    def detail(spacing: tuple[float, float], share: tuple[float, float]) -> float:
        fine = facts.case(shape=(20, 300, 300), spacing=(5.0, 0.62, 0.62))
        odd = facts.case(shape=(20, 300, 300), spacing=(5.0, *spacing), resolution=(1.0, *share))
        data = facts.fingerprint([odd, odd, odd, fine, fine, fine, fine])
        found = plan_of(data)
        assert found.target_spacing.value[1:] == (0.62, 0.62)
        only = data.model_copy(update={"cases": {"a": odd}})
        return facts_of_plan(found, only).plane.resolution

    assert detail((0.62, 0.62), (1.0, 0.62)) == 1.0
    assert detail((0.62, 1.0), (1.0, 1.0)) == 1.0
    assert detail((1.0, 1.0), (1.0, 1.0)) == pytest.approx(0.62)
    assert detail((0.62, 0.62), (0.5, 0.62)) == pytest.approx(0.62)
    assert detail((0.31, 0.31), (0.4, 0.4)) == pytest.approx(0.8)


def plan_of(data: Fingerprint) -> Plan:
    return make_plan(data, facts.description(), facts.budget())


def test_too_little_memory_is_said() -> None:
    """Where nothing fits, the smallest plan is made and its reason warns."""
    found = plan([facts.case()] * 3, gpu=1.0)
    chosen = found.configuration().recipes["sam"]["gpu"]
    assert chosen.input_size.value == 112
    assert chosen.checkpointing.value
    assert "may need more" in chosen.batch_size.reason


def test_larger_inputs_say_what_stopped_them() -> None:
    """The reason of a reduced input names the size that did not fit and why."""
    cases = [facts.case(shape=(30, 240, 240), spacing=(5, 1, 1))] * 10
    small = plan(cases, gpu=1.5).configuration().recipes["sam"]["gpu"].input_size
    assert small.value < 896
    assert "does not fit 1.5 GiB" in small.reason


def test_explanation_names_every_decision() -> None:
    """The text holds each field of the explained recipes, each recipe's line, and the facts behind them."""
    data = facts.fingerprint([facts.case()] * 5)
    found = make_plan(data, facts.description(), facts.budget())
    text = explain(found, data)
    assert all(name in text for name in type(found.configuration().recipes["sam"]["gpu"]).model_fields)
    assert found.mirror_axes.reason in " ".join(text.split())
    assert all(kind in summary(found) for kind in WEIGHTS_KINDS)
    assert max(map(len, text.splitlines())) <= 140


def test_the_same_facts_give_the_same_plan() -> None:
    """Planning twice gives equal plans with equal hashes."""
    assert plan([facts.case()] * 3) == plan([facts.case()] * 3)


def test_planning_imports_no_torch() -> None:
    """A plan can be made where torch is slow to import or broken."""
    code = (
        "import sys; from samunet.planners import explain, planner, hardware; import samunet.pipeline.plan;"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("weights", WEIGHTS_KINDS)
def test_every_kind_of_weights_knows_its_backbone(weights: str) -> None:
    """A backbone is planned for weights only if such weights exist for it."""
    from samunet.artifacts.model_spec import get_spec

    chosen = recipe(plan([facts.case()] * 3), weights, "gpu")
    assert weights == "none" or weights in get_spec(chosen.backbone).pretrained
