"""Every path of a run. Flag > environment > ./samunet_workspace."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from samunet.core.errors import UsageError

DEFAULT_WORKSPACE = Path("samunet_workspace")
DESCRIPTION = "dataset.json"


@dataclass(frozen=True)
class Workspace:
    """The three folders of a user.

    Args:
        raw: Datasets in nnU-Net's raw format.
        preprocessed: Fingerprints, plans, stores and splits.
        results: Trained models.
    """

    raw: Path
    preprocessed: Path
    results: Path

    @classmethod
    def locate(
        cls,
        *,
        workspace: Path | None = None,
        raw: Path | None = None,
        preprocessed: Path | None = None,
        results: Path | None = None,
        environment: Mapping[str, str] = os.environ,
    ) -> Workspace:
        """Find the folders from flags, then environment variables, then the default workspace."""

        def pick(flag: Path | None, *variables: str, below: str) -> Path:
            if flag is not None:
                return flag
            if workspace is not None:
                return workspace / below
            for variable in variables:
                if environment.get(variable):
                    return Path(environment[variable])
            return DEFAULT_WORKSPACE / below

        return cls(
            pick(raw, "samunet_raw", "nnUNet_raw", below="raw"),
            pick(preprocessed, "samunet_preprocessed", below="preprocessed"),
            pick(results, "samunet_results", below="results"),
        )

    @property
    def is_default(self) -> bool:
        """Whether any folder lies in the default workspace, which users should be told about."""
        return any(f.parent == DEFAULT_WORKSPACE for f in (self.raw, self.preprocessed, self.results))

    def dataset_name(self, identifier: str) -> str:
        """Full dataset name from an id ("4"), a name or a path, looked up in all three folders.

        Raises:
            UsageError: If nothing or more than one thing fits; the message lists what exists.
        """
        path = Path(identifier)
        if path.name.startswith("Dataset") and "_" in path.name:
            return path.name
        known: set[str] = set()
        for folder in (self.raw, self.preprocessed, self.results):
            if folder.is_dir():
                known |= {p.name for p in folder.iterdir() if p.is_dir() and p.name.startswith("Dataset")}
        fitting = sorted(n for n in known if _fits(n, identifier))
        if len(fitting) == 1:
            return fitting[0]
        raise UsageError(
            "no dataset has this id or name" if not fitting else "more than one dataset has this id",
            expected=", ".join(sorted(known)) or f"DatasetXXX_Name folders below {self.raw}",
            found=identifier if not fitting else ", ".join(fitting),
            todo="give -d the id, the full name or a path, and check --raw or samunet_raw",
        )

    def raw_folder(self, identifier: str, *, must_exist: bool = True) -> Path:
        """Folder of a raw dataset given by id, name or path.

        Args:
            identifier: As the user gives it.
            must_exist: Whether the dataset has to be there.

        Raises:
            UsageError: If it has to be there and is neither in the raw folder nor a path.
        """
        path = Path(identifier)
        if path.is_dir() and (path / DESCRIPTION).is_file():
            return path.resolve()
        folder = self.raw / self.dataset_name(identifier)
        if must_exist and not (folder / DESCRIPTION).is_file():
            raise UsageError(
                "there is no such raw dataset",
                expected=f"{folder / DESCRIPTION}, with imagesTr and labelsTr beside it",
                found="no such file",
                todo="put the dataset there, give its path with -d, or the folder that holds it with --raw",
            )
        return folder

    def preprocessed_folder(self, dataset: str) -> Path:
        """Folder of a dataset's plan and stores."""
        return self.preprocessed / dataset

    def fingerprint_file(self, dataset: str) -> Path:
        """The dataset's fingerprint."""
        return self.preprocessed_folder(dataset) / "dataset_fingerprint.json"

    def plan_file(self, dataset: str) -> Path:
        """The dataset's plan."""
        return self.preprocessed_folder(dataset) / "plans.json"

    def probe_file(self, dataset: str) -> Path:
        """What samunet_probe measured."""
        return self.preprocessed_folder(dataset) / "probe.json"

    def splits_file(self, dataset: str) -> Path:
        """The dataset's cross-validation splits."""
        return self.preprocessed_folder(dataset) / "splits_final.json"

    def subsets_file(self, dataset: str) -> Path:
        """The order in which training cases are taken into subsets."""
        return self.preprocessed_folder(dataset) / "subsets.json"

    def description_file(self, dataset: str) -> Path:
        """The copy of dataset.json that training and prediction read."""
        return self.preprocessed_folder(dataset) / DESCRIPTION

    def store_folder(self, dataset: str, key: str) -> Path:
        """Folder of a store."""
        return self.preprocessed_folder(dataset) / key

    def best_file(self, dataset: str) -> Path:
        """What samunet_find_best_configuration found."""
        return self.results / dataset / "best.json"

    def comparison_folder(self, dataset: str) -> Path:
        """Folder of the cross-validated masks and scores that it compared."""
        return self.results / dataset / "comparison"

    def pretrained_folder(self, name: str) -> Path:
        """Folder of a run of samunet_pretrain."""
        return self.results / "pretrained" / name

    def model_folder(self, dataset: str, configuration: str, preset: str, weights: str) -> Path:
        """Folder of all folds of one configuration, preset and kind of weights."""
        return self.results / dataset / f"{configuration}__{preset}__{weights}"


def fold_folder(model_folder: Path, fold: int | str) -> Path:
    """Folder of one fold below a model folder."""
    return model_folder / f"fold_{fold}"


def _fits(name: str, identifier: str) -> bool:
    number = name.removeprefix("Dataset").split("_", 1)[0]
    same_number = identifier.isdigit() and number.isdigit() and int(number) == int(identifier)
    return same_number or identifier == name.split("_", 1)[-1]
