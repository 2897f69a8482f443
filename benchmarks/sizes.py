"""Input size and field of view against each other, for the same processor minutes: what the rule for sizes stands on.

    python -m benchmarks.sizes --data FOLDER/Dataset... --minutes 5 --inputs 112 224 --shares 0.5 1

A share of 1 shows the encoder the dataset's largest slice as a whole, 0.5 a tile of half its side; both are zoomed to
the input. A larger share sees more of the body at once and each voxel more coarsely. Every pair is planned for its own
speed, as the plan would be if it had chosen it. Selection only, as `benchmarks.recipe`: folds lie inside the training
cases of fold 0. Cells whose result exists are skipped; `--table` only prints.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.cells import Cell, run_table
from benchmarks.methods import row
from benchmarks.recipe import select_inside
from benchmarks.variants import at_input_size, copy_plan
from samunet.artifacts.fingerprint import Fingerprint
from samunet.artifacts.model_spec import DECODER_STRIDE
from samunet.artifacts.plan import load_plan
from samunet.artifacts.workspace import Workspace
from samunet.core.config import load_schema
from samunet.planners.planner import facts_of_plan
from samunet.planners.sizes import grid_of

TABLE = "sizes"


def main() -> None:
    """Run the cells that are missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, nargs="+", default=[], help="raw dataset folders")
    parser.add_argument("--minutes", type=float, default=5.0, help="of every training")
    parser.add_argument("--inputs", type=int, nargs="+", default=[112, 224], help="encoder pixels")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.5, 1.0], help="of the largest slice's side")
    parser.add_argument("--configuration", help="default: the recommended one")
    parser.add_argument("--seeds", type=int, nargs="+", default=[12345])
    parser.add_argument("--workspace", type=Path, default=Path("samunet_workspace"))
    parser.add_argument("--table", action="store_true", help="only print the table")
    run_table(parser.parse_args(), TABLE, cells, table)


def cells(data: Path, options: argparse.Namespace) -> list[Cell]:
    """One per input size, share and seed, smallest first."""
    source = Workspace(raw=data.parent, preprocessed=options.workspace / "preprocessed", results=options.workspace)
    target = Workspace(raw=data.parent, preprocessed=options.workspace / "sizes", results=options.workspace)
    planned = load_plan(source.plan_file(data.name))
    fingerprint = load_schema(Fingerprint, source.fingerprint_file(data.name))
    parent = options.configuration or planned.recommended.value
    largest = facts_of_plan(planned, fingerprint).plane.largest_vox
    tiles = sorted({round(share * largest) for share in options.shares})
    pairs = {f"{parent}_{size}px_{tile}vox": (size, tile) for size, tile in product(sorted(options.inputs), tiles)}
    added = {name: at_input_size(planned, fingerprint, parent, *pair) for name, pair in pairs.items()}
    copy_plan(planned.model_copy(update={"configurations": {**planned.configurations, **added}}), source, target)
    select_inside(data.name, target)
    made = []
    stride = grid_of(planned.configuration(parent).recipes["none"]["cpu"].method_parts()).stride
    for seed, (name, (size, tile)) in product(options.seeds, pairs.items()):
        facts = {"dataset": data.name, "minutes": options.minutes, "tile_vox": tile, "share": round(tile / largest, 3)}
        facts["stride"] = stride
        title = f"{data.name} {parent} {size} px {tile} voxels seed {seed} {options.minutes:g} min"
        title += "" if stride == DECODER_STRIDE else f" stride {stride}"
        words = ("-c", name, "--weights", "none", "--seed", f"{seed}")
        made.append(Cell(title, data, options.minutes, words, facts, preprocessed=target.preprocessed))
    return made


def table(results: Mapping[str, Any]) -> str:
    """Markdown: Dice of every pair, grouped by dataset and minutes."""
    head = ["dataset", "minutes", "input", "tile, voxels", "share", "voxels per decoder cell", "steps", "Dice"]
    lines = [row(head), row(["---"] * len(head))]
    done = [cell for cell in results.values() if "failed" not in cell]
    for cell in sorted(done, key=lambda c: (c["dataset"], c["minutes"], c["input_size"], c["tile_vox"], c["seed"])):
        coarse = cell.get("stride", DECODER_STRIDE) * cell["tile_vox"] / cell["input_size"]
        place = [cell["dataset"], f"{cell['minutes']:g}", cell["input_size"], cell["tile_vox"], f"{cell['share']:.2f}"]
        lines.append(row([*place, f"{coarse:.1f}", cell["steps"], f"{cell['mean_dice']:.3f}"]))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
