"""Preprocessing of a whole dataset: in several processes, resumable, one bad case stops none of the others."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from samunet.artifacts.dataset import Case, RawDataset
from samunet.artifacts.plan import Plan
from samunet.artifacts.store import CaseRecord
from samunet.core.config import parse_schema
from samunet.core.files import sha256_file, sha256_json
from samunet.core.log import Reporter
from samunet.distributed.casewise import Outcome, map_cases
from samunet.preprocessing.store import CaseStore, create_store, remove_leftovers, write_case


@dataclass(frozen=True)
class _Job:
    """One case to preprocess; the plan travels as JSON."""

    case: Case
    plan: dict[str, Any]
    configuration: str
    folder: Path


def preprocess_dataset(
    dataset: RawDataset,
    plan: Plan,
    configuration: str,
    folder: Path,
    *,
    processes: int,
    reporter: Reporter,
) -> list[Outcome[CaseRecord]]:
    """Preprocess every training case that the plan does not leave out into a store.

    Cases that are finished and whose source files have not changed are kept as they are.

    Args:
        dataset: The raw dataset.
        plan: Its plan.
        configuration: Name of the configuration to preprocess for.
        folder: The store's folder.
        processes: Number of worker processes.
        reporter: Told about progress.

    Returns:
        One outcome per case, sorted by case as in the dataset.

    Raises:
        StoreError: If the folder holds a store of another plan.
    """
    store = create_store(folder, plan.store_spec(configuration))
    remove_leftovers(folder)
    cases = [case for case in dataset.training if case.name not in plan.left_out]
    finished = _finished_cases(store, cases, processes)
    if finished:
        reporter.info(f"{configuration}: {len(finished)} of {len(cases)} cases are already preprocessed")
    content = plan.model_dump(mode="json")
    jobs = [_Job(case, content, configuration, folder) for case in cases if case.name not in finished]
    outcomes = map_cases(
        _preprocess_one,
        jobs,
        processes=processes,
        reporter=reporter,
        what=f"preprocessing {configuration}",
        name_of=_job_name,
    )
    made = {outcome.name: outcome for outcome in outcomes}
    return [made.get(case.name) or Outcome(case.name, finished[case.name]) for case in cases]


def source_files(case: Case) -> list[Path]:
    """All files that are read for a case, spacing files of pictures included."""
    from samunet.imageio.natural import spacing_file

    labels = [] if case.label is None else [case.label]
    besides = [*map(spacing_file, case.images), *(spacing_file(label, as_labels=True) for label in labels)]
    return [*case.images, *labels, *(beside for beside in besides if beside is not None)]


def source_hash(case: Case) -> str:
    """Hash of the content of all files of a case."""
    return sha256_json([sha256_file(path) for path in source_files(case)])


def _finished_cases(store: CaseStore, cases: list[Case], processes: int) -> dict[str, CaseRecord]:
    """Records of the cases in the store whose files are what they were."""
    stored = set(store.names())
    candidates = [case for case in cases if case.name in stored]

    def record_if_current(case: Case) -> CaseRecord | None:
        record = store.record(case.name)
        try:
            return record if record.source_sha256 == source_hash(case) else None
        except OSError:  # a file is gone: preprocessing the case again reports it
            return None

    with ThreadPoolExecutor(max(1, processes)) as threads:
        records = list(threads.map(record_if_current, candidates))
    return {record.name: record for record in records if record is not None}


def _job_name(job: _Job) -> str:
    return job.case.name


def _preprocess_one(job: _Job) -> CaseRecord:
    from samunet.imageio import read_labels, read_volume
    from samunet.preprocessing.pipeline import preprocess_case

    case = job.case
    source_sha256 = source_hash(case)
    volume = read_volume(case.images, case=case.name)
    labels = None if case.label is None else read_labels(case.label, case=case.name)
    preprocessed = preprocess_case(
        volume,
        labels,
        plan=parse_schema(Plan, job.plan),
        configuration=job.configuration,
        name=case.name,
        files=case,
        source_sha256=source_sha256,
    )
    write_case(job.folder, preprocessed)
    return preprocessed.record
