"""What no case may have, whether it is measured, preprocessed or predicted: one set of messages."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from samunet.artifacts.dataset import Case
from samunet.core.errors import DataError
from samunet.core.labels import LabelSpec
from samunet.core.volume import Volume
from samunet.imageio import MISMATCH_VOX

_VALUES_SHOWN = 20


def check_case(
    volume: Volume,
    labels: Volume | None,
    *,
    num_channels: int,
    spec: LabelSpec,
    name: str,
    files: Case | None = None,
) -> None:
    """Refuse an image and its reference that nothing can be made of; verification, which finds more, may be left out.

    Args:
        volume: The image.
        labels: The reference; None for prediction.
        num_channels: Channels that the image has to have.
        spec: Label values that are declared.
        name: Of the case, for messages.
        files: Where both were read from, for messages.

    Raises:
        DataError: If the channels or label values do not fit the plan, the grids differ, or a voxel is NaN or infinite.
    """
    image_files: tuple[Path, ...] = () if files is None else tuple(files.images)
    label_file = None if files is None else files.label
    first = image_files[0] if image_files else None
    if volume.num_channels != num_channels:
        raise DataError(
            "the image's channels do not fit dataset.json and the plan",
            case=name,
            file=first,
            expected=f"{num_channels} channel{'s' * (num_channels != 1)}",
            found=f"{volume.num_channels}",
            todo="correct the files of this case, or dataset.json",
        )
    if labels is not None:
        _check_labels(volume, labels, spec, name, label_file)
    for index, channel in enumerate(volume.data):
        if bad := int(channel.size - np.count_nonzero(np.isfinite(channel))):
            raise DataError(
                "the image holds NaN or infinite values",
                case=name,
                file=image_files[index] if len(image_files) == num_channels else first,
                expected="finite intensities",
                found=f"{bad} of {channel.size} voxels",
                todo="restore it from its source, or set these voxels to the image's background",
            )


def _check_labels(volume: Volume, labels: Volume, spec: LabelSpec, name: str, file: Path | None) -> None:
    if labels.geometry.shape != volume.geometry.shape:
        raise DataError(
            "image and label have different shapes",
            case=name,
            file=file,
            expected=f"{volume.geometry.shape} as the image",
            found=f"{labels.geometry.shape} in the label",
            todo="resample the label map to the image's grid with nearest neighbour",
        )
    if not volume.geometry.matches(labels.geometry, tolerance_vox=MISMATCH_VOX):
        raise DataError(
            "image and label lie in different places",
            case=name,
            file=file,
            expected=f"corners within {MISMATCH_VOX} voxel; orientation {''.join(volume.geometry.codes)}",
            found=f"{volume.geometry.corner_distance_vox(labels.geometry):.3g} voxels; orientation "
            f"{''.join(labels.geometry.codes)}",
            todo="mend the label's header or leave the case out",
        )
    if undeclared := spec.undeclared_in(labels.data):
        raise DataError(
            "the label map holds values that dataset.json does not declare",
            case=name,
            file=file,
            expected=", ".join(map(str, spec.values)),
            found=", ".join(map(str, undeclared[:_VALUES_SHOWN])),
            todo="declare them in dataset.json and plan again, or correct the label map",
        )
