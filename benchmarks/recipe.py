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
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.cells import POINTS, Cell, paired, run_table, span_of
from benchmarks.methods import row
from benchmarks.variants import copy_dataset
from samunet.artifacts.fingerprint import Fingerprint
from samunet.artifacts.plan import Plan, Recipe, load_plan
from samunet.artifacts.plan_parts import STORED
from samunet.artifacts.workspace import Workspace
from samunet.core.config import load_schema
from samunet.core.files import read_json, sha256_json, write_json
from samunet.datasets.raw import load_raw_dataset
from samunet.planners.planner import facts_of_plan

TABLE = "recipe"
PLANNED = "as planned"
SPLIT_SEED, SHARE = 7, 0.2


@dataclass(frozen=True)
class Change:
    """One row.

    Args:
        group: What it is about.
        recipe: Fields of the recipe that differ from the plan's.
        tile_factor: On the side of the planned tile; no more than the largest slice.
        configuration: Other than the recommended one.
        design: Fields of the configuration that differ from the plan's.
        words: Further words of samunet_train.
        mirror: Average the plan's predictions over mirrored views.
        pretrained: Start from the weights that are given.
    """

    group: str
    recipe: Mapping[str, Any] = field(default_factory=dict)
    tile_factor: float | None = None
    configuration: str | None = None
    design: Mapping[str, Any] = field(default_factory=dict)
    words: tuple[str, ...] = ()
    mirror: bool = False
    pretrained: bool = False


def decoder(upsampler: str = "side_path", **changes: Any) -> dict[str, Any]:
    """The planned decoder with other values."""
    path = {"path_stride": 2} if upsampler == "side_path" else {}
    return {"decoder": {"train": "full", "upsampler": upsampler} | path | changes}


CHANGES: dict[str, Change] = {
    PLANNED: Change("plan"),
    "SAM's decoder, 112 px": Change("side path", decoder("sam") | {"input_size": 112}),
    "SAM's decoder, 224 px": Change("side path", decoder("sam") | {"input_size": 224}),
    "progressive decoder, 112 px": Change("decoder", decoder("progressive") | {"input_size": 112}),
    "path from stride 1": Change("decoder", decoder(path_stride=1)),
    "path from stride 1, 64 px": Change("decoder", decoder(path_stride=1) | {"input_size": 64}),
    "path of width 8": Change("decoder", decoder(path_width=8)),
    "path of width 32": Change("decoder", decoder(path_width=32)),
    "two convolutions per stage": Change("decoder", decoder(path_convolutions=2)),
    "deep supervision": Change("decoder", decoder(deep_supervision=True)),
    "64 px": Change("input", {"input_size": 64}),
    "96 px": Change("input", {"input_size": 96}),
    "112 px": Change("input", {"input_size": 112}),
    "128 px": Change("input", {"input_size": 128}),
    "224 px": Change("input", {"input_size": 224}),
    "tile / 2": Change("field of view", tile_factor=0.5),
    "tile / 1.5": Change("field of view", tile_factor=1 / 1.5),
    "tile x 1.5": Change("field of view", tile_factor=1.5),
    "tile x 2": Change("field of view", tile_factor=2),
    "2d": Change("context", configuration="2d"),
    "2.5d": Change("context", configuration="2.5d"),
    "five slices": Change("context", design={"context_slices": 2, "channels": "projection"}),
    "3d": Change("depth", configuration="3d"),
    "rate / 2": Change("rate", {"learning_rate": 1e-3}),
    "rate x 2": Change("rate", {"learning_rate": 4e-3}),
    "batch 16": Change("batch", {"batch_size": 16}),
    "batch 32": Change("batch", {"batch_size": 32}),
    "no averaged weights": Change("EMA", {"ema_decay": 0.0}),
    "no augmentation": Change("augmentation", words=("--no-augmentation",)),
    "augmentation 2.5 times as often": Change("augmentation", {"augmentation": {"frequency": 2.5}}),
    "ViT instead of TinyViT": Change("backbone", {"backbone": "vit_xs"}),
    "TinyViT of MobileSAM's size": Change("backbone", {"backbone": "vit_t"}),
    "one plane": Change("planes", {"planes": ["slices"]}),
    "all planes": Change("planes", {"planes": ["slices", "rows", "columns"]}),
    "mirrored views": Change("TTA", mirror=True),
    "images without labels too": Change("self-training", words=("--unlabelled", "imagesTr")),
    "pretrained encoder": Change("pretraining", pretrained=True),
    "pretrained encoder, rate / 4": Change("pretraining", words=("--lr", "0.0005"), pretrained=True),
    "pretrained encoder, frozen": Change("pretraining", words=("--set", "encoder.train=frozen"), pretrained=True),
}


def main() -> None:
    """Run the cells that are missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, nargs="+", default=[], help="raw dataset folders")
    parser.add_argument("--minutes", type=float, default=15.0)
    parser.add_argument("--seeds", type=int, nargs="+", default=[12345])
    parser.add_argument("--num-cases", type=int, help="train on a subset of so many cases")
    parser.add_argument("--pretrained", type=Path, help="weights of samunet_pretrain: adds rows that start from them")
    parser.add_argument("--only", nargs="+", choices=tuple(CHANGES), help="rows to run")
    parser.add_argument("--workspace", type=Path, default=Path("samunet_workspace"))
    parser.add_argument("--table", action="store_true", help="only print the table")
    run_table(parser.parse_args(), TABLE, cells, table)


def cells(data: Path, options: argparse.Namespace) -> list[Cell]:
    """One per change that makes sense for the dataset, and seed."""
    source = Workspace(raw=data.parent, preprocessed=options.workspace / "preprocessed", results=options.workspace)
    target = Workspace(raw=data.parent, preprocessed=options.workspace / "selection", results=options.workspace)
    names, key = install(data.name, source, target)
    backbone = load_plan(source.plan_file(data.name)).configuration().recipes["none"]["cpu"].backbone.value
    made = []
    for seed in options.seeds:
        for title, configuration in names.items():
            change = CHANGES[title]
            if (options.only and title not in options.only) or (change.pretrained and options.pretrained is None):
                continue
            start = [options.pretrained, "--backbone", backbone] if change.pretrained else ["none"]
            words = ("--weights", *map(str, start), "-c", configuration, "--seed", f"{seed}", *change.words)
            facts = {"dataset": data.name, "group": change.group, "change": title, "minutes": options.minutes}
            facts |= {"plan": key}
            tail = f"seed {seed} {options.minutes:g} min plan {key}"
            if options.num_cases:
                words += ("--num-cases", f"{options.num_cases}")
                facts |= {"num_cases": options.num_cases}
                tail += f" {options.num_cases} cases"
            name, of = (f"{data.name} {one} {tail}" for one in (title, PLANNED))
            made.append(
                Cell(
                    name,
                    data,
                    options.minutes,
                    words,
                    facts,
                    preprocessed=target.preprocessed,
                    mirror=change.mirror,
                    model_of=of if change.mirror else None,
                )
            )
    return made


def install(dataset: str, source: Workspace, target: Workspace) -> tuple[dict[str, str], str]:
    """A copy of the plan with a configuration per change and the folds of the selection.

    Returns:
        What to train by the change's title, and a short hash of the planned configurations.
    """
    planned = load_plan(source.plan_file(dataset))
    content = read_json(source.plan_file(dataset))
    key = plan_key(planned)
    facts = facts_of_plan(planned, load_schema(Fingerprint, source.fingerprint_file(dataset)))
    names: dict[str, str] = {}
    for title, change in CHANGES.items():
        parent = change.configuration or planned.recommended.value
        if parent not in planned.configurations or (title != PLANNED and parent == title == planned.recommended.value):
            continue
        recipe = planned.configuration(parent).recipes["none"]["cpu"]
        fields = dict(change.recipe)
        if change.tile_factor is not None:
            side = min(facts.plane.largest_vox, round(change.tile_factor * recipe.tile_vox.value))
            if side == recipe.tile_vox.value:
                continue
            fields["tile_vox"] = side
        names[title] = parent
        if fields or change.design:
            names[title] = f"changed_{sha256_json([fields, change.design])[:8]}"
            edits = {name: edited(recipe, name, value) for name, value in fields.items()}
            content["configurations"][names[title]] = {
                "inherits_from": parent,
                **{name: {"value": value, "reason": title} for name, value in change.design.items()},
                "recipes": {"none": {"cpu": {n: {"value": v, "reason": title} for n, v in edits.items()}}},
            }
    copy_dataset(dataset, source, target)
    write_json(target.plan_file(dataset), content)
    select_inside(dataset, target)
    return names, key


def select_inside(dataset: str, workspace: Workspace) -> None:
    """Replace the splits of a copied dataset by one fold inside the training cases of fold 0."""
    file = workspace.splits_file(dataset)
    groups = load_raw_dataset(workspace.raw_folder(dataset)).groups or {}
    write_json(file, [selection(read_json(file)[0]["train"], groups)])


def plan_key(plan: Plan) -> str:
    """Short hash of what is planned from random weights on a CPU: rows of other plans do not compare."""
    chosen = plan.configuration()
    recipe = chosen.recipes["none"]["cpu"].model_dump(mode="json")
    values = {name: field["value"] for name, field in recipe.items() if field is not None and name != "memory_gib"}
    # Rows of before there was a choice say nothing of it.
    if values["planes"] == list(STORED):
        del values["planes"]
    return sha256_json([plan.recommended.value, chosen.context_slices.value, values])[:8]


def edited(recipe: Recipe, name: str, value: Any) -> Any:
    """A field's new value; of the augmentation, only what the change names is new."""
    return recipe.augmentation.value.model_dump() | value if name == "augmentation" else value


def selection(cases: list[str], groups: Mapping[str, str]) -> dict[str, list[str]]:
    """A fold inside the training cases of another; a group stays together."""
    units: dict[str, list[str]] = {}
    for case in sorted(cases):
        units.setdefault(groups.get(case, case), []).append(case)
    shuffled = list(units)
    random.Random(SPLIT_SEED).shuffle(shuffled)
    number = max(1, round(SHARE * len(shuffled)))
    chosen = [case for unit in shuffled[:number] for case in units[unit]]
    return {"train": sorted(set(cases) - set(chosen)), "val": sorted(chosen)}


def table(results: dict[str, Any]) -> str:
    """Markdown: Dice of every change, and its difference to the plan on the same cases."""
    head = ["dataset", "part", "change", "px", "minutes", "seeds", "Dice"]
    head += ["change - plan, points (95 %)", "steps", "slices/s"]
    lines = [row(head), row(["---"] * len(head))]
    found = [cell for cell in results.values() if "failed" not in cell]
    runs: dict[tuple[str, int, float, str], dict[str, list[dict[str, Any]]]] = {}
    for cell in found:
        place = (cell["dataset"], cell.get("num_cases", 0), cell["minutes"], cell.get("plan", ""))
        run = runs.setdefault(place, {})
        run.setdefault(cell["change"], []).append(cell)
    order = list(CHANGES)
    for (dataset, num_cases, minutes, _), cells_of in sorted(runs.items()):
        where = f"{dataset}, {num_cases} cases" if num_cases else dataset
        plans = {cell["seed"]: cell for cell in cells_of.get(PLANNED, [])}
        # Changes of earlier plans, which are no rows any more, come last.
        for title in sorted(cells_of, key=lambda one: (order.index(one) if one in order else len(order), one)):
            same = cells_of[title]
            pairs = [paired(c, plans[c["seed"]]) for c in same if c["seed"] in plans]
            shown = "; ".join(f"{POINTS * m:+.1f} ({span_of(POINTS * low, POINTS * high)})" for m, low, high in pairs)
            mean = sum(c["mean_dice"] for c in same) / len(same)
            first = same[0]
            name = (title if title != PLANNED else f"{PLANNED}: {decoder_of(first)}") + planes_of(first)
            facts = [where, first["group"], name, first["input_size"], f"{minutes:g}", len(same), f"{mean:.3f}"]
            difference = shown if title != PLANNED else ""
            lines.append(row([*facts, difference, first["steps"], first["images_per_second"]]))
    return "\n".join(lines)


def decoder_of(cell: Mapping[str, Any]) -> str:
    """What decodes, of a row's method: plans differ in it."""
    return "side path" if "side path" in cell["method"] else "SAM's decoder"


def planes_of(cell: Mapping[str, Any]) -> str:
    """In how many planes a row cuts slices, where they are several; older rows knew one."""
    number = len(cell.get("planes", STORED))
    return f", {number} planes" if number > 1 else ""


if __name__ == "__main__":
    main()
