"""Plan and store in, trained and validated model out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader

from samunet.artifacts.checkpoint import BaseWeights
from samunet.artifacts.dataset import Case, DatasetDescription, RawDataset
from samunet.artifacts.model_spec import get_spec
from samunet.artifacts.plan import Plan, ResolvedRecipe, load_plan, resolve_recipe
from samunet.artifacts.report import EvaluationReport
from samunet.artifacts.workspace import Workspace, fold_folder
from samunet.core.errors import DataError, UsageError
from samunet.core.files import read_json, write_json
from samunet.core.log import Reporter
from samunet.datasets.raw import load_raw_dataset
from samunet.datasets.splits import Split, cases_of_fold, load_or_make_splits, monitor_subset
from samunet.inference.export import predict_cases
from samunet.inference.loading import num_input_channels
from samunet.inference.predictor import Predictor
from samunet.models.build import build_model
from samunet.models.device import device_class, place, resolve_device
from samunet.models.weights import WeightsFile, locate_weights, weights_kind
from samunet.pipeline.evaluate import evaluate, save_evaluation
from samunet.pipeline.provenance import describe
from samunet.preprocessing.store import CaseStore
from samunet.training.checkpointing import RunIdentity, checkpoint_file, load_identity, resume, save_result
from samunet.training.data import Sample, SliceDataset, make_loader
from samunet.training.events import FoldEvents
from samunet.training.trainer import RunSettings, Trainer

MAX_PLOTTED_CASES = 5


@dataclass(frozen=True)
class TrainingRequest:
    """What to train; None leaves a decision to the plan.

    Args:
        dataset: Id, name or path.
        fold: "0" to "4", or "all".
        configuration: Planned configuration.
        weights: "auto", "none", a path, or KIND:PATH.
        device: "auto", "cpu", "cuda", ...
        epochs: Epochs.
        iterations: Optimizer steps per epoch.
        learning_rate: Peak learning rate.
        batch_size: Slices per optimizer step.
        rank: LoRA rank.
        seed: Of initialisation, data and monitor subset.
        patience: Epochs without a better monitor score before stopping.
        minutes: Time limit; the schedule runs on elapsed time.
        num_workers: Loader processes.
        resume: Continue the latest checkpoint.
        overwrite: Replace an existing run.
        validate_only: Only predict and evaluate the fold's validation cases with the final checkpoint.
        mirror: Average mirrored views in the final validation.
    """

    dataset: str
    fold: str
    configuration: str | None = None
    weights: str = "auto"
    device: str = "auto"
    epochs: int | None = None
    iterations: int | None = None
    learning_rate: float | None = None
    batch_size: int | None = None
    rank: int | None = None
    seed: int = 12345
    patience: int | None = None
    minutes: float | None = None
    num_workers: int | None = None
    resume: bool = False
    overwrite: bool = False
    validate_only: bool = False
    mirror: bool = True


@dataclass(frozen=True)
class TrainingResult:
    """Where a run's files are and how it did on the fold's validation cases (None for fold all)."""

    folder: Path
    report: EvaluationReport | None


@dataclass(frozen=True)
class _Inputs:
    """Everything a run reads."""

    dataset: RawDataset
    plan: Plan
    configuration: str
    store: Path
    split: Split
    monitor: tuple[str, ...]
    description: DatasetDescription
    fingerprint: dict[str, Any]

    def cases(self, names: Sequence[str]) -> list[Case]:
        """Raw cases by name."""
        by_name = {case.name: case for case in self.dataset.training}
        missing = [name for name in names if name not in by_name]
        if missing:
            raise DataError(
                "cases of the split are not in the raw dataset",
                file=self.dataset.folder,
                found=", ".join(missing[:5]),
                todo="restore them, or delete splits_final.json and plan again",
            )
        return [by_name[name] for name in names]


def train(request: TrainingRequest, workspace: Workspace, *, reporter: Reporter) -> TrainingResult:
    """Train one fold, then predict and evaluate its validation cases.

    Raises:
        UsageError: If the run exists already, or a name does not.
        StoreError: If the dataset is not preprocessed with the current plan.
        WeightsError: If the pretrained weights are not at hand.
    """
    inputs = _read_inputs(request, workspace)
    device = resolve_device(request.device)
    kind = weights_kind(request.weights)
    recipe = _resolve(request, inputs, kind, device)
    folder = fold_folder(workspace.model_folder(inputs.plan.dataset, inputs.configuration, "auto", kind), request.fold)
    if not request.validate_only:
        if request.resume:
            identity = load_identity(folder)
        else:
            existing = _existing_files(folder, overwrite=request.overwrite)
            identity = _identify(request, inputs, recipe, reporter)
            for path in existing:
                path.unlink()
        _train(identity, inputs, folder, device, request, reporter)
    return TrainingResult(folder, _validate(inputs, folder, device, request, reporter))


def _read_inputs(request: TrainingRequest, workspace: Workspace) -> _Inputs:
    name = workspace.dataset_name(request.dataset)
    plan_file = workspace.plan_file(name)
    if not plan_file.is_file():
        raise UsageError("this dataset has no plan", file=plan_file, todo=f"samunet_plan_and_preprocess -d {name}")
    plan = load_plan(plan_file)
    configuration = request.configuration or plan.recommended.value
    plan.configuration(configuration)
    dataset = load_raw_dataset(workspace.raw_folder(request.dataset))
    cases = [case.name for case in dataset.training if case.name not in plan.left_out]
    splits = load_or_make_splits(workspace.splits_file(name), cases, dataset.groups)
    split = cases_of_fold(splits, request.fold, cases)
    store = workspace.store_folder(name, plan.store_key(configuration))
    stored = set(CaseStore(store, spec=plan.store_spec(configuration)).names())
    lacking = sorted({*split.train, *split.val} - stored)
    if lacking:
        raise DataError(
            "the store lacks cases of this fold",
            file=store,
            expected=f"{len(split.train) + len(split.val)} cases",
            found=f"{len(lacking)} are not there, as {', '.join(lacking[:5])}",
            todo=f"samunet_plan_and_preprocess -d {name} (finished cases are skipped)",
        )
    return _Inputs(
        dataset,
        plan,
        configuration,
        store,
        split,
        monitor_subset(split.train, dataset.groups, seed=request.seed),
        dataset.description,
        read_json(workspace.fingerprint_file(name)),
    )


def _resolve(request: TrainingRequest, inputs: _Inputs, kind: str, device: str) -> ResolvedRecipe:
    """The plan's recipe with the command line's overrides."""
    recipe = resolve_recipe(inputs.plan.configuration(inputs.configuration), kind, device_class(device))
    overrides: dict[str, Any] = {
        "epochs": request.epochs,
        "iterations": request.iterations,
        "learning_rate": request.learning_rate,
        "batch_size": request.batch_size,
        "lora_rank": request.rank,
    }
    changes = {name: value for name, value in overrides.items() if value is not None}
    if "batch_size" in changes:
        changes["accumulation_steps"] = min(recipe.accumulation_steps, changes["batch_size"])
    if request.rank is not None and recipe.encoder_tuning != "lora":
        raise UsageError(
            "--rank has no effect here: this recipe has no LoRA",
            expected="a recipe with encoder_tuning lora",
            found=f"{recipe.encoder_tuning} ({kind} weights on {recipe.device_class})",
        )
    if request.minutes is not None:
        changes["minutes"] = request.minutes
    elif request.epochs is not None or request.iterations is not None:
        changes["minutes"] = None
    return replace(recipe, **changes)


def _existing_files(folder: Path, *, overwrite: bool) -> list[Path]:
    """Files of an earlier run here; they may only be replaced on request, and only once the new run can start."""
    existing = [path for path in folder.glob("*") if path.is_file()]
    if existing and not overwrite:
        raise UsageError("there is a run here already", file=folder, todo="--c continues it, --overwrite replaces it")
    return existing


def _identify(request: TrainingRequest, inputs: _Inputs, recipe: ResolvedRecipe, reporter: Reporter) -> RunIdentity:
    """Find the weights and fix what the run is."""
    file = locate_weights(request.weights, get_spec(recipe.backbone), reporter=reporter)
    return RunIdentity(
        dataset=inputs.plan.dataset,
        configuration=inputs.configuration,
        preset="auto",
        fold=request.fold,
        recipe=recipe,
        base=_as_base(file),
        seed=request.seed,
        patience=request.patience,
        plan=inputs.plan,
        description=inputs.description,
        fingerprint=inputs.fingerprint,
        provenance=describe(),
    )


def _as_base(file: WeightsFile | None) -> BaseWeights:
    if file is None:
        return BaseWeights(kind="none")
    rest = None if file.rest is None else _as_base(file.rest)
    return BaseWeights(kind=file.kind, file=str(file.path), sha256=file.sha256, rest=rest)


def _train(
    identity: RunIdentity,
    inputs: _Inputs,
    folder: Path,
    device: str,
    request: TrainingRequest,
    reporter: Reporter,
) -> None:
    recipe, plan = identity.recipe, identity.plan
    configuration = plan.configuration(identity.configuration)
    labels = plan.label_spec
    built = build_model(
        recipe,
        num_tokens=labels.num_tokens,
        num_input_channels=num_input_channels(plan, configuration),
        channels=configuration.channels.value,
        weights=identity.weights_file(),
        seed=identity.seed,
    )
    identity = replace(identity, load_report=built.load_report.as_lists())
    _announce(identity, inputs, device, reporter)
    reporter.info(built.load_report.summary())
    settings = RunSettings(
        recipe=recipe,
        has_regions=labels.has_regions,
        device=device,
        seed=identity.seed,
        minutes=recipe.minutes,
        patience=identity.patience,
    )
    events = _events(identity, inputs, folder, device)
    trainer = Trainer(
        place(built.model, device),
        settings,
        make_loader=_loader_factory(identity, inputs, settings, request.num_workers),
        events=events,
        reporter=reporter,
    )
    trained = [name for name in inputs.split.train if name not in inputs.monitor]
    write_json(folder / "cases.json", {"train": trained, "monitor": inputs.monitor, "validation": inputs.split.val})
    if request.resume:
        resume(folder, trainer)
        events.restart_log(trainer.state.history)
        reporter.info(f"continuing at step {trainer.state.step}, {trainer.state.seconds / 60:.1f} minutes in")
    state = trainer.run()
    save_result(folder, "final", trainer, identity)
    reporter.info(
        f"trained {state.step} steps in {trainer.elapsed / 60:.1f} minutes: {checkpoint_file(folder, 'final')}"
    )


def _events(identity: RunIdentity, inputs: _Inputs, folder: Path, device: str) -> FoldEvents:
    return FoldEvents(
        folder,
        identity,
        store=inputs.store,
        monitor=inputs.cases(inputs.monitor),
        validation=inputs.cases(inputs.split.val[:MAX_PLOTTED_CASES]),
        device=device,
    )


def _loader_factory(
    identity: RunIdentity, inputs: _Inputs, settings: RunSettings, num_workers: int | None
) -> Callable[[int], DataLoader[Sample]]:
    """What starts the loader after a number of samples already consumed."""
    dataset = SliceDataset(
        inputs.store,
        [name for name in inputs.split.train if name not in inputs.monitor],
        plan=identity.plan,
        recipe=identity.recipe,
        context=identity.plan.configuration(identity.configuration).context_slices.value,
        seed=identity.seed,
    )
    return partial(
        make_loader,
        dataset,
        batch_size=identity.recipe.batch_size,
        samples_per_epoch=settings.samples_per_epoch,
        num_workers=default_workers(settings.device) if num_workers is None else num_workers,
        pin_memory=settings.device != "cpu",
    )


def default_workers(device: str) -> int:
    """Loader processes: one beside a CPU that trains, a few beside a GPU."""
    import os

    cores = os.cpu_count() or 1
    return 1 if device == "cpu" else max(1, min(8, cores - 1))


def _announce(identity: RunIdentity, inputs: _Inputs, device: str, reporter: Reporter) -> None:
    recipe = identity.recipe
    limit = f"{recipe.minutes:g} minutes" if recipe.minutes is not None else f"{recipe.epochs} epochs"
    tuning = f"LoRA rank {recipe.lora_rank}" if recipe.encoder_tuning == "lora" else f"{recipe.encoder_tuning} encoder"
    reporter.info(
        f"{identity.dataset} {identity.configuration}, fold {identity.fold}: {recipe.backbone} at "
        f"{recipe.input_size} px on tiles of {recipe.tile_vox} voxels, {identity.base.kind} weights, {tuning}, "
        f"{recipe.batch_size} slices a step, learning rate {recipe.learning_rate:g}, {limit} on {device}; "
        f"{len(inputs.split.train) - len(inputs.monitor)} cases train, {len(inputs.monitor)} monitor, "
        f"{len(inputs.split.val)} validate"
    )


def _validate(
    inputs: _Inputs, folder: Path, device: str, request: TrainingRequest, reporter: Reporter
) -> EvaluationReport | None:
    """Predict the fold's validation cases from their raw files, exactly as samunet_predict does, and score them."""
    if not inputs.split.val:
        return None
    predictor = Predictor.from_folder(
        folder.parent, folds=[request.fold], checkpoint="final", device=device, mirror=request.mirror
    )
    output = folder / "validation"
    output.mkdir(parents=True, exist_ok=True)
    cases = inputs.cases(inputs.split.val)
    ending = inputs.plan.file_ending
    outcomes = predict_cases(predictor, cases, output, ending=ending, reporter=reporter)
    for error in outcomes.values():
        if error is not None:
            reporter.warn(str(error))
    pairs = [(c.name, c.label, output / f"{c.name}{ending}") for c in cases if c.label is not None]
    report = evaluate(pairs, labels=inputs.plan.label_spec, reporter=reporter)
    save_evaluation(report, output)
    return report
