"""Every distinct method on one fold, for the same training minutes, from one base checkpoint per backbone.

    python -m benchmarks.base_weights --backbone vit_xs --minutes 10 --output FOLDER/vit_xs.pth
    python -m benchmarks.base_weights --backbone vit_t_xs --minutes 10 --output FOLDER/vit_t_xs.pth
    python -m benchmarks.methods --data FOLDER/Dataset004_Hippocampus --base FOLDER --minutes 4

The bases are trained on generated phantoms, as adapting a frozen random encoder would show nothing; what pretrained
SAM weights would give is not shown. Methods that are prompted are scored with prompts made from the reference (oracle),
so their rows do not compare with the others. One row per backbone starts from random weights. Med-SA's other
conditionings are rows of `benchmarks.ablations`. Rows whose result exists are skipped; `--table` only prints.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.cells import RESULTS, Cell, plan, run_cells, stored
from samunet.artifacts.method import Method, summarise
from samunet.artifacts.model_spec import get_spec
from samunet.planners.counts import decoder_parameters, encoder_adapter_parameters
from samunet.planners.presets import PRESETS, Preset
from samunet.planners.rules import MOST_SLAB

BACKBONES = ("vit_t_xs", "vit_xs")
TABLE = "methods"
AUTOMATIC = (
    "auto",
    "sam_decoder",
    "samed",
    "samed_s",
    "finetune_sam_vit_b_both_vanilla",
    "finetune_sam_vit_b_both_adapter",
    "finetune_sam_vit_b_decoder_adapter",
    "finetune_sam_vit_b_decoder_lora",
    "sam_adapter",
    "ma_sam",
    "nnsam",
    "peft_dora",
    "peft_rslora",
)
RANDOM = "auto from random weights"
PROMPTED = ("sam_zero_shot", "medsam", "medsam_points", "med_sa", "med_sa_2d")


def main() -> None:
    """Run the rows that are missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="raw dataset folder")
    parser.add_argument("--base", type=Path, help="folder of vit_xs.pth and vit_t_xs.pth")
    parser.add_argument("--minutes", type=float, default=4.0)
    parser.add_argument("--workspace", type=Path, default=Path("samunet_workspace"))
    parser.add_argument("--only", nargs="+", help="presets to run")
    parser.add_argument("--table", action="store_true", help="only print the table")
    options = parser.parse_args()
    if not options.table:
        plan(options.data, options.workspace, options.minutes, ("2d", "2.5d", "3d", "2d_medsam"))
        run_cells(cells(options), TABLE, options.workspace)
    print(table(stored(RESULTS / f"{TABLE}.json")))


def cells(options: argparse.Namespace) -> list[Cell]:
    """One per preset and backbone, and the plan's own method on slabs."""
    made = []
    for backbone in BACKBONES:
        facts = {"preset": RANDOM, "oracle_prompts": False}
        words: tuple[str, ...] = ("--weights", "none", "--backbone", backbone)
        made.append(Cell(f"{RANDOM} {backbone}", options.data, options.minutes, words, facts))
        for preset in (*AUTOMATIC, *PROMPTED):
            if options.only and preset not in options.only:
                continue
            base = base_words(preset, backbone, options.base)
            facts = {"preset": preset, "oracle_prompts": preset in PROMPTED}
            words = ("--preset", preset, *base)
            made.append(Cell(f"{preset} {backbone}", options.data, options.minutes, words, facts))
            if preset == "auto":
                name = f"auto 3d {backbone}"
                made.append(Cell(name, options.data, options.minutes, (*words, "-c", "3d"), facts))
    return made


def base_words(preset: str, backbone: str, folder: Path) -> tuple[str, ...]:
    """The words that start a run from a backbone's base."""
    kind = PRESETS[preset].weights if preset in PRESETS else "sam"
    kind = "sam" if kind == "mobile_sam" else kind
    return "--backbone", backbone, "--weights", f"{kind}:{folder / f'{backbone}.pth'}"


def table(results: dict[str, Any]) -> str:
    """Markdown: scores of what was run, then the parameter counts of every preset on its published backbone."""
    return "\n".join([scores_table(results), "", *counts_table()])


def scores_table(results: dict[str, Any]) -> str:
    """Markdown: scores of what was run; prompted methods last."""
    head = ["method", "backbone", "Dice", "95 %", "trained", "slices/s", "peak GiB", "steps"]
    lines = [row(head), row(["---"] * len(head))]
    for name, cell in sorted(results.items(), key=lambda item: (item[1].get("oracle_prompts", False), item[0])):
        if "failed" in cell:
            lines.append(row([name, "", cell["failed"], *[""] * 5]))
            continue
        interval, counts = cell["interval"], cell["parameters"]
        title = f"{cell['preset']}{' (oracle prompts)' if cell['oracle_prompts'] else ''}, {cell['method']}"
        span = f"{interval['low']:.3f} to {interval['high']:.3f}" if interval["low"] is not None else ""
        speed, memory = cell["images_per_second"], cell["peak_rss_gib"]
        title += ", slabs" if cell["configuration"] == "3d" else ""
        lines.append(
            row(
                [
                    title,
                    cell["backbone"],
                    f"{cell['mean_dice']:.3f}",
                    span,
                    f"{counts['total']:,}",
                    speed,
                    memory,
                    cell["steps"],
                ]
            )
        )
    return "\n".join(lines)


def representatives() -> dict[str, str]:
    """For every preset the one that stands for its method: one that is run where there is one, else the first.

    Methods are the same if all their choices, the prompts among them, and the intensities they need are.
    """
    run = [name for name in (*AUTOMATIC, *PROMPTED) if name in PRESETS]
    ordered = [PRESETS[name] for name in (*run, *(name for name in PRESETS if name not in run))]
    return {
        preset.name: next(p.name for p in ordered if _choices(p) == _choices(preset)) for preset in PRESETS.values()
    }


def _choices(preset: Preset) -> tuple[Method, bool]:
    return preset.method, preset.own_intensities


def same_method(name: str) -> str:
    """Which preset stands for another one's method, and whether only the backbone differs; empty if it is itself."""
    other = representatives()[name]
    if other == name:
        return ""
    differs = PRESETS[other].backbone != PRESETS[name].backbone
    return f"{other}, on another backbone" if differs else other


def counts_table(num_tokens: int = 2, slab_depth: int = MOST_SLAB) -> list[str]:
    """Trained parameters of every preset on its published backbone, for one structure.

    Args:
        num_tokens: Mask tokens of models without prompts.
        slab_depth: Slices of a slab where a method has a depth mechanism: MA-SAM's, and the most that is planned.
    """
    head = ["preset", "backbone", "method", "slices", "encoder adapters", "decoder", "same method as"]
    lines = [row(head), row(["---"] * len(head))]
    for preset in PRESETS.values():
        spec, method = get_spec(preset.backbone), preset.method
        depth = 1 if method.depth.kind == "none" else slab_depth
        adapters = encoder_adapter_parameters(method, spec, slab_depth=depth)
        encoder = "the whole encoder" if method.encoder.train == "full" else f"{adapters:,}"
        tokens = 4 if method.promptable else num_tokens
        decoder = "U-Net" if method.fusion.kind == "unet" else f"{decoder_parameters(method, tokens):,}"
        words = [summarise(method), depth, encoder, decoder, same_method(preset.name)]
        lines.append(row([preset.name, preset.backbone, *words]))
    return lines


def row(values: Sequence[object]) -> str:
    """A line of a Markdown table."""
    return "| " + " | ".join(str(value) for value in values) + " |"


if __name__ == "__main__":
    main()
