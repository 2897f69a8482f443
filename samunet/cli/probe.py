"""samunet_probe: measure where a dataset pulls at a pretrained encoder, for the planner."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from samunet.artifacts.model_spec import SPECS
from samunet.cli.arguments import (
    CommandParser,
    add_workspace_flags,
    announce_workspace,
    locate_workspace,
    natural_number,
    positive_count,
    positive_number,
)
from samunet.cli.render import TerminalReporter, format_table, run_command

DESCRIPTION = (
    "Measures the gradient of the loss on every projection of a pretrained encoder, with a briefly trained decoder, "
    "and writes it to probe.json beside the plan. Planning and training then spread the adapters' rank over the blocks "
    "by it; delete the file, or train with --rank, for the same rank everywhere."
)


def build_parser() -> CommandParser:
    """The command's flags."""
    parser = CommandParser("samunet_probe", DESCRIPTION)
    parser.add_argument("dataset", metavar="DATASET", help="id, name or path of a planned dataset")
    parser.add_argument(
        "fold", metavar="FOLD", nargs="?", default="0", help="fold whose training cases are used: 0 to 4, or all"
    )
    parser.add_argument("-c", dest="configuration", metavar="CONFIG", help="configuration (default: the recommended)")
    parser.add_argument("--backbone", choices=tuple(SPECS), help="another image encoder than planned")
    parser.add_argument("--weights", default="auto", help="auto (SAM's official file), a file, or KIND:FILE")
    parser.add_argument("--device", "-device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    parser.add_argument(
        "--batches", type=positive_count, default=16, metavar="N", help="batches that the gradient is averaged over"
    )
    parser.add_argument(
        "--minutes", type=positive_number, metavar="MINUTES", help="time limit (default: as long as the batches take)"
    )
    parser.add_argument("--seed", type=natural_number, help="seed of the fresh head and the batches (default 12345)")
    parser.add_argument(
        "--workers", type=natural_number, help="loader processes (default: 1 on a CPU, to 8 beside a GPU)"
    )
    add_workspace_flags(parser)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command."""
    return run_command(lambda: _run(build_parser().parse_command(arguments)))


def _run(options: argparse.Namespace) -> int:
    workspace = locate_workspace(options, options.dataset)
    from samunet.pipeline.probe import ProbeRequest, probe

    reporter = TerminalReporter()
    announce_workspace(workspace, reporter)
    request = ProbeRequest(
        dataset=options.dataset,
        fold=options.fold,
        configuration=options.configuration,
        backbone=options.backbone,
        weights=options.weights,
        device=options.device,
        batches=options.batches,
        minutes=options.minutes,
        seed=options.seed,
        num_workers=options.workers,
    )
    file, found = probe(request, workspace, reporter=reporter)
    header = ["block", "projection", "norm", "signal/noise", "energy in 4", "in 16"]
    rows = [[p.block, p.target, f"{p.norm:.2e}", p.signal_to_noise, *_shares(p.energy)] for p in found.projections]
    reporter.info(format_table(header, rows))
    first, last = found.warmup_loss
    reporter.info(
        f"decoder loss {first:.3f} to {last:.3f} in {found.warmup_steps} steps, then {found.batches} batches; "
        f"written: {file}"
    )
    return 0


def _shares(energy: Sequence[float]) -> list[float]:
    """Energy in the first 4 and the first 16 directions, or in all there are."""
    return [energy[min(number, len(energy)) - 1] for number in (4, 16)]


if __name__ == "__main__":
    raise SystemExit(main())
