"""Whether the masks in a folder may stand beside new ones: only those that the same models made, in the same way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from samunet.artifacts.best import ComponentFilter
from samunet.artifacts.dataset import Case
from samunet.artifacts.prediction import ModelUsed, PredictionReport, PromptsUsed
from samunet.core.config import load_schema
from samunet.core.errors import ConfigError, UsageError
from samunet.core.log import Reporter
from samunet.imageio.formats import ending_of

REPORT_FILE = "prediction.json"
TODO = "give another -o, or leave --continue_prediction out to start anew"
SHOWN = 12


def files_of(case: Case, output: Path, *, with_probabilities: bool) -> list[Path]:
    """The files that a prediction of a case writes: its mask, in its image's format, and its probabilities."""
    mask = output / f"{case.name}{ending_of(case.images[0])}"
    return [mask, output / f"{case.name}.npz"] if with_probabilities else [mask]


def masks_to_keep(
    wanted: PredictionReport,
    cases: Sequence[Case],
    output: Path,
    *,
    sources: Mapping[str, str],
    with_probabilities: bool,
    reporter: Reporter,
) -> frozenset[str]:
    """Names of the cases that an earlier run has done just as this one would, from the very files.

    Args:
        wanted: What this run is.
        cases: What it is to predict.
        output: Folder of the masks.
        sources: Case to hash of its files.
        with_probabilities: Whether a case is done only with its probabilities.
        reporter: Told which images are not those that the masks were made from.

    Raises:
        UsageError: If the masks there are of other models or made in another way, or nothing says what made them.
    """
    done = {
        case.name
        for case in cases
        if all(file.is_file() for file in files_of(case, output, with_probabilities=with_probabilities))
    }
    if not done:
        return frozenset()
    file = output / REPORT_FILE
    try:
        former = load_schema(PredictionReport, file)
    except ConfigError as error:
        raise UsageError(
            "nothing says what made the masks in this folder, and they would be kept",
            expected=f"{REPORT_FILE} of the run that is to be continued",
            found=error.problem,
            file=file,
            todo=TODO,
        ) from None
    ours, theirs = _decides(wanted), _decides(former)
    differing = [name for name, value in ours.items() if theirs[name] != value]
    if differing:
        raise UsageError(
            "the masks in this folder were made in another way, and would be kept",
            expected="; ".join(f"{name}: {ours[name]}" for name in differing),
            found="; ".join(f"{name}: {theirs[name]}" for name in differing),
            file=file,
            todo=TODO,
        )
    made_from = {case.case: case.source for case in former.cases if case.status != "failed"}
    done &= made_from.keys()
    same = {name for name in done if made_from[name] == sources[name]}
    if changed := sorted(done - same):
        names = ", ".join(changed)
        reporter.warn(f"other images than those that the masks in {output} were made from, predicted again: {names}")
    return frozenset(same)


def _decides(report: PredictionReport) -> dict[str, str]:
    """What a mask depends on beside its image, in words that are equal only where it is."""
    return {
        "dataset": report.dataset,
        "models and their checkpoints": " + ".join(map(_model, report.models)) or "not said",
        "checkpoint": report.checkpoint,
        "mirrored views": "averaged" if report.mirrored else "not averaged",
        "prompts": _prompts(report.prompts),
        "propagation of prompts": "yes" if report.propagated else "no",
        "component filters": "; ".join(map(_filter, report.filters)) or "none",
    }


def _model(used: ModelUsed) -> str:
    return (
        f"{used.model} ({', '.join(f'fold {fold} {name[:SHOWN]}' for fold, name in sorted(used.identities.items()))})"
    )


def _prompts(used: PromptsUsed | None) -> str:
    return "none" if used is None else f"{used.file}, SHA-256 {used.sha256[:SHOWN]}"


def _filter(rule: ComponentFilter) -> str:
    return f"{rule.structure}: {rule.kind}" + (f" {rule.least_mm3!r} mm3" if rule.least_mm3 else "")
