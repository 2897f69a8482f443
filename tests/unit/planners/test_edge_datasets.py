"""Datasets that are odd in one way each: their plans, and what makes these sensible.

Golden plans are made by ``python -m tests.golden.edge_plans``.
"""

from __future__ import annotations

import json
import math
from functools import lru_cache

import numpy as np
import pytest

from samunet.artifacts.fingerprint import CaseFacts, Fingerprint
from samunet.artifacts.plan import Plan, Recipe
from samunet.core.geometry import ANATOMICAL_AXES
from samunet.planners import rules, sizes
from samunet.preprocessing.cropping import nonzero_crop
from samunet.preprocessing.normalization import normalize
from samunet.preprocessing.slicing import tile_positions
from tests import planning_facts as facts
from tests.edge_datasets import EDGE_DATASETS
from tests.golden import edge_plans


@lru_cache
def known(name: str) -> tuple[Fingerprint, Plan]:
    """Facts and plan of an edge dataset."""
    found = edge_plans.facts_of(name)
    return found[0], edge_plans.plan_of(found)


def case_facts(name: str) -> list[CaseFacts]:
    return list(known(name)[0].cases.values())


def recipes(name: str) -> list[tuple[str, str, Recipe]]:
    """Every recipe of an edge dataset with its configuration and device."""
    return [
        (configuration, device, recipe)
        for configuration, chosen in known(name)[1].configurations.items()
        for by_device in chosen.recipes.values()
        for device, recipe in by_device.items()
    ]


@pytest.mark.parametrize("name", edge_plans.NAMES)
def test_plans_are_the_golden_ones(name: str) -> None:
    """A rule that changes what is planned for an odd dataset changes its golden plan too."""
    golden = json.loads((edge_plans.FOLDER / f"{name}.json").read_text())
    found = json.loads(json.dumps(edge_plans.compact(known(name)[1])))
    assert found == golden, f"if this is meant: {edge_plans.SCRIPT}, and read the diff"


def test_every_golden_plan_has_its_dataset() -> None:
    """No file is left over from a dataset that is gone."""
    assert {path.stem for path in edge_plans.FOLDER.glob("*.json")} == set(edge_plans.NAMES)


@pytest.mark.parametrize("name", edge_plans.NAMES)
def test_every_plan_fits_its_budget(name: str) -> None:
    """On 8 GiB nothing is planned that is predicted to need more, and every number is finite."""
    for _, _, recipe in recipes(name):
        assert 0 < recipe.memory_gib.value <= 8.0
        bounds = (*recipe.intensity_map.value.lower, *recipe.intensity_map.value.upper)
        assert np.isfinite(bounds).all()
        assert np.isfinite(recipe.learning_rate.value)


def test_pictures_are_flat() -> None:
    """2D data have neither neighbours nor slabs, grey ones go in three times."""
    plan = known("pictures")[1]
    assert set(plan.configurations) == {"2d", "2d_medsam"}
    assert plan.configuration().channels.value == "repeat"
    assert plan.frame.value.slice_axis == 0


def test_colour_pictures_go_in_directly_and_have_no_up() -> None:
    """Three channels meet the encoder's three; discs all around the middle allow any angle."""
    plan = known("colour_pictures")[1]
    assert plan.configuration().channels.value == "direct"
    assert [n.scheme for n in plan.normalization.value] == ["rgb_to_01"] * 3
    assert all(recipe.augmentation.value.rotation_deg == 180 for _, _, recipe in recipes("colour_pictures"))


@pytest.mark.parametrize(("name", "number"), [("one_case", 1), ("two_cases", 2)])
def test_few_cases_get_full_plans(name: str, number: int) -> None:
    """One or two cases are planned like many: volumes, neighbours, slabs, and a batch of at least four slices."""
    found, plan = known(name)
    assert len(found.cases) == number
    assert {"2d", "2.5d", "3d"} < set(plan.configurations)
    assert all(recipe.batch_size.value >= 4 for _, _, recipe in recipes(name))


def test_a_label_in_one_case_still_counts() -> None:
    """The structure that a single case shows is known with its facts and has a token."""
    found, plan = known("label_in_one_case")
    assert [name for name, case in found.cases.items() if "cube" in case.structures] == ["case_2"]
    assert plan.label_spec.num_tokens == 3


def test_a_hundred_labels_fit_memory() -> None:
    """A hundred labels and the background are as many tokens, on a GPU of 8 GiB at sizes that resolve every voxel."""
    assert known("hundred_labels")[1].label_spec.num_tokens == 101
    found = [recipe for _, device, recipe in recipes("hundred_labels") if device == "gpu"]
    assert all(recipe.input_size.reason.endswith("resolves them") for recipe in found)


def test_three_slices_make_slabs_of_three() -> None:
    """No slab is deeper than the volumes; volumes that resampling leaves two slices have none."""
    assert known("three_slices")[1].configuration("3d").slab_depth.value == 3
    # own distances 1 and 2 mm, 2 mm after resampling: 2, 2, 3, 2 and 2 slices
    sizes = ((4, 1.0), (4, 1.0), (3, 2.0), (2, 2.0), (2, 2.0))
    cases = [facts.case(shape=(slices, 90, 90), spacing=(mm, 0.8, 0.8)) for slices, mm in sizes]
    thin = edge_plans.plan_of((facts.fingerprint(cases), facts.description()))
    assert "2.5d" in thin.configurations
    assert "3d" not in thin.configurations


def test_two_thousand_slices_take_no_more_memory() -> None:
    """Slices are batched, so a tall volume is planned with the sizes of a short one."""
    tall = {(c, d): (r.input_size.value, r.tile_vox.value) for c, d, r in recipes("two_thousand_slices") if c != "3d"}
    cases = [facts.case(shape=(200, 320, 320), spacing=(1, 0.9, 0.9))] * 4
    short = edge_plans.plan_of((facts.fingerprint(cases), facts.description())).configurations
    for (configuration, device), tall_sizes in tall.items():
        chosen = list(short[configuration].recipes.values())[-1][device]
        assert tall_sizes == (chosen.input_size.value, chosen.tile_vox.value)
    assert known("two_thousand_slices")[1].configuration("3d").slab_depth.value == 5


def test_four_channels_are_projected_without_neighbours() -> None:
    """More than three channels need a projection, and each keeps its own intensities."""
    plan = known("four_channels")[1]
    assert "2.5d" not in plan.configurations
    assert plan.configuration("3d").context_slices.value == 0
    assert plan.configuration().channels.value == "projection"
    lower = plan.configuration().recipes["sam"]["gpu"].intensity_map.value.lower
    assert len(set(lower)) == 4


def test_tenfold_spacing_is_judged_in_millimetres() -> None:
    """Cases of 67 to 667 pixels a side show the same 200 mm, so one tile at target spacing holds any of them."""
    assert {round(c.shape[1] * c.spacing[1]) for c in case_facts("tenfold_spacing")} <= {200, 201}
    sides = {recipe.tile_vox.value for _, device, recipe in recipes("tenfold_spacing") if device == "gpu"}
    assert max(sides) <= 202


def test_constant_images_stay_finite() -> None:
    """Images of one value, or of zeros, are normalized to finite voxels; no detail buys no larger input."""
    plan = known("constant_images")[1]
    for chosen in plan.configurations:
        for image, _ in EDGE_DATASETS["constant_images"]().cases:
            normalized = normalize(image.data, nonzero_crop(image.data).mask, plan.normalization_of(chosen))
            assert np.isfinite(normalized).all()
    for _, _, recipe in recipes("constant_images"):
        assert recipe.input_size.value == {"sam": 224, "side_path": 112}[recipe.decoder.value.upsampler]


def test_huge_pictures_are_tiled_with_tiles_that_fit() -> None:
    """4096 pixels a side are cut into overlapping tiles, whose decoder cells span no more than their grid allows."""
    for _, _, recipe in recipes("huge_pictures"):
        side = recipe.tile_vox.value
        grid = sizes.grid_of(recipe.method_parts())
        assert side <= math.ceil(4096 / 3)
        assert grid.stride * side / recipe.input_size.value <= grid.few_steps_cell_vox * sizes.TILE_SLACK
        corners = tile_positions((4096, 4096), side, 0.5)
        assert len(corners) >= 25
        assert max(row for row, _ in corners) + side == 4096


def test_labels_at_the_border_are_measured() -> None:
    """A structure that is cut by the border has a finite width and extent inside the image, on the slices it fills."""
    for case in case_facts("labels_at_the_border"):
        extent = np.array(case.shape) * case.spacing
        for structure in case.structures.values():
            assert 0 < structure.width_mm <= max(extent)
            assert np.all(np.array(structure.extent_mm) <= extent)
        assert case.num_foreground_slices[1:] == case.shape[1:]


def test_ignored_slices_never_count_as_labelled() -> None:
    """Slices and cases that are all ignored hold no structure and leave no trace in any statistic."""
    found, plan = known("all_ignore_slices")
    assert found.cases["case_1"].num_foreground_slices == (0, 0, 0)
    assert all(case.num_foreground_slices[0] <= 3 for case in found.cases.values())
    assert all(set(case.structures) <= {"ball"} for case in found.cases.values())
    shapes = rules.canonical_shapes(list(found.cases.values()), plan.frame.value, (1.0, 1.0))
    labelled = sum(case.num_foreground_slices[0] for case in found.cases.values())
    assert labelled / sum(shape[0] for shape in shapes) < rules.RARE_FOREGROUND
    assert plan.configuration().recipes["none"]["cpu"].foreground_fraction.value == rules.RARE_FOREGROUND_FRACTION
    assert plan.label_spec.num_tokens == 2


def test_turned_cases_count_their_own_slices() -> None:
    """Labelled slices of a case that is stored along other axes are counted across the axis it is turned to."""
    usual = facts.case(shape=(20, 100, 100), spacing=(5, 1, 1))
    turned = facts.case(shape=(100, 100, 20), spacing=(1, 1, 5), codes=("R", "A", "S"))
    turned = turned.model_copy(update={"num_foreground_slices": (50, 50, 4)})
    usual = usual.model_copy(update={"num_foreground_slices": (4, 50, 50)})
    plans = [
        edge_plans.plan_of((facts.fingerprint(cases), facts.description()))
        for cases in ([usual, usual, usual], [usual, usual, turned])
    ]
    reasons = [plan.configuration("2d").recipes["sam"]["gpu"].epochs.reason for plan in plans]
    assert "12 labelled slices" in reasons[0]
    assert reasons[0] == reasons[1]


def test_mirror_axes_are_known_names() -> None:
    """Every edge plan names anatomical axes, all of them where no structures form a pair."""
    assert all(set(known(name)[1].mirror_axes.value) <= set(ANATOMICAL_AXES) for name in edge_plans.NAMES)
    assert known("one_case")[1].mirror_axes.value == ANATOMICAL_AXES
