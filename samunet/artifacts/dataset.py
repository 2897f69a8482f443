"""A raw dataset in nnU-Net's format, as found on disk: the pipeline's first artifact."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from samunet.core.labels import LabelSpec


class DatasetDescription(BaseModel):
    """The content of dataset.json; keys nnU-Net does not define are kept and ignored.

    Args:
        channel_names: Channel index (as text) to name; the name selects the normalization.
        labels: Structure to value, or to a list of values for a region.
        regions_class_order: Painting order of regions.
        file_ending: Ending of images and labels, as ".nii.gz".
        numTraining: Number of training cases; checked, not trusted.
        dataset: Optional explicit lists, case to {"images": [...], "label": ...}.
        overwrite_image_reader_writer: nnU-Net's reader name; accepted and not needed.
    """

    model_config = ConfigDict(extra="allow", frozen=True)

    channel_names: dict[str, str]
    labels: dict[str, int | list[int]]
    regions_class_order: list[int] | None = None
    file_ending: str
    numTraining: int | None = None  # noqa: N815 - nnU-Net's key
    dataset: dict[str, Any] | None = None
    name: str | None = None

    @property
    def label_spec(self) -> LabelSpec:
        """The labels as the pipeline uses them."""
        return LabelSpec.from_dataset_json({"labels": self.labels, "regions_class_order": self.regions_class_order})

    @property
    def channels(self) -> tuple[str, ...]:
        """Channel names in order of their index."""
        return tuple(self.channel_names[key] for key in sorted(self.channel_names, key=int))


@dataclass(frozen=True)
class Case:
    """One case: its image files (one per channel, or one file that holds all) and its label file."""

    name: str
    images: tuple[Path, ...]
    label: Path | None = None


@dataclass(frozen=True)
class RawDataset:
    """A dataset folder.

    Args:
        folder: ``DatasetXXX_Name``.
        description: Its dataset.json.
        training: Cases with labels, sorted by name.
        test: Cases of imagesTs, sorted by name.
        groups: Case to group (patient, volume) for splitting, of images elsewhere too; None when not given.
    """

    folder: Path
    description: DatasetDescription
    training: tuple[Case, ...]
    test: tuple[Case, ...] = ()
    groups: dict[str, str] | None = None

    @property
    def name(self) -> str:
        """Folder name, as in ``Dataset004_Hippocampus``."""
        return self.folder.name

    @property
    def labels(self) -> LabelSpec:
        """The dataset's labels."""
        return self.description.label_spec
