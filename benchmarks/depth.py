"""Depth attention against slices on their own and with neighbours, for the same minutes, from random weights.

    python -m benchmarks.depth --data FOLDER/Dataset004_Hippocampus FOLDER/Dataset... --minutes 5

Cells whose result exists are skipped; `--table` only prints.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from benchmarks.cells import RESULTS, Cell, paired, plan, run_cells, stored
from benchmarks.methods import row

TABLE = "depth"
CONFIGURATIONS = ("2d", "2.5d", "3d")
NO_INTERVAL = 2.0


def main() -> None:
    """Run the cells that are missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, nargs="+", default=[], help="raw dataset folders")
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--workspace", type=Path, default=Path("samunet_workspace"))
    parser.add_argument("--table", action="store_true", help="only print the table")
    options = parser.parse_args()
    for data in [] if options.table else options.data:
        plan(data, options.workspace, options.minutes)
        made = [
            Cell(
                f"{data.name} {name}",
                data,
                options.minutes,
                ("--weights", "none", "-c", name),
                {"dataset": data.name},
            )
            for name in CONFIGURATIONS
        ]
        run_cells(made, TABLE, options.workspace)
    print(table(stored(RESULTS / f"{TABLE}.json")))


def table(results: dict[str, Any]) -> str:
    """Markdown: Dice per dataset and configuration, and the paired difference of slabs to the better of the others."""
    lines = [row(["dataset", *CONFIGURATIONS, "3d - better of the others (95 %)"]), row(["---"] * 5)]
    for dataset in sorted({cell["dataset"] for cell in results.values() if "dataset" in cell}):
        cells = {name: results.get(f"{dataset} {name}", {}) for name in CONFIGURATIONS}
        scored = {name: cell for name, cell in cells.items() if "mean_dice" in cell}
        shown = [f"{scored[name]['mean_dice']:.3f}" if name in scored else "" for name in CONFIGURATIONS]
        difference = ""
        others = [name for name in ("2d", "2.5d") if name in scored]
        if "3d" in scored and others:
            best = max(others, key=lambda name: scored[name]["mean_dice"])
            mean, low, high = paired(scored["3d"], scored[best])
            interval = f"{low:+.3f} to {high:+.3f}" if high - low < NO_INTERVAL else "one group: no interval"
            difference = f"{mean:+.3f} ({interval}) against {best}"
        lines.append(row([dataset, *shown, difference]))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
