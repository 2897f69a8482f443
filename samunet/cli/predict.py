"""samunet_predict: a folder of images in, 3D masks in each image's own geometry out."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from samunet.cli.arguments import CommandParser, add_workspace_flags, locate_workspace, positive_count
from samunet.cli.render import TerminalReporter, run_command
from samunet.core.errors import UsageError


def build_parser() -> CommandParser:
    """The command's flags."""
    parser = CommandParser(
        "samunet_predict", "Segment every image of a folder. Each mask has exactly its image's grid and file format."
    )
    parser.add_argument("-i", dest="input", type=Path, required=True, metavar="IN", help="folder of images")
    parser.add_argument("-o", dest="output", type=Path, required=True, metavar="OUT", help="folder for masks")
    parser.add_argument("-d", dest="dataset", metavar="DATASET", help="dataset whose trained model is used")
    parser.add_argument("-m", dest="model", type=Path, metavar="FOLDER", help="model folder instead of -d")
    parser.add_argument(
        "-f",
        dest="folds",
        nargs="+",
        metavar="FOLD",
        help="folds to average (default: those found best, else all finished)",
    )
    parser.add_argument(
        "-c",
        dest="configuration",
        metavar="CONFIG",
        help="configuration (default: the best found, else the recommended)",
    )
    parser.add_argument(
        "--preset", metavar="NAME", help="preset, or the label of a changed one, instead of the best found"
    )
    parser.add_argument(
        "-chk", dest="checkpoint", default="final", choices=["final", "best"], help="checkpoint (default final)"
    )
    parser.add_argument("--device", "-device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    views = parser.add_mutually_exclusive_group()
    views.add_argument(
        "--disable_tta",
        action="store_true",
        help="do not average mirrored views (default: as the models were compared, else average)",
    )
    views.add_argument("--enable_tta", action="store_true", help="average them in any case")
    parser.add_argument(
        "--no-postprocessing", action="store_true", help="leave out the component filters that cross-validation found"
    )
    parser.add_argument("--save_probabilities", action="store_true", help="also write CASE.npz with probabilities")
    parser.add_argument("--continue_prediction", action="store_true", help="keep masks that the same models made")
    parser.add_argument(
        "-npp", dest="readers", type=positive_count, default=1, help="cases read and preprocessed ahead"
    )
    parser.add_argument("-nps", dest="writers", type=positive_count, default=1, help="masks written at the same time")
    parser.add_argument(
        "--prompts", type=Path, metavar="FILE", help="prompts.json: boxes and points per image, for promptable models"
    )
    parser.add_argument(
        "--disable_propagation", action="store_true", help="segment prompted objects on the marked slices only"
    )
    add_workspace_flags(parser)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command."""
    return run_command(lambda: _run(build_parser().parse_command(arguments)))


def _run(options: argparse.Namespace) -> int:
    if (options.dataset is None) == (options.model is None):
        raise UsageError("name the model with either -d DATASET or -m FOLDER")
    if options.disable_propagation and options.prompts is None:
        raise UsageError("--disable_propagation is about prompts", todo="give --prompts too, or leave it out")
    from samunet.pipeline.predict import PredictionRequest, predict
    from samunet.pipeline.selection import Selection, select_models

    reporter = TerminalReporter()
    mirror = True if options.enable_tta else False if options.disable_tta else None
    if options.model is None:
        workspace = locate_workspace(options, options.dataset)
        selection = select_models(
            workspace,
            workspace.dataset_name(options.dataset),
            configuration=options.configuration,
            preset=options.preset,
            folds=options.folds,
            checkpoint=options.checkpoint,
            postprocess=not options.no_postprocessing,
            prompted=options.prompts is not None,
            mirror=mirror,
            reporter=reporter,
        )
    elif options.configuration is not None or options.preset is not None:
        raise UsageError("-c and --preset choose among the models of -d", found="-m, which is one model")
    else:
        selection = Selection((options.model,), options.folds, mirror=mirror is not False)
    report = predict(
        PredictionRequest(
            input=options.input,
            output=options.output,
            model_folder=selection.folders[0],
            others=selection.folders[1:],
            folds=selection.folds,
            filters=selection.filters,
            checkpoint=options.checkpoint,
            device=options.device,
            mirror=selection.mirror,
            save_probabilities=options.save_probabilities,
            resume=options.continue_prediction,
            readers=options.readers,
            writers=options.writers,
            prompts=options.prompts,
            propagate=not options.disable_propagation,
        ),
        reporter=reporter,
    )
    done = len(report.cases) - len(report.failed)
    reporter.info(f"{done} of {len(report.cases)} images have a mask in {options.output}")
    if report.failed:
        reporter.warn(
            f"no mask for {', '.join(report.failed)}; the reasons are in {options.output / 'prediction.json'}"
        )
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
