"""Images without labels that a training run learns from too."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from samunet.artifacts.plan import ResolvedRecipe
from samunet.artifacts.workspace import Workspace
from samunet.core.cores import default_processes
from samunet.core.errors import StoreError, UsageError
from samunet.core.files import sha256_json
from samunet.core.log import Reporter
from samunet.datasets.splits import ALL_CASES
from samunet.pipeline.pretrain_data import TEST, TRAINING, Planned, images_folder, read_sources, unlabelled_key
from samunet.preprocessing.store import CaseStore

FLAG = "--unlabelled"
_NAMES_SHOWN = 5


@dataclass(frozen=True)
class _Images:
    """Which images are meant, in the words of samunet_pretrain."""

    datasets: Sequence[str]
    configuration: str
    images: Sequence[str]
    left_out: Sequence[str]
    left_out_fold: str | None
    cases: Sequence[str] | None = None
    supervised: bool = False
    num_processes: int = 1


def unlabelled_tag(unlabelled: Sequence[str]) -> str:
    """What tells runs that learn from images without labels apart in the results folder; empty for others."""
    if not unlabelled:
        return ""
    places = sorted({name if name in (TRAINING, TEST) else str(Path(name).resolve()) for name in unlabelled})
    return "unlabelled" if places == [TRAINING] else f"unlabelled{sha256_json(places)[:6]}"


def unlabelled_cases(
    unlabelled: Sequence[str],
    others: Sequence[str],
    planned: Planned,
    recipe: ResolvedRecipe,
    fold: str,
    workspace: Workspace,
    reporter: Reporter,
) -> dict[str, CaseStore]:
    """Case to the store that holds its voxels, made now where there is none yet.

    Args:
        unlabelled: "imagesTr", "imagesTs" and folders.
        others: Cases of imagesTr that are not meant: the run has their labels, or validates on them.
        planned: The dataset.
        recipe: Of the run.
        fold: Whose validation cases are left out, under whatever folder.
        workspace: Where the stores are.
        reporter: Told what is left out.

    Raises:
        UsageError: If no image is left.
    """
    if set(unlabelled) == {TRAINING} and {case.name for case in planned.dataset.training} <= set(others):
        raise UsageError(
            f"{FLAG} {TRAINING} finds no image to learn from: the run has the labels of all, or validates on them",
            found=planned.plan.dataset,
            todo=f"learn from fewer labels (--num-cases, --cases), or name other images: {FLAG} {TEST}, {FLAG} FOLDER",
        )
    images = _Images(
        datasets=(planned.plan.dataset,),
        configuration=planned.configuration,
        images=tuple(dict.fromkeys(unlabelled)),
        left_out=tuple(others),
        left_out_fold=None if fold == ALL_CASES else fold,
        num_processes=default_processes(),
    )
    (source,) = read_sources(images, [planned], [recipe], workspace, reporter)
    found = {name: CaseStore(folder) for folder, names in source.stores for name in names}
    if len(found) < source.num_cases:
        reporter.warn(
            f"{source.num_cases - len(found)} images have the name of another and are not learnt from: rename them, or "
            "put all into one folder"
        )
    return found


def stored_cases(
    unlabelled: Sequence[str], recorded: Collection[str], planned: Planned, workspace: Workspace
) -> dict[str, CaseStore]:
    """Of the images that a run which is continued began with, those whose voxels are stored, wherever their files are.

    Args:
        unlabelled: "imagesTr", "imagesTs" and folders.
        recorded: Names of the images.
        planned: The dataset.
        workspace: Where the stores are.
    """
    plan, configuration = planned.plan, planned.configuration
    keys = []
    for place in dict.fromkeys(unlabelled):
        keys += [plan.store_key(configuration)] if place == TRAINING else []
        keys += [unlabelled_key(plan, configuration, images_folder(place, planned.dataset))]
    found: dict[str, CaseStore] = {}
    for folder in (workspace.store_folder(plan.dataset, key) for key in keys):
        try:
            store = CaseStore(folder)
        except StoreError:  # imagesTr of which all, or none, have labels
            continue
        found |= dict.fromkeys(set(store.names()) & set(recorded), store)
    return found


def as_recorded(found: Mapping[str, CaseStore], recorded: Collection[str], reporter: Reporter) -> dict[str, CaseStore]:
    """Of the images that are there now, those that a run which is continued began with; says where some are missing."""
    if missing := sorted(set(recorded) - set(found)):
        reporter.warn(
            f"{len(missing)} images without labels that the run began with are not there any more and are not learnt "
            f"from: {', '.join(missing[:_NAMES_SHOWN])}"
        )
    return {name: store for name, store in found.items() if name in recorded}


def refuse_unlabelled(unlabelled: Sequence[str], recipe: ResolvedRecipe, *, cached: bool) -> None:
    """Refuse images without labels where the run cannot label them, or would not learn from them.

    Raises:
        UsageError: With the reason.
    """
    method = recipe.method
    if not unlabelled:
        return
    if method.promptable:
        reason = "this method segments what prompts point at, and nothing points at structures of these images"
    elif not method.trains_anything:
        reason = "nothing is trained"
    elif cached:
        reason = "embeddings that are computed once are those of the labelled cases"
    else:
        return
    raise UsageError(f"{FLAG} has no effect here: {reason}", found=" ".join(unlabelled), todo=f"leave {FLAG} out")
