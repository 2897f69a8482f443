"""Regret: how many Dice points a search over settings gains on the plan, at the same minutes of training.

    python -m benchmarks.regret --minutes 3
    python -m benchmarks.regret --data FOLDER/Dataset... --minutes 3 --base FOLDER --rank-folds 0 1

Per dataset the plan and at most 12 others (input size, context and depth, learning rate, one at a time and input size
x learning rate; with --base, a folder that holds vit_xs.pth of `benchmarks.base_weights`, also the rank of adapters)
are trained on the search folds. The best of the others there and the plan are then trained with fresh seeds on the
folds that are left, and compared case by case; a dataset of fewer than 20 cases (groups of cases where there are any)
is searched and measured on all folds, pooled. A search over several folds halves: after each, the better half of the
others on the folds so far goes on, never fewer than two. Positive: the search was better; negative: the plan was, as it
may be where no other was better in the search either. Intervals are 95 % bootstraps over cases, or groups.

Source: Jamieson and Talwalkar, Non-stochastic best arm identification, 2016 (successive halving).

Every training is a cell of results/regret_cells.json that is run once, whatever else was planned in the meantime: its
name holds a hash of its settings. results/regret.json says per dataset what was found; until every cell of the search
and of the measurement is there, regret is null and the table says so. `--table` only prints.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.cells import RESULTS, Cell, Dice, paired_points, plan, run_cells, span_of, stored
from benchmarks.methods import row
from benchmarks.variants import (
    MOST_OTHERS,
    PLANNED,
    RANK_BACKBONE,
    Settings,
    Variant,
    install,
    rank_variants,
    scratch_variants,
    settings,
)
from samunet.artifacts.plan import load_plan
from samunet.artifacts.workspace import Workspace
from samunet.core.files import read_json, write_json
from samunet.datasets.raw import load_raw_dataset

TABLE, CELLS = "regret", "regret_cells"
DATASETS = ("Dataset004_Hippocampus", "Dataset021_SunnybrookLV", "Dataset022_MouseBrain", "Dataset023_CurvasCT2D")
FEW_CASES = 20
SEARCH_SEED, FRESH_SEEDS = 12345, (1, 2)
FEWEST_LEFT = 2


@dataclass(frozen=True)
class Study:
    """The search and the measurement of one dataset from one kind of start.

    Args:
        data: Raw dataset folder.
        minutes: Of every training.
        variants: The plan first.
        settings: By variant.
        search_folds: Folds on which the best of the others is chosen.
        fresh_folds: Folds on which it is compared with the plan.
        groups: Case to group; empty where cases are independent.
        preprocessed: Folder of the copied plan.
    """

    data: Path
    minutes: float
    variants: Sequence[Variant]
    settings: Mapping[str, Settings]
    search_folds: Sequence[str]
    fresh_folds: Sequence[str]
    groups: Mapping[str, str]
    preprocessed: Path

    def cell(self, variant: str, fold: str, seed: int) -> Cell:
        """One training."""
        chosen = self.settings[variant]
        name = f"{self.data.name} {variant} fold {fold} seed {seed} {self.minutes:g} min {chosen.key}"
        words = (*chosen.words, "--seed", f"{seed}")
        facts = {"dataset": self.data.name, **chosen.facts}
        return Cell(name, self.data, self.minutes, words, facts, fold, self.preprocessed)

    def search_cells(self, fold: str, others: Sequence[str]) -> list[Cell]:
        """The plan and the others that are left on a search fold."""
        return [self.cell(name, fold, SEARCH_SEED) for name in (PLANNED, *others)]

    def fresh_cells(self, other: str) -> list[Cell]:
        """One other and the plan on the folds that are left, with fresh seeds."""
        return [self.cell(v, f, s) for s in FRESH_SEEDS for f in self.fresh_folds for v in (PLANNED, other)]


def main() -> None:
    """Run the cells that are missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    root = Path(os.environ.get("SAMUNET_TEST_DATA", "../shared/data"))
    parser.add_argument("--data", type=Path, nargs="+", default=[root / name for name in DATASETS])
    parser.add_argument("--minutes", type=float, default=3.0, help="of every training")
    parser.add_argument("--base", type=Path, help="folder of vit_xs.pth: compare ranks too")
    parser.add_argument("--folds", nargs="+", help="folds to use; the first is searched where cases are many")
    parser.add_argument("--rank-folds", nargs="+", help="those of the comparison of ranks; as the others unless said")
    parser.add_argument("--others", type=int, default=MOST_OTHERS, help="at most so many beside the plan")
    parser.add_argument("--workspace", type=Path, default=Path("samunet_workspace"))
    parser.add_argument("--table", action="store_true", help="only print the table")
    options = parser.parse_args()
    file = RESULTS / f"{TABLE}.json"
    for data in [] if options.table else options.data:
        found = run_dataset(data, options)
        write_json(file, {**stored(file), data.name: found})
    print(table(stored(file)))


def run_dataset(data: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Everything about one dataset, as it goes into regret.json."""
    plan(data, options.workspace, options.minutes)
    scratch = run_study(make_study(data, options, base=None), options.workspace)
    if options.base is None:
        return scratch
    base = options.base / f"{RANK_BACKBONE}.pth"
    about = stored(base.with_suffix(".json"))
    what = {key: about.get(key) for key in ("minutes", "held_out_iou", "sha256")}
    return scratch | {"rank": run_study(make_study(data, options, base=base), options.workspace) | {"base": what}}


def make_study(data: Path, options: argparse.Namespace, *, base: Path | None) -> Study:
    """Variants, folds and groups of a planned dataset."""
    source = Workspace.locate(workspace=options.workspace, raw=data.parent, environment={})
    below = options.workspace / ("variants" if base is None else "variants_of_rank")
    target = Workspace(data.parent, below, options.workspace / "cells")
    planned = load_plan(source.plan_file(data.name))
    variants = (scratch_variants(planned) if base is None else rank_variants(planned))[: 1 + options.others]
    assert len(variants) <= 1 + MOST_OTHERS
    copied = install(variants, data.name, source, target)
    groups = load_raw_dataset(data).groups or {}
    available = [str(index) for index in range(len(read_json(source.splits_file(data.name))))]
    folds = folds_to_use(options, available, ranks=base is not None)
    search, fresh = divide(folds, len(set(groups.values())) or len(load_raw_dataset(data).training))
    return Study(
        data,
        options.minutes,
        variants,
        {v.name: settings(v, copied, target, base=base, minutes=options.minutes) for v in variants},
        search,
        fresh,
        groups,
        below,
    )


def folds_to_use(options: argparse.Namespace, available: Sequence[str], *, ranks: bool) -> list[str]:
    """The folds that were named, for ranks those named for ranks before the others; else all."""
    return list((options.rank_folds if ranks else None) or options.folds or available)


def divide(folds: Sequence[str], num_units: int) -> tuple[list[str], list[str]]:
    """Folds to search and folds to measure on: all for both where cases are few, else one and all the others."""
    if num_units < FEW_CASES:
        return list(folds), list(folds)
    if len(folds) < 2:
        raise SystemExit("many cases: name at least two folds, the first to search and the others to measure")
    return [folds[0]], list(folds[1:])


def run_study(study: Study, workspace: Path) -> dict[str, Any]:
    """Search fold by fold, then measure the best of the others against the plan."""
    results: Mapping[str, Any] = {}
    for count in range(len(study.search_folds)):
        left = others_left(study, results, count)
        if left is None:
            break
        results = run_cells(study.search_cells(study.search_folds[count], left), CELLS, workspace)
    best = best_other(study, results)
    if best is not None:
        results = run_cells(study.fresh_cells(best), CELLS, workspace)
    return summary(study, results)


def others_left(study: Study, results: Mapping[str, Any], count: int) -> list[str] | None:
    """The others that are searched on after so many folds, the best first.

    Returns:
        None until every cell of those folds is there, the plan's included: the best of those that happen to have
        finished would be no best, and a regret against it too small.
    """
    left = [v.name for v in study.variants if v.name != PLANNED]
    for done in range(1, count + 1):
        scores = {name: searched(study, results, name, done) for name in (PLANNED, *left)}
        if not all(scores.values()):
            return None
        means = {name: fmean(dice.values()) for name, dice in scores.items() if dice}
        ranked = sorted(left, key=lambda name: -means[name])
        left = ranked[: max(FEWEST_LEFT, (len(ranked) + 1) // 2)]
    return left


def best_other(study: Study, results: Mapping[str, Any]) -> str | None:
    """The other that came out of the search; None until all of it is there."""
    left = others_left(study, results, len(study.search_folds))
    return left[0] if left else None


def searched(study: Study, results: Mapping[str, Any], variant: str, count: int) -> Dice | None:
    """Pooled Dice by case of the search on the first folds."""
    return pooled(results, [study.cell(variant, fold, SEARCH_SEED) for fold in study.search_folds[:count]])


def pooled(results: Mapping[str, Any], cells: Sequence[Cell]) -> Dice | None:
    """Dice by case over cells with different validation cases; None where a cell is missing or failed."""
    found = [results.get(cell.name, {}).get("case_dice") for cell in cells]
    if any(one is None for one in found):
        return None
    return {case: dice for one in found for case, dice in one.items() if dice is not None}


def summary(study: Study, results: Mapping[str, Any]) -> dict[str, Any]:
    """Regret in Dice points with its interval, and what every variant reached in the search."""
    best = best_other(study, results)
    found: dict[str, Any] = {"regret": None, "low": None, "high": None}
    if best is not None:
        seeds = [[pooled(results, cells_of(study, v, s)) for v in (best, PLANNED)] for s in FRESH_SEEDS]
        complete = [(other, own) for other, own in seeds if other is not None and own is not None]
        if len(complete) == len(FRESH_SEEDS):
            found = paired_points(complete, study.groups)
    cells = {v.name: cell_summary(study, results, v.name) for v in study.variants}
    return found | {
        "best_other": best,
        "minutes": study.minutes,
        "search_folds": list(study.search_folds),
        "measured_folds": list(study.fresh_folds),
        "fresh_seeds": list(FRESH_SEEDS),
        "not_searched": unsearched(study, results),
        "cells": cells,
    }


def cells_of(study: Study, variant: str, seed: int) -> list[Cell]:
    """A variant's cells of the measurement with one fresh seed."""
    return [study.cell(variant, fold, seed) for fold in study.fresh_folds]


def unsearched(study: Study, results: Mapping[str, Any]) -> list[str]:
    """Variants whose cell is missing on the first search fold that is not complete."""
    for count, fold in enumerate(study.search_folds):
        left = others_left(study, results, count) or []
        missing = [name for name in (PLANNED, *left) if pooled(results, [study.cell(name, fold, SEARCH_SEED)]) is None]
        if missing:
            return missing
    return []


def cell_summary(study: Study, results: Mapping[str, Any], variant: str) -> dict[str, Any]:
    """What a variant is, and its pooled mean Dice and the plan's on the folds on which it was searched."""
    facts = {name: value for name, value in study.settings[variant].facts.items() if name != "variant"}
    counts = range(len(study.search_folds), 0, -1)
    found = next(((n, dice) for n in counts if (dice := searched(study, results, variant, n))), None)
    if found is None:
        return {**facts, "mean_dice": None, "plan_dice": None, "cases": 0, "folds": 0}
    count, dice = found
    plans = searched(study, results, PLANNED, count)
    own, planned = (fmean(one.values()) if one else None for one in (dice, plans))
    return {**facts, "mean_dice": own, "plan_dice": planned, "cases": len(dice), "folds": count}


def table(results: Mapping[str, Any]) -> str:
    """Markdown: regret per dataset, then what every variant reached in the search."""
    lines = [row(["dataset", "start", "best other", "regret, points", "95 %", "minutes", "state"]), row(["---"] * 7)]
    for name, start, found in entries(results):
        shown = ["", ""]
        if found["regret"] is not None:
            shown = [f"{found['regret']:+.2f}", span_of(found["low"], found["high"])]
        lacking = [*found["not_searched"], *([] if found["regret"] is not None else ["the measurement"])]
        state = f"partial, without {', '.join(lacking)}" if lacking else "complete"
        lines.append(row([name, start, found["best_other"] or "", *shown, f"{found['minutes']:g}", state]))
    lines += [row([name, "random weights", *[""] * 4, "no result yet"]) for name in DATASETS if name not in results]
    head = ["dataset", "start", "variant", "input", "learning rate", "rank", "folds", "Dice on them", "plan on them"]
    lines += ["", row(head), row(["---"] * len(head))]
    for name, start, found in entries(results):
        for variant, cell in found["cells"].items():
            dice = ["" if cell[key] is None else f"{cell[key]:.4f}" for key in ("mean_dice", "plan_dice")]
            values = [cell["input_size"], f"{cell['learning_rate']:g}", cell["rank"] or "", cell["folds"], *dice]
            lines.append(row([name, start, f"{variant} ({cell['configuration']})", *values]))
    return "\n".join(lines)


def entries(results: Mapping[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    """Dataset, start and findings: from random weights, and from the base where that was run."""
    found = []
    for name, entry in sorted(results.items()):
        found.append((name, "random weights", entry))
        if "rank" in entry:
            found.append((name, f"base of {RANK_BACKBONE}", entry["rank"]))
    return found


if __name__ == "__main__":
    main()
