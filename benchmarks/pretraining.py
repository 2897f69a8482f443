"""What pretraining is worth at N labelled cases: none, supervised on other datasets, self-supervised on the images.

    python -m benchmarks.pretraining --data FOLDER/Dataset004_Hippocampus --others FOLDER/Dataset022_MouseBrain

The three set-ups of the finetune-SAM study, from random weights of one backbone. Self-supervised: masked images of the
fold's training cases, no label read. Self-training: the run labels the fold's other training cases itself, within its
minutes. Supervised: prompts for the structures of the other datasets, whose labels are all
read; none of the dataset in question. Each is pretrained once for `--pretrain-minutes`, which all subsets share and
which do not count in the minutes of training. All set-ups train the same network for the same minutes on the same
subset, and validate on the same cases, with mirrored views. `--synthetic FILE`, made by `benchmarks.synthetic_weights`,
adds encoders trained on generated images alone. Rows whose result exists for the same plan are skipped, an interrupted
pretraining is continued; `--table` only prints.

Source: Gu et al., How to build the best medical image segmentation algorithm using foundation models, 2024 (set-ups).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.cells import RESULTS, THREADS, Cell, paired, plan, run_cells, stored
from benchmarks.recipe import plan_key
from samunet.artifacts.plan import load_plan
from samunet.artifacts.pretraining import read_pretrained
from samunet.artifacts.workspace import Workspace
from samunet.core.files import read_json

TABLE = "pretraining"
NONE, SUPERVISED, SELF = "none", "supervised", "self-supervised"
SYNTHETIC, TAUGHT = "synthetic", "self-training"
SETUPS = (NONE, SUPERVISED, SELF, SYNTHETIC, TAUGHT)
UNPRETRAINED = (NONE, TAUGHT)


def main() -> None:
    """Pretrain what is missing, run the rows that are missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="raw dataset folder")
    parser.add_argument("--others", type=Path, nargs="*", default=[], help="labelled datasets of the supervised set-up")
    parser.add_argument("--synthetic", type=Path, help="weights of benchmarks.synthetic_weights")
    parser.add_argument("--num-cases", type=int, nargs="+", default=[5, 10, 40])
    parser.add_argument("--subset-seeds", type=int, nargs="+", default=[12345, 1])
    parser.add_argument("--one-subset-from", type=int, default=40, help="from so many cases on only the first subset")
    parser.add_argument("--minutes", type=float, default=15.0, help="of training")
    parser.add_argument("--pretrain-minutes", type=float, default=30.0)
    parser.add_argument("--backbone", default="vit_t_xs")
    parser.add_argument("--fold", default="0")
    parser.add_argument("--setups", nargs="+", choices=SETUPS, default=list(SETUPS))
    parser.add_argument("--workspace", type=Path, default=Path("samunet_workspace"))
    parser.add_argument("--table", action="store_true", help="only print the table")
    options = parser.parse_args()
    if not options.table:
        given = {SUPERVISED: options.others, SYNTHETIC: options.synthetic}
        setups = [name for name in options.setups if name not in given or given[name]]
        for data in (options.data, *(options.others if SUPERVISED in setups else [])):
            plan(data, options.workspace, options.minutes)
        files = {name: pretrained(name, options) for name in setups if name not in UNPRETRAINED}
        run_cells(cells(setups, files, options), TABLE, options.workspace, fold=options.fold)
    file = RESULTS / f"{TABLE}.json"
    print(table(stored(file)))


def pretrained(setup: str, options: argparse.Namespace) -> Path:
    """The weights of a set-up, pretrained now if they are not there, continued if that was interrupted."""
    if setup == SYNTHETIC:
        return Path(options.synthetic)
    datasets = options.others if setup == SUPERVISED else [options.data]
    of = "_".join(data.name.partition("_")[0].removeprefix("Dataset") for data in datasets)
    of += "" if setup == SUPERVISED else f"_without_fold_{options.fold}"
    name = f"benchmark_{setup}_{of}_{options.backbone}_{options.pretrain_minutes:g}_{planned(options)}"
    folder = options.workspace / "results" / "pretrained" / name
    file: Path = folder / "weights.safetensors"
    if file.is_file():
        return file
    raw = {data.parent for data in datasets}
    if len(raw) > 1:
        raise SystemExit("all datasets have to lie in one folder")
    words = ["samunet.cli.pretrain", "-d", *(data.name for data in datasets), "--raw", str(raw.pop())]
    words += ["--preprocessed", str(options.workspace / "preprocessed")]
    words += ["--results", str(options.workspace / "results"), "--name", name]
    words += ["--weights", "none", "--backbone", options.backbone, "--device", "cpu", "--workers", "0", "--cpu-clock"]
    words += ["--time-limit", f"{options.pretrain_minutes:g}"]
    words += ["--supervised"] if setup == SUPERVISED else ["--leave-out-fold", options.fold]
    words += ["--c" if (folder / "checkpoint_latest.safetensors").is_file() else "--overwrite"]
    print("+", " ".join(words), flush=True)
    environment = {**os.environ, "OMP_NUM_THREADS": str(THREADS)}
    if subprocess.run([sys.executable, "-m", *words], env=environment, check=False).returncode:
        raise SystemExit(f"failed: {' '.join(words)}")
    return file


def planned(options: argparse.Namespace) -> str:
    """Short hash of the dataset's plan: rows of other plans do not compare."""
    return plan_key(load_plan(Workspace.locate(workspace=options.workspace).plan_file(options.data.name)))


def cells(setups: Sequence[str], files: dict[str, Path], options: argparse.Namespace) -> list[Cell]:
    """One per set-up, number of cases and subset."""
    made, key = [], planned(options)
    for number in options.num_cases:
        seeds = options.subset_seeds[:1] if number >= options.one_subset_from else options.subset_seeds
        for seed in seeds:
            for setup in setups:
                words = ["--num-cases", str(number), "--subset-seed", str(seed)]
                weights = NONE if setup in UNPRETRAINED else str(files[setup])
                words += ["--weights", weights, "--backbone", options.backbone]
                words += ["--unlabelled", "imagesTr"] * (setup == TAUGHT)
                name = f"{options.data.name} fold {options.fold} {number} cases subset {seed} {options.backbone}"
                name += f" {options.minutes:g} min plan {key}, {setup}"
                name += f" {options.pretrain_minutes:g} min" if setup in (SUPERVISED, SELF) else ""
                facts = {"setup": setup, "num_cases": number, "subset_seed": seed, "dataset": options.data.name}
                facts["plan"] = key
                facts["pretraining"] = None if setup in UNPRETRAINED else _facts(files[setup])
                made.append(Cell(name, options.data, options.minutes, tuple(words), facts, mirror=True))
    return made


def _facts(file: Path) -> dict[str, Any]:
    """What the table says about pretrained weights."""
    about = read_pretrained(file)
    assert about is not None
    return {
        "sha256": about.sha256 or read_json(file.with_suffix(".json"))["sha256"],
        "datasets": [part.name for part in about.datasets],
        "minutes": round(about.minutes, 2),
        "steps": about.steps,
        "loss": about.loss,
    }


def table(results: dict[str, Any]) -> str:
    """Markdown: a row per subset, a column per set-up, with the paired gain over no pretraining."""
    gained = [name for name in SETUPS[1:] if any(cell.get("setup") == name for cell in results.values())]
    head = ["dataset", "minutes", "plan", "cases", "subset", NONE]
    head += [title for name in gained for title in (name, "gain (95 %)")]
    lines = [_row(head), _row(["---"] * len(head))]
    done = {k: cell for k, cell in results.items() if "failed" not in cell}
    for place in sorted({place_of(cell) for cell in done.values()}):
        by_setup = {c["setup"]: c for c in done.values() if place_of(c) == place}
        base = by_setup.get(NONE)
        values: list[object] = [*place, _dice(base)]
        for setup in gained:
            cell = by_setup.get(setup)
            values += [_dice(cell), _gain(cell, base)]
        lines.append(_row(values))
    missing = sum(1 for line in lines[2:] if " - " in line)
    if missing:
        lines += ["", f"This table is partial: {missing} rows lack a set-up."]
    return "\n".join(lines)


def place_of(cell: dict[str, Any]) -> tuple[object, ...]:
    """What rows share that compare: dataset, minutes, plan, number of cases and subset."""
    return cell["dataset"], cell["minutes"], cell["plan"], cell["num_cases"], cell["subset_seed"]


def _dice(cell: dict[str, Any] | None) -> str:
    return "-" if cell is None else f"{cell['mean_dice']:.3f}"


def _gain(cell: dict[str, Any] | None, base: dict[str, Any] | None) -> str:
    if cell is None or base is None:
        return "-"
    mean, low, high = paired(cell, base)
    return f"{mean:+.3f} ({low:+.3f} to {high:+.3f})"


def _row(values: Sequence[object]) -> str:
    return "| " + " | ".join(str(value) for value in values) + " |"


if __name__ == "__main__":
    main()
