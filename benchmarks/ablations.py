"""One choice at a time, beside the published table each mirrors.

    python -m benchmarks.ablations --data FOLDER/Dataset004_Hippocampus --base FOLDER --minutes 2

Base checkpoints as for `benchmarks.methods`. Cells whose result exists are skipped; `--table` only prints.
"""

from __future__ import annotations

import argparse
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.cells import RESULTS, Cell, plan, run_cells, stored
from benchmarks.methods import base_words, row

TABLE = "ablations"
BACKBONE, OTHER_BACKBONE = "vit_xs", "vit_t_xs"
RANKS, TARGETS, RATES = (1, 4, 16), ("q", "qv", "qkvo"), (5e-4, 2e-3, 5e-3)
SYNAPSE = "Synapse, Dice in percent (SAMed)"
GROUPS: dict[str, tuple[str, dict[str, tuple[str, dict[str, str]]]]] = {
    "encoder": (
        f"{SYNAPSE}: decoder only 67.95, encoder LoRA and decoder 81.88",
        {
            "decoder only": ("sam_decoder", {}),
            "encoder LoRA + decoder": ("samed", {}),
            "encoder adapter + decoder": ("samed", {"encoder.adapters": '[{"kind": "bottleneck"}]'}),
            "whole encoder + decoder": ("finetune_sam_vit_b_both_vanilla", {}),
        },
    ),
    "decoder": (
        f"{SYNAPSE}: whole decoder 81.88, LoRA in it 77.78; finetune-SAM: adaptation in both parts is best",
        {
            "whole": ("samed", {}),
            "LoRA": ("samed", {"decoder.train": "lora"}),
            "adapter": ("samed", {"decoder.train": "adapters"}),
        },
    ),
    "high frequency": (
        "CAMO, structure measure (SAM-Adapter): decoder only .750, with it .847",
        {"without": ("sam_decoder", {}), "with": ("sam_adapter", {})},
    ),
    "medical sam adapter": (
        "BTCV, Dice in percent, prompted (Med-SA): 79.3, + SD-Trans 84.7, + add 86.1, + concat 86.4, + HyP 88.3",
        {
            "adapters": ("med_sa_plain", {}),
            "+ depth attention": ("med_sa_depth", {}),
            "+ add": ("med_sa_add", {}),
            "+ concat": ("med_sa_concat", {}),
            "+ HyP-Adpt": ("med_sa", {}),
        },
    ),
}
RANK_PUBLISHED = (
    f"{SYNAPSE}, all at 5e-3 and batch 24: rank 1, 4, 16 on q and v 78.26, 81.88, 69.03; q 73.76, q and v 81.88, "
    "q, k, v and o 50.93"
)


def main() -> None:
    """Run the cells that are missing and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="raw dataset folder")
    parser.add_argument("--base", type=Path, help="folder of vit_xs.pth and vit_t_xs.pth")
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--workspace", type=Path, default=Path("samunet_workspace"))
    parser.add_argument("--table", action="store_true", help="only print the tables")
    options = parser.parse_args()
    if not options.table:
        plan(options.data, options.workspace, options.minutes, ("2d", "2.5d", "3d"))
        run_cells(cells(options), TABLE, options.workspace)
    print(tables(stored(RESULTS / f"{TABLE}.json")))


def cells(options: argparse.Namespace) -> list[Cell]:
    """The groups, the grid of ranks, targets and learning rates, and the rates on the other family of backbones."""
    made = []
    for group, (_, rows) in GROUPS.items():
        for title, (preset, changes) in rows.items():
            words = [f"--set={path}={value}" for path, value in changes.items()]
            made.append(_cell(f"{group}: {title}", preset, words, options, {"group": group, "row": title}))
    for rank, targets, rate in product(RANKS, TARGETS, RATES):
        listed = ", ".join(f'"{target}"' for target in targets)
        words = [f"--set=encoder.adapters.0.targets=[{listed}]", "--rank", f"{rank}", "--lr", f"{rate:g}"]
        facts = {"group": "rank", "rank": rank, "targets": targets, "rate": rate}
        made.append(_cell(f"rank {rank} {targets} lr {rate:g}", "samed", words, options, facts))
    for rate in RATES:
        facts = {"group": "rate", "rate": rate}
        name = f"{OTHER_BACKBONE} lr {rate:g}"
        made.append(_cell(name, "samed", ["--lr", f"{rate:g}"], options, facts, backbone=OTHER_BACKBONE))
    return made


def _cell(
    name: str,
    preset: str,
    words: list[str],
    options: argparse.Namespace,
    facts: dict[str, Any],
    *,
    backbone: str = BACKBONE,
) -> Cell:
    base = base_words(preset, backbone, options.base)
    return Cell(name, options.data, options.minutes, ("--preset", preset, *base, *words), facts)


def tables(results: dict[str, Any]) -> str:
    """Markdown: a table per group, and the grid; cells that were not run are empty."""
    parts = []
    for group, (published, rows) in GROUPS.items():
        lines = [f"**{group}**. Published: {published}.", "", row(["choice", "Dice", "trained", "slices/s"])]
        lines.append(row(["---"] * 4))
        for title in rows:
            cell = results.get(f"{group}: {title}")
            shown = ["", "", ""] if cell is None or "failed" in cell else _shown(cell)
            lines.append(row([title, *shown]))
        parts.append("\n".join(lines))
    lines = [f"**rank, targets, learning rate**. Published: {RANK_PUBLISHED}.", ""]
    lines += [row(["rank", "targets", *(f"lr {rate:g}" for rate in RATES)]), row(["---"] * 5)]
    for rank, targets in product(RANKS, TARGETS):
        found = [results.get(f"rank {rank} {targets} lr {rate:g}", {}).get("mean_dice") for rate in RATES]
        lines.append(row([rank, targets, *("" if dice is None else f"{dice:.3f}" for dice in found)]))
    found = [results.get(f"{OTHER_BACKBONE} lr {rate:g}", {}).get("mean_dice") for rate in RATES]
    lines.append(row([4, f"qv, {OTHER_BACKBONE}", *("" if dice is None else f"{dice:.3f}" for dice in found)]))
    return "\n\n".join([*parts, "\n".join(lines)])


def _shown(cell: dict[str, Any]) -> list[str]:
    return [f"{cell['mean_dice']:.3f}", f"{cell['parameters']['total']:,}", f"{cell['images_per_second']}"]


if __name__ == "__main__":
    main()
