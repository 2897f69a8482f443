"""Images of planned datasets in, weights to train from out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from samunet.artifacts.checkpoint import ENDING, BaseWeights
from samunet.artifacts.model_spec import get_spec
from samunet.artifacts.plan import IntensityMap, ResolvedRecipe
from samunet.artifacts.pretraining import Earlier, Masking, Pretrained, read_pretrained, write_pretrained
from samunet.artifacts.workspace import Workspace
from samunet.core.errors import UsageError
from samunet.core.files import read_json, write_json
from samunet.core.log import Reporter
from samunet.inference.loading import num_input_channels
from samunet.models.build import BuiltModel
from samunet.models.channels import build_channel_input
from samunet.models.device import device_class, place, resolve_device, usable_precision
from samunet.models.formats import ENCODER
from samunet.models.pretraining import build_masked_model, build_prompted_model
from samunet.models.weights import NONE, WeightsFile, as_base, locate_weights, pretrained_weights, recorded_weights
from samunet.pipeline.kept_settings import Setting, is_longer_or_shorter, refuse_others, weights_setting
from samunet.pipeline.pretrain_data import TRAINING, Source, planned_datasets, read_sources, recipes_of
from samunet.pipeline.pretrain_length import count_tiles, tell_length, with_length_for
from samunet.pipeline.pretrained import seen_before, tell_what_is_unknown
from samunet.pipeline.provenance import describe
from samunet.pipeline.train import DEFAULT_SEED
from samunet.planners import peft
from samunet.planners.batches import split_batch
from samunet.planners.hardware import cpu_memory
from samunet.planners.pretraining import KIND
from samunet.preprocessing.store import CaseStore
from samunet.training.checkpointing import RunIdentity, checkpoint_file, load_identity, resume
from samunet.training.clock import CLOCKS, clock_of_run, loader_workers
from samunet.training.data import Slabs, SliceDataset, make_loader
from samunet.training.fallback import predicted_gib
from samunet.training.mixture import EncoderSlices, Mixture
from samunet.training.objective import Objective
from samunet.training.pretraining import (
    MASK_RATIO,
    MaskedImageObjective,
    MaskedSlices,
    mask_unit,
    see_whole_images,
)
from samunet.training.pretraining_events import PretrainingEvents
from samunet.training.prompted import PromptedDataset, PromptedObjective
from samunet.training.trainer import RunSettings, Trainer

FACTS_FILE = "pretraining.json"
RESULT = f"weights{ENDING}"


@dataclass(frozen=True)
class PretrainingRequest:
    """What to pretrain; None leaves a decision to the plan.

    Args:
        datasets: Ids, names or paths.
        supervised: Learn to answer prompts for labelled structures, instead of completing masked images.
        configuration: Planned configuration.
        images: "imagesTr", "imagesTs" and folders.
        cases: Only these cases.
        left_out: Not these cases.
        left_out_fold: Not the cases that this fold validates.
        backbone: Image encoder.
        weights: "auto", "none", a path, or KIND:PATH.
        device: "auto", "cpu", "cuda", ...
        epochs: Epochs.
        iterations: Optimizer steps per epoch.
        minutes: Time limit; the schedule runs on elapsed time.
        processor_clock: Measure the minutes on the processor's clock.
        learning_rate: Peak learning rate.
        batch_size: Slices per optimizer step.
        seed: Of initialisation, data and masks (12345).
        name: Of the run's folder.
        num_workers: Loader processes.
        num_processes: Processes that preprocess images which are not yet.
        resume: Continue the latest checkpoint.
        overwrite: Replace an existing run.
    """

    datasets: tuple[str, ...]
    supervised: bool = False
    configuration: str | None = None
    images: tuple[str, ...] = (TRAINING,)
    cases: tuple[str, ...] | None = None
    left_out: tuple[str, ...] = ()
    left_out_fold: str | None = None
    backbone: str | None = None
    weights: str = "auto"
    device: str = "auto"
    epochs: int | None = None
    iterations: int | None = None
    minutes: float | None = None
    processor_clock: bool = False
    learning_rate: float | None = None
    batch_size: int | None = None
    seed: int | None = None
    name: str | None = None
    num_workers: int | None = None
    num_processes: int = 1
    resume: bool = False
    overwrite: bool = False

    @property
    def objective(self) -> str:
        """As the result records it."""
        return "supervised" if self.supervised else "masked_images"


@dataclass(frozen=True)
class PretrainingResult:
    """The file and what it is."""

    file: Path
    about: Pretrained


def pretrain(request: PretrainingRequest, workspace: Workspace, *, reporter: Reporter) -> PretrainingResult:
    """Pretrain, and write weights in segment-anything's layout that ``samunet_train --weights`` takes.

    Raises:
        UsageError: If the run exists already, is continued with other settings, or names what does not exist.
        StoreError: If a dataset is not preprocessed with its plan.
        WeightsError: If the weights to continue from are not at hand.
    """
    device = resolve_device(request.device)
    about = pretrained_weights(request.weights)
    backbone = request.backbone or (about.backbone if about else _backbone(request, device))
    datasets = planned_datasets(request, workspace)
    folder = workspace.pretrained_folder(
        request.name or "__".join(["+".join(d.plan.dataset for d in datasets), request.objective, backbone])
    )
    existing = _existing_files(folder, request)
    begun = _begun(folder, request) if request.resume else None
    if begun is None:
        from_random = request.weights == NONE or (about is not None and about.from_random)
    else:
        backbone, from_random = begun.recipe.backbone, _from_random(begun.base)
    recipes = recipes_of(request, datasets, workspace, device=device, backbone=backbone, from_random=from_random)
    sources = read_sources(request, datasets, recipes, workspace, reporter)
    num_tiles = count_tiles(sources, supervised=request.supervised)
    planned = with_length_for(_shared(recipes[0]), num_tiles)
    if begun is not None:
        recipe = replace(begun.recipe, precision=usable_precision(begun.recipe, device))
        clock = clock_of_run(begun.clock, processor=request.processor_clock, resume=True)
        identity = replace(begun, recipe=_with_length(recipe, request), clock=clock)
    else:
        file = locate_weights(request.weights, get_spec(backbone), reporter=reporter)
        recipe = _with_overrides(planned, request, device)
        identity = _identity(sources, recipe, as_base(file), request, workspace)
    facts = _facts(identity, sources, request)
    earlier = seen_before(identity.base)
    run = _Run(folder, identity, sources, facts, from_random, device, begun, earlier, planned, num_tiles)
    return _execute(run, request, existing, reporter)


@dataclass(frozen=True)
class _Run:
    """What a run is.

    Args:
        folder: Of the run.
        identity: What its checkpoints say.
        sources: What is seen.
        facts: What must not change when it is continued.
        from_random: Whether it began with random weights, at whatever remove.
        device: Resolved.
        begun: What it was when it began, if it is continued.
        earlier: What its weights had seen.
        planned: The recipe before anything was asked for.
        num_tiles: Tiles that are seen.
    """

    folder: Path
    identity: RunIdentity
    sources: Sequence[Source]
    facts: dict[str, Any]
    from_random: bool
    device: str
    begun: RunIdentity | None
    earlier: Earlier
    planned: ResolvedRecipe
    num_tiles: int


def _begun(folder: Path, request: PretrainingRequest) -> RunIdentity:
    """The run that is continued.

    Raises:
        UsageError: If it began with another encoder or other weights than are asked for.
    """
    begun = load_identity(folder, "latest")
    backbone = begun.recipe.backbone
    refuse_others([Setting("--backbone", request.backbone, backbone)], folder)
    refuse_others([weights_setting(request.weights, begun.base, backbone)], folder)
    return begun


def _from_random(base: BaseWeights) -> bool:
    """Whether what a run continued from was random, at whatever remove."""
    file = recorded_weights(base)
    about = None if file is None else read_pretrained(file.path)
    return file is None or (about is not None and about.from_random)


def _backbone(request: PretrainingRequest, device: str) -> str:
    """That of training with the same weights."""
    kind = request.weights.partition(":")[0]
    if request.weights == NONE:
        return peft.backbone("none", device_class(device))[0]
    return "vit_t" if kind == "mobile_sam" else "vit_b"


def _existing_files(folder: Path, request: PretrainingRequest) -> list[Path]:
    existing = [path for path in folder.glob("*") if path.is_file()]
    if request.resume and not checkpoint_file(folder, "latest").is_file():
        raise UsageError("there is no run here to continue", file=folder, todo="leave --c out, or give its --name")
    if existing and not (request.overwrite or request.resume):
        raise UsageError("there is a run here already", file=folder, todo="--c continues it, --overwrite replaces it")
    if request.overwrite and Path(request.weights.rpartition(":")[2]).resolve().parent == folder.resolve():
        raise UsageError("the run would replace the weights that it begins with", file=folder, todo="give it a --name")
    return existing


def _shared(recipe: ResolvedRecipe) -> ResolvedRecipe:
    """The recipe of samples that are in the encoder's pixels already, from whatever dataset."""
    return replace(recipe, tile_vox=recipe.input_size, intensity_map=IntensityMap(kind="identity"))


def _with_overrides(recipe: ResolvedRecipe, request: PretrainingRequest, device: str) -> ResolvedRecipe:
    changes: dict[str, Any] = {"precision": usable_precision(recipe, device)}
    given = {
        "iterations": request.iterations,
        "learning_rate": request.learning_rate,
        "batch_size": request.batch_size,
    }
    changes |= {name: value for name, value in given.items() if value is not None}
    if request.batch_size is not None:
        changes["accumulation_steps"] = split_batch(recipe, request.batch_size, is_fixed=True)[1]
    if request.iterations is not None and request.minutes is None:
        changes["minutes"] = None
    return _with_length(replace(recipe, **changes), request)


def _with_length(recipe: ResolvedRecipe, request: PretrainingRequest) -> ResolvedRecipe:
    if request.epochs is not None and request.minutes is not None:
        raise UsageError("--epochs and --time-limit both give the length: choose one")
    if request.epochs is not None:
        return replace(recipe, epochs=request.epochs, minutes=None)
    return recipe if request.minutes is None else replace(recipe, minutes=request.minutes)


def _identity(
    sources: Sequence[Source],
    recipe: ResolvedRecipe,
    base: BaseWeights,
    request: PretrainingRequest,
    workspace: Workspace,
) -> RunIdentity:
    """What its checkpoints say; plan and fingerprint are those of the first dataset."""
    first = sources[0].planned
    return RunIdentity(
        dataset="+".join(source.planned.plan.dataset for source in sources),
        configuration=first.configuration,
        preset=request.objective,
        fold="all",
        recipe=recipe,
        base=base,
        seed=DEFAULT_SEED if request.seed is None else request.seed,
        patience=None,
        plan=first.plan,
        description=first.dataset.description,
        fingerprint=read_json(workspace.fingerprint_file(first.plan.dataset)),
        provenance=describe(),
        clock=clock_of_run(None, processor=request.processor_clock, resume=False),
    )


def _facts(identity: RunIdentity, sources: Sequence[Source], request: PretrainingRequest) -> dict[str, Any]:
    """What a continued run must have in common with its beginning; what is not given anew counts as the same."""
    recipe = identity.recipe
    return {
        "objective": request.objective,
        "datasets": [source.seen(labels_read=request.supervised).model_dump(mode="json") for source in sources],
        "backbone": recipe.backbone,
        "seed": identity.seed if request.seed is None else request.seed,
        "learning_rate": request.learning_rate or recipe.learning_rate,
        "batch_size": request.batch_size or recipe.batch_size,
        "iterations": request.iterations or recipe.iterations,
    }


def _execute(run: _Run, request: PretrainingRequest, existing: Sequence[Path], reporter: Reporter) -> PretrainingResult:
    """Build, train, write."""
    identity, recipe = run.identity, run.identity.recipe
    if run.begun is not None:
        _refuse_changes(run)
    weights = recorded_weights(identity.base)
    built = _build(recipe, weights, identity.seed, request)
    _announce(run, request, built, reporter)
    model = place(built.model, run.device)
    data, objective = _samples(run, request)
    clock = identity.clock or "wall"
    num_workers = loader_workers(request.num_workers, clock, run.device)
    settings = RunSettings(recipe, run.device, identity.seed, recipe.minutes, None, CLOCKS[clock])
    loader = partial(
        make_loader,
        data,
        batch_size=recipe.batch_size,
        samples_per_epoch=settings.samples_per_epoch,
        num_workers=num_workers,
        pin_memory=run.device != "cpu",
    )
    events = PretrainingEvents(run.folder, identity, samples=data, objective=objective)
    trainer = Trainer(model, settings, objective=objective, make_loader=loader, events=events, reporter=reporter)
    if run.begun is not None:
        resume(run.folder, trainer)
        if is_longer_or_shorter(recipe, run.begun.recipe):
            trainer.prolong()
        events.restart_log(trainer.state.history)
        reporter.info(f"continuing at step {trainer.state.step}, {trainer.state.seconds / 60:.1f} minutes in")
    else:
        for path in existing:
            path.unlink()
        write_json(run.folder / FACTS_FILE, run.facts)
    if run.device == "cpu":
        available_gib, origin = cpu_memory()
        trainer.economise(partial(predicted_gib, recipe, 1), available_gib, origin)
    state = trainer.run()
    if not request.supervised:
        see_whole_images(model.network.image_encoder, iter(loader(0)), device=run.device)
    return _write(run, trainer, request, reporter, loss=state.history[-1]["loss"] if state.history else None)


def _refuse_changes(run: _Run) -> None:
    recorded = read_json(run.folder / FACTS_FILE)
    differing = [name for name in run.facts if recorded.get(name) != run.facts[name]]
    if differing:
        raise UsageError(
            "a run that is continued keeps its settings and images",
            expected="the command that began it, with --c and at most another --epochs or --time-limit",
            found=f"other {', '.join(differing)}",
            file=run.folder / FACTS_FILE,
        )


def _build(recipe: ResolvedRecipe, weights: WeightsFile | None, seed: int, request: PretrainingRequest) -> BuiltModel:
    make = build_prompted_model if request.supervised else build_masked_model
    return make(recipe, weights=weights, seed=seed)


def _samples(run: _Run, request: PretrainingRequest) -> tuple[Slabs, Objective]:
    """Samples of all stores: each dataset as likely as the others, its stores by their cases."""
    identity, sources, weights = run.identity, [], []
    for source in run.sources:
        plan, configuration = source.planned.plan, source.planned.plan.configuration(source.planned.configuration)
        recipe = replace(source.recipe, input_size=identity.recipe.input_size)
        channels = build_channel_input(configuration.channels.value, num_input_channels(plan, configuration))
        for folder, cases in source.stores:
            slices = SliceDataset(
                CaseStore(folder),
                cases,
                plan=plan,
                recipe=recipe,
                context=configuration.context_slices.value,
                seed=identity.seed,
                augment=recipe.augmentation.enabled,
                read_labels=request.supervised,
            )
            encoded: Slabs = EncoderSlices(slices, recipe=recipe, channels=channels)
            if request.supervised:
                prompts = identity.recipe.method.prompts
                encoded = PromptedDataset(encoded, labels=plan.label_spec, prompts=prompts, seed=identity.seed)
            sources.append(encoded)
            weights.append(len(cases) / source.num_cases)
    mixture = Mixture(sources, weights, seed=identity.seed)
    if request.supervised:
        return mixture, PromptedObjective(identity.recipe, device=run.device)
    return MaskedSlices(mixture, seed=identity.seed), MaskedImageObjective(identity.recipe, device=run.device)


def _announce(run: _Run, request: PretrainingRequest, built: BuiltModel, reporter: Reporter) -> None:
    recipe = run.identity.recipe
    limit = f"{recipe.minutes:g} minutes" if recipe.minutes is not None else f"{recipe.epochs} epochs"
    task = "prompts for labelled structures" if request.supervised else "masked images, no label is read"
    reporter.info(
        f"pretraining {recipe.backbone} at {recipe.input_size} px ({task}): {recipe.batch_size} slices a step, "
        f"learning rate {recipe.learning_rate:g}, {limit} on {run.device}"
    )
    for source in run.sources:
        parts = ", ".join(f"{len(cases)} from {folder.name}" for folder, cases in source.stores)
        reporter.info(f"  {source.planned.plan.dataset}: {source.num_cases} cases ({parts})")
    tell_length(recipe, run.planned, run.num_tiles, reporter)
    reporter.info(built.load_report.summary())
    tell_what_is_unknown(run.earlier, reporter)
    whole = [source.planned.plan.dataset for source in run.sources if not source.left_out]
    if request.supervised and whole:
        reporter.warn(
            f"{', '.join(whole)}: labels of every case are read, so that what is trained from these weights cannot be "
            "validated there; --leave-out-fold K keeps a fold's validation cases out"
        )


def _write(
    run: _Run, trainer: Trainer, request: PretrainingRequest, reporter: Reporter, *, loss: float | None
) -> PretrainingResult:
    """The weights as they are now, and what they are."""
    identity, recipe, state = run.identity, run.identity.recipe, trainer.state
    network = trainer.model.network.state_dict()
    tensors = {k: t for k, t in network.items() if request.supervised or k.startswith(ENCODER)}
    masking = None if request.supervised else Masking(ratio=MASK_RATIO, unit_px=mask_unit(recipe.input_size))
    about = Pretrained(
        objective="supervised" if request.supervised else "masked_images",
        kind=_kind(recipe, request),
        backbone=recipe.backbone,
        input_size=recipe.input_size,
        from_random=run.from_random,
        base=identity.base,
        datasets=tuple(source.seen(labels_read=request.supervised) for source in run.sources),
        earlier=run.earlier,
        masking=masking,
        steps=state.step,
        minutes=trainer.elapsed / 60,
        clock=identity.clock,
        batch_size=recipe.batch_size,
        learning_rate=recipe.learning_rate,
        loss=loss,
        seed=identity.seed,
        provenance=identity.provenance,
    )
    file, passes = run.folder / RESULT, state.step * recipe.batch_size / run.num_tiles
    about = write_pretrained(file, tensors, about)
    reporter.info(
        f"pretrained {about.steps} steps ({passes:.2g} passes over the tiles) in {about.minutes:.1f} minutes: {file}\n"
        f"train from it with samunet_train DATASET FOLD --weights {file}"
    )
    return PretrainingResult(file, about)


def _kind(recipe: ResolvedRecipe, request: PretrainingRequest) -> str:
    """Whose recipe the result is trained with: a whole SAM is one of SAM's, an encoder alone is "ssl"."""
    if not request.supervised:
        return KIND
    return next(kind for kind in ("sam", "mobile_sam") if kind in get_spec(recipe.backbone).pretrained)
