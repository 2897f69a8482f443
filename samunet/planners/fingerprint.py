"""The facts of a dataset, case by case, in parallel and in bounded memory."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from samunet.artifacts.dataset import Case, RawDataset
from samunet.artifacts.fingerprint import FINGERPRINT_VERSION, CaseFacts, Fingerprint
from samunet.core.config import parse_schema
from samunet.core.errors import DataError, SamunetError
from samunet.core.files import atomic_path, sha256_json
from samunet.core.geometry import Geometry, Triple, code_directions
from samunet.core.labels import LabelSpec
from samunet.core.log import Reporter
from samunet.core.volume import Volume
from samunet.distributed.casewise import Outcome, map_cases
from samunet.planners.intensities import (
    NUM_SAMPLES_DATASET,
    IntensityPool,
    ValueCounts,
    ZScorePool,
    draw_foreground,
)
from samunet.planners.mirrors import find_mirror_pairs
from samunet.planners.structures import effective_resolution, structure_facts
from samunet.preprocessing.checks import check_case
from samunet.preprocessing.cropping import NonzeroCrop, nonzero_crop
from samunet.preprocessing.runner import source_files

_MOST_NAMED = 5


@dataclass(frozen=True, eq=False)
class CaseMeasurement:
    """What is learned from one case.

    Args:
        facts: Goes into the fingerprint as it is.
        drawn: Foreground draws per channel.
        moments: (C, 4) mean and standard deviation over the cropped image, then over its nonzero region.
    """

    facts: CaseFacts
    drawn: list[ValueCounts]
    moments: NDArray[np.float64]


def extract_fingerprint(
    dataset: RawDataset,
    *,
    processes: int,
    reporter: Reporter,
    skip: Collection[str] = (),
    skip_unmeasured: bool = False,
    cache: Path | None = None,
) -> Fingerprint:
    """Measure every training case and merge what was found.

    Args:
        dataset: The raw dataset.
        processes: Number of worker processes.
        reporter: Told about progress, and about the cases that are left out here.
        skip: Cases to leave out, as verification rejected them.
        skip_unmeasured: Leave out the cases that cannot be measured too. The others are then measured again: how many
            voxels are drawn from each depends on how many cases there are, so the result is the one of a dataset
            without the cases left out.
        cache: Folder for finished cases, so that an interrupted run goes on where it stopped; a temporary one if
            None. The caller removes it once the fingerprint is saved.

    Raises:
        DataError: If a case that was not left out cannot be measured, or none remains.
    """
    left_out = set(skip)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) if cache is None else cache
        while True:
            cases = sorted((c for c in dataset.training if c.name not in left_out), key=lambda c: c.name)
            outcomes = _measure(dataset, cases, folder, processes, reporter)
            failed = [o.error for o in outcomes if o.error is not None]
            if not failed:
                files = {o.name: o.result for o in outcomes if o.result is not None}
                return _merge(dataset, files, left_out=tuple(sorted(left_out)))
            if not skip_unmeasured:
                raise _unmeasured(failed, len(cases))
            for error in failed:
                reporter.warn(f"a case could not be measured and is left out: {error}")
            left_out |= {o.name for o in outcomes if o.error is not None}


def _measure(
    dataset: RawDataset, cases: Sequence[Case], folder: Path, processes: int, reporter: Reporter
) -> list[Outcome[Path]]:
    """Measure cases into files of a folder.

    Raises:
        DataError: If there are none.
    """
    if not cases:
        raise DataError(
            "no training case is left to plan from",
            file=dataset.folder,
            found="0 usable cases",
            todo="correct the cases that were left out",
        )
    job = partial(
        _measure_to_file,
        folder=folder,
        labels=dataset.labels,
        num_channels=len(dataset.description.channels),
        num_samples=NUM_SAMPLES_DATASET // len(cases),
    )
    return map_cases(
        job, cases, processes=processes, reporter=reporter, what="fingerprint", name_of=lambda case: case.name
    )


def _unmeasured(failed: Sequence[SamunetError], num_cases: int) -> DataError:
    """One error for all cases that could not be measured, with what the first one says."""
    first, names = failed[0], [f"{error.case}" for error in failed]
    others = ", ".join(names[:_MOST_NAMED]) + (f" and {len(names) - _MOST_NAMED} more" * (len(names) > _MOST_NAMED))
    which = first.problem if len(names) == 1 else f"{others}; the first: {first.problem}"
    way_on = f"leave {'it' if len(names) == 1 else 'them'} out with --skip-bad-cases"
    return DataError(
        f"{len(names)} of {num_cases} cases could not be measured: {which}",
        case=first.case,
        file=first.file,
        expected=first.expected,
        found=first.found,
        todo=f"{first.todo or 'correct the case'}; or {way_on}",
    )


def extract_case_facts(case: Case, *, labels: LabelSpec, num_channels: int, num_samples: int) -> CaseMeasurement:
    """Read and measure one case.

    Args:
        case: Its files.
        labels: What its label values mean.
        num_channels: How many its image has to have.
        num_samples: Foreground voxels to draw per channel.

    Raises:
        DataError: If a file cannot be read, is missing or holds what cannot be measured.
    """
    from samunet.imageio import read_labels, read_volume

    if case.label is None:
        raise DataError(
            "a training case has no label file", case=case.name, todo="add it, or move its image to imagesTs"
        )
    image = read_volume(case.images, case=case.name)
    label_map = read_labels(case.label, case=case.name)
    check_case(image, label_map, num_channels=num_channels, spec=labels, name=case.name, files=case)
    return measure_case(image, label_map, labels=labels, num_samples=num_samples)


def measure_case(image: Volume, label_map: Volume, *, labels: LabelSpec, num_samples: int) -> CaseMeasurement:
    """Measure one case that is in memory.

    Args:
        image: (C, Z, Y, X).
        label_map: (1, Z, Y, X) integers on the same grid.
        labels: What the integers mean.
        num_samples: Foreground voxels to draw per channel.
    """
    crop = nonzero_crop(image.data)
    foreground = labels.foreground_mask(label_map.data[0])
    cropped = image.data[(slice(None), *crop.window)]
    inside = foreground[crop.window]
    size = image.geometry.shape
    kept = cropped.shape[1:]
    facts = CaseFacts(
        shape=size,
        spacing=image.geometry.spacing,
        codes=image.geometry.codes,
        shape_after_crop=(kept[0], kept[1], kept[2]),
        relative_size_after_crop=float(np.prod(kept) / np.prod(size)),
        num_foreground_voxels=int(foreground.sum()),
        num_foreground_slices=_foreground_slices(foreground),
        effective_resolution=effective_resolution(cropped),
        structures=structure_facts(label_map.data[0], labels, image.geometry),
        tilt_deg=tilt_deg(image.geometry),
    )
    drawn = draw_foreground([channel[inside] for channel in cropped], num_samples)
    return CaseMeasurement(facts, drawn, np.array([_moments(channel, crop) for channel in cropped]))


def inputs_hash(cases: Sequence[Case], extra: Any = None) -> str:
    """Hash of names, sizes and modification times of the cases' files: unchanged means nothing need be read again."""
    rows = []
    for case in sorted(cases, key=lambda c: c.name):
        rows.append([case.name, *(_identity(file) for file in source_files(case))])
    return sha256_json([FINGERPRINT_VERSION, rows, extra])


def _identity(file: Path) -> list[Any]:
    if not file.is_file():
        return [file.name]
    status = file.stat()
    return [file.name, status.st_size, status.st_mtime_ns]


def _moments(channel: NDArray[Any], crop: NonzeroCrop) -> list[float]:
    region = channel[crop.mask] if crop.mask.any() else channel
    values = [f(part, dtype=np.float64) for part in (channel, region) for f in (np.mean, np.std)]
    return [float(v) for v in values]


def _foreground_slices(foreground: NDArray[np.bool_]) -> Triple:
    z, y, x = (int(foreground.any(axis=tuple(a for a in range(3) if a != axis)).sum()) for axis in range(3))
    return z, y, x


def _measure_to_file(case: Case, *, folder: Path, labels: LabelSpec, num_channels: int, num_samples: int) -> Path:
    """Measure a case into a file, unless an earlier run did; only the path crosses processes."""
    key = inputs_hash([case], [num_samples, num_channels, labels.to_json()])
    path = folder / f"{case.name}-{key[:12]}.npz"
    if path.is_file():
        return path
    measured = extract_case_facts(case, labels=labels, num_channels=num_channels, num_samples=num_samples)
    arrays: dict[str, Any] = {f"values_{i}": d.values for i, d in enumerate(measured.drawn)}
    arrays |= {f"counts_{i}": d.counts for i, d in enumerate(measured.drawn)}
    with atomic_path(path) as temporary:
        np.savez(temporary, facts=np.array(measured.facts.model_dump_json()), moments=measured.moments, **arrays)
    return path


def _load(path: Path) -> CaseMeasurement:
    import json

    with np.load(path, allow_pickle=False) as content:
        facts = parse_schema(CaseFacts, json.loads(str(content["facts"])), file=path)
        moments = content["moments"]
        drawn = [ValueCounts(content[f"values_{i}"], content[f"counts_{i}"]) for i in range(len(moments))]
    return CaseMeasurement(facts, drawn, moments)


def _merge(dataset: RawDataset, files: dict[str, Path], *, left_out: tuple[str, ...]) -> Fingerprint:
    channels = dataset.description.channels
    pools = [IntensityPool() for _ in channels]
    scores = [ZScorePool() for _ in channels]
    facts: dict[str, CaseFacts] = {}
    for name in sorted(files):
        measured = _load(files[name])
        facts[name] = measured.facts
        for pool, score, drawn, moments in zip(pools, scores, measured.drawn, measured.moments, strict=True):
            pool.add(drawn)
            score.add(drawn, [float(m) for m in moments])
    return Fingerprint(
        dataset=dataset.name,
        channel_names=channels,
        cases=facts,
        foreground_intensities=tuple(pool.statistics() for pool in pools),
        zscore_ranges=tuple(score.range() for score in scores),
        mirror_pairs=find_mirror_pairs(dataset.labels.names, facts),
        left_out=left_out,
    )


def tilt_deg(geometry: Geometry) -> float:
    """Largest angle in degrees between an array axis and the anatomical axis it is named after."""
    along = np.sum(geometry.directions * code_directions(geometry.codes), axis=1)
    return round(float(np.degrees(np.arccos(np.clip(along, -1, 1)).max())), 4)


def majority_orientation(cases: Collection[CaseFacts]) -> tuple[str, str, str]:
    """The orientation codes most cases have; of equally many the first in the alphabet."""
    counts = Counter(case.codes for case in cases)
    return min(counts, key=lambda codes: (-counts[codes], codes))
