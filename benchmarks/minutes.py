"""Dice against training minutes: the three commands on one fold of a dataset, once per time limit.

    python -m benchmarks.minutes --data FOLDER/Dataset004_Hippocampus --minutes 10 30

Each cell runs samunet_plan_and_preprocess, which is told the minutes (finished cases are skipped), samunet_train with
random weights and that time limit, and records the whole-volume scores of the fold's validation cases on their original
grid. `--cpu-clock` trains on one thread and counts the process's own time, so that two cells can share a machine; a
plan is then made for half the minutes, as plans count on two threads. Cells whose result exists are skipped, a training
that was interrupted is continued; results go to benchmarks/results/minutes.json with machine, versions and commands.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.cells import PLANNED_THREADS, THREADS, scores_of, stored
from samunet.artifacts.checkpoint import read_manifest
from samunet.core.files import read_json, write_json
from samunet.datasets.raw import load_raw_dataset

RECIPE_KEYS = ("backbone", "input_size", "tile_vox", "batch_size", "learning_rate")
COMPARED = ("dataset", "fold", "device", "threads", "clock", "minutes")
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
    parser.add_argument("--cpu-clock", action="store_true", help="one thread, the process's own time")
    parser.add_argument("--again", action="store_true", help="run cells whose result exists too")
    options = parser.parse_args()
    for data in options.data:
        for minutes in sorted(options.minutes):
            configuration = options.configuration or "recommended"
            name = f"{data.name} fold {options.fold} {configuration} {options.device} {minutes:g} min"
            name += " of one thread" if options.cpu_clock else ""
            if options.again or not is_complete(finished().get(name)):
                result = run_cell(data, minutes, name, options)
                write_json(RESULTS, dict(sorted({**finished(), name: result}.items())))
    print(table(finished()))


def finished() -> dict[str, dict[str, Any]]:
    """What the results file holds now; another process may have added to it."""
    return stored(RESULTS)


def is_complete(cell: dict[str, Any] | None) -> bool:
    """Whether a row has what `benchmarks.accuracy` compares."""
    return cell is not None and {"case_dice", *COMPARED} <= set(cell)


def run_cell(data: Path, minutes: float, name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Plan, train, validate; returns scores and provenance. What was interrupted in training is continued."""
    below = options.workspace / "minutes" / re.sub(r"\W+", "_", name)
    folders = ["--raw", str(data.parent), "--preprocessed", str(below / "preprocessed")]
    train = ["samunet.cli.train", data.name, options.fold, "--weights", "none", "--device", options.device]
    train += ["--time-limit", f"{minutes:g}", *folders, "--results", str(below / "results")]
    train += ["-c", options.configuration] if options.configuration else []
    train += ["--cpu-clock", "--workers", "0"] if options.cpu_clock else []
    if options.again or not list(below.rglob("checkpoint_latest.safetensors")):
        shutil.rmtree(below, ignore_errors=True)
        planned = minutes * THREADS / PLANNED_THREADS if options.cpu_clock else minutes
        run(["samunet.cli.plan_and_preprocess", "-d", data.name, "--minutes", f"{planned:g}", *folders])
    else:
        train += ["--c"]
    began = time.monotonic()
    run(train, threads=THREADS if options.cpu_clock else None)
    seconds = time.monotonic() - began
    (fold,) = (below / "results" / data.name).glob(f"*/fold_{options.fold}")
    summary = read_json(fold / "validation" / "summary.json")
    manifest = read_manifest(fold / "checkpoint_final.safetensors")
    log = [json.loads(line) for line in (fold / "training_log.jsonl").read_text().splitlines()]
    return {
        **scores_of(fold / "validation" / "summary.json", load_raw_dataset(data).groups or {}),
        "dataset": data.name,
        "fold": options.fold,
        "device": options.device,
        "threads": THREADS if options.cpu_clock else os.cpu_count() or 1,
        "minutes": minutes,
        "clock": "process" if options.cpu_clock else "wall",
        "dice": {summary["structures"][k]: v["Dice"] for k, v in summary["mean"].items()},
        "hd95_mm": {summary["structures"][k]: v["HD95"] for k, v in summary["mean"].items()},
        "validation_cases": len(summary["metric_per_case"]),
        "configuration": manifest.configuration,
        "steps": manifest.steps,
        "training_minutes": round(manifest.minutes, 2),
        "wall_minutes_with_validation": round(seconds / 60, 2),
        "continued": "--c" in train,
        "recipe": {k: manifest.recipe[k] for k in RECIPE_KEYS},
        "growth": [
            {"minutes": row["minutes"], "dice_of_five_validation_cases": round(row["validation"], 4)}
            for row in log
            if row.get("validation") is not None
        ],
        "provenance": {k: v for k, v in manifest.provenance.items() if k != "command"},
        "seed": manifest.seed,
    }


def run(words: list[str], *, threads: int | None = None) -> None:
    """Run a command of samunet, on so many threads, and stop if it fails."""
    print("+", " ".join(words), flush=True)
    environment = {**os.environ, **({} if threads is None else {"OMP_NUM_THREADS": f"{threads}"})}
    if subprocess.run([sys.executable, "-m", *words], env=environment, check=False).returncode > 1:
        raise SystemExit(f"failed: {' '.join(words)}")


def table(results: dict[str, dict[str, Any]]) -> str:
    """A Markdown table of all cells."""
    lines = ["| cell | mean Dice | 95 % interval | steps | training minutes |", "|---|---|---|---|---|"]
    for name, cell in results.items():
        interval = cell["interval"]
        low, high = interval["low"], interval["high"]
        span = "-" if low is None else f"{low:.3f} to {high:.3f}"
        lines.append(f"| {name} | {cell['mean_dice']:.3f} | {span} | {cell['steps']} | {cell['training_minutes']} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
