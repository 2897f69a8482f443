"""From a raw dataset to its fingerprint, plan, splits and preprocessed stores."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from samunet.artifacts.dataset import RawDataset
from samunet.artifacts.fingerprint import Fingerprint
from samunet.artifacts.plan import Plan, save_plan
from samunet.artifacts.probe import load_probes
from samunet.artifacts.workspace import Workspace
from samunet.core.config import load_schema, save_schema
from samunet.core.errors import ConfigError, DataError, SamunetError
from samunet.core.files import read_json, write_json
from samunet.core.log import Reporter, SilentReporter
from samunet.pipeline.explanation import PAGE, TEXT_PAGE, write_explanation
from samunet.pipeline.replan import discard_plan, plan_again
from samunet.pipeline.stores import identities, record_inputs
from samunet.planners.fingerprint import extract_fingerprint, inputs_hash
from samunet.planners.hardware import check_gpu_memory, detect_budget
from samunet.planners.mirrors import find_mirror_pairs
from samunet.planners.planner import make_plan

if TYPE_CHECKING:
    from samunet.artifacts.store import CaseRecord
    from samunet.distributed.casewise import Outcome

_CACHE = ".fingerprint_cases"


class VerificationError(DataError):
    """Verification found faults, and the user did not choose to go on without these cases."""


@dataclass(frozen=True)
class PlanResult:
    """What planning and preprocessing a dataset made.

    Args:
        folder: Where everything lies.
        fingerprint: The dataset's facts.
        plan: The plan.
        stores: Store folders, one per distinct way of preprocessing.
        failed: Errors by case that preprocessing met.
    """

    folder: Path
    fingerprint: Fingerprint
    plan: Plan
    stores: tuple[Path, ...]
    failed: dict[str, SamunetError]


def plan_and_preprocess(
    dataset_folder: Path,
    workspace: Workspace,
    *,
    processes: int = 1,
    gpu_memory_gib: float | None = None,
    cpu_minutes: float | None = None,
    skip_bad_cases: bool = False,
    overwrite_plan: bool = False,
    verify: bool = True,
    configurations: Sequence[str] | None = None,
    reporter: Reporter | None = None,
) -> PlanResult:
    """Verify, measure, plan, split and preprocess a dataset; what an earlier run finished is kept.

    Args:
        dataset_folder: The raw dataset.
        workspace: Where to write.
        processes: Worker processes.
        gpu_memory_gib: GPU memory to plan for; None to look.
        cpu_minutes: Training minutes on a CPU to plan for; None for the default.
        skip_bad_cases: Go on without the cases that verification rejects or that cannot be measured.
        overwrite_plan: Plan without the edits of an existing plan.
        verify: Whether to verify the dataset first.
        configurations: Which to preprocess; None: all but those with intensities of their own.
        reporter: Receives messages and progress.

    Raises:
        VerificationError: With everything that verification found.
        DataError: If a case cannot be measured and is not to be skipped, or none is left.
        ConfigError: If dataset.json, plans.json or splits_final.json is invalid.
        UsageError: If no GPU has so little memory as is given.
    """
    from samunet.datasets.raw import load_raw_dataset

    reporter = reporter or SilentReporter()
    check_gpu_memory(gpu_memory_gib)
    dataset = load_raw_dataset(dataset_folder)
    folder = workspace.preprocessed_folder(dataset.name)
    fingerprint = _fingerprint(dataset, workspace, processes, skip_bad_cases, verify, reporter)
    if fingerprint.left_out:
        reporter.warn(f"left out of plan and stores: {', '.join(fingerprint.left_out)}")
    plan = _plan(fingerprint, dataset, workspace, gpu_memory_gib, cpu_minutes, overwrite_plan, reporter)
    write_json(workspace.description_file(dataset.name), read_json(dataset_folder / "dataset.json"))
    cases = [case.name for case in dataset.training if case.name not in plan.left_out]
    _split(workspace.splits_file(dataset.name), cases, dataset.groups, reporter)
    chosen = _to_preprocess(plan, configurations)
    stores, failed = _preprocess(dataset, plan, chosen, workspace, processes, reporter)
    return PlanResult(folder, fingerprint, plan, stores, failed)


def _fingerprint(
    dataset: RawDataset,
    workspace: Workspace,
    processes: int,
    skip_bad_cases: bool,
    verify: bool,
    reporter: Reporter,
) -> Fingerprint:
    """The fingerprint on disk if it was made from these very files, else a new one."""
    file = workspace.fingerprint_file(dataset.name)
    inputs = inputs_hash(dataset.training, read_json(dataset.folder / "dataset.json"))
    existing = _readable_fingerprint(file)
    if existing is not None and existing.inputs_sha256 == inputs:
        enough_checks = existing.verified or not verify
        if enough_checks and (skip_bad_cases or not existing.left_out):
            reporter.info(f"{dataset.name}: input files unchanged, fingerprint kept")
            return _with_pairs(existing, dataset, file)
    bad = _verify(dataset, processes, skip_bad_cases, reporter) if verify else ()
    cache = file.parent / _CACHE
    fingerprint = extract_fingerprint(
        dataset, processes=processes, reporter=reporter, skip=bad, skip_unmeasured=skip_bad_cases, cache=cache
    )
    fingerprint = fingerprint.model_copy(update={"inputs_sha256": inputs, "verified": verify})
    save_schema(fingerprint, file)
    shutil.rmtree(cache, ignore_errors=True)
    return fingerprint


def _with_pairs(fingerprint: Fingerprint, dataset: RawDataset, file: Path) -> Fingerprint:
    """A fingerprint with the mirror pairs as they are told from its facts now; older versions knew fewer signs."""
    pairs = find_mirror_pairs(dataset.labels.names, fingerprint.cases)
    if pairs == fingerprint.mirror_pairs:
        return fingerprint
    fingerprint = fingerprint.model_copy(update={"mirror_pairs": pairs})
    save_schema(fingerprint, file)
    return fingerprint


def _readable_fingerprint(file: Path) -> Fingerprint | None:
    """An existing fingerprint, or None if there is none or another version wrote it: it can be measured again."""
    if not file.is_file():
        return None
    try:
        return load_schema(Fingerprint, file)
    except ConfigError:
        return None


def _verify(dataset: RawDataset, processes: int, skip_bad_cases: bool, reporter: Reporter) -> tuple[str, ...]:
    """Names of the cases to leave out.

    Raises:
        VerificationError: If something is wrong and the user did not choose to go on, or no case is to blame.
    """
    from samunet.datasets.integrity import verify_dataset

    report = verify_dataset(dataset, processes=processes, reporter=reporter)
    if report.findings:
        reporter.warn(report.render())
    if not report.errors:
        return ()
    blameless = [finding for finding in report.errors if finding.case is None]
    if blameless or not skip_bad_cases:
        raise VerificationError(
            f"verification found {len(report.errors)} errors (listed above)",
            file=dataset.folder,
            expected="a dataset without errors",
            found=f"errors in {', '.join(report.bad_cases[:5]) or 'the dataset as a whole'}"
            + (f" and {len(report.bad_cases) - 5} more cases" if len(report.bad_cases) > 5 else ""),
            todo="correct them" if blameless else "correct them, or go on without these cases with --skip-bad-cases",
        )
    return report.bad_cases


def _plan(
    fingerprint: Fingerprint,
    dataset: RawDataset,
    workspace: Workspace,
    gpu_memory_gib: float | None,
    cpu_minutes: float | None,
    overwrite: bool,
    reporter: Reporter,
) -> Plan:
    """The plan for these facts: the one on disk if nothing has changed, else a new one around its edits."""
    file = workspace.plan_file(dataset.name)
    probes = load_probes(probe_file := workspace.probe_file(dataset.name))
    for found in probes.probes:
        if fault := found.fault_with(fingerprint):
            what = f"the probe of {found.configuration}, {found.weights}, {found.backbone}"
            reporter.warn(f"{what} is left aside: it {fault} ({probe_file}; samunet_probe measures again)")
    hardware = {"gpu_memory_gib": gpu_memory_gib, "cpu_minutes": cpu_minutes}
    if overwrite and file.is_file():
        discard_plan(file, reporter)
    if not file.is_file():
        plan = make_plan(fingerprint, dataset.description, detect_budget(**hardware), probes=probes)
        save_plan(plan, file, as_planned=True)
    else:
        plan = plan_again(file, fingerprint, dataset.description, probes, hardware, reporter)
    pages = [file.with_name(name) for name in (PAGE, TEXT_PAGE)]
    if any(not page.is_file() or page.stat().st_mtime_ns < file.stat().st_mtime_ns for page in pages):
        write_explanation(plan, fingerprint, probes, file.parent)
    return plan


def _split(file: Path, cases: list[str], groups: Mapping[str, str] | None, reporter: Reporter) -> None:
    """Make the splits, or check those on disk; splits made here for other cases are made anew, edited ones never."""
    from samunet.datasets.splits import load_or_make_splits, make_splits

    if file.is_file():
        content = read_json(file)
        former = _cases_of(content)
        made = [split.model_dump(mode="json") for split in make_splits(former, groups)]
        if former and set(former) != set(cases) and content == made:
            reporter.warn(f"the cases have changed since {file.name} was made: split anew")
            file.unlink()
    load_or_make_splits(file, cases, groups)


def _cases_of(splits: Any) -> list[str]:
    """Every case that splits name; none if they are not of the usual form."""
    try:
        return sorted({case for split in splits for part in ("train", "val") for case in split[part]})
    except (TypeError, KeyError):
        return []


def _to_preprocess(plan: Plan, wanted: Sequence[str] | None) -> list[str]:
    """Configurations to preprocess, the recommended one last, so that it names a store that several share."""
    if wanted is not None:
        for name in wanted:
            plan.configuration(name)
    usual = [name for name, chosen in plan.configurations.items() if chosen.normalization is None]
    return sorted(usual if wanted is None else wanted, key=lambda name: name == plan.recommended.value)


def _preprocess(
    dataset: RawDataset, plan: Plan, chosen: Sequence[str], workspace: Workspace, processes: int, reporter: Reporter
) -> tuple[tuple[Path, ...], dict[str, SamunetError]]:
    """One store per distinct way of preprocessing; configurations that agree share it."""
    from samunet.preprocessing.runner import preprocess_dataset

    configurations = {plan.store_key(name): name for name in chosen}
    stores, failed = [], {}
    for key, name in configurations.items():
        store = workspace.store_folder(dataset.name, key)
        before = identities(dataset.training)
        outcomes: list[Outcome[CaseRecord]] = preprocess_dataset(
            dataset, plan, name, store, processes=processes, reporter=reporter
        )
        failed.update({o.name: o.error for o in outcomes if o.error is not None})
        record_inputs(store, before, {o.name: o.result.source_sha256 for o in outcomes if o.result is not None})
        stores.append(store)
    return tuple(stores), failed
