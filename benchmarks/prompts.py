"""Dice against the quality of prompts: SAM as it is, MedSAM and Med-SA, prompted from the reference (oracle).

    python -m benchmarks.prompts --data FOLDER/Dataset004_Hippocampus --workspace WORKSPACE

Evaluates the models that `benchmarks.methods` trained in the same workspace, on all validation cases of the fold, with
every object of every slice prompted: a box as large as the image, one and three clicks, boxes that overlap the tight
one by 0.5 and 0.75, the tight box. All of it has seen the reference. Rows whose result exists are skipped.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.cells import RESULTS, cell_folder, stored
from benchmarks.methods import row
from samunet.artifacts.dataset import Case
from samunet.core.files import read_json, write_json
from samunet.core.log import SilentReporter
from samunet.datasets.raw import load_raw_dataset
from samunet.inference.export import predict_cases
from samunet.inference.oracle import OracleSettings
from samunet.inference.predictor import Predictor
from samunet.inference.simulation import GRADES, Grade
from samunet.pipeline.evaluate import evaluate
from samunet.pipeline.oracle import oracle_prompts
from samunet.pipeline.provenance import describe

TABLE = "prompts"
MODELS = ("sam_zero_shot", "medsam", "med_sa")
SEED = 0


def main() -> None:
    """Run the rows that are missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="raw dataset folder")
    parser.add_argument("--workspace", type=Path, default=Path("samunet_workspace"))
    parser.add_argument("--backbone", nargs="+", default=["vit_xs", "vit_t_xs"])
    parser.add_argument("--table", action="store_true", help="only print the table")
    options = parser.parse_args()
    file = RESULTS / f"{TABLE}.json"
    results: dict[str, Any] = stored(file)
    for backbone in [] if options.table else options.backbone:
        for model in MODELS:
            for grade in GRADES:
                name = f"{model} {backbone} {grade}"
                if name not in results:
                    results[name] = score(model, backbone, grade, options)
                    write_json(file, dict(sorted(results.items())))
                    print(name, results[name]["mean_dice"], flush=True)
    print(table(results))


def score(model: str, backbone: str, grade: Grade, options: argparse.Namespace) -> dict[str, Any]:
    """Mean Dice of one model over the fold's validation cases for one grade of prompts."""
    name = f"{model} {backbone}"
    taken = read_json(RESULTS / "methods.json").get(name, {}).get("taken_from", "")
    below = cell_folder(options.workspace, taken.partition(": ")[2] or name)
    finals = below.glob("*/*__*__*/fold_0/checkpoint_final.safetensors")
    folder = next(iter(finals)).parent
    predictor = Predictor.from_folder(folder.parent, folds=["0"], device="cpu", mirror=False)
    cases = validation_cases(options.data, read_json(folder / "cases.json")["validation"])
    settings = OracleSettings(predictor.plan.label_spec, grade, SEED, frame=predictor.plan.frame.value)
    prompts = oracle_prompts({case.name: case.label for case in cases if case.label is not None}, settings).cases
    with TemporaryDirectory() as output:
        outcomes = predict_cases(
            predictor,
            cases,
            Path(output),
            ending=predictor.plan.file_ending,
            reporter=SilentReporter(),
            prompts=prompts,
            propagate=False,
        )
        failed = [name for name, error in outcomes.items() if error is not None]
        pairs = [
            (case.name, case.label, Path(output) / f"{case.name}{predictor.plan.file_ending}")
            for case in cases
            if case.label is not None and case.name not in failed
        ]
        report = evaluate(pairs, labels=predictor.plan.label_spec, reporter=SilentReporter())
    interval = report.foreground_mean_interval["Dice"]
    return {
        "oracle_prompts": True,
        "grade": grade,
        "seed": SEED,
        "model": model,
        "backbone": backbone,
        "mean_dice": report.foreground_mean["Dice"],
        "low": interval.low,
        "high": interval.high,
        "num_cases": len(pairs),
        "failed": failed,
        "provenance": {k: v for k, v in describe().items() if k not in ("command", "started")},
    }


def validation_cases(data: Path, names: Sequence[str]) -> list[Case]:
    """The raw cases of the fold's validation part."""
    by_name = {case.name: case for case in load_raw_dataset(data).training}
    return [by_name[name] for name in names]


def table(results: dict[str, Any]) -> str:
    """Markdown: one row per model, one column per grade."""
    lines = [row(["oracle prompts", "backbone", *GRADES]), row(["---"] * (2 + len(GRADES)))]
    for model in MODELS:
        for backbone in sorted({cell["backbone"] for cell in results.values()}):
            found = [results.get(f"{model} {backbone} {grade}", {}).get("mean_dice") for grade in GRADES]
            if any(dice is not None for dice in found):
                lines.append(row([model, backbone, *("" if dice is None else f"{dice:.3f}" for dice in found)]))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
