"""What a training run reads: the request, which run it means, its cases and its store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from samunet.artifacts.dataset import Case, RawDataset
from samunet.artifacts.plan import Plan, ResolvedRecipe, load_plan
from samunet.artifacts.subset import Subset
from samunet.artifacts.workspace import Workspace, fold_folder
from samunet.core.config import parse_schema
from samunet.core.errors import ConfigError, UsageError
from samunet.core.files import read_json
from samunet.core.log import Reporter
from samunet.datasets.raw import load_raw_dataset
from samunet.datasets.splits import Split, cases_of_fold, load_or_make_splits, monitor_subset
from samunet.models.device import usable_precision
from samunet.models.weights import AUTO
from samunet.pipeline.methods import chosen_kind, default_configuration, method_recipe, run_label
from samunet.pipeline.pretrain_data import Planned
from samunet.pipeline.pretrained import labels_read
from samunet.pipeline.stores import check_planned_around, open_store
from samunet.pipeline.subsets import check_subset, choose_subset, recipe_for_subset, subset_tag
from samunet.pipeline.unlabelled import as_recorded, stored_cases, unlabelled_cases
from samunet.planners.batches import split_batch
from samunet.planners.presets import AUTO as AUTO_PRESET
from samunet.preprocessing.store import CaseStore
from samunet.training.checkpointing import RunIdentity, checkpoint_file

CASES_FILE = "cases.json"


@dataclass(frozen=True)
class TrainingRequest:
    """What to train; None leaves a decision to the plan.

    Args:
        dataset: Id, name or path.
        fold: "0" to "4", or "all".
        configuration: Planned configuration.
        preset: A published method, or "auto" for the plan's own.
        backbone: Image encoder instead of the planned or published one.
        changes: Changes of the method, dotted path to JSON value.
        published: Take the preset's published size and schedule.
        weights: "auto", "none", a path, or KIND:PATH.
        device: "auto", "cpu", "cuda", ...
        epochs: Epochs.
        iterations: Optimizer steps per epoch.
        learning_rate: Peak learning rate.
        batch_size: Slices per optimizer step.
        rank: LoRA rank.
        seed: Of initialisation, data and monitor subset (12345).
        patience: Epochs without a better monitor score before stopping.
        minutes: Time limit; the schedule runs on elapsed time.
        processor_clock: Measure the minutes on the processor's clock: time in which this process computes.
        num_workers: Loader processes.
        resume: Continue the latest checkpoint.
        overwrite: Replace an existing run.
        validate_only: Only predict and evaluate the fold's validation cases with the final checkpoint.
        mirror: Average mirrored views in the final validation.
        augment: Whether to augment.
        cache_embeddings: Compute a frozen encoder's embeddings once.
        num_cases: Train on so many of the fold's training cases, drawn once.
        cases: Train on these of them.
        subset_seed: Of that draw (12345).
        unlabelled: Images without labels to learn from too: "imagesTr" (of the fold's training cases those that the
            run has no label of), "imagesTs", or folders.
    """

    dataset: str
    fold: str
    configuration: str | None = None
    preset: str = AUTO_PRESET
    backbone: str | None = None
    changes: Mapping[str, Any] = field(default_factory=dict)
    published: bool = False
    weights: str = "auto"
    device: str = "auto"
    epochs: int | None = None
    iterations: int | None = None
    learning_rate: float | None = None
    batch_size: int | None = None
    rank: int | None = None
    seed: int | None = None
    patience: int | None = None
    minutes: float | None = None
    processor_clock: bool = False
    num_workers: int | None = None
    resume: bool = False
    overwrite: bool = False
    validate_only: bool = False
    mirror: bool = True
    augment: bool = True
    cache_embeddings: bool = False
    num_cases: int | None = None
    cases: tuple[str, ...] | None = None
    subset_seed: int | None = None
    unlabelled: tuple[str, ...] = ()


@dataclass(frozen=True)
class RunCases:
    """Who is trained on, who chooses, who validates.

    Args:
        train: Cases that are trained on.
        monitor: Training cases set aside for early stopping and ``best``.
        validation: Cases of the fold.
        subset: What the first two are limited to; None for all training cases of the fold.
        labels_seen: Validation cases with whose labels the weights that the run starts from were taught.
        unlabelled: Cases without labels that are learnt from too.
    """

    train: tuple[str, ...]
    monitor: tuple[str, ...]
    validation: tuple[str, ...]
    subset: Subset | None = None
    labels_seen: tuple[str, ...] = ()
    unlabelled: tuple[str, ...] = ()

    @property
    def trained(self) -> tuple[str, ...]:
        """All that the model has to do with in training."""
        return (*self.train, *self.monitor)

    def to_json(self) -> dict[str, Any]:
        """As written into the run's folder."""
        parts = {"train": list(self.train), "monitor": list(self.monitor), "validation": list(self.validation)}
        for part in ("labels_seen", "unlabelled"):
            parts |= {part: list(names)} if (names := getattr(self, part)) else {}
        return parts if self.subset is None else parts | {"subset": self.subset.model_dump(mode="json")}

    @classmethod
    def read(cls, file: Path) -> RunCases:
        """As read back from there."""
        content = read_json(file)
        subset = content.pop("subset", None)
        parts = {part: tuple(names) for part, names in content.items()}
        if set(parts) - {each.name for each in fields(cls)} or not {"train", "monitor", "validation"} <= set(parts):
            raise ConfigError("these are not the cases of a run", expected="the file as it was written", file=file)
        return cls(**parts, subset=None if subset is None else parse_schema(Subset, subset, file=file))


@dataclass(frozen=True)
class RunInputs:
    """The data of a run.

    Args:
        dataset: Raw images and labels.
        store: Folder of preprocessed slices.
        cases: Their parts in the run.
        unlabelled: Case without labels to the store that holds its voxels.
    """

    dataset: RawDataset
    store: Path
    cases: RunCases
    unlabelled: Mapping[str, CaseStore] = field(default_factory=dict)

    def raw(self, names: Sequence[str]) -> list[Case]:
        """Raw cases by name.

        Raises:
            UsageError: If some are not in the raw dataset any more.
        """
        by_name = {case.name: case for case in self.dataset.training}
        missing = [name for name in names if name not in by_name]
        if missing:
            raise UsageError(
                "cases of the split are not in the raw dataset",
                file=self.dataset.folder,
                found=", ".join(missing[:5]),
                todo="restore them, or delete splits_final.json and plan again",
            )
        return [by_name[name] for name in names]


def planned(request: TrainingRequest, workspace: Workspace) -> tuple[Plan, str]:
    """The dataset's plan and the name of the configuration asked for.

    Raises:
        UsageError: If there is no plan.
        ConfigError: If the plan or the name is not valid.
    """
    name = workspace.dataset_name(request.dataset)
    plan_file = workspace.plan_file(name)
    if not plan_file.is_file():
        raise UsageError("this dataset has no plan", file=plan_file, todo=f"samunet_plan_and_preprocess -d {name}")
    plan = load_plan(plan_file)
    configuration = request.configuration or default_configuration(request, plan)
    check_planned_around(plan, configuration)
    return plan, configuration


def run_folder(request: TrainingRequest, plan: Plan, configuration: str, workspace: Workspace) -> Path:
    """Folder of the run; one that is continued or validated is found without naming its weights if it is the only one.

    Raises:
        UsageError: If several runs fit.
    """
    if request.weights == AUTO and (request.resume or request.validate_only):
        wanted = "latest" if request.resume else "final"
        runs = (workspace.results / plan.dataset).glob(f"{configuration}__{run_label(request)}__*")
        folders = sorted(fold_folder(run, request.fold) for run in runs)
        existing = [folder for folder in folders if checkpoint_file(folder, wanted).is_file()]
        if len(existing) > 1:
            raise UsageError(
                "several runs of this fold fit",
                found=", ".join(folder.parent.name for folder in existing),
                todo="name the weights of the one you mean with --weights",
            )
        if existing:
            return existing[0]
    kind = chosen_kind(request)
    return fold_folder(workspace.model_folder(plan.dataset, configuration, run_label(request), kind), request.fold)


def read_inputs(
    request: TrainingRequest, identity: RunIdentity, folder: Path, workspace: Workspace, reporter: Reporter
) -> RunInputs:
    """The data of a run: drawn anew for a fresh one, as recorded for one that is continued or validated.

    Raises:
        StoreError: If there is no store of the run's plan, it lacks cases, or their images have changed.
        UsageError: If the fold does not exist.
    """
    dataset = load_raw_dataset(workspace.raw_folder(request.dataset))
    recorded = folder / CASES_FILE
    if (request.resume or request.validate_only) and recorded.is_file():
        cases = RunCases.read(recorded)
        if subset_tag(request) or cases.subset is not None:
            check_subset(cases.subset, _fold(request, identity.plan, dataset, workspace)[1], file=recorded)
    else:
        cases = _draw_cases(request, identity, dataset, workspace)
    taught = labels_read(identity.base, identity.dataset) & set(cases.validation)
    cases = replace(cases, labels_seen=tuple(sorted({*cases.labels_seen, *taught})))
    wanted = {*cases.train, *cases.monitor, *cases.validation}
    store = open_store(identity.plan, identity.configuration, dataset, workspace, cases=wanted)
    if request.validate_only:
        return RunInputs(dataset, store.folder, cases)
    if request.resume and recorded.is_file():
        planned = Planned(dataset, identity.plan, identity.configuration)
        unlabelled = stored_cases(request.unlabelled, cases.unlabelled, planned, workspace)
        if set(cases.unlabelled) - set(unlabelled):  # a store was removed; their files may still be there
            try:
                unlabelled = _unlabelled(request, identity, cases, dataset, workspace, reporter) | unlabelled
            except UsageError as error:
                reporter.warn(str(error))
        return RunInputs(dataset, store.folder, cases, as_recorded(unlabelled, cases.unlabelled, reporter))
    unlabelled = _unlabelled(request, identity, cases, dataset, workspace, reporter) if request.unlabelled else {}
    return RunInputs(dataset, store.folder, replace(cases, unlabelled=tuple(sorted(unlabelled))), unlabelled)


def _unlabelled(
    request: TrainingRequest,
    identity: RunIdentity,
    cases: RunCases,
    dataset: RawDataset,
    workspace: Workspace,
    reporter: Reporter,
) -> dict[str, CaseStore]:
    """Images to learn from without labels: of imagesTr none but training cases that the run has no label of."""
    plan = identity.plan
    learnt = set(_fold(request, plan, dataset, workspace)[0].train) - set(cases.trained)
    others = [case.name for case in dataset.training if case.name not in {*learnt, *plan.left_out}]
    planned = Planned(dataset, plan, identity.configuration)
    return unlabelled_cases(request.unlabelled, others, planned, identity.recipe, request.fold, workspace, reporter)


def _draw_cases(request: TrainingRequest, identity: RunIdentity, dataset: RawDataset, workspace: Workspace) -> RunCases:
    split, subset = _fold(request, identity.plan, dataset, workspace)
    train = split.train if subset is None else subset.cases
    early_stop = identity.patience is not None
    monitor = monitor_subset(train, dataset.groups, seed=identity.seed, early_stop=early_stop)
    return RunCases(tuple(name for name in train if name not in monitor), monitor, split.val, subset)


def _fold(
    request: TrainingRequest, plan: Plan, dataset: RawDataset, workspace: Workspace
) -> tuple[Split, Subset | None]:
    """The fold's cases, and the subset of its training cases that is asked for."""
    names = [case.name for case in dataset.training if case.name not in plan.left_out]
    splits = load_or_make_splits(workspace.splits_file(plan.dataset), names, dataset.groups)
    split = cases_of_fold(splits, request.fold, names)
    return split, choose_subset(request, request.fold, split, dataset.groups, plan.dataset, workspace)


def resolve(
    request: TrainingRequest,
    plan: Plan,
    configuration: str,
    device: str,
    workspace: Workspace,
    reporter: Reporter | None = None,
) -> ResolvedRecipe:
    """The recipe for the method, the weights and the device, with the command line's overrides.

    Args:
        request: What is asked for.
        plan: The dataset's plan.
        configuration: Of the plan.
        device: Resolved.
        workspace: Where the fingerprint and splits are.
        reporter: Told what a subset of the cases changes.

    Raises:
        UsageError: If an override has no effect on this recipe.
        ConfigError: If the plan holds no such recipe, or the method does not go with the configuration.
    """
    recipe = method_recipe(request, plan, configuration, device, workspace)
    if subset_tag(request):
        _, subset = _fold(request, plan, load_raw_dataset(workspace.raw_folder(request.dataset)), workspace)
        assert subset is not None
        named = any(path.endswith((".rank", ".ranks", ".adapters")) for path in request.changes)
        asked = {"published": request.published, "keep_rank": request.rank is not None or named}
        recipe = recipe_for_subset(recipe, subset, plan, workspace, **asked, reporter=reporter)
    changes: dict[str, Any] = {"precision": usable_precision(recipe, device)}
    if not request.augment:
        changes["augmentation"] = recipe.augmentation.model_copy(update={"enabled": False})
    overrides = {
        "iterations": request.iterations,
        "learning_rate": request.learning_rate,
        "batch_size": request.batch_size,
    }
    changes |= {name: value for name, value in overrides.items() if value is not None}
    if request.batch_size is not None:
        depth = recipe.slab_depth
        if request.batch_size % depth:
            raise UsageError(
                "--batch-size counts slices and holds whole slabs",
                expected=f"a multiple of {depth}",
                found=str(request.batch_size),
            )
        changes["accumulation_steps"] = split_batch(recipe, request.batch_size, is_fixed=True)[1]
    if request.iterations is not None and request.minutes is None:
        changes["minutes"] = None
    return with_length(replace(recipe, **changes), request)


def with_length(recipe: ResolvedRecipe, request: TrainingRequest) -> ResolvedRecipe:
    """The recipe with the length asked for: minutes, or epochs instead of minutes.

    Raises:
        UsageError: If both are asked for.
    """
    if request.epochs is not None and request.minutes is not None:
        raise UsageError("--epochs and --time-limit both give the length: choose one")
    if request.epochs is not None:
        recipe = replace(recipe, epochs=request.epochs, minutes=None)
    return recipe if request.minutes is None else replace(recipe, minutes=request.minutes)
