"""Verification of a raw dataset: everything that is wrong, in one report."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from samunet.artifacts.dataset import Case, RawDataset
from samunet.core.errors import DataError
from samunet.core.geometry import Geometry
from samunet.core.labels import LabelSpec
from samunet.core.log import Reporter, SilentReporter
from samunet.datasets.findings import Finding, Severity, VerificationReport
from samunet.datasets.raw import duplicated_names, other_endings, surplus_channels
from samunet.distributed.casewise import map_cases
from samunet.imageio import MISMATCH_VOX, ROUNDING_VOX, read_labels, read_volume

__all__ = ["Finding", "VerificationReport", "verify_dataset"]

_SPACING_TOLERANCE = 1e-3
_MAX_VALUES_LISTED = 20


@dataclass(frozen=True)
class _Job:
    """A case and what it is held against; picklable."""

    case: Case
    num_channels: int
    labels: LabelSpec


@dataclass(frozen=True)
class _Checked:
    findings: tuple[Finding, ...]
    image_hash: str


def verify_dataset(dataset: RawDataset, *, processes: int = 1, reporter: Reporter | None = None) -> VerificationReport:
    """Read every training case once and report everything that is wrong with the dataset.

    Args:
        dataset: As load_raw_dataset found it.
        processes: Cases checked at the same time.
        reporter: Receives progress.
    """
    channels = len(dataset.description.channels)
    jobs = [_Job(case, channels, dataset.labels) for case in dataset.training]
    findings = _check_folder(dataset)
    hashes: dict[str, list[str]] = {}
    outcomes = map_cases(
        _check_case,
        jobs,
        processes=processes,
        reporter=reporter or SilentReporter(),
        what="verifying",
        name_of=lambda job: job.case.name,
    )
    for outcome in outcomes:
        if outcome.result is None:
            failure = outcome.error or DataError("the case could not be checked")
            findings.append(Finding.from_error(failure, case=outcome.name))
            continue
        findings += outcome.result.findings
        if outcome.result.image_hash:
            hashes.setdefault(outcome.result.image_hash, []).append(outcome.name)
    findings += [
        Finding("warning", "these cases hold the same image", found=", ".join(sorted(names)))
        for names in hashes.values()
        if len(names) > 1
    ]
    return VerificationReport.collect(findings)


def _check_folder(dataset: RawDataset) -> list[Finding]:
    """What is wrong with the dataset as a whole."""
    findings = duplicated_names(dataset.training)
    declared = dataset.description.numTraining
    if not dataset.training:
        expected = f"imagesTr/CASE_0000{dataset.description.file_ending}"
        findings.append(Finding("error", "no training case was found", file=dataset.folder, expected=expected))
    elif declared is not None and declared != len(dataset.training):
        findings.append(
            Finding(
                "warning",
                "numTraining does not agree with the cases found",
                file=dataset.folder / "dataset.json",
                expected=str(declared),
                found=str(len(dataset.training)),
            )
        )
    if dataset.description.dataset is None:
        findings += other_endings(dataset.folder / "imagesTr", dataset.description.file_ending)
    return findings + _labels_without_image(dataset)


def _labels_without_image(dataset: RawDataset) -> list[Finding]:
    folder = dataset.folder / "labelsTr"
    if dataset.description.dataset is not None or not folder.is_dir():
        return []
    used = {case.label for case in dataset.training}
    ending = dataset.description.file_ending
    loose = sorted(f for f in folder.iterdir() if f.name.endswith(ending) and f.name[0] != "." and f not in used)
    return [Finding("warning", "a label map without an image", file=file) for file in loose]


def _check_case(job: _Job) -> _Checked:
    """Check one case: its channels, then its label map against the first channel's grid."""
    case = job.case
    findings = surplus_channels([case], job.num_channels)
    digest = hashlib.blake2b(digest_size=16)
    grid: Geometry | None = None
    channels_found = 0
    for index, file in enumerate(case.images):
        if not file.is_file():
            findings.append(_missing(f"channel {index} is missing", case, file))
            continue
        try:
            volume = read_volume([file], case=case.name)
        except DataError as error:
            findings.append(Finding.from_error(error, case=case.name, file=file))
            continue
        channels_found += volume.num_channels
        digest.update(repr(volume.data.shape).encode() + np.ascontiguousarray(volume.data).data)
        findings += _check_values(volume.data, case, file)
        findings += [
            Finding("warning", note, case.name, file) for note in (volume.header.notes if volume.header else ())
        ]
        findings += [] if grid is None else _compare_grids(grid, volume.geometry, case, file, f"channel {index}")
        grid = grid or volume.geometry
    intact = not any(finding.severity == "error" for finding in findings)
    if intact and channels_found != job.num_channels:
        expected = f"{job.num_channels} channels, as dataset.json declares"
        problem = "the number of channels is wrong"
        findings.append(Finding("error", problem, case.name, case.images[0], expected, str(channels_found)))
    findings += _check_label(job, grid)
    return _Checked(tuple(findings), digest.hexdigest() if intact else "")


def _check_label(job: _Job, grid: Geometry | None) -> list[Finding]:
    case = job.case
    if case.label is None or not case.label.is_file():
        return [_missing("the label map is missing", case, case.label)]
    try:
        volume = read_labels(case.label, case=case.name)
    except DataError as error:
        return [Finding.from_error(error, case=case.name, file=case.label)]
    notes = volume.header.notes if volume.header else ()
    findings = [Finding("warning", f"the label map: {note}", case.name, case.label) for note in notes]
    findings += [] if grid is None else _compare_grids(grid, volume.geometry, case, case.label, "the label map")
    if undeclared := job.labels.undeclared_in(volume.data):
        findings.append(
            Finding(
                "error",
                "label values that dataset.json does not declare",
                case.name,
                case.label,
                _listed(job.labels.values),
                _listed(undeclared),
            )
        )
    elif not job.labels.foreground_mask(volume.data).any():
        findings.append(Finding("warning", "the label map holds no structure", case.name, case.label))
    return findings


def _check_values(data: NDArray[Any], case: Case, file: Path) -> list[Finding]:
    wrong = int(data.size - np.count_nonzero(np.isfinite(data)))
    if not wrong:
        return []
    problem = "the image holds NaN or infinite values"
    return [Finding("error", problem, case.name, file, "finite intensities", f"{wrong} of {data.size} voxels")]


def _compare_grids(first: Geometry, other: Geometry, case: Case, file: Path, what: str) -> list[Finding]:
    """Compare a file's grid with the first channel's: shape, then spacing, then place and direction."""
    if first.shape != other.shape:
        problem = f"{what} has another shape than the image"
        return [Finding("error", problem, case.name, file, str(first.shape), str(other.shape))]
    gap = first.corner_distance_vox(other)
    if gap <= ROUNDING_VOX:
        return []
    severity: Severity = "error" if gap > MISMATCH_VOX else "warning"
    if not np.allclose(first.spacing, other.spacing, rtol=_SPACING_TOLERANCE):
        problem = f"{what} has another spacing than the image"
        return [Finding(severity, problem, case.name, file, _millimetres(first.spacing), _millimetres(other.spacing))]
    problem = f"{what} lies elsewhere than the image (origin or direction)"
    expected = f"corners within {MISMATCH_VOX} voxel; orientation {''.join(first.codes)}"
    return [
        Finding(severity, problem, case.name, file, expected, f"{gap:.3g} voxels; orientation {''.join(other.codes)}")
    ]


def _missing(problem: str, case: Case, file: Path | None) -> Finding:
    return Finding("error", problem, case.name, file, None if file is None else file.name, "no such file")


def _listed(values: Iterable[int]) -> str:
    texts = [str(value) for value in values]
    rest = len(texts) - _MAX_VALUES_LISTED
    return ", ".join(texts[:_MAX_VALUES_LISTED]) + (f" and {rest} more" if rest > 0 else "")


def _millimetres(spacing: Iterable[float]) -> str:
    return " x ".join(f"{value:.6g}" for value in spacing) + " mm"
