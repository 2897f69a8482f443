"""A queue of training cells: each one command, measured, written down as it finishes, never run twice.

A cell trains in one process on one thread, and its minutes are counted in processor time, so that what else the machine
does changes how long a cell takes and hardly what comes out. It is scored without mirrored views unless it says so.
Beside the scores it records the processor minutes it used and the share of the machine that others used meanwhile.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from samunet import planners
from samunet.artifacts.checkpoint import read_manifest
from samunet.artifacts.method import summarise
from samunet.core.files import read_json, sha256_file, sha256_json, write_json
from samunet.datasets.raw import load_raw_dataset
from samunet.evaluation.aggregate import bootstrap_weights, group_labels, resampled_means
from samunet.pipeline.provenance import describe

RESULTS = Path(__file__).parent / "results"
BEGUN_FILE = "cell.json"
THREADS = 1
PLANNED_THREADS = 2
POINTS = 100
OUTDATED = "outdated"
RESAMPLES = 10_000
WEIGHTS_ENDINGS = (".pth", ".safetensors")
Dice = dict[str, float]


@dataclass(frozen=True)
class Cell:
    """One training run.

    Args:
        name: Unique in its table.
        data: Raw dataset folder.
        minutes: Time limit of the training, in processor minutes.
        words: Further words of samunet_train.
        facts: What the table shows beside the scores.
        fold: Fold to train, where it is not the same for all cells.
        preprocessed: Folder of plans and stores, where it is not the workspace's.
        mirror: Average predictions over mirrored views.
        model_of: Cell whose model is scored, where nothing else is to be trained; without it the cell trains its own.
    """

    name: str
    data: Path
    minutes: float
    words: tuple[str, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    fold: str | None = None
    preprocessed: Path | None = None
    mirror: bool = False
    model_of: str | None = None


def plan(data: Path, workspace: Path, minutes: float, configurations: Sequence[str] = ()) -> None:
    """Plan and preprocess a dataset; what is finished is kept.

    Plans count on two threads, so what a cell trains on one is planned for a share of the minutes.
    """
    words = ["samunet.cli.plan_and_preprocess", "-d", str(data), "--workspace", str(workspace), "--minutes"]
    words += [f"{minutes * THREADS / PLANNED_THREADS:g}", *(["-c", *configurations] if configurations else [])]
    if subprocess.run([sys.executable, "-m", *words], check=False).returncode:
        raise SystemExit(f"failed: {' '.join(words)}")


def run_cells(cells: Sequence[Cell], table: str, workspace: Path, *, fold: str = "0") -> dict[str, Any]:
    """Run the cells that are missing from a table, in order; a cell that fails is written down as such.

    A cell whose very run stands in another table is taken from there.

    Args:
        cells: The cells.
        table: Name of the results file.
        workspace: Where plans and stores are; each cell's model goes below ``cells``.
        fold: Fold to train.
    """
    file = RESULTS / f"{table}.json"
    results: dict[str, Any] = stored(file)
    for cell in cells:
        if cell.name in results and "failed" not in results[cell.name]:
            continue
        outcome = same_run(cell, fold) or run_cell(cell, workspace, fold=fold)
        results = stored(file)
        results[cell.name] = outcome
        write_json(file, dict(sorted(results.items())))
        print(f"{cell.name}: {outcome.get('mean_dice', outcome.get('failed'))}", flush=True)
    return results


def stored(file: Path) -> dict[str, Any]:
    """What a results file holds now; nothing where there is none yet."""
    found: dict[str, Any] = read_json(file) if file.is_file() else {}
    return found


def run_table(
    options: Any, table: str, cells: Callable[[Path, Any], Sequence[Cell]], show: Callable[[dict[str, Any]], str]
) -> None:
    """Plan the datasets, run the cells that are missing and print the table; with ``--table`` only print it.

    Args:
        options: Of the command: data, minutes, workspace and table.
        table: Name of the results file.
        cells: Of a dataset.
        show: Markdown of the results.
    """
    for data in [] if options.table else options.data:
        plan(data, options.workspace, options.minutes)
        run_cells(cells(data, options), table, options.workspace)
    print(show(stored(RESULTS / f"{table}.json")))


def run_cell(cell: Cell, workspace: Path, *, fold: str) -> dict[str, Any]:
    """Train, validate, measure; training that was interrupted under the same rules goes on."""
    below = cell_folder(workspace, cell.name)
    fold = cell.fold or fold
    is_copied = copy_model(cell, workspace, fold)
    is_begun = not is_copied and has_begun(below, identity(cell, fold))
    preprocessed = cell.preprocessed or workspace / "preprocessed"
    folders = ["--raw", str(cell.data.parent), "--preprocessed", str(preprocessed)]
    words = ["samunet.cli.train", cell.data.name, fold, "--device", "cpu"]
    if is_copied:
        words += ["--val"]
    else:
        words += ["--time-limit", f"{cell.minutes:g}", "--cpu-clock", "--workers", "0"]
        words += ["--c" if is_begun else "--overwrite"]
    words += [*([] if cell.mirror else ["--disable_tta"]), *cell.words, *folders, "--results", str(below)]
    print("+", " ".join(words), flush=True)
    code, used = measured([sys.executable, "-m", *words])
    found = sorted(below.glob(f"*/*__*__*/fold_{fold}/checkpoint_final.safetensors"))
    if code > 1 or not found:
        return {"failed": f"exit code {code}", **used}
    run = read_run(found[0].parent, load_raw_dataset(cell.data).groups or {})
    return {**dict(cell.facts), **run, **used, **identity(cell, fold), "continued": is_begun}


def has_begun(below: Path, run: dict[str, Any]) -> bool:
    """Whether a cell's folder holds this very run, to go on with; whatever else is there is removed."""
    file = below / BEGUN_FILE
    if file.is_file() and read_json(file) == run and list(below.rglob("checkpoint_latest.safetensors")):
        return True
    shutil.rmtree(below, ignore_errors=True)
    write_json(file, run)
    return False


def copy_model(cell: Cell, workspace: Path, fold: str) -> bool:
    """Whether the other cell's finished model now stands in this cell's folder, without its scores."""
    source = None if cell.model_of is None else cell_folder(workspace, cell.model_of)
    if source is None or not list(source.glob(f"*/*__*__*/fold_{fold}/checkpoint_final.safetensors")):
        return False
    below = cell_folder(workspace, cell.name)
    shutil.rmtree(below, ignore_errors=True)
    shutil.copytree(source, below, ignore=shutil.ignore_patterns("validation*", BEGUN_FILE))
    return True


def identity(cell: Cell, fold: str) -> dict[str, Any]:
    """What makes two cells the same run: dataset, fold, minutes, weights, the planner, and words with files by name."""
    files = [Path(word.rpartition(":")[2]) for word in cell.words if word.endswith(WEIGHTS_ENDINGS)]
    words = [re.sub(r"/\S*/", "", word) for word in cell.words]
    run = {"dataset": cell.data.name, "fold": cell.fold or fold, "minutes": cell.minutes, "words": words}
    base = sha256_file(files[0]) if files else None
    own = cell.preprocessed.name if cell.preprocessed else None
    # None and not False: rows of before there was a choice say nothing of it.
    mirror = True if cell.mirror else None
    return run | {"own_plans": own, "base_sha256": base, "mirror": mirror, "rules": rules_hash()}


@cache
def rules_hash() -> str:
    """Of the planner's source: other rules may make another run of the same words."""
    sources = sorted(Path(planners.__file__).parent.glob("*.py"))
    return sha256_json([file.read_text(encoding="utf-8") for file in sources])[:10]


def same_run(cell: Cell, fold: str) -> dict[str, Any] | None:
    """The result of the same run in another table, under the facts of this one."""
    wanted = identity(cell, fold)
    for file in sorted(RESULTS.glob("*.json")):
        for name, row in read_json(file).items():
            if not isinstance(row, dict) or "failed" in row or OUTDATED in row:
                continue
            if {key: row.get(key) for key in wanted} == wanted:
                return {**row, **dict(cell.facts), "taken_from": row.get("taken_from", f"{file.stem}: {name}")}
    return None


def cell_folder(workspace: Path, name: str) -> Path:
    """Where a cell's model is."""
    return workspace / "cells" / re.sub(r"\W+", "_", name)


def read_run(folder: Path, groups: Mapping[str, str]) -> dict[str, Any]:
    """Scores, method, speed and provenance of a finished fold."""
    manifest = read_manifest(folder / "checkpoint_final.safetensors")
    scores = next(iter(sorted(folder.glob("validation*/summary.json"))))
    log = folder / "training_log.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
    recipe = manifest.resolved_recipe
    return {
        **scores_of(scores, groups),
        "evaluation": scores.parent.name,
        "method": summarise(recipe.method),
        "configuration": manifest.configuration,
        "backbone": recipe.backbone,
        "input_size": recipe.input_size,
        "planes": list(recipe.planes),
        "batch_size": recipe.batch_size,
        "learning_rate": recipe.learning_rate,
        "parameters": manifest.provenance.get("trained_parameters"),
        "steps": manifest.steps,
        "training_minutes": round(manifest.minutes, 2),
        "images_per_second": round(manifest.steps * recipe.batch_size / max(60 * manifest.minutes, 1e-9), 2),
        "loss": rows[-1]["loss"] if rows else None,
        "seed": manifest.seed,
        "base_sha256": manifest.base.sha256,
        "provenance": {k: v for k, v in describe().items() if k not in ("command", "started")},
    }


def scores_of(summary: Path, groups: Mapping[str, str]) -> dict[str, Any]:
    """Mean Dice with its interval and Dice by case of an evaluation, and the groups of the cases that have one."""
    content = read_json(summary)
    by_case = {
        case["case"]: _mean([m["Dice"] for m in case["metrics"].values()]) for case in content["metric_per_case"]
    }
    own = {case: groups[case] for case in by_case if case in groups}
    return {
        "mean_dice": content["foreground_mean"]["Dice"],
        "interval": content["foreground_mean_interval"]["Dice"],
        "case_dice": by_case,
        **({"groups": own} if own else {}),
    }


def measured(words: list[str]) -> tuple[int, dict[str, Any]]:
    """Run a command; returns its exit code, and its processor seconds, peak memory and others' share."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(THREADS)}
    busy, began = _busy_seconds(), time.monotonic()
    process = subprocess.Popen(words, env=environment)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    wall, own = time.monotonic() - began, usage.ru_utime + usage.ru_stime
    others = max(0.0, _busy_seconds() - busy - own) / (wall * (os.cpu_count() or 1))
    return process.returncode, {
        "wall_minutes": round(wall / 60, 2),
        "cpu_minutes": round(own / 60, 2),
        "peak_rss_gib": round(usage.ru_maxrss / 2**20, 2),
        "others_share": round(others, 3),
        "threads": THREADS,
    }


def _busy_seconds() -> float:
    """Processor seconds that anything on the machine has used since it started."""
    line = Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
    user, nice, system, _idle, _wait, irq, softirq, steal = map(int, line)
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def paired_points(seeds: Sequence[tuple[Dice, Dice]], groups: Mapping[str, str]) -> dict[str, float]:
    """Mean difference of Dice over cases, in points, each case averaged over seeds, and a bootstrap over groups.

    Args:
        seeds: Dice by case of the other and of the plan, per seed.
        groups: Case to group; cases without one stand for themselves.

    Returns:
        ``regret``, and the 95 % interval ``low`` to ``high``, which is all there is where a single case or group says
        nothing of others.
    """
    common = sorted(set.intersection(*(set(one) for pair in seeds for one in pair)))
    differences = np.array([[POINTS * fmean(other[case] - own[case] for other, own in seeds)] for case in common])
    weights = bootstrap_weights(len(common), groups=group_labels(common, groups), resamples=RESAMPLES, seed=0)
    means = resampled_means(differences, weights)
    known = len({groups.get(case, case) for case in common}) > 1
    low, high = (float(np.quantile(means, q)) for q in (0.025, 0.975)) if known else (-POINTS, POINTS)
    return {name: round(v, 3) for name, v in (("regret", float(differences.mean())), ("low", low), ("high", high))}


def span_of(low: float, high: float) -> str:
    """An interval in points for a table."""
    return "one case or group" if high - low >= 2 * POINTS else f"{low:+.1f} to {high:+.1f}"


def paired(first: Mapping[str, Any], second: Mapping[str, Any]) -> tuple[float, float, float]:
    """Mean difference of two cells' Dice over their common cases, with an interval of 95 %, as a fraction."""
    runs = [{case: dice for case, dice in cell["case_dice"].items() if dice is not None} for cell in (first, second)]
    found = paired_points([(runs[0], runs[1])], first.get("groups") or {})
    return found["regret"] / POINTS, found["low"] / POINTS, found["high"] / POINTS
