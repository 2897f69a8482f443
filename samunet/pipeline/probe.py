"""Plan, store and weights in; the encoder's gradient on the dataset out, which planning reads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import cast

from samunet.artifacts.plan import Plan, WeightsKind
from samunet.artifacts.probe import Probe, load_probes, save_probes
from samunet.artifacts.workspace import Workspace
from samunet.core.errors import UsageError
from samunet.core.log import Reporter
from samunet.inference.loading import num_input_channels
from samunet.models.build import build_model
from samunet.models.device import place, resolve_device
from samunet.models.weights import NONE
from samunet.pipeline.methods import chosen_kind
from samunet.pipeline.train import identify_run
from samunet.pipeline.training_run import RunInputs, TrainingRequest, planned, read_inputs, run_folder
from samunet.preprocessing.store import CaseStore
from samunet.training.checkpointing import RunIdentity
from samunet.training.clock import default_workers
from samunet.training.data import Sample, SliceDataset, make_loader
from samunet.training.objective import SemanticObjective
from samunet.training.probe import Measurement, measure, probe_recipe

DEFAULT_BATCHES = 16


@dataclass(frozen=True)
class ProbeRequest:
    """What to probe; None leaves a decision to the plan.

    Args:
        dataset: Id, name or path.
        fold: Its training cases are used.
        configuration: Planned configuration.
        backbone: Image encoder instead of the planned one.
        weights: "auto", a path, or KIND:PATH.
        device: "auto", "cpu", "cuda", ...
        batches: Batches that the gradient is averaged over.
        minutes: Time limit; None: as long as the batches take.
        seed: Of the fresh head and the batches.
        num_workers: Loader processes.
    """

    dataset: str
    fold: str = "0"
    configuration: str | None = None
    backbone: str | None = None
    weights: str = "auto"
    device: str = "auto"
    batches: int = DEFAULT_BATCHES
    minutes: float | None = None
    seed: int | None = None
    num_workers: int | None = None

    def as_training(self) -> TrainingRequest:
        """The run that the probe stands for: the plan's own method on these weights."""
        return TrainingRequest(
            self.dataset,
            self.fold,
            configuration=self.configuration,
            backbone=self.backbone,
            weights=self.weights,
            device=self.device,
            seed=self.seed,
        )


def probe(request: ProbeRequest, workspace: Workspace, *, reporter: Reporter) -> tuple[Path, Probe]:
    """Measure the encoder's gradient and write it beside the plan; returns the file and what is new in it.

    Raises:
        UsageError: If there is no plan, no such fold, or the weights are random.
        StoreError: If the dataset is not preprocessed with the plan.
        WeightsError: If the weights are not at hand.
    """
    training = request.as_training()
    if chosen_kind(training) == NONE:
        raise UsageError(
            "random weights have no ranks to choose: the whole encoder trains",
            expected="pretrained weights",
            found="--weights none",
        )
    device = resolve_device(request.device)
    plan, configuration = planned(training, workspace)
    identity = identify_run(training, plan, configuration, workspace, device, reporter)
    identity = replace(identity, recipe=probe_recipe(identity.recipe))
    inputs = read_inputs(training, identity, run_folder(training, plan, configuration, workspace), workspace, reporter)
    measured = _measure(identity, inputs, request, device, reporter)
    found = _as_probe(identity, measured)
    file = workspace.probe_file(plan.dataset)
    save_probes(load_probes(file).with_probe(found), file)
    return file, found


def _measure(
    identity: RunIdentity, inputs: RunInputs, request: ProbeRequest, device: str, reporter: Reporter
) -> Measurement:
    recipe, plan = identity.recipe, identity.plan
    configuration, labels = plan.configuration(identity.configuration), plan.label_spec
    built = build_model(
        recipe,
        num_tokens=labels.num_tokens,
        num_input_channels=num_input_channels(plan, configuration),
        channels=configuration.channels.value,
        weights=identity.weights_file(),
        seed=identity.seed,
    )
    reporter.info(built.load_report.summary())
    return measure(
        place(built.model, device),
        _batches(identity, inputs, plan, request.num_workers, device),
        recipe=recipe,
        objective=SemanticObjective(recipe, has_regions=labels.has_regions, device=device),
        device=device,
        num_batches=request.batches,
        minutes=request.minutes,
        reporter=reporter,
    )


def _batches(
    identity: RunIdentity, inputs: RunInputs, plan: Plan, num_workers: int | None, device: str
) -> Iterator[Sample]:
    """Batches as training would see them first."""
    recipe = identity.recipe
    slices = SliceDataset(
        CaseStore(inputs.store),
        inputs.cases.train,
        plan=plan,
        recipe=recipe,
        context=plan.configuration(identity.configuration).context_slices.value,
        seed=identity.seed,
        augment=recipe.augmentation.enabled,
    )
    loader = make_loader(
        slices,
        0,
        batch_size=recipe.batch_size,
        samples_per_epoch=recipe.iterations * recipe.batch_size // recipe.slab_depth,
        num_workers=default_workers(device) if num_workers is None else num_workers,
        pin_memory=device != "cpu",
    )
    return iter(loader)


def _as_probe(identity: RunIdentity, measured: Measurement) -> Probe:
    losses = measured.warmup_loss
    tenth = max(1, len(losses) // 10)
    base = identity.base
    return Probe(
        configuration=identity.configuration,
        weights=cast(WeightsKind, base.kind),
        weights_sha256=base.sha256,
        backbone=identity.recipe.backbone,
        input_size=identity.recipe.input_size,
        seed=identity.seed,
        fold=identity.fold,
        warmup_steps=len(losses),
        warmup_loss=(fmean(losses[:tenth]), fmean(losses[-tenth:])),
        batches=measured.batches,
        batch_size=identity.recipe.batch_size,
        projections=measured.projections,
        dataset=identity.plan.dataset,
        fingerprint_sha256=identity.plan.fingerprint_sha256,
        provenance=identity.provenance,
    )
