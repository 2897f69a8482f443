"""samunet_export: a trained model in segment-anything's own layout."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from samunet.cli.arguments import CommandParser
from samunet.cli.render import TerminalReporter, run_command


def build_parser() -> CommandParser:
    """The command's flags."""
    parser = CommandParser(
        "samunet_export",
        "Merge a trained model's adapters and write what plain segment-anything can load: the whole model where it has "
        "SAM's own size and tokens, otherwise its image encoder.",
    )
    parser.add_argument(
        "-m", dest="model", type=Path, required=True, metavar="FOLDER", help="results/DATASET/CONFIG__PRESET__WEIGHTS"
    )
    parser.add_argument("-f", dest="fold", required=True, metavar="FOLD", help="0 to 4, or all")
    parser.add_argument("-o", dest="output", type=Path, required=True, metavar="FILE", help="file ending in .pth")
    parser.add_argument(
        "-chk", dest="checkpoint", default="final", choices=["final", "best"], help="checkpoint (default final)"
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command."""
    return run_command(lambda: _run(build_parser().parse_command(arguments)))


def _run(options: argparse.Namespace) -> int:
    from samunet.pipeline.export_weights import export_weights

    result = export_weights(options.model, options.fold, options.output, checkpoint=options.checkpoint)
    reporter = TerminalReporter()
    reporter.info(f"{result.scope} written: {result.file}; load it with {result.note}")
    reporter.info(f"which cases taught it stands in {result.record}: samunet_train and samunet_pretrain read it there")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
