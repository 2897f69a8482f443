"""From a request to a method: the folder's name, and which configuration is trained."""

from __future__ import annotations

from typing import Any

import pytest

from samunet.artifacts.plan import Plan
from samunet.core.errors import UsageError
from samunet.pipeline.methods import default_configuration, run_label
from samunet.pipeline.training_run import TrainingRequest
from samunet.planners.method_recipes import preset_recipe
from samunet.planners.planner import make_plan
from samunet.planners.presets import PRESETS
from tests import planning_facts as facts

PICTURES = facts.fingerprint([facts.case(shape=(1, 200, 300), spacing=(999.0, 1.0, 1.0))] * 6)
IN_SLABS = [name for name, preset in PRESETS.items() if preset.configuration == "3d"]


@pytest.fixture(scope="module")
def pictures() -> Plan:
    """Of single slices, for which no slabs are planned."""
    return make_plan(PICTURES, facts.description(), facts.budget())


def label(preset: str = "samed", **asked: Any) -> str:
    return run_label(TrainingRequest("Dataset999_Test", "0", preset=preset, **asked))


@pytest.mark.parametrize("preset", ["samed", "samed_s", "auto"])
def test_runs_of_different_ranks_have_folders_of_their_own(preset: str) -> None:
    """No rank, and every rank, with and without other changes, on all cases and on some."""
    changes = {"encoder.adapters.0.targets": ["q"]}
    asked: list[dict[str, Any]] = [
        {},
        {"rank": 4},
        {"rank": 16},
        {"rank": 16, "changes": changes},
        {"rank": 16, "num_cases": 5},
    ]
    assert len({label(preset, **words) for words in asked}) == len(asked)
    assert label(preset) == preset
    assert label(preset, rank=16, num_cases=5) == f"{label(preset, rank=16)}-n5"


def test_a_rank_and_the_changes_it_stands_for_share_a_folder() -> None:
    """Both spellings of one method of a preset are continued as one run; the encoder's rank alone is another."""
    encoder = {"encoder.adapters.0.rank": 16}
    assert label(rank=16) == label(changes=encoder)
    assert label("samed_s", rank=16) == label("samed_s", changes={**encoder, "decoder.rank": 16})
    assert label("samed_s", rank=16) != label("samed_s", changes=encoder)
    assert label(rank=16, changes={"encoder.adapters.0.rank": 8}) == label(changes=encoder)


def test_a_rank_that_replaces_ranks_is_told_from_one_beside_them() -> None:
    """--rank means that rank in every block, --set of both keeps both: two methods, two folders."""
    ranks = {"encoder.adapters.0.ranks": [2] * 12}
    assert label(changes=ranks, rank=3) != label(changes={**ranks, "encoder.adapters.0.rank": 3})


def test_a_rank_that_nothing_reads_is_refused_before_a_folder_is_named() -> None:
    """As when the method is planned."""
    with pytest.raises(UsageError, match="no low-rank adapters"):
        label("sam_decoder", rank=8)


@pytest.mark.parametrize("name", IN_SLABS)
def test_presets_in_slabs_say_what_helps_where_there_are_none(pictures: Plan, name: str) -> None:
    """Single slices, or the same method without its depth mechanism; both can be planned then."""
    with pytest.raises(UsageError, match="needs configuration 3d") as caught:
        default_configuration(TrainingRequest(pictures.dataset, "0", preset=name), pictures)
    todo = caught.value.todo or ""
    assert "-c 2d" in todo
    assert "plan again" not in todo
    others = [other for other in PRESETS if f"--preset {other}," in todo]
    assert others == {"med_sa": ["med_sa_2d"], "med_sa_depth": ["med_sa_plain"]}.get(name, [])
    for preset in (PRESETS[name], *(PRESETS[other] for other in others)):
        for device in ("cpu", "gpu"):
            recipe = preset_recipe(
                preset,
                pictures,
                PICTURES,
                configuration="2d",
                weights=preset.weights,
                device=device,
            )
            assert recipe.method_parts() == preset.method
    for other in others:
        assert default_configuration(TrainingRequest(pictures.dataset, "0", preset=other), pictures) == "2d"
