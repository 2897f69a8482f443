"""Ranks that a probe chose hold for the weights it measured, which are known only when training begins."""

from __future__ import annotations

from dataclasses import replace

from samunet.artifacts.method import Lora
from samunet.artifacts.plan import Plan, ResolvedRecipe
from samunet.artifacts.probe import Probe, load_probes
from samunet.artifacts.workspace import Workspace
from samunet.core.log import Reporter
from samunet.planners.edits import edits_of, root_of
from samunet.planners.ranks import choose_ranks
from samunet.training.checkpointing import RunIdentity

_DIGITS = 10


def with_probed_ranks(identity: RunIdentity, workspace: Workspace, reporter: Reporter) -> RunIdentity:
    """The run, with one rank everywhere where the plan's ranks were probed on other weights of the same kind.

    Args:
        identity: Of the run, with its weights found.
        workspace: Where probe.json is.
        reporter: Told on what the ranks were probed, unless on these weights.
    """
    recipe, plan = identity.recipe, identity.plan
    lora = recipe.method.adapter("lora")
    if lora is None or lora.ranks is None:
        return identity
    probe = _probe_behind(lora, recipe, plan, identity.configuration, workspace)
    if probe is None:
        if plan.probes_sha256 is not None:
            reporter.info("ranks by block: not those of probe.json as it is now, so the probed weights are not known")
        return identity
    if not identity.base.sha256:
        reporter.info(f"ranks by block were probed on weights {probe.weights_sha256[:_DIGITS]}; these have no hash")
        return identity
    if probe.weights_sha256 == identity.base.sha256:
        return identity
    reporter.warn(
        f"ranks by block were probed on other weights ({probe.weights_sha256[:_DIGITS]}, these are "
        f"{identity.base.sha256[:_DIGITS]}): rank {lora.rank} everywhere; samunet_probe measures these"
    )
    return replace(identity, recipe=_uniform(recipe))


def _probe_behind(
    lora: Lora, recipe: ResolvedRecipe, plan: Plan, configuration: str, workspace: Workspace
) -> Probe | None:
    """The probe that ranks were chosen from; None of ranks that are the user's own."""
    probe = load_probes(workspace.probe_file(plan.dataset)).find(
        configuration=root_of(configuration, edits_of(plan).own), weights=recipe.weights_kind, backbone=recipe.backbone
    )
    if probe is None or probe.fingerprint_sha256 != plan.fingerprint_sha256:
        return None
    if choose_ranks(probe, rank=lora.rank, targets=lora.targets)[0] != lora.ranks:
        return None
    return probe


def _uniform(recipe: ResolvedRecipe) -> ResolvedRecipe:
    adapters = tuple(
        adapter.model_copy(update={"ranks": None}) if isinstance(adapter, Lora) else adapter
        for adapter in recipe.method.encoder.adapters
    )
    encoder = recipe.method.encoder.model_copy(update={"adapters": adapters})
    return replace(recipe, method=recipe.method.model_copy(update={"encoder": encoder}))
