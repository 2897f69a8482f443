"""Trained models in, the best of them out: by cross-validation, with the component filters that help."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from samunet.artifacts.best import Best, BestModel, CandidateScore, CaseScores, ComponentFilter
from samunet.artifacts.dataset import Case
from samunet.artifacts.report import Interval
from samunet.artifacts.workspace import Workspace
from samunet.core.config import save_schema
from samunet.core.errors import UsageError
from samunet.core.labels import LabelSpec
from samunet.core.log import Reporter
from samunet.datasets.raw import load_raw_dataset
from samunet.evaluation.aggregate import group_labels
from samunet.evaluation.overlap import count_voxels, dice
from samunet.evaluation.selection import (
    ABSENT,
    RULE,
    Groups,
    Table,
    choose,
    filter_helps,
    mean_dice,
    paired_gain,
    score_table,
    size_thresholds,
    too_few_for_filters,
)
from samunet.imageio import read_labels
from samunet.imageio.formats import ending_of
from samunet.inference.postprocess import apply_filters, component_sizes, filtered_mask
from samunet.models.device import resolve_device
from samunet.pipeline.candidate_scores import case_dice, mask_file, score_cases
from samunet.pipeline.candidates import Comparison, find_models, plan_comparison
from samunet.pipeline.provenance import describe

NOT_TRIED = "not tried: where voxels may be ignored, removing a real component that nobody labelled would cost nothing"
NO_FILTER_HELPS = "none gains on average without a likely loss"


@dataclass(frozen=True)
class BestRequest:
    """What to compare; None leaves it to what is trained.

    Args:
        dataset: Id, name or path.
        configurations: Configurations.
        presets: Presets, or labels of changed ones.
        folds: Folds.
        pairs: Whether pairs of models are candidates too.
        mirror: Whether mirrored views are averaged.
        device: As for training.
        overwrite: Predict anew what an earlier comparison left.
    """

    dataset: str
    configurations: Sequence[str] | None = None
    presets: Sequence[str] | None = None
    folds: Sequence[str] | None = None
    pairs: bool = True
    mirror: bool = True
    device: str = "auto"
    overwrite: bool = False


@dataclass(frozen=True)
class MaskPair:
    """A reference and its cross-validated mask, as files."""

    case: str
    reference: Path
    mask: Path


def find_best(request: BestRequest, workspace: Workspace, *, reporter: Reporter) -> Best:
    """Compare what is trained on the cases that its folds validate, and write down what is best.

    Raises:
        UsageError: If nothing is trained, or the trained models share no validated case.
        DataError: If a case cannot be predicted; what is done is kept.
    """
    device = resolve_device(request.device)
    name = workspace.dataset_name(request.dataset)
    dataset = load_raw_dataset(workspace.raw_folder(request.dataset))
    models = find_models(
        workspace,
        name,
        configurations=request.configurations,
        presets=request.presets,
        folds=request.folds,
        reporter=reporter,
    )
    comparison = plan_comparison(models, request.folds, pairs=request.pairs, mirror=request.mirror, reporter=reporter)
    cases = _raw_cases(comparison, {case.name: case for case in dataset.training}, dataset.folder)
    reporter.info(
        f"{len(comparison.candidates)} candidates on {len(cases)} cases of fold {', '.join(comparison.folds)}: "
        f"{', '.join(comparison.candidates)}"
    )
    folder = workspace.comparison_folder(name)
    scores = score_cases(comparison, cases, folder, device=device, overwrite=request.overwrite, reporter=reporter)
    spec = dataset.description.label_spec
    tables = _tables(comparison, scores, list(spec.names))
    groups = group_labels(comparison.cases, dataset.groups)
    numbers = {candidate: len(parts) for candidate, parts in comparison.candidates.items()}
    chosen, reason = choose(tables, numbers, groups)
    pairs = _mask_pairs(cases, folder, chosen)
    filters, filtered, filters_reason = choose_filters(pairs, spec, dataset.groups)
    best = Best(
        dataset=name,
        models=_models(comparison, chosen, request.folds),
        filters=filters,
        filters_reason=filters_reason,
        reason=reason,
        candidates=_ranking(comparison, tables, list(spec.names), groups),
        filtered_dice=filtered,
        folds=comparison.folds,
        cases=comparison.cases,
        mirrored=request.mirror,
        rule=RULE,
        provenance=describe(),
    )
    save_schema(best, workspace.best_file(name))
    return best


def _raw_cases(comparison: Comparison, known: Mapping[str, Case], folder: Path) -> list[Case]:
    missing = sorted(set(comparison.cases) - set(known))
    if missing:
        raise UsageError(
            "validated cases are not in the raw dataset", file=folder, found=", ".join(missing[:5]), todo="restore them"
        )
    return [known[case] for case in comparison.cases]


def _tables(comparison: Comparison, scores: Mapping[str, CaseScores], structures: Sequence[str]) -> dict[str, Table]:
    """Candidate to its scores (cases, structures)."""
    found = {name for case in scores.values() for dice in case.dice.values() for name in dice}
    if found != set(structures):
        raise UsageError(
            "the models were trained for other labels than the dataset has now",
            expected=", ".join(structures),
            found=", ".join(sorted(found)),
            todo="train again",
        )
    return {
        candidate: score_table(
            {case: own.dice[candidate] for case, own in scores.items()}, comparison.cases, structures
        )
        for candidate in comparison.candidates
    }


def _models(comparison: Comparison, chosen: str, folds: Sequence[str] | None) -> tuple[BestModel, ...]:
    """The chosen models: a single one with all its folds, a pair with those that both have."""
    names = comparison.candidates[chosen]
    parts = [model for model in comparison.models if model.name in names]
    own = parts[0].folds if len(parts) == 1 and folds is None else comparison.folds
    return tuple(
        BestModel(model=model.name, folds=own, identities={fold: model.identities[fold] for fold in own})
        for model in parts
    )


def _ranking(
    comparison: Comparison, tables: Mapping[str, Table], structures: Sequence[str], groups: Groups
) -> tuple[CandidateScore, ...]:
    """Every candidate, best first."""
    order = sorted(tables, key=lambda candidate: -float(tables[candidate].mean()))
    first = tables[order[0]]
    return tuple(
        CandidateScore(
            models=comparison.candidates[candidate],
            dice=mean_dice(tables[candidate], groups),
            structures=dict(zip(structures, tables[candidate].mean(axis=0).tolist(), strict=True)),
            behind=None if candidate == order[0] else paired_gain(first, tables[candidate], groups),
        )
        for candidate in order
    )


def _mask_pairs(cases: Sequence[Case], folder: Path, candidate: str) -> list[MaskPair]:
    return [
        MaskPair(case.name, case.label, mask_file(folder, candidate, case.name, ending_of(case.images[0])))
        for case in cases
        if case.label is not None
    ]


def choose_filters(
    pairs: Sequence[MaskPair], spec: LabelSpec, groups: Mapping[str, str] | None = None
) -> tuple[tuple[ComponentFilter, ...], Interval | None, str]:
    """The component filter of each structure that helps in cross-validation, if any does.

    None is tried where voxels may be ignored: there a reference does not know its components, and to remove one that
    is real but was not labelled would cost nothing. Nor is one on fewer cases or groups than show anything.

    Args:
        pairs: Cross-validated masks of the chosen candidate with their references.
        spec: Meaning of the values.
        groups: Case to group.

    Returns:
        The filters, the score with all of them (None without any), and why these or none.
    """
    if spec.ignore is not None:
        return (), None, NOT_TRIED
    labels = group_labels(_names(pairs), groups)
    if (too_few := too_few_for_filters(len(pairs), labels)) is not None:
        return (), None, f"not tried: {too_few}"
    options = _options(pairs, spec)
    trials: dict[str, list[list[float]]] = {name: [] for name in spec.names}
    for pair in pairs:
        for name, row in _trial(pair, options, spec).items():
            trials[name].append(row)
    chosen = (_best_filter(np.array(trials[name]), options[name], labels) for name in spec.names)
    filters = tuple(found for found in chosen if found is not None)
    if not filters:
        return (), None, NO_FILTER_HELPS
    after = score_table(
        {pair.case: _filtered_dice(pair, filters, spec) for pair in pairs}, _names(pairs), [*spec.names]
    )
    before = np.column_stack([np.array(trials[name])[:, 0] for name in spec.names])
    gain = paired_gain(after, before, labels)
    if gain.value is None or gain.value <= 0:
        return (), None, NO_FILTER_HELPS
    return filters, mean_dice(after, labels), "each gains in cross-validation, as said with it"


def _options(pairs: Sequence[MaskPair], spec: LabelSpec) -> dict[str, list[ComponentFilter]]:
    """Filters worth trying: the largest component, and sizes that the references' components seldom fall below."""
    volumes: dict[str, list[float]] = {name: [] for name in spec.names}
    for pair in pairs:
        reference = read_labels(pair.reference, case=pair.case)
        for name in spec.names:
            sizes = component_sizes(spec.structure_mask(reference.data[0], name))
            volumes[name] += (sizes * reference.geometry.voxel_volume_mm3).tolist()
    return {
        name: [
            ComponentFilter(structure=name, kind="largest"),
            *(
                ComponentFilter(structure=name, kind="size", least_mm3=threshold)
                for threshold in size_thresholds(volumes[name])
            ),
        ]
        for name in spec.names
    }


def _trial(pair: MaskPair, options: Mapping[str, Sequence[ComponentFilter]], spec: LabelSpec) -> dict[str, list[float]]:
    """Per structure its Dice without a filter and with each of the options."""
    reference, mask = (read_labels(file, case=pair.case) for file in (pair.reference, pair.mask))
    volume = reference.geometry.voxel_volume_mm3
    rows = {}
    for name in spec.names:
        truth, found = (spec.structure_mask(labels.data[0], name) for labels in (reference, mask))
        kept = [found, *(filtered_mask(found, rule, volume) for rule in options[name])]
        rows[name] = [_dice(truth, part) for part in kept]
    return rows


def _dice(truth: NDArray[np.bool_], found: NDArray[np.bool_]) -> float:
    value = dice(count_voxels(truth, found))
    return value if np.isfinite(value) else ABSENT


def _best_filter(trials: Table, options: Sequence[ComponentFilter], groups: Groups) -> ComponentFilter | None:
    """The option that gains most among those that help; None if none does.

    Args:
        trials: (cases, 1 + options) Dice without a filter and with each.
        options: The filters.
        groups: Group of each case.
    """
    helping = []
    for column, rule in enumerate(options, start=1):
        helps, reason = filter_helps(trials[:, 0], trials[:, column], groups)
        if helps:
            helping.append((float(trials[:, column].mean()), rule.model_copy(update={"reason": reason})))
    return max(helping, key=lambda entry: entry[0])[1] if helping else None


def _filtered_dice(pair: MaskPair, filters: Sequence[ComponentFilter], spec: LabelSpec) -> dict[str, float | None]:
    reference, mask = (read_labels(file, case=pair.case) for file in (pair.reference, pair.mask))
    cleaned = apply_filters(mask.data[0], filters, spec, reference.geometry.voxel_volume_mm3)
    return case_dice(reference.data[0], cleaned, spec, reference.geometry)


def _names(pairs: Sequence[MaskPair]) -> list[str]:
    return [pair.case for pair in pairs]
