"""samunet_evaluate: label maps against references."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from samunet.cli.arguments import (
    CommandParser,
    add_workspace_flags,
    locate_workspace,
    positive_count,
    positive_number,
)
from samunet.cli.render import TerminalReporter, format_table, run_command
from samunet.core.cores import default_processes
from samunet.core.errors import UsageError

if TYPE_CHECKING:
    from samunet.artifacts.report import EvaluationReport
    from samunet.core.labels import LabelSpec

COMPARISON_FILE = "comparison.json"
DESCRIPTION = (
    "Scores label maps against references, per case and structure: Dice, IoU, volumes, HD, HD95, ASSD and normalized "
    "surface Dice in mm. Writes summary.json (a superset of nnU-Net's) and summary.csv."
)


def build_parser() -> CommandParser:
    """The command line."""
    parser = CommandParser(
        "samunet_evaluate",
        DESCRIPTION,
        usage="%(prog)s REFERENCE PREDICTION [options]\n       %(prog)s -d DATASET [-f FOLD] PREDICTION [options]",
    )
    parser.add_argument(
        "folders", nargs="*", type=Path, metavar="FOLDER", help="reference folder (left out with -d), prediction folder"
    )
    parser.add_argument("-d", dest="dataset", metavar="DATASET", help="take the references of this dataset")
    parser.add_argument("-f", dest="fold", type=int, help="with -d: only the validation cases of this fold")
    parser.add_argument(
        "--dataset-json", type=Path, metavar="FILE", help="names, regions and ignore label (default: found nearby)"
    )
    parser.add_argument("-o", "--output", type=Path, metavar="FOLDER", help="where to write (default: PREDICTION)")
    parser.add_argument(
        "--tolerance", type=positive_number, default=1.0, metavar="MM", help="of the surface Dice (default: 1)"
    )
    parser.add_argument("--no-surface", action="store_true", help="leave surface distances out")
    parser.add_argument(
        "--compare", type=Path, metavar="SUMMARY", help="compare with another summary.json, case by case"
    )
    parser.add_argument("-np", "--processes", type=positive_count, metavar="N", help="processes (default: up to 8)")
    add_workspace_flags(parser)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_command(lambda: _run(build_parser().parse_command(arguments)))


def _run(options: argparse.Namespace) -> int:
    from samunet.datasets.raw import groups_beside
    from samunet.pipeline.evaluate import evaluate, match, save_evaluation, suggest_processes

    reporter = TerminalReporter()
    references, predictions, dataset_json = _sources(options)
    pairs, unmatched = match(references, predictions)
    labels = _labels(options, dataset_json, list(references.values()), reporter)
    report = evaluate(
        pairs,
        labels=labels,
        tolerance_mm=options.tolerance,
        processes=options.processes or suggest_processes(pairs, labels, limit=default_processes()),
        reporter=reporter,
        surface=not options.no_surface,
        unmatched=unmatched,
        groups=groups_beside(dataset_json),
    )
    output = options.output or predictions
    summary, table = save_evaluation(report, output)
    show_report(report, reporter)
    if options.compare is not None:
        _compare(report, options.compare, output, reporter)
    reporter.info(f"written: {summary}\n         {table}")
    return 0 if report.complete else 1


def _sources(options: argparse.Namespace) -> tuple[dict[str, Path], Path, Path | None]:
    """Reference files by case, the prediction folder, and the dataset.json that goes with them."""
    from samunet.pipeline.evaluate import dataset_references, fold_references, label_files

    expected = 1 if options.dataset is not None else 2
    if len(options.folders) != expected:
        form = "-d DATASET PREDICTION" if options.dataset is not None else "REFERENCE PREDICTION"
        raise UsageError(
            "the number of folders does not fit", expected=form, found=" ".join(map(str, options.folders)) or "none"
        )
    predictions = options.folders[-1]
    if options.dataset is not None:
        workspace = locate_workspace(options, options.dataset)
        folder = workspace.raw_folder(options.dataset)
        if options.fold is None:
            references = dataset_references(folder, predictions)
        else:
            references = fold_references(folder, workspace.splits_file(folder.name), options.fold)
        return references, predictions, folder / "dataset.json"
    if options.fold is not None:
        raise UsageError("-f needs -d", todo="give the dataset whose fold it is")
    reference = options.folders[0]
    references = label_files(reference)
    if not references:
        raise UsageError("the reference folder holds no label file", file=reference)
    near = [reference / "dataset.json", reference.resolve().parent / "dataset.json"]
    return references, predictions, next((path for path in near if path.is_file()), None)


def _labels(
    options: argparse.Namespace, found: Path | None, references: list[Path], reporter: TerminalReporter
) -> LabelSpec:
    from samunet.datasets.raw import load_label_spec
    from samunet.pipeline.evaluate import labels_from_references

    path = options.dataset_json or found
    if path is None:
        reporter.info("no dataset.json: structures are the values found in the references")
        return labels_from_references(references, processes=options.processes or 1, reporter=reporter)
    reporter.info(f"labels from {path}")
    return load_label_spec(path)


def show_report(report: EvaluationReport, reporter: TerminalReporter) -> None:
    """Print the table, the means with their intervals, and the rule."""
    from samunet.evaluation.tables import interval_text, summary_table

    assert report.settings is not None
    header, rows = summary_table(report)
    reporter.info(format_table(header, rows))
    units = "cases" if report.settings.groups is None else "groups of cases"
    level = f"{100 * report.settings.confidence:g} % bootstrap interval over {units}"
    scores = ("Dice", "NSD", "HD95") if report.settings.surface else ("Dice",)
    for score in scores:
        reporter.info(f"mean {score}: {interval_text(report.foreground_mean_interval[score])} ({level})")
    reporter.info(report.rule)
    for key in report.mean:
        if report.metric_per_case and report.mean[key]["Dice"] is None:
            reporter.warn(f"{report.name_of(key)} is in no reference and no prediction: it has no score, in no mean")


def _compare(report: EvaluationReport, other: Path, output: Path, reporter: TerminalReporter) -> None:
    """Print and write the paired comparison with another summary."""
    from samunet.artifacts.report import load_report
    from samunet.core.config import save_schema
    from samunet.evaluation.compare import compare_reports

    comparison = compare_reports(report, load_report(other))
    rows = [
        [report.name_of(key), score, _text(d.mean), _text(d.low), _text(d.high), _text(d.p_value), d.num_cases]
        for key, scores in comparison.structures.items()
        for score, d in scores.items()
        if d.num_cases
    ]
    reporter.info(f"minus {other}, on {comparison.num_common_cases} common cases:")
    reporter.info(format_table(["structure", "score", "difference", "low", "high", "p (Wilcoxon)", "cases"], rows))
    save_schema(comparison, output / COMPARISON_FILE)
    reporter.info(f"written: {output / COMPARISON_FILE}")


def _text(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


if __name__ == "__main__":
    raise SystemExit(main())
