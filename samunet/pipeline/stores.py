"""The preprocessed voxels of a plan: found by hash, and never used after what they were made from has changed."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from samunet.artifacts.dataset import Case, RawDataset
from samunet.artifacts.plan import Decided, Plan
from samunet.artifacts.workspace import Workspace
from samunet.core.errors import ConfigError, StoreError
from samunet.core.files import read_json, write_json
from samunet.planners.fingerprint import inputs_hash
from samunet.preprocessing.runner import source_hash
from samunet.preprocessing.store import STORE_FILE, CaseStore

INPUTS_FILE = "inputs.json"
_MOST_NAMED = 5
Identities = Mapping[str, str]


def open_store(
    plan: Plan, configuration: str, dataset: RawDataset, workspace: Workspace, *, cases: Collection[str]
) -> CaseStore:
    """The store of a configuration as the plan is now, with all these cases as they are now.

    Args:
        plan: The plan.
        configuration: Of the plan.
        dataset: The raw dataset.
        workspace: Where the stores are.
        cases: Names of the cases that will be read.

    Raises:
        StoreError: If the plan, dataset.json or images were changed after preprocessing, or cases are missing.
    """
    todo = f"samunet_plan_and_preprocess -d {plan.dataset} -c {configuration}"
    key = plan.store_key(configuration)
    folder = workspace.store_folder(plan.dataset, key)
    if not (folder / STORE_FILE).is_file():
        others = sorted(file.parent.name for file in folder.parent.glob(f"*/{STORE_FILE}"))
        raise StoreError(
            f"configuration {configuration} is not preprocessed as the plan is now",
            file=folder.parent,
            expected=f"{key}, named by a hash of axes, spacing, normalization and labels",
            found=f"{', '.join(others)}, made with other values" if others else "no store",
            todo=todo,
        )
    if plan.labels != dataset.description.labels:
        raise StoreError(
            "the labels of dataset.json are not those that were planned for",
            file=dataset.folder / "dataset.json",
            expected=str(plan.labels),
            found=str(dataset.description.labels),
            todo=todo,
        )
    store = CaseStore(folder, spec=plan.store_spec(configuration))
    _refuse("the store lacks cases of this fold", sorted(set(cases) - set(store.names())), store, todo)
    changed = _changed(store, dataset, cases)
    _refuse("images or labels have changed since preprocessing", changed, store, todo)
    return store


def check_planned_around(plan: Plan, configuration: str) -> None:
    """Refuse a plan in which what recipes rest on was edited, but nothing is planned around it yet.

    Raises:
        ConfigError: If frame, spacing or normalization are the user's and no rule was asked since.
    """
    chosen = plan.configuration(configuration)
    decided: dict[str, Decided[Any] | None] = {
        "frame": plan.frame,
        "target_spacing": plan.target_spacing,
        "normalization": plan.normalization,
        f"{configuration}.spacing": chosen.spacing,
        f"{configuration}.normalization": chosen.normalization,
    }
    pending = [name for name, entry in decided.items() if entry is not None and entry.by_user and entry.by_rule is None]
    if pending:
        raise ConfigError(
            "plans.json was edited and the rest is not planned around it yet",
            expected="a plan that was made again since",
            found=f"edits of {', '.join(pending)}",
            todo=f"samunet_plan_and_preprocess -d {plan.dataset} -c {configuration}",
        )


def identities(cases: Iterable[Case]) -> dict[str, str]:
    """Names, sizes and times of each case's files, hashed: what is cheap to compare before anything is read."""
    return {case.name: inputs_hash([case]) for case in cases}


def record_inputs(folder: Path, before: Identities, content: Identities) -> None:
    """Write beside a store what the files of its cases looked like when these voxels were made from them.

    Args:
        folder: The store.
        before: Identity by case, taken before its files were read.
        content: Hash of the files' content by case, of those only whose preprocessing succeeded.
    """
    write_json(folder / INPUTS_FILE, {name: [before[name], content[name]] for name in sorted(content)})


def _changed(store: CaseStore, dataset: RawDataset, cases: Collection[str]) -> list[str]:
    """Cases whose files are not what they were; their content is read only where sizes or times have changed."""
    file = store.folder / INPUTS_FILE
    known = read_json(file) if file.is_file() else {}
    changed: list[str] = []
    for case in dataset.training:
        if case.name not in cases:
            continue
        made_from = store.record(case.name).source_sha256
        if known.get(case.name) == [inputs_hash([case]), made_from] or made_from == "":
            continue
        try:
            now = source_hash(case)
        except OSError:  # a file is gone
            now = None
        if now != made_from:
            changed.append(case.name)
    return changed


def _refuse(problem: str, names: list[str], store: CaseStore, todo: str) -> None:
    if names:
        more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
        raise StoreError(problem, file=store.folder, found=", ".join(names[:_MOST_NAMED]) + more, todo=todo)
