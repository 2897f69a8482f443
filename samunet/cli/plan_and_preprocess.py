"""samunet_plan_and_preprocess: verify, measure, plan and preprocess raw datasets."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from samunet.cli.arguments import (
    CommandParser,
    add_workspace_flags,
    announce_workspace,
    locate_workspace,
    positive_count,
    positive_number,
)
from samunet.cli.render import TerminalReporter, run_command
from samunet.core.cores import default_processes

DESCRIPTION = (
    "Verifies raw datasets in nnU-Net's format, measures them, decides how to train on them (every decision with its "
    "reason, in plans.json) and preprocesses their training cases. What an earlier run finished is kept."
)


def build_parser() -> CommandParser:
    """The command line."""
    parser = CommandParser("samunet_plan_and_preprocess", DESCRIPTION)
    parser.add_argument(
        "-d", dest="datasets", nargs="+", required=True, metavar="DATASET", help="ids, names or paths of raw datasets"
    )
    parser.add_argument(
        "-c",
        dest="configurations",
        nargs="+",
        metavar="CONFIG",
        help="configurations to preprocess (default: all but those with intensities of their own)",
    )
    parser.add_argument(
        "-np", "--processes", type=positive_count, default=default_processes(), metavar="N", help="processes"
    )
    parser.add_argument(
        "--gpu-memory",
        type=positive_number,
        metavar="GB",
        help="memory of the GPU to plan for (default: the one found, else 8)",
    )
    parser.add_argument(
        "--minutes", type=positive_number, metavar="MINUTES", help="training minutes on a CPU to plan for (default: 60)"
    )
    parser.add_argument(
        "--explain", action="store_true", help="print every decision with its reason and what would change it"
    )
    parser.add_argument(
        "--skip-bad-cases",
        action="store_true",
        help="go on without the cases that verification rejects or that cannot be measured; the exit code is then 1",
    )
    parser.add_argument("--overwrite-plan", action="store_true", help="plan anew without the edits of plans.json")
    parser.add_argument("--no-verify", action="store_true", help="do not verify the dataset first")
    add_workspace_flags(parser)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_command(lambda: _run(build_parser().parse_command(arguments)))


def _run(options: argparse.Namespace) -> int:
    reporter = TerminalReporter()
    return max(run_command(lambda d=dataset: _one(d, options, reporter)) for dataset in options.datasets)  # type: ignore[misc]


def _one(dataset: str, options: argparse.Namespace, reporter: TerminalReporter) -> int:
    from samunet.artifacts.probe import load_probes
    from samunet.pipeline.plan import plan_and_preprocess
    from samunet.planners.explain import explain, shortages, summary
    from samunet.planners.what_if import what_ifs

    workspace = locate_workspace(options, dataset)
    announce_workspace(workspace, reporter)
    result = plan_and_preprocess(
        workspace.raw_folder(dataset),
        workspace,
        processes=options.processes,
        gpu_memory_gib=options.gpu_memory,
        cpu_minutes=options.minutes,
        skip_bad_cases=options.skip_bad_cases,
        overwrite_plan=options.overwrite_plan,
        verify=not options.no_verify,
        configurations=options.configurations,
        reporter=reporter,
    )
    if options.explain:
        plan, probes = result.plan, load_probes(workspace.probe_file(result.plan.dataset))
        reporter.info(explain(plan, result.fingerprint, what_ifs(plan, result.fingerprint, probes), probes=probes))
    else:
        reporter.info(summary(result.plan))
    for shortage in shortages(result.plan):
        reporter.warn(shortage)
    for name, error in result.failed.items():
        reporter.warn(f"{name} could not be preprocessed: {error}")
    reporter.info(f"written: {result.folder}")
    return 1 if result.failed or result.fingerprint.left_out else 0


if __name__ == "__main__":
    raise SystemExit(main())
