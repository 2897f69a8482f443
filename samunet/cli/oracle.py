"""samunet_oracle_prompts: simulated prompts from reference labels, for an evaluation that says oracle."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from samunet.cli.arguments import CommandParser, add_workspace_flags, locate_workspace, natural_number
from samunet.cli.render import TerminalReporter, run_command
from samunet.core.errors import UsageError

if TYPE_CHECKING:
    from samunet.artifacts.plan import Frame
    from samunet.core.labels import LabelSpec

GRADES = ("whole_image", "clicks_1", "clicks_3", "box_0.5", "box_0.75", "box_tight")
DESCRIPTION = (
    "Oracle: simulates prompts from reference labels, which a user does not have, and writes them as prompts.json. "
    "What is predicted with them measures how a model answers to prompts of a given quality; it is no result of "
    "automatic segmentation, and the file's name says oracle."
)


def build_parser() -> CommandParser:
    """The command line."""
    parser = CommandParser("samunet_oracle_prompts", DESCRIPTION)
    parser.add_argument("-i", "--input", type=Path, required=True, metavar="LABELS", help="folder of reference labels")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        required=True,
        metavar="OUTPUT",
        help="a .json file whose name contains 'oracle', or a folder (then oracle_GRADE_seedSEED.json in it)",
    )
    parser.add_argument(
        "-d", dest="dataset", metavar="DATASET", help="dataset: its dataset.json, and its plan's slice axis if planned"
    )
    parser.add_argument(
        "--dataset-json", type=Path, metavar="FILE", help="names and values of the structures (default: found nearby)"
    )
    parser.add_argument(
        "--grade",
        choices=GRADES,
        default="box_tight",
        help="the prompt of each connected object on each slice: a box as large as the image, positive clicks inside, "
        "a box with this IoU with the tight one, or the tight one (default: box_tight)",
    )
    parser.add_argument("--seed", type=natural_number, default=0, help="of everything random (default: 0)")
    slices = parser.add_mutually_exclusive_group()
    slices.add_argument(
        "--every-slice",
        dest="every_slice",
        action="store_true",
        default=True,
        help="prompt every slice that shows a structure (default)",
    )
    slices.add_argument(
        "--middle-slice",
        dest="every_slice",
        action="store_false",
        help="prompt only the middle slice of each structure, to be propagated",
    )
    add_workspace_flags(parser)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_command(lambda: _run(build_parser().parse_command(arguments)))


def _run(options: argparse.Namespace) -> int:
    from samunet.inference.oracle import OracleSettings
    from samunet.pipeline.evaluate import label_files
    from samunet.pipeline.oracle import oracle_file, oracle_prompts, save_oracle

    reporter = TerminalReporter()
    file = oracle_file(options.output, grade=options.grade, seed=options.seed)
    references = label_files(options.input)
    if not references:
        raise UsageError("the folder holds no label file", file=options.input)
    labels, frame = _labels(options, reporter), _frame(options)
    if frame is None:
        reporter.info("no plan: slices lie along the widest spacing of each file")
    settings = OracleSettings(labels, options.grade, options.seed, options.every_slice, frame)
    prompts = oracle_prompts(references, settings, reporter=reporter)
    for message in prompts.failed.values():
        reporter.warn(message)
    if prompts.empty:
        reporter.warn(f"no structure, hence no prompt, in {', '.join(prompts.empty)}")
    save_oracle(prompts, file)
    number = sum(len(entries) for entries in prompts.cases.values())
    reporter.info(f"{number} oracle prompts ({options.grade}) of {len(prompts.cases)} cases written: {file}")
    return 1 if prompts.failed else 0


def _labels(options: argparse.Namespace, reporter: TerminalReporter) -> LabelSpec:
    from samunet.datasets.raw import load_label_spec

    candidates = [options.input / "dataset.json", options.input.resolve().parent / "dataset.json"]
    if options.dataset is not None:
        workspace = locate_workspace(options, options.dataset)
        folder = workspace.raw_folder(options.dataset, must_exist=False)
        candidates = [folder / "dataset.json", workspace.description_file(folder.name)]
    path = options.dataset_json or next((near for near in candidates if near.is_file()), None)
    if path is None:
        raise UsageError(
            "the structures are not named",
            expected=" or ".join(map(str, candidates)),
            todo="give -d DATASET or --dataset-json FILE",
        )
    reporter.info(f"labels from {path}")
    return load_label_spec(path)


def _frame(options: argparse.Namespace) -> Frame | None:
    """The plan's axes, where there is a plan."""
    if options.dataset is None:
        return None
    from samunet.artifacts.plan import load_plan

    workspace = locate_workspace(options, options.dataset)
    file = workspace.plan_file(workspace.raw_folder(options.dataset, must_exist=False).name)
    return load_plan(file).frame.value if file.is_file() else None


if __name__ == "__main__":
    raise SystemExit(main())
