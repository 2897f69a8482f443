"""samunet_train: fine-tune one fold."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

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


class ListPresets(argparse.Action):
    """Shows every preset with its backbone and weights, what it is, its method and source."""

    def __init__(self, option_strings: Sequence[str], dest: str, **options: Any) -> None:
        super().__init__(option_strings, dest, nargs=0, **options)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        """Show and leave."""
        from samunet.artifacts.method import summarise
        from samunet.planners.presets import PRESETS

        rows = [("auto", "planned", "given", "what the plan composes from the facts", "")]
        rows += [
            (p.name, p.backbone, p.weights, p.summary, f"{summarise(p.method)} ({p.source})") for p in PRESETS.values()
        ]
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        reporter = TerminalReporter()
        for row in rows:
            columns = [text.ljust(width) for text, width in zip(row, widths, strict=False)]
            reporter.info("  ".join([*columns, row[3]]))
            if row[4]:
                reporter.info(f"    {row[4]}")
        parser.exit()


def method_change(text: str) -> tuple[str, Any]:
    """``PATH=VALUE`` with a JSON value; what is no JSON is taken as a word."""
    path, separator, value = text.partition("=")
    if not (separator and path and value):
        raise argparse.ArgumentTypeError(f"expected PATH=VALUE, found '{text}'")
    try:
        return path, json.loads(value)
    except json.JSONDecodeError:
        return path, value


def build_parser() -> CommandParser:
    """The command's flags."""
    parser = CommandParser("samunet_train", "Fine-tune SAM on one fold of a planned dataset, then validate it.")
    parser.add_argument("dataset", metavar="DATASET", help="id, name or path")
    parser.add_argument("fold", metavar="FOLD", help="0 to 4, or all")
    parser.add_argument("-c", dest="configuration", metavar="CONFIG", help="configuration (default: the recommended)")
    parser.add_argument("--preset", default="auto", help="a published method (default: auto, the plan's own)")
    parser.add_argument("--list-presets", action=ListPresets, help="show all presets and exit")
    parser.add_argument("--backbone", choices=tuple(SPECS), help="another image encoder than planned or published")
    parser.add_argument(
        "--set",
        dest="changes",
        action="append",
        default=[],
        type=method_change,
        metavar="PATH=VALUE",
        help="change the method, as encoder.adapters.0.rank=8 (repeatable)",
    )
    parser.add_argument(
        "--recipe", choices=("plan", "published"), default="plan", help="whose size and schedule a preset takes"
    )
    parser.add_argument(
        "--weights", default="auto", help="auto (SAM's official file), none (random), a file, or KIND:FILE"
    )
    parser.add_argument("--device", "-device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    schedule = parser.add_argument_group("overrides of the plan")
    schedule.add_argument("--epochs", type=positive_count, help="number of epochs")
    schedule.add_argument("--iterations", type=positive_count, help="optimizer steps per epoch")
    schedule.add_argument(
        "--time-limit", type=positive_number, metavar="MINUTES", help="run the schedule on elapsed time"
    )
    schedule.add_argument(
        "--cpu-clock",
        action="store_true",
        help="count the time limit in this process's CPU time, so that runs compare on a busy machine; it then reads "
        "the data itself",
    )
    schedule.add_argument(
        "--patience", type=positive_count, help="epochs without a better monitor score before stopping"
    )
    schedule.add_argument("--lr", type=positive_number, help="peak learning rate")
    schedule.add_argument("--batch-size", type=positive_count, help="slices per optimizer step")
    schedule.add_argument("--rank", type=positive_count, help="LoRA rank")
    schedule.add_argument("--seed", type=natural_number, help="seed of initialisation and data (default 12345)")
    schedule.add_argument("--no-augmentation", action="store_true", help="train on the images as they are")
    _add_cases(parser)
    run = parser.add_argument_group("the run")
    run.add_argument(
        "--cache-embeddings",
        action="store_true",
        help="compute a frozen encoder's embeddings once (only with --no-augmentation)",
    )
    existing = run.add_mutually_exclusive_group()
    existing.add_argument("--c", dest="resume", action="store_true", help="continue the latest checkpoint")
    existing.add_argument("--val", dest="validate_only", action="store_true", help="only validate the final checkpoint")
    existing.add_argument("--overwrite", action="store_true", help="replace an existing run")
    run.add_argument("--workers", type=natural_number, help="loader processes (default: 1 on a CPU, to 8 beside a GPU)")
    run.add_argument("--disable_tta", action="store_true", help="no mirrored views in the final validation")
    add_workspace_flags(parser)
    return parser


def _add_cases(parser: CommandParser) -> None:
    """Flags that say which cases are learnt from."""
    few = parser.add_argument_group("few labels")
    few.add_argument(
        "--num-cases", type=positive_count, metavar="N", help="train on N of the fold's training cases, drawn once"
    )
    few.add_argument(
        "--cases", metavar="LIST", help="train on these of them: names with commas, or a file that lists them"
    )
    few.add_argument("--subset-seed", type=natural_number, help="seed of the draw of --num-cases (default 12345)")
    few.add_argument(
        "--unlabelled",
        nargs="+",
        default=[],
        metavar="FOLDER",
        help="learn from images without labels too, which the run labels itself: imagesTr (training cases of the fold "
        "that it has no label of), imagesTs, or any folder of images",
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command."""
    return run_command(lambda: _run(build_parser().parse_command(arguments)))


def _run(options: argparse.Namespace) -> int:
    workspace = locate_workspace(options, options.dataset)
    from samunet.cli.evaluate import show_report
    from samunet.datasets.subsets import read_case_list
    from samunet.pipeline.train import train
    from samunet.pipeline.training_run import TrainingRequest

    reporter = TerminalReporter()
    announce_workspace(workspace, reporter)
    request = TrainingRequest(
        dataset=options.dataset,
        fold=options.fold,
        configuration=options.configuration,
        preset=options.preset,
        backbone=options.backbone,
        changes=dict(options.changes),
        published=options.recipe == "published",
        weights=options.weights,
        device=options.device,
        epochs=options.epochs,
        iterations=options.iterations,
        learning_rate=options.lr,
        batch_size=options.batch_size,
        rank=options.rank,
        seed=options.seed,
        patience=options.patience,
        minutes=options.time_limit,
        processor_clock=options.cpu_clock,
        num_workers=options.workers,
        resume=options.resume,
        overwrite=options.overwrite,
        validate_only=options.validate_only,
        mirror=not options.disable_tta,
        augment=not options.no_augmentation,
        cache_embeddings=options.cache_embeddings,
        num_cases=options.num_cases,
        cases=None if options.cases is None else read_case_list(options.cases),
        subset_seed=options.subset_seed,
        unlabelled=tuple(options.unlabelled),
    )
    result = train(request, workspace, reporter=reporter)
    if result.report is None:
        reporter.info(f"trained on all cases, so none is left to validate on: {result.folder}")
        return 0
    show_report(result.report, reporter)
    reporter.info(f"validation of fold {options.fold}: {result.validation}")
    return 0 if result.report.complete else 1


if __name__ == "__main__":
    raise SystemExit(main())
