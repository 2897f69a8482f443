"""Plan and store in, trained and validated model out."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader

from samunet.artifacts.method import summarise
from samunet.artifacts.model_spec import get_spec
from samunet.artifacts.plan import Plan
from samunet.artifacts.plan_parts import STORED
from samunet.artifacts.report import EvaluationReport
from samunet.artifacts.workspace import Workspace
from samunet.core.errors import UsageError
from samunet.core.files import read_json, write_json
from samunet.core.log import Reporter
from samunet.datasets.raw import load_description
from samunet.inference.export import predict_cases
from samunet.inference.loading import num_input_channels
from samunet.inference.oracle import oracle_settings
from samunet.inference.predictor import Predictor
from samunet.models.build import build_model
from samunet.models.device import place, resolve_device
from samunet.models.segmentation import SegmentationModel
from samunet.models.weights import as_base, locate_weights
from samunet.pipeline.evaluate import evaluate, save_evaluation
from samunet.pipeline.kept_settings import (
    CACHED,
    check_validated,
    continued_identity,
    is_longer_or_shorter,
    ways_beside_a_run,
)
from samunet.pipeline.methods import chosen_weights, run_label
from samunet.pipeline.oracle import oracle_prompts
from samunet.pipeline.pretrained import tell_what_was_seen
from samunet.pipeline.probed_ranks import with_probed_ranks
from samunet.pipeline.provenance import describe
from samunet.pipeline.quality import MaskWatch, write_calibration
from samunet.pipeline.training_run import (
    CASES_FILE,
    RunInputs,
    TrainingRequest,
    planned,
    read_inputs,
    resolve,
    run_folder,
)
from samunet.pipeline.unlabelled import refuse_unlabelled
from samunet.planners.hardware import cpu_memory
from samunet.preprocessing.store import CaseStore
from samunet.training.checkpointing import RunIdentity, checkpoint_file, load_identity, resume, save_result
from samunet.training.clock import CLOCKS, clock_of_run, loader_workers
from samunet.training.data import Sample, Slabs, SliceDataset, make_loader
from samunet.training.embeddings import EmbeddedSlices, EmbeddingCache, EmbeddingObjective, refuse, why_not
from samunet.training.events import FoldEvents
from samunet.training.fallback import predicted_gib
from samunet.training.objective import Objective, SemanticObjective
from samunet.training.prompted import PromptedDataset, PromptedObjective
from samunet.training.self_training import LESSONS, SelfTaughtSlices
from samunet.training.trainer import RunSettings, Trainer

DEFAULT_SEED = 12345
MAX_PLOTTED_CASES = 5
_NAMES_SHOWN = 5
UNLABELLED_FOLDER = "own_labels"


@dataclass(frozen=True)
class TrainingResult:
    """Where a run's files are and how it did on the fold's validation cases.

    Args:
        folder: Of the fold.
        report: Scores of the validation cases; None for fold all.
        validation: Folder of the masks and scores; its name says where the masks were prompted from the reference.
    """

    folder: Path
    report: EvaluationReport | None
    validation: Path | None


def train(request: TrainingRequest, workspace: Workspace, *, reporter: Reporter) -> TrainingResult:
    """Train one fold, then predict and evaluate its validation cases.

    Raises:
        UsageError: If the run exists already, or a name does not.
        StoreError: If the dataset is not preprocessed with the run's plan.
        WeightsError: If the pretrained weights are not at hand.
    """
    device = resolve_device(request.device)
    plan, configuration = planned(request, workspace)
    folder = run_folder(request, plan, configuration, workspace)
    if request.validate_only:
        identity = load_identity(folder, "final")
        check_validated(request, identity, folder, reporter)
        inputs = read_inputs(request, identity, folder, workspace, reporter)
    elif request.resume:
        begun = load_identity(folder, "latest")
        identity = continued_identity(request, begun, device, folder)
        inputs = read_inputs(request, identity, folder, workspace, reporter)
        _train(identity, inputs, folder, device, request, reporter, begun=begun)
    else:
        existing = _existing_files(folder, request)
        identity = identify_run(request, plan, configuration, workspace, device, reporter)
        identity = with_probed_ranks(identity, workspace, reporter)
        inputs = read_inputs(request, identity, folder, workspace, reporter)
        _train(identity, inputs, folder, device, request, reporter, replaced=existing)
    return TrainingResult(folder, *_validate(inputs, folder, device, request, reporter))


def _existing_files(folder: Path, request: TrainingRequest) -> list[Path]:
    """Files of an earlier run here; they may only be replaced on request, and only once the new run can start."""
    existing = [path for path in folder.glob("*") if path.is_file()]
    if existing and not request.overwrite:
        raise UsageError("there is a run here already", file=folder, todo=ways_beside_a_run(request.weights, folder))
    return existing


def identify_run(
    request: TrainingRequest,
    plan: Plan,
    configuration: str,
    workspace: Workspace,
    device: str,
    reporter: Reporter,
) -> RunIdentity:
    """Find the weights and fix what the run is."""
    recipe = resolve(request, plan, configuration, device, workspace, reporter)
    planned_minutes = resolve(replace(request, minutes=None), plan, configuration, device, workspace).minutes
    if request.minutes and planned_minutes and request.minutes < planned_minutes / 2:
        reporter.warn(
            f"the plan chose its input size for {planned_minutes:g} minutes; for {request.minutes:g}, "
            f"samunet_plan_and_preprocess --minutes {request.minutes:g} may choose a smaller one that learns more"
        )
    refuse_unlabelled(request.unlabelled, recipe, cached=request.cache_embeddings)
    file = locate_weights(chosen_weights(request), get_spec(recipe.backbone), reporter=reporter)
    return RunIdentity(
        dataset=plan.dataset,
        configuration=configuration,
        preset=run_label(request),
        fold=request.fold,
        recipe=recipe,
        base=as_base(file),
        seed=DEFAULT_SEED if request.seed is None else request.seed,
        patience=request.patience,
        plan=plan,
        description=load_description(workspace.description_file(plan.dataset)),
        fingerprint=read_json(workspace.fingerprint_file(plan.dataset)),
        provenance={**describe(), CACHED: request.cache_embeddings},
        clock=clock_of_run(None, processor=request.processor_clock, resume=False),
    )


def _train(
    identity: RunIdentity,
    inputs: RunInputs,
    folder: Path,
    device: str,
    request: TrainingRequest,
    reporter: Reporter,
    *,
    replaced: Sequence[Path] = (),
    begun: RunIdentity | None = None,
) -> None:
    """Build and train, from the start or on from what was ``begun``.

    Files of an earlier run that is ``replaced`` are only deleted once nothing can refuse to start any more.
    """
    recipe, plan = identity.recipe, identity.plan
    if identity.patience is not None and not inputs.cases.monitor:
        raise UsageError("--patience has no cases to watch: the fold has too few training cases or only one group")
    configuration = plan.configuration(identity.configuration)
    labels = plan.label_spec
    available_gib, source = cpu_memory()
    built = build_model(
        recipe,
        num_tokens=labels.num_tokens,
        num_input_channels=num_input_channels(plan, configuration),
        channels=configuration.channels.value,
        weights=identity.weights_file(),
        seed=identity.seed,
    )
    provenance = {**identity.provenance, "trained_parameters": built.model.count_parameters()}
    identity = replace(identity, load_report=built.load_report.as_lists(), provenance=provenance)
    _announce(identity, inputs, device, reporter)
    reporter.info(built.load_report.summary())
    clock = identity.clock or "wall"
    num_workers = loader_workers(request.num_workers, clock, device)
    settings = RunSettings(recipe, device, identity.seed, recipe.minutes, identity.patience, CLOCKS[clock])
    model = place(built.model, device)
    samples = _samples(identity, inputs, model, device, folder, reporter)
    taught = samples.dataset if isinstance(samples.dataset, SelfTaughtSlices) else None
    events = _events(identity, inputs, folder, device, reporter, taught)
    trainer = Trainer(
        model,
        settings,
        objective=samples.objective,
        make_loader=_loader_factory(samples.dataset, settings, num_workers),
        events=events,
        reporter=reporter,
    )
    for path in replaced:
        path.unlink()
    if begun is None:
        shutil.rmtree(folder / UNLABELLED_FOLDER, ignore_errors=True)
    write_json(folder / CASES_FILE, inputs.cases.to_json())
    if begun is not None:
        resume(folder, trainer)
        if is_longer_or_shorter(recipe, begun.recipe):
            trainer.prolong()
        events.restart_log(trainer.state.history)
        if taught is not None:
            taught.take_up(trainer.state.lessons)
        reporter.info(f"continuing at step {trainer.state.step}, {trainer.state.seconds / 60:.1f} minutes in")
    if device == "cpu" and recipe.method.trains_anything:
        trainer.economise(partial(predicted_gib, recipe, labels.num_tokens), available_gib, source)
    state = trainer.run() if recipe.method.trains_anything else trainer.state
    if taught is not None and state.lessons < len(LESSONS):
        reporter.warn(f"the run ended after {state.lessons} of {len(LESSONS)} lessons on images without labels")
    save_result(folder, "final", trainer, identity)
    reporter.info(
        f"trained {state.step} steps in {trainer.elapsed / 60:.1f} minutes: {checkpoint_file(folder, 'final')}"
    )


def _events(
    identity: RunIdentity,
    inputs: RunInputs,
    folder: Path,
    device: str,
    reporter: Reporter,
    taught: SelfTaughtSlices | None,
) -> FoldEvents:
    return FoldEvents(
        folder,
        identity,
        store=inputs.store,
        monitor=inputs.raw(inputs.cases.monitor),
        validation=inputs.raw(inputs.cases.validation[:MAX_PLOTTED_CASES]),
        device=device,
        reporter=reporter,
        taught=taught,
    )


@dataclass(frozen=True)
class _Samples:
    """What a run trains on and what it minimises."""

    dataset: Slabs
    objective: Objective


def _check_labelled(cases: Sequence[str], slices: SliceDataset, reporter: Reporter) -> None:
    """Say which cases teach nothing, as all of their voxels are to be ignored.

    Raises:
        UsageError: If that is true of all.
    """
    bare = [name for name in cases if name not in slices.records]
    named = ", ".join(bare[:_NAMES_SHOWN]) + (", ..." if len(bare) > _NAMES_SHOWN else "")
    if len(bare) == len(cases):
        raise UsageError(
            "there is nothing to learn from: every voxel of all training cases is to be ignored",
            found=named,
            todo="label some of them, or train on others (--cases, --num-cases)",
        )
    if bare:
        reporter.warn(f"{len(bare)} of {len(cases)} training cases teach nothing, all is to be ignored in {named}")


def _samples(
    identity: RunIdentity,
    inputs: RunInputs,
    model: SegmentationModel,
    device: str,
    folder: Path,
    reporter: Reporter,
) -> _Samples:
    """Slabs of the training cases: as they are, with prompts for one structure each, or as cached embeddings.

    Beside them those of cases that the run labels itself, where there are some.

    Raises:
        UsageError: If embeddings are to be cached and cannot be.
    """
    recipe, plan = identity.recipe, identity.plan
    configuration = plan.configuration(identity.configuration)
    make = partial(
        SliceDataset,
        plan=plan,
        recipe=recipe,
        context=configuration.context_slices.value,
        seed=identity.seed,
        augment=recipe.augmentation.enabled,
    )
    slices = make(CaseStore(inputs.store), inputs.cases.train)
    _check_labelled(inputs.cases.train, slices, reporter)
    if identity.provenance[CACHED]:
        reason = why_not(recipe, configuration, slices.records)
        if reason is not None:
            raise refuse(reason)
        cache = EmbeddingCache(inputs.store.parent, embedding_facts(identity, inputs.store), slices.records)
        cache.fill(slices, model, device=device, reporter=reporter)
        embedded = EmbeddingObjective(recipe, has_regions=plan.label_spec.has_regions, device=device)
        return _Samples(EmbeddedSlices(slices, cache), embedded)
    if recipe.method.promptable:
        prompted = PromptedDataset(slices, labels=plan.label_spec, prompts=recipe.method.prompts, seed=identity.seed)
        return _Samples(prompted, PromptedObjective(recipe, device=device))
    objective = SemanticObjective(recipe, has_regions=plan.label_spec.has_regions, device=device)
    if not inputs.unlabelled:
        return _Samples(slices, objective)
    taught = SelfTaughtSlices(
        slices,
        inputs.unlabelled,
        make=make,
        folder=folder / UNLABELLED_FOLDER,
        labels=plan.label_spec,
        seed=identity.seed,
        reporter=reporter,
    )
    return _Samples(taught, objective)


def embedding_facts(identity: RunIdentity, store: Path) -> dict[str, Any]:
    """All that an embedding depends on beside its case."""
    recipe, configuration = identity.recipe, identity.plan.configuration(identity.configuration)
    return {
        "weights": identity.base.model_dump(mode="json", exclude={"file"}),
        "backbone": recipe.backbone,
        "input_size": recipe.input_size,
        "tile_vox": recipe.tile_vox,
        "intensity_map": recipe.intensity_map.model_dump(mode="json"),
        "precision": recipe.precision,
        "context": configuration.context_slices.value,
        "channels": configuration.channels.value,
        "planes": list(recipe.planes),
        "store": store.name,
    }


def _loader_factory(dataset: Slabs, settings: RunSettings, num_workers: int) -> Callable[[int], DataLoader[Sample]]:
    """What starts the loader after a number of samples already consumed."""
    return partial(
        make_loader,
        dataset,
        batch_size=settings.recipe.batch_size,
        samples_per_epoch=settings.samples_per_epoch,
        num_workers=num_workers,
        pin_memory=settings.device != "cpu",
    )


def _announce(identity: RunIdentity, inputs: RunInputs, device: str, reporter: Reporter) -> None:
    recipe = identity.recipe
    unit = "minutes of this process's CPU time" if identity.clock == "processor" else "minutes"
    limit = f"{recipe.minutes:g} {unit}" if recipe.minutes is not None else f"{recipe.epochs} epochs"
    unlabelled = f" with {number} without labels" if (number := len(inputs.unlabelled)) else ""
    planes = "" if recipe.planes == STORED else f" across {' and '.join(recipe.planes)}"
    reporter.info(
        f"{identity.dataset} {identity.configuration}, fold {identity.fold}: {recipe.backbone} at "
        f"{recipe.input_size} px on tiles of {recipe.tile_vox} voxels{planes}, {identity.base.kind} weights, "
        f"{summarise(recipe.method)}, {recipe.batch_size} slices a step, "
        f"learning rate {recipe.learning_rate:g}, {limit} on {device}; "
        f"{len(inputs.cases.train)} cases train{unlabelled}, {len(inputs.cases.monitor)} monitor, "
        f"{len(inputs.cases.validation)} validate"
    )
    cases = inputs.cases
    tell_what_was_seen(identity.base, identity.dataset, cases.validation, reporter, subset=cases.subset)


def _validate(
    inputs: RunInputs, folder: Path, device: str, request: TrainingRequest, reporter: Reporter
) -> tuple[EvaluationReport, Path] | tuple[None, None]:
    """Predict the fold's validation cases from their raw files, exactly as samunet_predict does, and score them."""
    trained, channels = inputs.cases.trained, inputs.dataset.description.channels
    if not inputs.cases.validation:
        write_calibration(folder, inputs.store, trained, channels, reporter=reporter)
        return None, None
    predictor = Predictor.from_folder(
        folder.parent,
        folds=[request.fold],
        checkpoint="final",
        device=device,
        mirror=request.mirror,
        reporter=reporter,
    )
    cases = inputs.raw(inputs.cases.validation)
    oracle = oracle_settings(predictor.plan, predictor.recipe, seed=DEFAULT_SEED)
    output = folder / ("validation" if oracle is None else f"validation_oracle_{oracle.grade}")
    output.mkdir(parents=True, exist_ok=True)
    prompts = None
    if oracle is not None:
        reporter.info(
            f"validation is prompted from the reference (oracle, {oracle.grade}): no user's prompts are that good"
        )
        prompts = oracle_prompts({c.name: c.label for c in cases if c.label is not None}, oracle).cases
    ending = predictor.plan.file_ending
    watch = MaskWatch(predictor.plan) if oracle is None else None
    outcomes = predict_cases(
        predictor, cases, output, ending=ending, reporter=reporter, prompts=prompts, propagate=False, observe=watch
    )
    for error in outcomes.values():
        if error is not None:
            reporter.warn(str(error))
    predicted = {name: output / f"{name}{ending}" for name, error in outcomes.items() if error is None}
    pairs = [(c.name, c.label, predicted.get(c.name)) for c in cases if c.label is not None]
    groups = inputs.dataset.groups
    report = evaluate(pairs, labels=predictor.plan.label_spec, reporter=reporter, groups=groups)
    save_evaluation(report, output)
    write_calibration(
        folder,
        inputs.store,
        trained,
        channels,
        watch=watch,
        report=report,
        groups=groups,
        labels_seen=inputs.cases.labels_seen,
        reporter=reporter,
    )
    return report, output
