"""nnU-Net for the same minutes on the same fold: what samunet's figures stand beside.

    python -m venv nnunet_env && nnunet_env/bin/pip install nnunetv2==2.8.1
    python -m benchmarks.nnunet_peer --nnunet-python nnunet_env/bin/python --data FOLDER/Dataset004_Hippocampus \
        --minutes 30 60

It gets its best chance: its plan as made, the same with small batches, and its 2d network with AdamW and small
batches; the learning rate falls over the minutes (`benchmarks.nnunet_timed`). Folds are samunet's, which are nnU-Net's
own. Masks are scored by samunet's evaluation, as samunet's are; nnU-Net predicts with mirrored views, as it does by
itself. Every cell has folders of its own. Cells whose result exists are skipped, one that was interrupted goes on, one
that fails is written down as such and tried again next time; `--table` only prints.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.cells import RESULTS, THREADS, scores_of, stored
from benchmarks.methods import row
from samunet.artifacts.subset import SUBSET_SEED
from samunet.artifacts.workspace import Workspace
from samunet.core.files import read_json, write_json
from samunet.core.log import SilentReporter
from samunet.datasets.raw import load_raw_dataset
from samunet.datasets.splits import cases_of_fold, load_or_make_splits
from samunet.datasets.subsets import first_cases, load_or_draw_order
from samunet.pipeline.evaluate import evaluate, save_evaluation
from samunet.pipeline.provenance import describe

TABLE = "nnunet_peer"


@dataclass(frozen=True)
class Variant:
    """How nnU-Net is run.

    Args:
        configuration: Of its plan.
        batch_size: Instead of the planned one.
        adamw: AdamW instead of SGD.
    """

    configuration: str
    batch_size: int | None = None
    adamw: bool = False


VARIANTS = {
    "3d as made": Variant("3d_fullres"),
    "3d batch 2": Variant("3d_fullres", 2),
    "3d batch 12": Variant("3d_fullres", 12),
    "2d as made": Variant("2d"),
    "2d batch 12 AdamW": Variant("2d", 12, adamw=True),
}


def main() -> None:
    """Run the cells that are missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nnunet-python", type=Path, help="interpreter with nnunetv2")
    parser.add_argument("--data", type=Path, nargs="+", default=[], help="raw dataset folders")
    parser.add_argument("--minutes", type=float, nargs="+", default=[30.0, 60.0])
    parser.add_argument("--variants", nargs="+", choices=tuple(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--fold", default="0")
    parser.add_argument("--num-cases", type=int, help="train on so many of the fold's training cases")
    parser.add_argument("--subset-seed", type=int, default=SUBSET_SEED)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument(
        "--cpu-clock", action="store_true", help="one thread, the process's own time; augments in it too"
    )
    parser.add_argument("--workspace", type=Path, default=Path("nnunet_workspace"))
    parser.add_argument("--table", action="store_true", help="only print the table")
    options = parser.parse_args()
    if options.cpu_clock:
        options.threads = THREADS
    for data in [] if options.table else options.data:
        shared = prepared(data, options)
        planned = read_json(shared / "nnUNetPlans.json")["configurations"]
        for minutes in options.minutes:
            for variant in options.variants:
                name = name_of(data, minutes, variant, options)
                if VARIANTS[variant].configuration not in planned:
                    print(f"{name}: nnU-Net plans no {VARIANTS[variant].configuration} for this dataset", flush=True)
                elif "case_dice" not in finished().get(name, {}):
                    result = run_cell(data, minutes, variant, shared, options)
                    write_json(RESULTS / f"{TABLE}.json", dict(sorted({**finished(), name: result}.items())))
                    print(f"{name}: {result.get('mean_dice', result.get('failed'))}", flush=True)
    print(table(finished()))


def finished() -> dict[str, Any]:
    """What the results file holds now; another process may have added to it."""
    file = RESULTS / f"{TABLE}.json"
    return stored(file)


def name_of(data: Path, minutes: float, variant: str, options: argparse.Namespace) -> str:
    """Of a cell: all that decides it."""
    subset = "" if options.num_cases is None else f" {options.num_cases} cases seed {options.subset_seed}"
    clock = "processor minutes" if options.cpu_clock else "min"
    return f"{data.name} fold {options.fold}{subset} {minutes:g} {clock} {options.threads} threads, {variant}"


def run_cell(data: Path, minutes: float, variant: str, shared: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Train, predict the validation cases, score them."""
    python, chosen = options.nnunet_python, VARIANTS[variant]
    below = options.workspace / "cells" / re.sub(r"\W+", "_", name_of(data, minutes, variant, options))
    state = below / "state.pt"
    split = chosen_cases(data, options)
    plans = view(shared, below / "preprocessed" / data.name, split, chosen)
    script = Path(__file__).with_name("nnunet_timed.py")
    words = [str(python), str(script), "--dataset", data.name, "--configuration", chosen.configuration]
    words += ["--plans", plans, "--minutes", f"{minutes:g}", "--threads", str(options.threads), "--state", str(state)]
    words += ["--adamw"] * chosen.adamw + ["--cpu-clock"] * options.cpu_clock
    environment = {**nnunet_environment(data, below), "nnUNet_n_proc_DA": "0" if options.cpu_clock else "1"}
    environment["OMP_NUM_THREADS"] = str(options.threads)
    facts = {
        "dataset": data.name,
        "fold": options.fold,
        "device": "cpu",
        "variant": variant,
        "minutes": minutes,
        "num_cases": len(split["train"]),
        "subset": None if options.num_cases is None else {"cases": options.num_cases, "seed": options.subset_seed},
        "threads": options.threads,
        "clock": "process" if options.cpu_clock else "wall",
        "nnunet": version(python),
        "provenance": {k: v for k, v in describe().items() if k not in ("command", "started")},
    }
    done = subprocess.run(words, env=environment, check=False, stdout=subprocess.PIPE, text=True)
    if done.returncode >= 0:
        state.unlink(missing_ok=True)
    if done.returncode:
        return {**facts, "failed": f"exit code {done.returncode}: {done.stdout[-500:]}"}
    found = json.loads(done.stdout.strip().splitlines()[-1])
    predicted = Path(found.pop("folder")) / "validation"
    return {**facts, **found, **score(data, predicted, split["val"])}


def nnunet_environment(data: Path, below: Path) -> dict[str, str]:
    """nnU-Net's folders."""
    folders = {f"nnUNet_{kind}": str(below / kind) for kind in ("preprocessed", "results")}
    return {**os.environ, **folders, "nnUNet_raw": str(data.parent)}


def prepared(data: Path, options: argparse.Namespace) -> Path:
    """nnU-Net's plan and preprocessed data; made again where that was interrupted."""
    folder: Path = options.workspace / "preprocessed" / data.name
    finished = options.workspace / "preprocessed" / f"{data.name}.finished"
    if not finished.is_file():
        shutil.rmtree(folder, ignore_errors=True)
        number = str(int(data.name.removeprefix("Dataset").partition("_")[0]))
        words = [options.nnunet_python.parent / "nnUNetv2_plan_and_preprocess", "-d", number]
        words += ["-c", "2d", "3d_fullres", "-np", "2"]
        # Planning sets its threads from this variable, and none is not allowed there.
        environment = {**nnunet_environment(data, options.workspace), "nnUNet_n_proc_DA": "1"}
        subprocess.run(words, env=environment, check=True, stdout=subprocess.DEVNULL)
        finished.touch()
    return folder


def chosen_cases(data: Path, options: argparse.Namespace) -> dict[str, list[str]]:
    """The cases of the fold, with the training cases that are asked for."""
    dataset = load_raw_dataset(data)
    names = [case.name for case in dataset.training]
    own = Workspace(raw=data.parent, preprocessed=options.workspace / "samunet", results=options.workspace)
    own.preprocessed_folder(data.name).mkdir(parents=True, exist_ok=True)
    splits = load_or_make_splits(own.splits_file(data.name), names, dataset.groups)
    fold = cases_of_fold(splits, options.fold, names)
    train = list(fold.train)
    if options.num_cases is not None:
        file = own.subsets_file(data.name)
        order = load_or_draw_order(file, options.fold, fold.train, dataset.groups, seed=options.subset_seed)
        train = list(first_cases(order, options.num_cases))
    return {"train": train, "val": list(fold.val)}


def view(shared: Path, folder: Path, split: dict[str, list[str]], variant: Variant) -> str:
    """A cell's own folder of preprocessed data: arrays are linked, cases and plans are its own.

    Returns:
        The name of the plans with the variant's batch size.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for entry in shared.iterdir():
        if entry.is_dir():
            (folder / entry.name).symlink_to(entry.resolve(), target_is_directory=True)
        else:
            shutil.copy2(entry, folder / entry.name)
    write_json(folder / "splits_final.json", [split])
    if variant.batch_size is None:
        return "nnUNetPlans"
    content = read_json(folder / "nnUNetPlans.json")
    name = f"nnUNetPlans_batch{variant.batch_size}"
    content["plans_name"] = name
    content["configurations"][variant.configuration]["batch_size"] = variant.batch_size
    write_json(folder / f"{name}.json", content)
    return name


def score(data: Path, predicted: Path, cases: list[str]) -> dict[str, Any]:
    """Dice of predicted masks by samunet's evaluation."""
    dataset = load_raw_dataset(data)
    ending = dataset.description.file_ending
    references = {case.name: case.label for case in dataset.training}
    pairs = [(name, references[name], predicted / f"{name}{ending}") for name in cases]
    groups = dataset.groups or {}
    report = evaluate(
        [(name, label, file) for name, label, file in pairs if label is not None],
        labels=dataset.description.label_spec,
        reporter=SilentReporter(),
        groups=groups,
    )
    return scores_of(save_evaluation(report, predicted.with_name("scored_by_samunet"))[0], groups)


def version(python: Path) -> str:
    """nnU-Net's version."""
    code = "from importlib.metadata import version; print(version('nnunetv2'))"
    return subprocess.run([str(python), "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def table(results: dict[str, Any]) -> str:
    """Markdown."""
    head = ["dataset", "training cases", "minutes", "nnU-Net", "Dice", "95 %", "steps", "batch"]
    lines = [row(head), row(["---"] * len(head))]
    for cell in results.values():
        if "failed" in cell:
            continue
        interval = cell["interval"]
        span = "" if interval["low"] is None else f"{interval['low']:.3f} to {interval['high']:.3f}"
        facts = [
            cell["dataset"],
            cell["num_cases"],
            f"{cell['minutes']:g}",
            cell["variant"],
            f"{cell['mean_dice']:.3f}",
        ]
        lines.append(row([*facts, span, cell["steps"], cell["batch_size"]]))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
