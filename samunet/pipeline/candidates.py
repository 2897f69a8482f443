"""Trained models as candidates: what lies below results/, and the cross-validated masks and scores of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from numpy.typing import NDArray

from samunet.artifacts.best import CaseScores
from samunet.artifacts.checkpoint import ENDING, read_manifest
from samunet.artifacts.dataset import Case
from samunet.artifacts.workspace import Workspace, fold_folder
from samunet.core.config import load_schema, save_schema
from samunet.core.errors import ConfigError, UsageError
from samunet.core.files import sha256_json
from samunet.core.geometry import Geometry
from samunet.core.labels import LabelSpec
from samunet.core.log import Reporter
from samunet.evaluation.case import evaluate_case
from samunet.imageio import read_labels, read_volume, write_labels
from samunet.imageio.formats import ending_of
from samunet.inference.ensemble import check_same_task, mean_labels, on_disk
from samunet.inference.loading import finished_folds
from samunet.inference.predictor import Predictor
from samunet.pipeline.selection import CONFIGURATION_PART, LABEL_PART, checkpoint_identity, name_part
from samunet.pipeline.training_run import CASES_FILE, RunCases

ALL_FOLD = "all"


@dataclass(frozen=True)
class TrainedModel:
    """A model folder with finished folds.

    Args:
        folder: Model folder.
        folds: Finished numbered folds.
        identities: Fold to what its final checkpoint is.
        validation: Fold to its validation cases.
    """

    folder: Path
    folds: tuple[str, ...]
    identities: Mapping[str, str]
    validation: Mapping[str, tuple[str, ...]]

    @property
    def name(self) -> str:
        """Of the folder."""
        return self.folder.name

    def fold_of(self, case: str, folds: Sequence[str]) -> str | None:
        """The fold, of those given, that validates a case."""
        return next((fold for fold in folds if case in self.validation.get(fold, ())), None)


@dataclass(frozen=True)
class Comparison:
    """What is compared on which cases.

    Args:
        models: Single candidates.
        folds: Folds that all have.
        cases: Their validation cases that all share, sorted.
        pairs: Whether pairs are candidates too.
        mirror: Whether mirrored views are averaged.
    """

    models: tuple[TrainedModel, ...]
    folds: tuple[str, ...]
    cases: tuple[str, ...]
    pairs: bool
    mirror: bool

    @property
    def candidates(self) -> dict[str, tuple[str, ...]]:
        """Name to its models' names, single ones first."""
        names: list[tuple[str, ...]] = [(model.name,) for model in self.models]
        names += list(combinations([model.name for model in self.models], 2)) if self.pairs else []
        return {"+".join(members): members for members in names}

    def key(self, case: Case) -> str:
        """Hash of what a case's scores depend on."""
        identities = {m.name: m.identities[str(m.fold_of(case.name, self.folds))] for m in self.models}
        files = [path for path in (*case.images, case.label) if path is not None]
        stamps = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]
        return sha256_json({"models": identities, "pairs": self.pairs, "mirror": self.mirror, "files": stamps})


def find_models(
    workspace: Workspace,
    dataset: str,
    *,
    configurations: Sequence[str] | None,
    presets: Sequence[str] | None,
    reporter: Reporter,
) -> list[TrainedModel]:
    """The models below results/ that can be compared: with numbered folds, without prompts, on all training cases.

    A run on a subset of the cases is taken only if its label is named.

    Args:
        workspace: Where results are.
        dataset: Full name.
        configurations: Only these; None: all.
        presets: Only these presets, or labels of changed ones and of subsets; None: all.
        reporter: Told what is left out.

    Raises:
        UsageError: If something is named that is not trained.
    """
    below = workspace.results / dataset
    found = [folder for folder in sorted(below.glob("*__*__*")) if set(finished_folds(folder)) - {ALL_FOLD}]
    for flag, names, part in (("-c", configurations, CONFIGURATION_PART), ("--preset", presets, LABEL_PART)):
        present = sorted({name_part(folder, part) for folder in found})
        unknown = sorted(set(names or ()) - set(present))
        if unknown:
            raise UsageError(f"{flag} names what is not trained", expected=", ".join(present), found=", ".join(unknown))
        found = [folder for folder in found if names is None or name_part(folder, part) in names]
    models = [model for folder in found if (model := _comparable(folder, presets, reporter)) is not None]
    if not models:
        raise UsageError("nothing is trained that could be compared", file=below, todo=f"samunet_train {dataset} 0")
    return models


def _comparable(folder: Path, presets: Sequence[str] | None, reporter: Reporter) -> TrainedModel | None:
    """The model of a folder, or None, said why, if it cannot be compared."""
    folds = tuple(fold for fold in finished_folds(folder) if fold != ALL_FOLD)
    manifest = read_manifest(fold_folder(folder, folds[0]) / f"checkpoint_final{ENDING}")
    if manifest.resolved_recipe.method.promptable:
        reporter.info(f"left out: {folder.name}, which needs prompts")
        return None
    cases = {fold: RunCases.read(fold_folder(folder, fold) / CASES_FILE) for fold in folds}
    if presets is None and any(own.subset is not None for own in cases.values()):
        reporter.info(f"left out: {folder.name}, trained on a subset (name it with --preset to take it)")
        return None
    identities = {fold: checkpoint_identity(folder, fold) for fold in folds}
    return TrainedModel(folder, folds, identities, {fold: own.validation for fold, own in cases.items()})


def plan_comparison(
    models: Sequence[TrainedModel], folds: Sequence[str] | None, *, pairs: bool, mirror: bool, reporter: Reporter
) -> Comparison:
    """The folds and validation cases that all models share.

    Args:
        models: To compare.
        folds: Only these, by the models that have them all; None: those that every model has.
        pairs: Whether pairs are candidates too.
        mirror: Whether mirrored views are averaged.
        reporter: Told what is left out.

    Raises:
        UsageError: If they share no fold or no case.
    """
    if folds is not None:
        for model in models:
            if set(folds) - set(model.folds):
                reporter.warn(f"left out: {model.name}, which has only fold {', '.join(model.folds)}")
        models = [model for model in models if not set(folds) - set(model.folds)]
    shared = set.intersection(*(set(model.folds) for model in models)) if models else set()
    chosen = tuple(sorted(shared if folds is None else shared & set(folds)))
    validated = [{case for fold in chosen for case in model.validation[fold]} for model in models]
    cases = tuple(sorted(set.intersection(*validated))) if validated else ()
    if not cases:
        raise UsageError(
            "the trained models share no validated case",
            expected="folds that every one has finished, of the same splits",
            found="; ".join(f"{model.name}: fold {', '.join(model.folds)}" for model in models) or "no model",
            todo="train the missing folds, or choose with -c, --preset and -f",
        )
    return Comparison(tuple(models), chosen, cases, pairs and len(models) > 1, mirror)


def mask_file(folder: Path, candidate: str, case: str, ending: str) -> Path:
    """Where a candidate's cross-validated mask of a case is."""
    return folder / candidate / f"{case}{ending}"


def score_cases(
    comparison: Comparison, cases: Sequence[Case], folder: Path, *, device: str, overwrite: bool, reporter: Reporter
) -> dict[str, CaseScores]:
    """Scores of every case by every candidate, each model predicting with the fold that did not train on it.

    What an earlier comparison of the same models left in the folder is kept.

    Args:
        comparison: What is compared.
        cases: Raw cases of it.
        folder: Where masks and scores are written.
        device: As for training.
        overwrite: Predict anew what is there.
        reporter: Told about progress.

    Returns:
        Case to scores.
    """
    scores: dict[str, CaseScores] = {}
    waiting: dict[tuple[str, ...], list[Case]] = {}
    for case in cases:
        kept = None if overwrite else _kept(folder, comparison, case)
        if kept is None:
            folds = tuple(str(model.fold_of(case.name, comparison.folds)) for model in comparison.models)
            waiting.setdefault(folds, []).append(case)
        else:
            scores[case.name] = kept
    if scores:
        reporter.info(f"{len(scores)} of {len(cases)} cases were compared before and are kept")
    for folds, group in sorted(waiting.items()):
        predictors = _load(comparison, folds, device)
        for case in reporter.track(group, total=len(group), what=f"comparing on fold {', '.join(sorted(set(folds)))}"):
            scores[case.name] = _score_case(comparison, predictors, case, folder)
    return scores


def _kept(folder: Path, comparison: Comparison, case: Case) -> CaseScores | None:
    """Scores of an earlier comparison of the same models, with their masks."""
    file = folder / f"{case.name}.json"
    if not file.is_file():
        return None
    try:
        scores = load_schema(CaseScores, file)
    except ConfigError:
        return None
    ending = ending_of(case.images[0])
    masks = all(mask_file(folder, candidate, case.name, ending).is_file() for candidate in comparison.candidates)
    return scores if masks and scores.key == comparison.key(case) else None


def _load(comparison: Comparison, folds: Sequence[str], device: str) -> dict[str, Predictor]:
    predictors = {
        model.name: Predictor.from_folder(model.folder, folds=[fold], device=device, mirror=comparison.mirror)
        for model, fold in zip(comparison.models, folds, strict=True)
    }
    first, *others = predictors.values()
    for other in others:
        check_same_task(first, other)
    return predictors


def _score_case(comparison: Comparison, predictors: Mapping[str, Predictor], case: Case, folder: Path) -> CaseScores:
    """Predict, write and score one case by every candidate; probabilities stay on disk and go when it is done."""
    assert case.label is not None
    volume = read_volume(case.images, case=case.name)
    reference = read_labels(case.label, case=case.name)
    spec = next(iter(predictors.values())).plan.label_spec
    ending = ending_of(case.images[0])
    dice: dict[str, dict[str, float | None]] = {}

    def finish(candidate: str, labels: NDArray[Any]) -> None:
        write_labels(mask_file(folder, candidate, case.name, ending), labels, like=volume)
        dice[candidate] = case_dice(reference.data[0], labels, spec, volume.geometry)

    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder, prefix=".probabilities-", ignore_cleanup_errors=True) as scratch:
        probabilities = {}
        for name, predictor in predictors.items():
            place = on_disk(Path(scratch) / f"{name}.npy")
            prepared = predictor.preprocess(volume, name=case.name)
            restored = predictor.predict_prepared(prepared, with_probabilities=comparison.pairs, allocate=place)
            finish(name, restored.labels)
            probabilities[name] = restored.probabilities
        for candidate, members in comparison.candidates.items():
            if len(members) > 1:
                maps = [maps for name in members if (maps := probabilities[name]) is not None]
                finish(candidate, mean_labels(maps, spec))
    scores = CaseScores(case=case.name, key=comparison.key(case), dice=dice)
    save_schema(scores, folder / f"{case.name}.json")
    return scores


def case_dice(
    reference: NDArray[Any], prediction: NDArray[Any], spec: LabelSpec, geometry: Geometry
) -> dict[str, float | None]:
    """Dice per structure; None where neither mask holds it."""
    metrics = evaluate_case(reference, prediction, labels=spec, geometry=geometry, surface=False)
    return {name: scores.Dice for name, scores in metrics.items()}
