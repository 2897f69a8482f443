"""samunet_pretrain: weights to train from, learnt on images of datasets."""

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
from samunet.cli.render import TerminalReporter, run_command
from samunet.core.cores import default_processes


def build_parser() -> CommandParser:
    """The command's flags."""
    parser = CommandParser(
        "samunet_pretrain",
        "Pretrain an image encoder on images of planned datasets, without labels: parts of slices are hidden and have "
        "to be completed. samunet_train --weights takes the result.",
    )
    parser.add_argument("-d", dest="datasets", nargs="+", required=True, metavar="DATASET", help="ids, names or paths")
    parser.add_argument("-c", dest="configuration", metavar="CONFIG", help="configuration (default: the recommended)")
    parser.add_argument(
        "--supervised",
        action="store_true",
        help="learn to answer prompts for the labelled structures of all datasets instead (reads labels)",
    )
    parser.add_argument("--backbone", choices=tuple(SPECS), help="image encoder (default: that of the weights)")
    parser.add_argument(
        "--weights", default="auto", help="auto (SAM's official file), none (random), a file, or KIND:FILE"
    )
    parser.add_argument("--device", "-device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    images = parser.add_argument_group("the images")
    images.add_argument(
        "--images",
        nargs="+",
        default=["imagesTr"],
        metavar="FOLDER",
        help="imagesTr, imagesTs, or any folder of images (default: imagesTr)",
    )
    images.add_argument("--cases", metavar="LIST", help="only these: names with commas, or a file that lists them")
    images.add_argument("--leave-out", metavar="LIST", help="not these")
    images.add_argument("--leave-out-fold", metavar="FOLD", help="not the cases that this fold validates")
    schedule = parser.add_argument_group("overrides of the plan")
    schedule.add_argument("--epochs", type=positive_count, help="number of epochs")
    schedule.add_argument("--iterations", type=positive_count, help="optimizer steps per epoch")
    schedule.add_argument(
        "--time-limit", "--minutes", type=positive_number, metavar="MINUTES", help="run the schedule on elapsed time"
    )
    schedule.add_argument(
        "--cpu-clock",
        action="store_true",
        help="count the time limit in this process's CPU time, so that runs compare on a busy machine; it then reads "
        "the data itself",
    )
    schedule.add_argument("--lr", type=positive_number, help="peak learning rate")
    schedule.add_argument("--batch-size", type=positive_count, help="slices per optimizer step")
    schedule.add_argument("--seed", type=natural_number, help="seed of initialisation, data and masks (default 12345)")
    run = parser.add_argument_group("the run")
    run.add_argument("--name", help="of the run's folder (default: datasets, objective, backbone)")
    existing = run.add_mutually_exclusive_group()
    existing.add_argument("--c", dest="resume", action="store_true", help="continue the latest checkpoint")
    existing.add_argument("--overwrite", action="store_true", help="replace an existing run")
    run.add_argument("--workers", type=natural_number, help="loader processes (default: 1 on a CPU, to 8 beside a GPU)")
    run.add_argument(
        "-np",
        "--processes",
        type=positive_count,
        default=default_processes(),
        metavar="N",
        help="processes that preprocess new images",
    )
    add_workspace_flags(parser)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command."""
    return run_command(lambda: _run(build_parser().parse_command(arguments)))


def _run(options: argparse.Namespace) -> int:
    workspace = locate_workspace(options, options.datasets[0])
    from samunet.datasets.subsets import read_case_list
    from samunet.pipeline.pretrain import PretrainingRequest, pretrain

    reporter = TerminalReporter()
    announce_workspace(workspace, reporter)
    request = PretrainingRequest(
        datasets=tuple(options.datasets),
        supervised=options.supervised,
        configuration=options.configuration,
        images=tuple(options.images),
        cases=None if options.cases is None else read_case_list(options.cases),
        left_out=() if options.leave_out is None else read_case_list(options.leave_out),
        left_out_fold=options.leave_out_fold,
        backbone=options.backbone,
        weights=options.weights,
        device=options.device,
        epochs=options.epochs,
        iterations=options.iterations,
        minutes=options.time_limit,
        processor_clock=options.cpu_clock,
        learning_rate=options.lr,
        batch_size=options.batch_size,
        seed=options.seed,
        name=options.name,
        num_workers=options.workers,
        num_processes=options.processes,
        resume=options.resume,
        overwrite=options.overwrite,
    )
    pretrain(request, workspace, reporter=reporter)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
