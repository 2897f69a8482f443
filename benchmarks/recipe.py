"""What each part of the training recipe is worth, one change at a time, for the same processor minutes.

    python -m benchmarks.recipe --data FOLDER/Dataset004_Hippocampus --minutes 15 --seeds 12345
    python -m benchmarks.recipe --data FOLDER/Dataset... --minutes 4 --num-cases 5 --only "as planned" "2d"

Selection only: trains on four fifths of fold 0's training cases and scores the rest of them, so that the fold's own
validation cases decide nothing. Rows are the plan from random weights and changes of it. Cells whose result exists are
skipped; `--table` only prints.
"""

from __future__ import annotations

import argparse
import random
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.cells import RESULTS, Cell, paired, plan, run_cells
from benchmarks.methods import row
from samunet.artifacts.plan import Recipe, load_plan
from samunet.artifacts.workspace import Workspace
from samunet.core.files import read_json, write_json

TABLE = "recipe"
PLANNED = "as planned"
SPLIT_SEED, SHARE = 7, 0.2


@dataclass(frozen=True)
class Change:
    """One row.

    Args:
        group: What it is about.
        recipe: Fields of the recipe that differ from the plan's.
        configuration: Other than the recommended one.
        words: Further words of samunet_train.
    """

    group: str
    recipe: Mapping[str, Any] = field(default_factory=dict)
    configuration: str | None = None
    words: tuple[str, ...] = ()


def side_path(**changes: Any) -> dict[str, Any]:
    """The side path with other values."""
    return {"decoder": {"train": "full", "upsampler": "side_path"} | changes}


CHANGES: dict[str, Change] = {
    PLANNED: Change("plan"),
    "side path": Change("side path", side_path()),
    "side path of width 32": Change("side path", side_path(path_width=32)),
    "side path, two convolutions per stage": Change("side path", side_path(path_convolutions=2)),
    "side path, 112 px": Change("side path", side_path() | {"input_size": 112}),
    "112 px": Change("input", {"input_size": 112}),
    "2d": Change("context", configuration="2d"),
    "2.5d": Change("context", configuration="2.5d"),
    "3d": Change("depth", configuration="3d"),
    "rate / 2": Change("rate", {"learning_rate": 1e-3}),
    "rate x 2": Change("rate", {"learning_rate": 4e-3}),
    "batch 16": Change("batch", {"batch_size": 16}),
    "batch 32": Change("batch", {"batch_size": 32}),
    "no averaged weights": Change("EMA", {"ema_decay": 0.0}),
    "no augmentation": Change("augmentation", words=("--no-augmentation",)),
    "augmentation 2.5 times as often": Change("augmentation", {"augmentation": {"frequency": 2.5}}),
    "ViT instead of TinyViT": Change("backbone", {"backbone": "vit_xs"}),
}


def main() -> None:
    """Run the cells that are missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, nargs="+", default=[], help="raw dataset folders")
    parser.add_argument("--minutes", type=float, default=15.0)
    parser.add_argument("--seeds", type=int, nargs="+", default=[12345])
    parser.add_argument("--num-cases", type=int, help="train on a subset of so many cases")
    parser.add_argument("--only", nargs="+", choices=tuple(CHANGES), help="rows to run")
    parser.add_argument("--workspace", type=Path, default=Path("samunet_workspace"))
    parser.add_argument("--table", action="store_true", help="only print the table")
    options = parser.parse_args()
    for data in [] if options.table else options.data:
        plan(data, options.workspace, options.minutes)
        run_cells(cells(data, options), TABLE, options.workspace)
    print(table(read_json(RESULTS / f"{TABLE}.json")))


def cells(data: Path, options: argparse.Namespace) -> list[Cell]:
    """One per change that makes sense for the dataset, and seed."""
    source = Workspace(raw=data.parent, preprocessed=options.workspace / "preprocessed", results=options.workspace)
    preprocessed = options.workspace / "selection"
    names = install(data.name, source, preprocessed)
    made = []
    for seed in options.seeds:
        for title, configuration in names.items():
            if options.only and title not in options.only:
                continue
            change = CHANGES[title]
            words = ("--weights", "none", "-c", configuration, "--seed", f"{seed}", *change.words)
            facts = {"dataset": data.name, "group": change.group, "change": title, "minutes": options.minutes}
            name = f"{data.name} {title} seed {seed} {options.minutes:g} min"
            if options.num_cases:
                words += ("--num-cases", f"{options.num_cases}")
                facts |= {"num_cases": options.num_cases}
                name += f" {options.num_cases} cases"
            made.append(Cell(name, data, options.minutes, words, facts, preprocessed=preprocessed))
    return made


def install(dataset: str, source: Workspace, preprocessed: Path) -> dict[str, str]:
    """A copy of the plan with a configuration per change and the folds of the selection; returns what to train."""
    origin, folder = source.preprocessed_folder(dataset), preprocessed / dataset
    planned = load_plan(source.plan_file(dataset))
    content = read_json(source.plan_file(dataset))
    names: dict[str, str] = {}
    for number, (title, change) in enumerate(CHANGES.items()):
        parent = change.configuration or planned.recommended.value
        if parent not in planned.configurations or (title != PLANNED and parent == title == planned.recommended.value):
            continue
        names[title] = parent
        if change.recipe:
            names[title] = f"changed_{number}"
            recipe = planned.configuration(parent).recipes["none"]["cpu"]
            edits = {
                name: {"value": edited(recipe, name, value), "reason": title} for name, value in change.recipe.items()
            }
            content["configurations"][names[title]] = {
                "inherits_from": parent,
                "recipes": {"none": {"cpu": edits}},
            }
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for entry in origin.iterdir():
        if entry.is_dir():
            (folder / entry.name).symlink_to(entry.resolve(), target_is_directory=True)
        else:
            shutil.copy2(entry, folder / entry.name)
    write_json(folder / source.plan_file(dataset).name, content)
    file = source.splits_file(dataset)
    write_json(folder / file.name, [selection(read_json(file)[0]["train"])])
    return names


def edited(recipe: Recipe, name: str, value: Any) -> Any:
    """A field's new value; of the augmentation, only what the change names is new."""
    return recipe.augmentation.value.model_dump() | value if name == "augmentation" else value


def selection(cases: list[str]) -> dict[str, list[str]]:
    """A fold inside the training cases of another."""
    shuffled = sorted(cases)
    random.Random(SPLIT_SEED).shuffle(shuffled)
    number = max(1, round(SHARE * len(shuffled)))
    return {"train": sorted(shuffled[number:]), "val": sorted(shuffled[:number])}


def table(results: dict[str, Any]) -> str:
    """Markdown: Dice of every change, and its difference to the plan on the same cases."""
    head = [
        "dataset",
        "part",
        "change",
        "minutes",
        "seeds",
        "Dice",
        "change - plan, points (95 %)",
        "steps",
        "slices/s",
    ]
    lines = [row(head), row(["---"] * len(head))]
    found = [cell for cell in results.values() if "failed" not in cell]
    runs: dict[tuple[str, int, float], dict[str, list[dict[str, Any]]]] = {}
    for cell in found:
        run = runs.setdefault((cell["dataset"], cell.get("num_cases", 0), cell["minutes"]), {})
        run.setdefault(cell["change"], []).append(cell)
    for (dataset, num_cases, minutes), cells_of in sorted(runs.items()):
        where = f"{dataset}, {num_cases} cases" if num_cases else dataset
        plans = {cell["seed"]: cell for cell in cells_of.get(PLANNED, [])}
        for title in [title for title in CHANGES if title in cells_of]:
            change, same = CHANGES[title], cells_of[title]
            pairs = [paired(c, plans[c["seed"]]) for c in same if c["seed"] in plans]
            shown = "; ".join(f"{100 * m:+.2f} ({100 * low:+.2f} to {100 * high:+.2f})" for m, low, high in pairs)
            mean = sum(c["mean_dice"] for c in same) / len(same)
            steps, speed = same[0]["steps"], same[0]["images_per_second"]
            text = shown if title != PLANNED else ""
            lines.append(
                row([where, change.group, title, f"{minutes:g}", len(same), f"{mean:.3f}", text, steps, speed])
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
