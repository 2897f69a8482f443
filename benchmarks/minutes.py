"""Dice against training minutes: the three commands on one fold of a dataset, once per time limit.

    python -m benchmarks.minutes --data FOLDER/Dataset004_Hippocampus --minutes 10 30

Each cell runs samunet_plan_and_preprocess, which is told the minutes (finished cases are skipped), samunet_train with
random weights and that time limit, and records the whole-volume scores of the fold's validation cases on their original
grid. Cells whose result exists are skipped; results go to benchmarks/results/minutes.json with the machine, versions
and commands.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from samunet.artifacts.checkpoint import read_manifest
from samunet.core.files import read_json, write_json

RECIPE_KEYS = ("backbone", "input_size", "tile_vox", "batch_size", "learning_rate")
RESULTS = Path(__file__).parent / "results" / "minutes.json"


def main() -> None:
    """Run the cells that are missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, nargs="+", help="raw dataset folders")
    parser.add_argument("--minutes", type=float, nargs="+", default=[10.0, 30.0], help="time limits")
    parser.add_argument("--fold", default="0")
    parser.add_argument("--configuration", default=None, help="default: the recommended one")
    parser.add_argument("--workspace", type=Path, default=Path("samunet_workspace"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--again", action="store_true", help="run cells whose result exists too")
    options = parser.parse_args()
    results = read_json(RESULTS) if RESULTS.is_file() else {}
    for data in options.data:
        for minutes in sorted(options.minutes):
            configuration = options.configuration or "recommended"
            name = f"{data.name} fold {options.fold} {configuration} {options.device} {minutes:g} min"
            if options.again or name not in results:
                results[name] = run_cell(data, minutes, options)
                write_json(RESULTS, dict(sorted(results.items())))
    print(table(results))


def run_cell(data: Path, minutes: float, options: argparse.Namespace) -> dict[str, object]:
    """Plan, train, validate; returns scores and provenance."""
    folders = ["--raw", str(data.parent), "--preprocessed", str(options.workspace / "preprocessed")]
    results = options.workspace / f"results_{minutes:g}_minutes"
    plan = ["samunet.cli.plan_and_preprocess", "-d", data.name, "--minutes", f"{minutes:g}", *folders]
    train = ["samunet.cli.train", data.name, options.fold, "--weights", "none", "--device", options.device]
    train += ["--time-limit", f"{minutes:g}", "--overwrite", *folders, "--results", str(results)]
    train += ["-c", options.configuration] if options.configuration else []
    run(plan)
    began = time.monotonic()
    run(train)
    seconds = time.monotonic() - began
    fold = next((results / data.name).glob(f"{options.configuration or '*'}__*__none/fold_{options.fold}"))
    summary = read_json(fold / "validation" / "summary.json")
    manifest = read_manifest(fold / "checkpoint_final.safetensors")
    log = [json.loads(line) for line in (fold / "training_log.jsonl").read_text().splitlines()]
    return {
        "mean_dice": summary["foreground_mean"]["Dice"],
        "interval": summary["foreground_mean_interval"]["Dice"],
        "dice": {summary["structures"][k]: v["Dice"] for k, v in summary["mean"].items()},
        "hd95_mm": {summary["structures"][k]: v["HD95"] for k, v in summary["mean"].items()},
        "validation_cases": len(summary["metric_per_case"]),
        "configuration": manifest.configuration,
        "steps": manifest.steps,
        "training_minutes": round(manifest.minutes, 2),
        "wall_minutes_with_validation": round(seconds / 60, 2),
        "recipe": {
            k: manifest.recipe[k] for k in ("backbone", "input_size", "tile_vox", "batch_size", "learning_rate")
        },
        "growth": [
            {"minutes": row["minutes"], "dice_of_five_validation_cases": round(row["validation"], 4)}
            for row in log
            if row.get("validation") is not None
        ],
        "provenance": {k: v for k, v in manifest.provenance.items() if k != "command"},
        "seed": manifest.seed,
    }


def run(words: list[str]) -> None:
    """Run a command of samunet and stop if it fails."""
    print("+", " ".join(words), flush=True)
    if subprocess.run([sys.executable, "-m", *words], check=False).returncode > 1:
        raise SystemExit(f"failed: {' '.join(words)}")


def table(results: dict[str, dict[str, object]]) -> str:
    """A Markdown table of all cells."""
    lines = ["| cell | mean Dice | 95 % interval | steps | training minutes |", "|---|---|---|---|---|"]
    for name, cell in results.items():
        interval = cell["interval"]
        assert isinstance(interval, dict)
        low, high = interval["low"], interval["high"]
        span = "-" if low is None else f"{low:.3f} to {high:.3f}"
        lines.append(f"| {name} | {cell['mean_dice']:.3f} | {span} | {cell['steps']} | {cell['training_minutes']} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
