"""samunet_demo: the whole way on generated phantoms, in about five minutes on two CPU cores."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from samunet.cli.arguments import CommandParser, positive_count, positive_number
from samunet.cli.render import TerminalReporter, format_table, run_command


def build_parser() -> CommandParser:
    """The command's flags."""
    parser = CommandParser(
        "samunet_demo",
        "Generate phantoms, plan, train a small SAM from random weights, predict and evaluate held-out phantoms.",
    )
    parser.add_argument("--workspace", type=Path, default=Path("demo_workspace"), help="folder to fill")
    parser.add_argument("--minutes", type=positive_number, default=4.0, help="training time (default 4)")
    parser.add_argument("--cases", type=positive_count, default=40, help="training phantoms (default 40)")
    parser.add_argument("--held-out", type=positive_count, default=5, help="phantoms to predict (default 5)")
    parser.add_argument("-np", dest="processes", type=positive_count, default=2, help="processes (default 2)")
    parser.add_argument("--device", "-device", default="cpu", help="cpu (default), cuda, ...")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command."""
    return run_command(lambda: _run(build_parser().parse_command(arguments)))


def _run(options: argparse.Namespace) -> int:
    from time import monotonic

    from samunet.pipeline.demo import run_demo

    began, reporter = monotonic(), TerminalReporter()
    result = run_demo(
        options.workspace,
        minutes=options.minutes,
        num_train=options.cases,
        num_test=options.held_out,
        processes=options.processes,
        device=options.device,
        reporter=reporter,
    )
    rows = [
        (result.report.name_of(key), scores["Dice"], scores["HD95"], result.baseline.mean[key]["Dice"])
        for key, scores in result.report.mean.items()
    ]
    mean, simple = result.report.foreground_mean, result.baseline.foreground_mean
    rows.append(("mean", mean["Dice"], mean["HD95"], simple["Dice"]))
    reporter.info("")
    reporter.info(format_table(("structure", "Dice", "HD95 mm", "Dice of thresholds x location"), rows))
    reporter.info(result.report.rule)
    reporter.info(f"masks:    {result.masks}")
    reporter.info(f"pictures: {result.pictures[0].parent} ({', '.join(p.name for p in result.pictures)})")
    reporter.info(f"{(monotonic() - began) / 60:.1f} minutes in all")
    return 0 if result.report.complete else 1


if __name__ == "__main__":
    raise SystemExit(main())
