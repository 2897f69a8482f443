"""Trained models as candidates: what lies below results/, and what of it is compared on which cases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from samunet.artifacts.checkpoint import ENDING, Manifest, read_manifest
from samunet.artifacts.dataset import Case
from samunet.artifacts.workspace import Workspace, fold_folder
from samunet.core.errors import UsageError
from samunet.core.files import sha256_json
from samunet.core.log import Reporter
from samunet.inference.loading import finished_folds, tell_other_weights
from samunet.pipeline.pretrained import labels_read
from samunet.pipeline.selection import ALL_FOLD, CONFIGURATION_PART, LABEL_PART, name_part
from samunet.pipeline.training_run import CASES_FILE, RunCases


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
    folds: Sequence[str] | None,
    reporter: Reporter,
) -> list[TrainedModel]:
    """The models below results/ that can be compared: with numbered folds, without prompts, on all training cases.

    A run on a subset of the cases is taken only if its label is named. One whose weights were taught with labels that
    its fold validates is not taken: it would win by what it remembers.

    Args:
        workspace: Where results are.
        dataset: Full name.
        configurations: Only these; None: all.
        presets: Only these presets, or labels of changed ones and of subsets; None: all.
        folds: Folds that will be compared; None: any.
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
    models = [model for folder in found if (model := _comparable(folder, presets, folds, reporter)) is not None]
    if not models:
        raise UsageError(
            "nothing is trained that could be compared",
            expected="a finished fold that holds cases out, which 'all' does not",
            file=below,
            todo=f"samunet_train {dataset} FOLD",
        )
    return models


def _comparable(
    folder: Path, presets: Sequence[str] | None, wanted: Sequence[str] | None, reporter: Reporter
) -> TrainedModel | None:
    """The model of a folder, or None, said why, if it cannot be compared."""
    folds = tuple(fold for fold in finished_folds(folder) if fold != ALL_FOLD)
    manifests = {fold: read_manifest(fold_folder(folder, fold) / f"checkpoint_final{ENDING}") for fold in folds}
    if manifests[folds[0]].resolved_recipe.method.promptable:
        reporter.info(f"left out: {folder.name}, which needs prompts")
        return None
    cases = {fold: RunCases.read(fold_folder(folder, fold) / CASES_FILE) for fold in folds}
    if presets is None and any(own.subset is not None for own in cases.values()):
        reporter.info(f"left out: {folder.name}, trained on a subset (name it with --preset to take it)")
        return None
    taught = {f: _taught(manifests[f], own) for f, own in cases.items() if wanted is None or f in wanted}
    if any(taught.values()):
        told = ", ".join(f"{taught[f]} of {len(cases[f].validation)} of fold {f}" for f in taught if taught[f])
        clean = [fold for fold in folds if fold in taught and not taught[fold]]
        reporter.warn(
            f"left out: {folder.name}, whose weights were taught with the labels of validation cases ({told}): its "
            "Dice there does not compare" + (f"; -f {' '.join(clean)} compares what is left" if clean else "")
        )
        return None
    tell_other_weights([manifests[fold] for fold in taught], folder, reporter)
    identities = {fold: manifest.identity for fold, manifest in manifests.items()}
    return TrainedModel(folder, folds, identities, {fold: own.validation for fold, own in cases.items()})


def _taught(manifest: Manifest, cases: RunCases) -> int:
    """How many of a fold's validation cases taught its weights: as recorded, and as the weights still at hand say."""
    known = labels_read(manifest.base, manifest.dataset) & set(cases.validation)
    return len(known | set(cases.labels_seen))


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
