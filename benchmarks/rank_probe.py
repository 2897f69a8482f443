"""Ranks from a probe against the same rank everywhere, at the same number of parameters and minutes of training.

    python -m benchmarks.base_weights --backbone vit_xs --minutes 10 --output FOLDER/vit_xs.pth
    python -m benchmarks.rank_probe --data FOLDER/Dataset004_Hippocampus FOLDER/Dataset... --base FOLDER --minutes 3

Per dataset: samunet_probe on the search fold's training cases (its own time is recorded, and is not part of the
minutes), then the plan's method with the probe's ranks, with the planned rank everywhere, and with rank 1 and 16
everywhere; all at the planned learning rate, on one fold, with two seeds. Differences to the planned rank are paired
case by case, with a 95 % bootstrap over cases (groups where there are any). Rows whose result exists are skipped, a
probe too. Where another learning rate or another probe's ranks are planned by now, the rows of before are marked as
outdated, run again, and not shown. `--table` only prints.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.cells import OUTDATED, RESULTS, Cell, measured, paired_points, plan, run_cells, span_of, stored
from benchmarks.methods import row
from benchmarks.variants import RANK_BACKBONE
from samunet.artifacts.fingerprint import Fingerprint
from samunet.artifacts.plan import load_plan
from samunet.artifacts.probe import Probe, load_probes, save_probes
from samunet.artifacts.workspace import Workspace
from samunet.core.config import load_schema
from samunet.core.files import sha256_file, sha256_json, write_json
from samunet.datasets.raw import load_raw_dataset
from samunet.pipeline.training_run import TrainingRequest, resolve
from samunet.planners.peft import LORA_TARGETS, lora_rank
from samunet.planners.planner import facts_of_plan
from samunet.planners.ranks import choose_ranks

TABLE = "rank_probe"
SEEDS = (1, 2)
FOLD = "0"
OTHER_RANKS = (1, 16)
PROBED = "probe"
COST = "cpu_minutes"
RANKS = "encoder.adapters.0.ranks"


@dataclass(frozen=True)
class Choice:
    """One way to choose the ranks.

    Args:
        words: Of samunet_train.
        changes: What they stand for, as a training request has it.
        rank: As there.
    """

    words: tuple[str, ...]
    changes: Mapping[str, Any] = field(default_factory=dict)
    rank: int | None = None


def main() -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, nargs="+", default=[], help="raw dataset folders")
    parser.add_argument("--base", type=Path, help="folder of vit_xs.pth")
    parser.add_argument("--minutes", type=float, default=3.0, help="of every training")
    parser.add_argument("--batches", type=int, default=16, help="of the probe")
    parser.add_argument("--workspace", type=Path, default=Path("samunet_workspace"))
    parser.add_argument("--table", action="store_true", help="only print the table")
    options = parser.parse_args()
    if options.data and options.base is None and not options.table:
        parser.error("--base is needed: adapting random weights shows nothing")
    for data in [] if options.table else options.data:
        plan(data, options.workspace, options.minutes)
        made = cells(data, probed(data, options), options)
        mark_outdated(made, data.name, options.minutes, RESULTS / f"{TABLE}.json")
        run_cells(made, TABLE, options.workspace, fold=FOLD)
    print(table(stored(RESULTS / f"{TABLE}.json")))


def probed(data: Path, options: argparse.Namespace) -> Probe:
    """The dataset's probe of the base, with the processor minutes that it took in its provenance.

    Without minutes of its own, so that the same seed gives the same probe: one that has no such record is made anew.
    """
    workspace = Workspace.locate(workspace=options.workspace, environment={})
    plan_made = load_plan(workspace.plan_file(data.name))
    configuration = plan_made.recommended.value
    base = options.base / f"{RANK_BACKBONE}.pth"
    question = {"configuration": configuration, "weights": "sam", "backbone": RANK_BACKBONE}
    wanted = (sha256_file(base), options.batches, plan_made.fingerprint_sha256)
    file = workspace.probe_file(data.name)
    found = load_probes(file).find(**question)
    known = found is not None and (found.weights_sha256, found.batches, found.fingerprint_sha256) == wanted
    if found is not None and known and cost_of(found) is not None:
        return found
    words = ["samunet.cli.probe", data.name, FOLD, "-c", configuration, "--weights", f"sam:{base}", "--device", "cpu"]
    words += ["--backbone", RANK_BACKBONE, "--batches", f"{options.batches}", "--raw", str(data.parent)]
    code, used = measured([sys.executable, "-m", *words, "--preprocessed", str(workspace.preprocessed)])
    probes = load_probes(file)
    found = probes.find(**question)
    if code or found is None:
        raise SystemExit(f"failed: {' '.join(words)}")
    found = found.model_copy(update={"provenance": {**found.provenance, COST: used["cpu_minutes"]}})
    save_probes(probes.with_probe(found), file)
    return found


def cost_of(probe: Probe) -> float | None:
    """Processor minutes that a probe took; None of one that was not made here."""
    cost: float | None = probe.provenance.get(COST)
    return cost


def cells(data: Path, probe: Probe, options: argparse.Namespace) -> list[Cell]:
    """Every choice of ranks with every seed; ranks are given word by word, so that no file decides what is compared."""
    rank = planned_rank(data, options.workspace)
    groups = load_raw_dataset(data).groups
    ranks, reason = choose_ranks(probe, rank=rank, targets=LORA_TARGETS)
    base = options.base / f"{RANK_BACKBONE}.pth"
    common = ("-c", probe.configuration, "--backbone", RANK_BACKBONE, "--weights", f"sam:{base}")
    choices: dict[str, Choice] = {
        PROBED: Choice((f"--set={RANKS}={list(ranks)}",), changes={RANKS: list(ranks)}),
        **{f"rank {r}": Choice(("--rank", f"{r}"), rank=r) for r in dict.fromkeys((rank, *OTHER_RANKS))},
    }
    rates = {name: planned_rate(data, probe, choice, base, options.workspace) for name, choice in choices.items()}
    made = []
    for seed in SEEDS:
        for name, choice in choices.items():
            facts = {"dataset": data.name, "choice": name, "planned_rank": rank, "seed": seed, "groups": groups}
            if name == PROBED:
                facts |= {"ranks": list(ranks), "reason": reason, "probe_cpu_minutes": cost_of(probe)}
            key = sha256_json([choice.words, common[:-1], probe.weights_sha256, rates[name]])[:8]
            title = f"{data.name} {name} seed {seed} {options.minutes:g} min {key}"
            words = (*common, *choice.words, "--seed", f"{seed}")
            made.append(Cell(title, data, options.minutes, words, facts))
    return made


def mark_outdated(made: Sequence[Cell], dataset: str, minutes: float, file: Path) -> None:
    """Mark the rows of a dataset and these minutes that no cell of now stands for; they stay in the file.

    Args:
        made: The cells of now.
        dataset: Folder name.
        minutes: Of every training.
        file: The results.
    """
    results, names = stored(file), {cell.name for cell in made}
    marked = {}
    for name, cell in results.items():
        is_former = cell.get("dataset") == dataset and f" {minutes:g} min " in name and name not in names
        marked[name] = {**cell, OUTDATED: True} if is_former else cell
    if marked != results:
        write_json(file, marked)


def planned_rate(data: Path, probe: Probe, choice: Choice, base: Path, workspace: Path) -> float:
    """The learning rate that samunet_train gives a choice now."""
    found = Workspace.locate(raw=data.parent, workspace=workspace, environment={})
    plan_made = load_plan(found.plan_file(data.name))
    request = TrainingRequest(
        data.name,
        FOLD,
        configuration=probe.configuration,
        backbone=RANK_BACKBONE,
        weights=f"sam:{base}",
        device="cpu",
        changes=choice.changes,
        rank=choice.rank,
    )
    return resolve(request, plan_made, probe.configuration, "cpu", found).learning_rate


def planned_rank(data: Path, workspace: Path) -> int:
    """The rank that the rule gives the dataset."""
    found = Workspace.locate(workspace=workspace, environment={})
    fingerprint = load_schema(Fingerprint, found.fingerprint_file(data.name))
    facts = facts_of_plan(load_plan(found.plan_file(data.name)), fingerprint)
    return lora_rank(facts.num_foreground_slices, facts.num_structures)[0]


def table(results: Mapping[str, Any]) -> str:
    """Markdown: Dice of every choice, and its difference to the planned rank everywhere; what is missing is said."""
    results = {name: cell for name, cell in results.items() if OUTDATED not in cell}
    head = ["dataset", "choice", "trained in the encoder", "Dice per seed", "against the planned rank, points (95 %)"]
    lines = [row(head), row(["---"] * len(head))]
    for dataset in sorted({cell["dataset"] for cell in results.values() if "dataset" in cell}):
        own = {n: cell for n, cell in results.items() if cell.get("dataset") == dataset}
        choices: dict[str, dict[int, Any]] = {}
        for cell in own.values():
            choices.setdefault(cell["choice"], {})[cell["seed"]] = cell
        planned = choices.get(f"rank {next(iter(own.values()))['planned_rank']}", {})
        for name, seeds in sorted(choices.items(), key=lambda item: (item[0] != PROBED, item[0])):
            shown = ", ".join(f"{seeds[s]['mean_dice']:.3f}" for s in sorted(seeds))
            first = next(iter(seeds.values()))
            title = f"probe: {', '.join(map(str, first['ranks']))}" if name == PROBED else name
            difference = "" if seeds is planned else against(seeds, planned)
            lines.append(row([dataset, title, f"{first['parameters']['encoder']:,}", shown, difference]))
    return "\n".join(lines)


def against(seeds: Mapping[int, Any], planned: Mapping[int, Any]) -> str:
    """Difference over the cases, averaged over the seeds that both have."""
    common = sorted(set(seeds) & set(planned))
    if not common:
        return "partial: not run"
    pairs = [(known(seeds[seed]), known(planned[seed])) for seed in common]
    found = paired_points(pairs, planned[common[0]]["groups"] or {})
    partial = "" if len(common) == len(SEEDS) else f", partial: {len(common)} of {len(SEEDS)} seeds"
    return f"{found['regret']:+.2f} ({span_of(found['low'], found['high'])}){partial}"


def known(cell: Mapping[str, Any]) -> dict[str, float]:
    """Dice of the cases that have one."""
    return {case: dice for case, dice in cell["case_dice"].items() if dice is not None}


if __name__ == "__main__":
    main()
