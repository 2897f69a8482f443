"""Which trained models a prediction uses when the user names only a dataset."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from samunet.artifacts.best import Best, BestModel, ComponentFilter
from samunet.artifacts.checkpoint import ENDING, read_manifest
from samunet.artifacts.plan import load_plan
from samunet.artifacts.subset import is_of_subset
from samunet.artifacts.workspace import Workspace, fold_folder
from samunet.core.config import load_schema
from samunet.core.errors import SamunetError, UsageError
from samunet.core.log import Reporter
from samunet.inference.loading import finished_folds

CONFIGURATION_PART, LABEL_PART = 0, 1
ALL_FOLD = "all"


@dataclass(frozen=True)
class Selection:
    """The models of a prediction.

    Args:
        folders: Model folders; the probabilities of several are averaged.
        folds: Folds of each; None: all that are finished.
        filters: Which components of structures their masks keep.
        mirror: Whether mirrored views are averaged unless the user says otherwise: as they were when compared.
    """

    folders: tuple[Path, ...]
    folds: list[str] | None = None
    filters: tuple[ComponentFilter, ...] = ()
    mirror: bool = True


def select_models(
    workspace: Workspace,
    dataset: str,
    *,
    configuration: str | None,
    preset: str | None,
    folds: list[str] | None,
    checkpoint: str,
    postprocess: bool,
    prompted: bool,
    mirror: bool | None = None,
    reporter: Reporter,
) -> Selection:
    """What was found best by cross-validation, unless a model is named; else the recommended or only one trained.

    Args:
        workspace: Where results are.
        dataset: Full dataset name.
        configuration: A configuration to insist on.
        preset: A preset, or the label of a changed one, to insist on.
        folds: Folds to insist on.
        checkpoint: The checkpoint that has to exist; what was found holds for "final" only.
        postprocess: Whether masks may be filtered.
        prompted: Whether prompts are given: then the model has to take some, and what was found does not apply.
        mirror: Whether the user wants mirrored views averaged; None: as in the comparison, else yes.
        reporter: Told what was found.

    Raises:
        UsageError: If nothing fits, several models do, or a model that was found is gone.
    """
    file = workspace.best_file(dataset)
    named = configuration is not None or preset is not None or checkpoint != "final"
    if named or prompted or not file.is_file():
        folder = choose_model_folder(
            workspace,
            dataset,
            configuration=configuration,
            preset=preset,
            checkpoint=checkpoint,
            prompted=prompted,
            reporter=reporter,
        )
        return Selection((folder,), folds, mirror=mirror is not False)
    best = load_schema(Best, file)
    folders = tuple(_found(workspace, dataset, model, file, reporter) for model in best.models)
    filters = best.filters if postprocess else ()
    chosen = sorted({fold for model in best.models for fold in model.folds}) if folds is None else folds
    cleaned = "; ".join(map(str, filters)) if filters else "none" if postprocess else "left out"
    mirrored = best.mirrored if mirror is None else mirror
    views = f"mirrored views {'averaged' if mirrored else 'not averaged'}"
    views += "" if mirrored == best.mirrored else f", though they were {'' if best.mirrored else 'not '}when compared"
    reporter.info(
        f"found best by cross-validation ({file.name}): {' + '.join(folder.name for folder in folders)}, "
        f"fold {', '.join(chosen)}; {views}; component filters: {cleaned}"
    )
    if folds is None:
        _tell_further_folds(folders, chosen, dataset, reporter)
    return Selection(folders, chosen, filters, mirrored)


def _found(workspace: Workspace, dataset: str, model: BestModel, file: Path, reporter: Reporter) -> Path:
    """The folder of a model that was found, with a warning if it was trained again since."""
    folder = workspace.results / dataset / model.model
    if not finished_folds(folder):
        raise UsageError(
            "the model that was found best is not there any more",
            expected=str(folder),
            file=file,
            todo=f"samunet_find_best_configuration {dataset}, or choose with -c CONFIGURATION or -m FOLDER",
        )
    present = set(finished_folds(folder))
    known = {fold: name for fold, name in model.identities.items() if fold in present}
    if any(checkpoint_identity(folder, fold) != name for fold, name in known.items()):
        reporter.warn(f"{model.model} was trained again since it was found best: compare again")
    return folder


def _tell_further_folds(folders: Sequence[Path], chosen: Sequence[str], dataset: str, reporter: Reporter) -> None:
    """Say which folds all models have finished beside those that were compared."""
    finished = set.intersection(*(set(finished_folds(folder)) for folder in folders)) - {ALL_FOLD}
    if further := sorted(finished - set(chosen)):
        reporter.info(
            f"fold {', '.join(further)} of it {'is' if len(further) == 1 else 'are'} finished too and not used: "
            f"samunet_find_best_configuration {dataset} takes finished folds in, -f "
            f"{' '.join(sorted({*chosen, *further}))} averages them without comparing again"
        )


def checkpoint_identity(folder: Path, fold: str) -> str:
    """Hash of what a fold's final checkpoint says it is, the time of its training included."""
    return read_manifest(fold_folder(folder, fold) / f"checkpoint_final{ENDING}").identity


def name_part(folder: Path, part: int) -> str:
    """The configuration or the label (preset, changes, subset) in the name of a model folder."""
    return folder.name.split("__")[part]


def _takes_prompts(folder: Path, checkpoint: str) -> bool | None:
    """Whether a trained model segments what prompts point at; None if its checkpoint cannot be read."""
    fold = finished_folds(folder, checkpoint)[0]
    try:
        manifest = read_manifest(fold_folder(folder, fold) / f"checkpoint_{checkpoint}{ENDING}")
    except SamunetError:
        return None
    return manifest.resolved_recipe.method.promptable


def choose_model_folder(
    workspace: Workspace,
    dataset: str,
    *,
    configuration: str | None = None,
    preset: str | None = None,
    checkpoint: str = "final",
    prompted: bool = False,
    reporter: Reporter | None = None,
) -> Path:
    """The folder of the recommended configuration if it is trained, else of the only one trained.

    Of models that take prompts and models that do not, only the kind that is asked counts, if there is one of it. Of
    these, runs on a subset of the cases count only where nothing is trained on all of them, unless one is named.

    Args:
        workspace: Where results are.
        dataset: Full dataset name.
        configuration: A configuration to insist on.
        preset: A preset, or the label of a changed one, to insist on.
        checkpoint: The checkpoint that has to exist.
        prompted: Whether prompts are given.
        reporter: Told where a run on a subset is taken.

    Raises:
        UsageError: If nothing fits, or several do; the message lists them.
    """
    below = workspace.results / dataset
    trained = [p for p in sorted(below.glob("*__*__*")) if finished_folds(p, checkpoint)]
    if not trained:
        raise UsageError(
            "nothing is trained for this dataset", file=below, todo=f"samunet_train {dataset} 0, or give -m FOLDER"
        )
    offered = trained if preset is None else [p for p in trained if name_part(p, LABEL_PART) == preset]
    offered = [p for p in offered if _takes_prompts(p, checkpoint) == prompted] or offered
    subsets = [p for p in offered if preset is None and _is_of_subset(p)]
    offered = [p for p in offered if p not in subsets] or subsets
    wanted = configuration
    if wanted is None and offered is not subsets:
        plan_file = workspace.plan_file(dataset)
        recommended = load_plan(plan_file).recommended.value if plan_file.is_file() else None
        present = {name_part(p, CONFIGURATION_PART) for p in offered}
        wanted = recommended if recommended in present else None
    fitting = offered if wanted is None else [p for p in offered if name_part(p, CONFIGURATION_PART) == wanted]
    if len(fitting) == 1:
        if fitting[0] in subsets and reporter is not None:
            reporter.warn(f"{fitting[0].name} was trained on a subset of the cases; no model that fits was on all")
        return fitting[0]
    asked = " ".join(filter(None, (wanted and f"configuration {wanted}", preset and f"preset {preset}")))
    if parts := [p for p in subsets if not fitting and name_part(p, CONFIGURATION_PART) == wanted]:
        raise UsageError(
            f"{asked} is not trained on all cases",
            expected=f"one of {', '.join(p.name for p in offered)}",
            found=f"runs on a subset: {', '.join(p.name for p in parts)}",
            todo=f"to take such a run, name it: --preset {name_part(parts[0], LABEL_PART)}, or -m FOLDER",
        )
    compare = "" if offered is subsets else f", or compare them: samunet_find_best_configuration {dataset}"
    alike = len({folder.name.rpartition("__")[0] for folder in fitting}) == 1
    choice = "-m FOLDER" if alike else "-c CONFIGURATION, --preset NAME or -m FOLDER"
    raise UsageError(
        "several trained models fit" if fitting else f"{asked} is not trained",
        expected=", ".join(p.name for p in (fitting or trained)),
        found=asked or "no -c",
        todo=f"choose with {choice}{compare}",
    )


def _is_of_subset(folder: Path) -> bool:
    return is_of_subset(name_part(folder, LABEL_PART))
