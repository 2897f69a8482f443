"""samunet_find_best_configuration: what is trained, compared by cross-validation; predictions then use the best."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from samunet.cli.arguments import CommandParser, add_workspace_flags, announce_workspace, locate_workspace
from samunet.cli.render import TerminalReporter, format_table, run_command

if TYPE_CHECKING:
    from samunet.artifacts.best import CandidateScore


def build_parser() -> CommandParser:
    """The command's flags."""
    parser = CommandParser(
        "samunet_find_best_configuration",
        "Compare the trained models of a dataset, and pairs of them, on the cases that their folds validate. Writes "
        "best.json, which samunet_predict -d DATASET then follows.",
    )
    parser.add_argument("dataset", metavar="DATASET", help="id, name or path")
    parser.add_argument("-c", dest="configurations", nargs="+", metavar="CONFIG", help="only these configurations")
    parser.add_argument(
        "--preset", dest="presets", nargs="+", metavar="NAME", help="only these presets, or labels of changed ones"
    )
    parser.add_argument(
        "-f", dest="folds", nargs="+", metavar="FOLD", help="only these folds (default: those that all models have)"
    )
    parser.add_argument("--disable_ensembling", action="store_true", help="do not try pairs of models")
    parser.add_argument("--disable_tta", action="store_true", help="do not average mirrored views")
    parser.add_argument("--device", "-device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    parser.add_argument("--overwrite", action="store_true", help="predict anew what an earlier comparison left")
    add_workspace_flags(parser)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command."""
    return run_command(lambda: _run(build_parser().parse_command(arguments)))


def _run(options: argparse.Namespace) -> int:
    workspace = locate_workspace(options, options.dataset)
    from samunet.pipeline.find_best import BestRequest, find_best

    reporter = TerminalReporter()
    announce_workspace(workspace, reporter)
    best = find_best(
        BestRequest(
            dataset=options.dataset,
            configurations=options.configurations,
            presets=options.presets,
            folds=options.folds,
            pairs=not options.disable_ensembling,
            mirror=not options.disable_tta,
            device=options.device,
            overwrite=options.overwrite,
        ),
        workspace,
        reporter=reporter,
    )
    rows = [
        [" + ".join(c.models), *(_text(value) for value in (c.dice.value, c.dice.low, c.dice.high)), _behind(c)]
        for c in best.candidates
    ]
    reporter.info(format_table(["candidate", "Dice", "low", "high", "behind"], rows))
    reporter.info(f"chosen: {' + '.join(model.model for model in best.models)} ({best.reason})")
    for rule in best.filters:
        reporter.info(f"component filter for {rule}: {rule.reason}")
    if not best.filters:
        reporter.info(f"no component filter: {best.filters_reason}")
    reporter.info(best.rule)
    reporter.info(f"written: {workspace.best_file(best.dataset)}; samunet_predict -d follows it")
    return 0


def _behind(candidate: CandidateScore) -> str:
    return "-" if candidate.behind is None else _text(candidate.behind.value)


def _text(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


if __name__ == "__main__":
    raise SystemExit(main())
