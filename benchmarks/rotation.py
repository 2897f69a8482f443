"""How far slices are turned in training: as obliquely as scans lie, which is the rule, or by no more than 15 degrees.

    python -m benchmarks.rotation --data FOLDER/Dataset021_SunnybrookLV --minutes 2

Every fold is trained with the planned rotation and with a narrow one, from random weights and the same seed; cases are
compared in pairs over all folds, with a 95 % bootstrap over cases, or groups where there are any. The planned rows are
those of `benchmarks.regret`, where that was run. Datasets that are turned by no more than that anyway are passed over.
Cells whose result exists are skipped; `--table` only prints.
"""

from __future__ import annotations

import argparse
from argparse import Namespace
from pathlib import Path
from typing import Any

from benchmarks.cells import Cell, Dice, paired_points, run_table, span_of
from benchmarks.methods import row
from benchmarks.regret import SEARCH_SEED, make_study
from benchmarks.variants import MOST_OTHERS, PLANNED, copy_plan
from samunet.artifacts.plan import Plan, load_plan
from samunet.artifacts.workspace import Workspace
from samunet.datasets.raw import load_raw_dataset
from samunet.planners.augmentation import NARROW_DEG

TABLE = "rotation"


def main() -> None:
    """Run the cells that are missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, nargs="+", default=[], help="raw dataset folders")
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--seeds", type=int, nargs="+", default=[SEARCH_SEED])
    parser.add_argument("--folds", nargs="+", help="default: all")
    parser.add_argument("--workspace", type=Path, default=Path("samunet_workspace"))
    parser.add_argument("--table", action="store_true", help="only print the table")
    run_table(parser.parse_args(), TABLE, cells, table)


def cells(data: Path, options: Namespace) -> list[Cell]:
    """The plan and the narrow rotation, by fold and seed."""
    source = Workspace.locate(workspace=options.workspace, raw=data.parent, environment={})
    plan = load_plan(source.plan_file(data.name))
    angle = plan.configuration().recipes["none"]["cpu"].augmentation.value.rotation_deg
    if angle <= NARROW_DEG:
        print(f"{data.name}: turned by no more than {NARROW_DEG:g} degrees as planned", flush=True)
        return []
    study = make_study(data, Namespace(**vars(options), base=None, others=MOST_OTHERS), base=None)
    below = options.workspace / f"rot{NARROW_DEG:g}"
    copy_plan(turned(plan, NARROW_DEG), source, Workspace(data.parent, below, options.workspace / "cells"))
    groups = load_raw_dataset(data).groups or {}
    made = []
    for seed in options.seeds:
        for fold in dict.fromkeys((*study.search_folds, *study.fresh_folds)):
            facts = {"dataset": data.name, "minutes": options.minutes, "planned_deg": angle, "groups": groups}
            planned = study.cell(PLANNED, fold, seed)
            words = ("-c", plan.recommended.value, "--weights", "none", "--seed", f"{seed}")
            name = f"{data.name} turned {NARROW_DEG:g} fold {fold} seed {seed}"
            facts_of = [facts | {"variant": PLANNED}, facts | {"variant": f"turned {NARROW_DEG:g}"}]
            made.append(
                Cell(planned.name, data, options.minutes, planned.words, facts_of[0], fold, planned.preprocessed)
            )
            made.append(Cell(name, data, options.minutes, words, facts_of[1], fold, below))
    return made


def turned(plan: Plan, angle: float) -> Plan:
    """A plan whose recommended configuration turns slices by up to so many degrees, from random weights on a CPU."""
    chosen = plan.configuration()
    recipe = chosen.recipes["none"]["cpu"]
    varied = recipe.augmentation.model_copy(
        update={"value": recipe.augmentation.value.model_copy(update={"rotation_deg": angle})}
    )
    recipes = {**chosen.recipes["none"], "cpu": recipe.model_copy(update={"augmentation": varied})}
    changed = chosen.model_copy(update={"recipes": {**chosen.recipes, "none": recipes}})
    return plan.model_copy(update={"configurations": {**plan.configurations, plan.recommended.value: changed}})


def table(results: dict[str, Any]) -> str:
    """Markdown: Dice of both over all folds, and the paired difference."""
    head = ["dataset", "minutes", "planned", "seeds", "cases", "Dice as planned", f"turned by up to {NARROW_DEG:g}"]
    head.append("narrow - planned, points (95 %)")
    lines = [row(head), row(["---"] * len(head))]
    done = [cell for cell in results.values() if "failed" not in cell]
    for dataset, minutes in sorted({(cell["dataset"], cell["minutes"]) for cell in done}):
        own = [cell for cell in done if (cell["dataset"], cell["minutes"]) == (dataset, minutes)]
        pairs = [pair for seed in sorted({c["seed"] for c in own}) if (pair := pair_of_seed(own, seed)) is not None]
        if not pairs:
            continue
        found = paired_points(pairs, own[0]["groups"])
        narrow, planned = (sum(sum(p[i].values()) / len(p[i]) for p in pairs) / len(pairs) for i in (0, 1))
        shown = f"{found['regret']:+.2f} ({span_of(found['low'], found['high'])})"
        facts = [dataset, f"{minutes:g}", f"{own[0]['planned_deg']:g} degrees", len(pairs), len(pairs[0][0])]
        lines.append(row([*facts, f"{planned:.3f}", f"{narrow:.3f}", shown]))
    return "\n".join(lines)


def pair_of_seed(cells_: list[dict[str, Any]], seed: int) -> tuple[Dice, Dice] | None:
    """Dice by case of the narrow rotation and of the plan, pooled over the folds that both have."""
    own = [cell for cell in cells_ if cell["seed"] == seed]
    by_kind = [{c["fold"]: c for c in own if (c["variant"] == PLANNED) == is_plan} for is_plan in (False, True)]
    folds = sorted(set(by_kind[0]) & set(by_kind[1]))
    narrow, planned = (
        {case: dice for f in folds for case, dice in kind[f]["case_dice"].items() if dice is not None}
        for kind in by_kind
    )
    return (narrow, planned) if folds else None


if __name__ == "__main__":
    main()
