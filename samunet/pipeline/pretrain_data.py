"""What a pretraining run sees: which images of which datasets, brought into stores by their plans."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from samunet.artifacts.dataset import Case, RawDataset
from samunet.artifacts.fingerprint import Fingerprint
from samunet.artifacts.plan import Plan, ResolvedRecipe, load_plan
from samunet.artifacts.pretraining import UNLABELLED, SeenDataset
from samunet.artifacts.workspace import Workspace
from samunet.core.config import load_schema
from samunet.core.errors import UsageError
from samunet.core.files import sha256_json
from samunet.core.log import Reporter
from samunet.datasets.raw import list_cases, load_raw_dataset
from samunet.datasets.splits import cases_of_fold, load_or_make_splits
from samunet.models.device import device_class
from samunet.pipeline.stores import check_planned_around, open_store
from samunet.planners.pretraining import pretraining_recipe
from samunet.preprocessing.runner import preprocess_dataset

TRAINING, TEST = "imagesTr", "imagesTs"
_NAMES_SHOWN = 5


class DataRequest(Protocol):
    """What of a request says which images are meant; fields as in PretrainingRequest."""

    @property
    def datasets(self) -> Sequence[str]: ...  # noqa: D102

    @property
    def supervised(self) -> bool: ...  # noqa: D102

    @property
    def configuration(self) -> str | None: ...  # noqa: D102

    @property
    def images(self) -> Sequence[str]: ...  # noqa: D102

    @property
    def cases(self) -> Sequence[str] | None: ...  # noqa: D102

    @property
    def left_out(self) -> Sequence[str]: ...  # noqa: D102

    @property
    def left_out_fold(self) -> str | None: ...  # noqa: D102

    @property
    def num_processes(self) -> int: ...  # noqa: D102


@dataclass(frozen=True)
class Planned:
    """A dataset and how its volumes become slices."""

    dataset: RawDataset
    plan: Plan
    configuration: str


@dataclass(frozen=True)
class Source:
    """What is seen of a dataset.

    Args:
        planned: The dataset.
        recipe: Its intensities and tile; the input side is the run's.
        stores: Store folder and the cases read from it.
        left_out: Cases that are not, in whatever folder.
    """

    planned: Planned
    recipe: ResolvedRecipe
    stores: tuple[tuple[Path, tuple[str, ...]], ...]
    left_out: tuple[str, ...]

    @property
    def num_cases(self) -> int:
        """Cases of all stores."""
        return sum(len(cases) for _, cases in self.stores)

    def seen(self, *, labels_read: bool) -> SeenDataset:
        """As the result records it."""
        images: dict[str, tuple[str, ...]] = {}
        for folder, cases in self.stores:  # two ways to name a folder come to one store
            images[folder.name] = tuple(dict.fromkeys((*images.get(folder.name, ()), *cases)))
        return SeenDataset(
            name=self.planned.plan.dataset,
            configuration=self.planned.configuration,
            images=images,
            left_out=self.left_out,
            labels_read=labels_read,
            intensity_map=self.recipe.intensity_map.model_dump(mode="json"),
            tile_vox=self.recipe.tile_vox,
        )


def planned_datasets(request: DataRequest, workspace: Workspace) -> list[Planned]:
    """The datasets asked for, with their plans.

    Raises:
        UsageError: If one has no plan, or folders of images are given for several.
        ConfigError: If a plan is not valid or lacks the configuration.
    """
    folders = [name for name in request.images if name not in (TRAINING, TEST)]
    if request.supervised and tuple(request.images) != (TRAINING,):
        raise UsageError("--supervised reads labels, which only imagesTr has", found=" ".join(request.images))
    if folders and len(request.datasets) > 1:
        raise UsageError(
            "a folder of images goes through the plan of one dataset",
            expected="one -d",
            found=f"{len(request.datasets)} datasets and {', '.join(folders)}",
        )
    made = []
    for identifier in request.datasets:
        name = workspace.dataset_name(identifier)
        file = workspace.plan_file(name)
        if not file.is_file():
            raise UsageError("this dataset has no plan", file=file, todo=f"samunet_plan_and_preprocess -d {name}")
        plan = load_plan(file)
        configuration = request.configuration or plan.recommended.value
        check_planned_around(plan, configuration)
        made.append(Planned(load_raw_dataset(workspace.raw_folder(identifier)), plan, configuration))
    names = [each.plan.dataset for each in made]
    if len(set(names)) < len(names):
        raise UsageError("a dataset is named twice", found=", ".join(names))
    return made


def recipes_of(
    request: DataRequest,
    datasets: Sequence[Planned],
    workspace: Workspace,
    *,
    device: str,
    backbone: str,
    from_random: bool,
) -> list[ResolvedRecipe]:
    """A recipe per dataset, all at the side of the one that needs the largest, which decides batch and schedule too.

    Returns:
        In the order of the datasets; they differ in tile, intensities and augmentation.
    """
    made = [
        pretraining_recipe(
            each.plan,
            load_schema(Fingerprint, workspace.fingerprint_file(each.plan.dataset)),
            configuration=each.configuration,
            device=device_class(device),
            backbone=backbone,
            supervised=request.supervised,
            from_random=from_random,
        )
        for each in datasets
    ]
    largest = max(made, key=lambda recipe: recipe.input_size)
    return [
        replace(
            largest,
            tile_vox=recipe.tile_vox,
            intensity_map=recipe.intensity_map,
            augmentation=recipe.augmentation,
            foreground_fraction=recipe.foreground_fraction,
        )
        for recipe in made
    ]


def read_sources(
    request: DataRequest,
    datasets: Sequence[Planned],
    recipes: Sequence[ResolvedRecipe],
    workspace: Workspace,
    reporter: Reporter,
) -> list[Source]:
    """The images asked for, preprocessed where they are not yet.

    Raises:
        UsageError: If a case that is named does not exist, or none is left.
        StoreError: If imagesTr is not preprocessed with the plan as it is now.
    """
    sources = []
    known: set[str] = set()
    for planned, recipe in zip(datasets, recipes, strict=True):
        left_out = _left_out(request, planned, workspace)
        # the same files may be known by other names elsewhere
        hidden = {path.resolve() for case in planned.dataset.training if case.name in left_out for path in case.images}
        stores = []
        for origin in request.images:
            cases = _cases(origin, planned, request, reporter)
            known |= {case.name for case in cases}
            wanted = [case for case in cases if _is_wanted(case, request, left_out, hidden)]
            if len(wanted) < len(cases):
                reporter.info(f"{origin}: {len(cases) - len(wanted)} of {len(cases)} images are left out")
            stores += _stores(origin, planned, wanted, request, workspace, reporter)
        if not stores:
            raise UsageError(
                "no image is left to learn from",
                expected="images that are neither left out nor validated on",
                found=f"{' '.join(request.images)} of {planned.plan.dataset}",
                todo="name others: imagesTs, or a folder",
            )
        sources.append(Source(planned, recipe, tuple(stores), left_out))
    elsewhere = {case.name for planned in datasets for case in planned.dataset.training}
    unknown = sorted({*(request.cases or ())} - known | {*request.left_out} - known - elsewhere)
    if unknown:
        raise UsageError("there are no such cases", found=", ".join(unknown[:_NAMES_SHOWN]))
    return sources


def _is_wanted(case: Case, request: DataRequest, left_out: Sequence[str], hidden: Collection[Path]) -> bool:
    named = request.cases is None or case.name in request.cases
    is_hidden = case.name in left_out or any(path.resolve() in hidden for path in case.images)
    return named and case.name not in request.left_out and not is_hidden


def _left_out(request: DataRequest, planned: Planned, workspace: Workspace) -> tuple[str, ...]:
    """Cases that must not be seen, in whatever folder: named ones of imagesTr and a fold's validation cases.

    With these go the cases of their groups that are in no fold: those without a label, and those of other folders.
    """
    names = [case.name for case in planned.dataset.training if case.name not in planned.plan.left_out]
    chosen = set(names) & set(request.left_out)
    if request.left_out_fold is not None:
        groups = planned.dataset.groups or {}
        splits = load_or_make_splits(workspace.splits_file(planned.plan.dataset), names, planned.dataset.groups)
        validation = cases_of_fold(splits, request.left_out_fold, names).val
        held_out = {groups[name] for name in validation if name in groups}
        labelled = set(names)
        chosen |= {*validation, *(name for name in groups if name not in labelled and groups[name] in held_out)}
    if request.cases is not None:
        chosen |= set(names) - set(request.cases)
    return tuple(sorted(chosen))


def _cases(origin: str, planned: Planned, request: DataRequest, reporter: Reporter) -> Sequence[Case]:
    """Cases of imagesTr, imagesTs or a folder."""
    if origin == TRAINING:
        return _training_cases(planned, request, reporter)
    if origin == TEST:
        if not planned.dataset.test:
            reporter.warn(f"{TEST}: there are no images in {planned.dataset.folder / TEST}")
        return planned.dataset.test
    description = planned.dataset.description
    cases, findings = list_cases(Path(origin), num_channels=len(description.channels), ending=description.file_ending)
    for finding in findings:
        reporter.warn(finding.render())
    return cases


def _training_cases(planned: Planned, request: DataRequest, reporter: Reporter) -> Sequence[Case]:
    """Those of imagesTr that are planned, and without labels also those that planning left out for want of one."""
    every = planned.dataset.training
    planned_out = [case for case in every if case.name in planned.plan.left_out]
    bare = [case for case in planned_out if not (request.supervised or (case.label and case.label.is_file()))]
    if bare:
        reporter.info(f"{TRAINING}: {len(bare)} of {len(every)} images have no label and are seen too")
    dropped = {case.name for case in planned_out} - {case.name for case in bare}
    if dropped:
        folder = planned_out[0].images[0].parent
        todo = "" if request.supervised else f"; the folder {folder} in place of {TRAINING} takes all that can be read"
        reporter.info(
            f"{TRAINING}: {len(dropped)} of {len(every)} images are not seen, as planning left them out{todo}"
        )
    return [case for case in every if case.name not in dropped]


def _stores(
    origin: str,
    planned: Planned,
    cases: Sequence[Case],
    request: DataRequest,
    workspace: Workspace,
    reporter: Reporter,
) -> list[tuple[Path, tuple[str, ...]]]:
    """The stores of some cases: the dataset's own for those that it holds, else one of images without labels."""
    plan, found = planned.plan, []
    has_own = origin == TRAINING
    own = tuple(case.name for case in cases if has_own and case.name not in plan.left_out)
    others = [case for case in cases if not has_own or case.name in plan.left_out]
    if own:
        store = open_store(plan, planned.configuration, planned.dataset, workspace, cases=own)
        found.append((store.folder, own))
    if others:
        folder, good = _unlabelled_store(planned, others, request, workspace, reporter)
        if good:
            found.append((folder, good))
        elif not own:
            raise UsageError("no image could be preprocessed", file=others[0].images[0].parent)
    return found


def _unlabelled_store(
    planned: Planned, cases: Sequence[Case], request: DataRequest, workspace: Workspace, reporter: Reporter
) -> tuple[Path, tuple[str, ...]]:
    """The store of a folder of images without labels, made or completed now, and which of the cases are in it."""
    # what was left out in planning was so for its label too, which is of no matter here
    plan, configuration = planned.plan.model_copy(update={"left_out": ()}), planned.configuration
    folder = workspace.store_folder(plan.dataset, unlabelled_key(plan, configuration, cases[0].images[0].parent))
    unlabelled = replace(planned.dataset, training=tuple(replace(case, label=None) for case in cases))
    outcomes = preprocess_dataset(
        unlabelled, plan, configuration, folder, processes=request.num_processes, reporter=reporter
    )
    for outcome in outcomes:
        if outcome.error is not None:
            reporter.warn(f"left out: {outcome.error}")
    return folder, tuple(outcome.name for outcome in outcomes if outcome.error is None)


def images_folder(place: str, dataset: RawDataset) -> Path:
    """Where the images without labels of imagesTr, imagesTs or a folder are."""
    cases = {TRAINING: dataset.training, TEST: dataset.test}.get(place)
    if cases is None:
        return Path(place)
    return cases[0].images[0].parent if cases else dataset.folder / place


def unlabelled_key(plan: Plan, configuration: str, images: Path) -> str:
    """Name of the store of a folder of images without labels: a hash of what its voxels depend on and of the folder."""
    spec: dict[str, Any] = {**plan.store_spec(configuration), "images": str(images.resolve())}
    return f"{UNLABELLED}{sha256_json(spec)[:10]}"
