"""The regret benchmark: what it varies, what it runs again, how it scores, and that a partial result says so."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import cells as running
from benchmarks import regret
from benchmarks.cells import Cell, paired_points
from benchmarks.regret import DATASETS, FRESH_SEEDS, Study, best_other, divide, folds_to_use, run_study, summary, table
from benchmarks.variants import (
    MOST_OTHERS,
    PLANNED,
    RANKS,
    Settings,
    install,
    larger,
    rank_variants,
    scratch_variants,
    settings,
    smaller,
)
from samunet.artifacts.plan import Plan, load_plan, save_plan
from samunet.artifacts.workspace import Workspace
from samunet.core.config import save_schema
from samunet.core.files import read_json, write_json
from samunet.pipeline import methods
from samunet.planners.planner import make_plan
from samunet.planners.sizes import PATH_GRIDS, SAM_GRID, Grid, grid_of
from tests.planning_facts import budget, case, description, fingerprint

FACTS = fingerprint([case(shape=(30, 120, 120), spacing=(3.0, 1.0, 1.0))] * 6)
NAME = FACTS.dataset


@pytest.fixture(scope="module")
def plan() -> Plan:
    """A plan with all configurations for three minutes."""
    return make_plan(FACTS, description(), budget(minutes=3))


@pytest.fixture
def source(tmp_path: Path, plan: Plan) -> Workspace:
    """A workspace with that plan and an empty store."""
    workspace = Workspace.locate(workspace=tmp_path / "source", environment={})
    save_plan(plan, workspace.plan_file(NAME))
    save_schema(FACTS, workspace.fingerprint_file(NAME))
    write_json(workspace.description_file(NAME), {})
    write_json(workspace.splits_file(NAME), [{"train": [], "val": []}] * 5)
    workspace.store_folder(NAME, plan.store_key("2d")).mkdir()
    return workspace


def test_at_most_twelve_others_each_different(plan: Plan) -> None:
    """The plan is first; size, context, depth and rate are varied, and with the ranks there are twelve at most."""
    made = [*scratch_variants(plan), *rank_variants(plan)[1:]]
    names = [variant.name for variant in made]
    assert names[0] == PLANNED
    assert len(set(names)) == len(names) <= 1 + MOST_OTHERS
    assert {v.configuration for v in made} == {"2d", "2.5d", "3d"}
    assert {v.rate_factor for v in made} == {1 / 3, 1.0, 3.0}
    assert {v.rank for v in made} == {None, *RANKS}
    recipe = plan.configuration().recipes["none"]["cpu"]
    planned, grid = recipe.input_size.value, grid_of(recipe.method_parts())
    assert {v.input_size for v in made} == {None, smaller(planned, grid), larger(planned, grid)}
    assert len({replace(v, name="") for v in made}) == len(made)


@pytest.mark.parametrize(
    ("grid", "size", "below", "above"),
    [
        (SAM_GRID, 224, 112, 448),
        (SAM_GRID, 672, 448, 1120),
        (PATH_GRIDS[2], 112, 48, 224),
        (PATH_GRIDS[2], 336, 224, 560),
    ],
)
def test_other_inputs(grid: Grid, size: int, below: int, above: int) -> None:
    """About two thirds and one and a half of the planned size, on its grid; below its smallest, half."""
    assert (smaller(size, grid), larger(size, grid)) == (below, above)


def test_the_copy_trains_with_what_was_asked(source: Workspace, tmp_path: Path, plan: Plan) -> None:
    """Stores are linked, the plan's own file stays, and every variant resolves to its own settings and key."""
    target = Workspace(tmp_path, tmp_path / "copy", tmp_path / "results")
    variants = scratch_variants(plan)
    before = source.plan_file(NAME).read_bytes()
    copied = install(variants, NAME, source, target)
    assert source.plan_file(NAME).read_bytes() == before
    assert load_plan(target.plan_file(NAME)) == copied
    assert target.store_folder(NAME, copied.store_key("2d")).resolve() == source.store_folder(
        NAME, plan.store_key("2d")
    )
    found = {v.name: settings(v, copied, target, base=None, minutes=3) for v in variants}
    assert len({chosen.key for chosen in found.values()}) == len(variants)
    for variant in variants:
        chosen = found[variant.name]
        assert copied.store_key(variant.trained_configuration) == plan.store_key(variant.configuration)
        assert chosen.words[:4] == ("-c", variant.trained_configuration, "--weights", "none")
        assert ("--lr" in chosen.words) == (variant.rate_factor != 1)
        if variant.input_size is not None:
            assert chosen.facts["input_size"] == variant.input_size
            recipes = [
                p.configuration(n).recipes["none"]["cpu"]
                for p, n in ((copied, variant.trained_configuration), (plan, variant.configuration))
            ]
            assert recipes[0].tile_vox.value == recipes[1].tile_vox.value
    planned = found[PLANNED].facts["learning_rate"]
    assert found["lr x 3"].facts["learning_rate"] == pytest.approx(3 * planned, rel=1e-2)
    again = settings(variants[0], copied, target, base=None, minutes=4)
    assert again.key != found[PLANNED].key


def test_ranks_are_given_with_the_base(
    source: Workspace, tmp_path: Path, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a base checkpoint the words name it, its backbone and the rank."""
    monkeypatch.setattr(methods, "supplies_decoder", lambda *_: True)
    base = tmp_path / "vit_xs.pth"
    base.write_bytes(b"weights")
    variants = rank_variants(plan)
    target = Workspace(tmp_path, tmp_path / "copy", tmp_path / "results")
    copied = install(variants, NAME, source, target)
    found = [settings(v, copied, target, base=base, minutes=3) for v in variants]
    assert [chosen.facts["rank"] for chosen in found] == [4, *RANKS]
    assert found[1].words[2:] == ("--weights", f"sam:{base}", "--backbone", "vit_xs", "--rank", "1")
    base.write_bytes(b"others")
    assert settings(variants[0], copied, target, base=base, minutes=3).key != found[0].key


def test_few_cases_are_searched_and_measured_on_all_folds() -> None:
    """Many cases: one fold is searched, the others measured; a single fold is refused then."""
    assert divide(["0", "1", "2"], 19) == (["0", "1", "2"], ["0", "1", "2"])
    assert divide(["0", "1", "2"], 20) == (["0"], ["1", "2"])
    with pytest.raises(SystemExit):
        divide(["0"], 20)


def test_points_are_paired_over_seeds_and_groups() -> None:
    """Means over seeds per case; a bootstrap over groups is wider than one over the cases in them."""
    plan_dice = {f"c{i}": 0.5 for i in range(12)}
    other = {f"c{i}": 0.5 + 0.01 * (1 if i < 6 else -1) + 0.02 for i in range(12)}
    seeds = [(other, plan_dice), ({c: d + 0.02 for c, d in other.items()}, plan_dice)]
    alone = paired_points(seeds, {})
    grouped = paired_points(seeds, {f"c{i}": f"g{i // 6}" for i in range(12)})
    assert alone["regret"] == grouped["regret"] == pytest.approx(3.0)
    assert grouped["low"] == pytest.approx(2.0)
    assert grouped["high"] == pytest.approx(4.0)
    assert 2.0 < alone["low"] < 3.0 < alone["high"] < 4.0
    missing = paired_points([({"a": 0.4, "b": 0.9}, {"a": 0.3})], {})
    assert missing == {"regret": 10.0, "low": -100.0, "high": 100.0}, "one case says nothing of others"


def study(tmp_path: Path, plan: Plan, folds: tuple[list[str], list[str]], count: int = 4) -> Study:
    """The plan and others with settings that need no files."""
    variants = scratch_variants(plan)[:count]
    facts: dict[str, Any] = {"configuration": "2d", "input_size": 224, "learning_rate": 1e-3, "rank": None}
    chosen = {v.name: Settings(("-c", "2d"), {"variant": v.name, **facts}, f"key{i}") for i, v in enumerate(variants)}
    return Study(tmp_path / NAME, 3.0, variants, chosen, *folds, {}, tmp_path)


def fake_runner(dice: dict[str, float], ran: list[str], failing: Iterable[str] = ()) -> Any:
    """Gives every variant its Dice, and the second fresh seed two points less."""

    def run_cell(cell: Cell, _: Path, *, fold: str) -> dict[str, Any]:
        ran.append(cell.name)
        variant = cell.facts["variant"]
        if variant in failing:
            return {"failed": "exit code 2"}
        less = 0.02 if cell.words[-1] == "2" else 0.0
        used = cell.fold or fold
        return {**cell.facts, "case_dice": {f"{used}a": dice[variant] - less, f"{used}b": None}, "mean_dice": 0.5}

    return run_cell


def test_a_study_searches_then_measures_and_resumes(
    tmp_path: Path, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The best of the others is measured with fresh seeds on other folds; nothing that is there is run again."""
    monkeypatch.setattr(running, "RESULTS", tmp_path)
    chosen = study(tmp_path, plan, (["0"], ["1", "2"]))
    names = [v.name for v in chosen.variants]
    ran: list[str] = []
    dice = dict(zip(names, (0.6, 0.5, 0.65, 0.55), strict=True))
    monkeypatch.setattr(running, "run_cell", fake_runner(dice, ran))
    found = run_study(chosen, tmp_path)
    assert found["best_other"] == names[2]
    assert found["not_searched"] == []
    assert {name: found[name] for name in ("regret", "low", "high")} == {"regret": 5.0, "low": 5.0, "high": 5.0}
    assert found["cells"][PLANNED]["mean_dice"] == 0.6
    assert len(ran) == 4 + 2 * len(FRESH_SEEDS) * 2
    assert f"{NAME} {names[2]} fold 2 seed 2 3 min key2" in ran
    ran.clear()
    assert run_study(chosen, tmp_path) == found
    assert ran == []
    assert "complete" in table({NAME: found})


@pytest.mark.parametrize("missing", range(4))
def test_no_best_of_a_search_that_is_not_complete(
    tmp_path: Path, plan: Plan, monkeypatch: pytest.MonkeyPatch, missing: int
) -> None:
    """Whichever variant is missing, the plan included: nothing is measured, and what is there goes on being there."""
    monkeypatch.setattr(running, "RESULTS", tmp_path)
    chosen = study(tmp_path, plan, (["0"], ["1"]))
    names = [v.name for v in chosen.variants]
    ran: list[str] = []
    dice = dict(zip(names, (0.6, 0.5, 0.65, 0.9), strict=True))
    monkeypatch.setattr(running, "run_cell", fake_runner(dice, ran, failing=[names[missing]]))
    found = run_study(chosen, tmp_path)
    assert (found["best_other"], found["regret"], found["not_searched"]) == (None, None, [names[missing]])
    assert len(ran) == 4
    assert f"partial, without {names[missing]}, the measurement" in table({NAME: found})
    ran.clear()
    monkeypatch.setattr(running, "run_cell", fake_runner(dice, ran))
    assert run_study(chosen, tmp_path)["best_other"] == names[3]
    assert ran[0] == chosen.cell(names[missing], "0", 12345).name


def test_a_search_over_folds_halves(tmp_path: Path, plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    """After each fold the better half goes on, two at least; the best is taken from all folds it was searched on."""
    monkeypatch.setattr(running, "RESULTS", tmp_path)
    folds = ["0", "1", "2", "3"]
    chosen = study(tmp_path, plan, (folds, folds), 8)
    plan_name, *others = (v.name for v in chosen.variants)
    first = dict(zip([plan_name, *others], (0.6, 0.5, 0.51, 0.52, 0.53, 0.54, 0.55, 0.56), strict=True))
    # Best on the first fold, and far behind from then on.
    later = first | {others[-1]: 0.3}
    ran: list[str] = []

    def run_cell(cell: Cell, _: Path, *, fold: str) -> dict[str, Any]:
        return dict(fake_runner(first if cell.fold == "0" else later, ran)(cell, tmp_path, fold=fold))

    monkeypatch.setattr(running, "run_cell", run_cell)
    found = run_study(chosen, tmp_path)
    search = [name for name in ran if " seed 12345 " in name]
    assert [sum(f" fold {fold} " in name for name in search) for fold in folds] == [8, 5, 3, 3]
    assert found["best_other"] == others[-2]
    assert [found["cells"][name]["folds"] for name in (plan_name, *others)] == [4, 1, 1, 1, 2, 4, 4, 2]
    assert found["cells"][others[-1]]["mean_dice"] == pytest.approx((0.56 + 0.3) / 2)
    assert found["cells"][others[-1]]["plan_dice"] == pytest.approx(0.6)
    assert len(ran) == len(search) + 2 * 2 * len(folds)
    ran.clear()
    assert run_study(chosen, tmp_path) == found
    assert ran == []


def test_without_the_measurement_there_is_no_regret(
    tmp_path: Path, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regret is null until both fresh seeds are there, and the table says what is missing."""
    chosen = study(tmp_path, plan, (["0"], ["1"]))
    dice = {v.name: 0.5 for v in chosen.variants}
    runner = fake_runner(dice, [])
    others = [v.name for v in chosen.variants[1:]]
    results = {cell.name: runner(cell, tmp_path, fold="0") for cell in chosen.search_cells("0", others)}
    best = best_other(chosen, results)
    assert best is not None
    for cell in chosen.fresh_cells(best)[:-1]:
        results[cell.name] = runner(cell, tmp_path, fold="1")
    found = summary(chosen, results)
    assert found["regret"] is None
    assert "without the measurement" in table({NAME: found})
    assert best_other(chosen, {}) is None


@pytest.mark.parametrize(
    ("named", "ranks", "scratch", "of_ranks"),
    [
        (None, None, ["0", "1", "2"], ["0", "1", "2"]),
        (["0", "2"], None, ["0", "2"], ["0", "2"]),
        (None, ["0", "1"], ["0", "1", "2"], ["0", "1"]),
        (["2"], ["1"], ["2"], ["1"]),
    ],
)
def test_folds_of_ranks(
    named: list[str] | None, ranks: list[str] | None, scratch: list[str], of_ranks: list[str]
) -> None:
    """Ranks are compared on folds of their own where they are named, else on those of the search, else on all."""
    options = argparse.Namespace(folds=named, rank_folds=ranks)
    assert folds_to_use(options, ["0", "1", "2"], ranks=False) == scratch
    assert folds_to_use(options, ["0", "1", "2"], ranks=True) == of_ranks


def test_the_result_holds_regret_interval_and_cells(
    tmp_path: Path, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """regret.json is {dataset: {regret, low, high, cells}}, with the rank part below it where there is a base."""
    monkeypatch.setattr(running, "RESULTS", tmp_path)
    monkeypatch.setattr(regret, "plan", lambda *_: None)
    chosen = study(tmp_path, plan, (["0"], ["0"]))
    monkeypatch.setattr(running, "run_cell", fake_runner({v.name: 0.5 for v in chosen.variants}, []))
    monkeypatch.setattr(regret, "make_study", lambda *_, **__: chosen)
    write_json(tmp_path / "vit_xs.json", {"minutes": 22.0, "sha256": "0f", "held_out_iou": {"box": 0.3}, "seed": 0})
    options = argparse.Namespace(workspace=tmp_path, minutes=3.0, base=tmp_path)
    found = regret.run_dataset(tmp_path / NAME, options)
    for part in (found, found["rank"]):
        assert {"regret", "low", "high", "cells"} <= set(part)
        assert part["regret"] == 0.0
    assert found["rank"]["base"] == {"minutes": 22.0, "sha256": "0f", "held_out_iou": {"box": 0.3}}
    write_json(tmp_path / "regret.json", {NAME: found})
    shown = table(read_json(tmp_path / "regret.json"))
    assert (shown.count("complete"), shown.count("no result yet")) == (2, len(DATASETS))
