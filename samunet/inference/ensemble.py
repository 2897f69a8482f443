"""Several kinds of models as one: each sees the image in its own frame, probabilities are averaged on the image's grid.

Probabilities of all members never stand in memory: each member's are written to disk as they come, and averaged and
decided some slices at a time.
"""

from __future__ import annotations

import errno
import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from samunet.artifacts.dataset import Case
from samunet.artifacts.plan import Plan
from samunet.core.errors import CheckpointError, DataError
from samunet.core.labels import LabelSpec
from samunet.core.volume import Volume
from samunet.inference.predictor import Predictor
from samunet.inference.restore import Allocate, Restored
from samunet.inference.signs import MaskSums, join_signs
from samunet.preprocessing.pipeline import PreprocessedCase

Probabilities = NDArray[np.float16]
CHUNK_BYTES = 64 << 20
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def on_disk(file: Path) -> Allocate:
    """Where probabilities are written to a file instead of memory.

    The file's place on the disk is reserved first: a mapped file that finds no place while it is written to ends the
    process without a word.

    Raises:
        DataError: (by what is returned) If the disk has no room for them.
    """

    def allocate(shape: tuple[int, ...]) -> Probabilities:
        needed = 2 * math.prod(shape)
        if shutil.disk_usage(file.parent).free < needed:
            raise _no_room(file, needed)
        mapped: Probabilities = np.lib.format.open_memmap(file, mode="w+", dtype=np.float16, shape=shape)
        if not _reserve(file):
            del mapped
            file.unlink()
            raise _no_room(file, needed)
        return mapped

    return allocate


def _reserve(file: Path) -> bool:
    """Give a sparse file its place on the disk, where the system can; False if there is none."""
    if not hasattr(os, "posix_fallocate"):
        return True
    with file.open("rb+") as stream:
        try:
            os.posix_fallocate(stream.fileno(), 0, file.stat().st_size)
        except OSError as error:
            return error.errno not in NO_ROOM
    return True


def _no_room(file: Path, needed: int) -> DataError:
    free = shutil.disk_usage(file.parent).free
    return DataError(
        "the disk has no room for the probabilities of this case",
        expected=f"{needed / 2**30:.3g} GiB",
        found=f"{free / 2**30:.3g} GiB free",
        file=file.parent,
        todo="make room there; where it is the folder for temporary files, TMPDIR=/big/disk chooses another",
    )


def mean_labels(
    members: Sequence[Probabilities], labels: LabelSpec, *, sums: MaskSums | None = None
) -> NDArray[np.integer[Any]]:
    """Label values of averaged probabilities, some slices at a time.

    Args:
        members: Each (T, Z, Y, X) on the same grid, in memory or on disk.
        labels: How maps become label values.
        sums: Told the averaged probabilities and labels of every slice.

    Returns:
        (Z, Y, X).
    """
    shape = members[0].shape[1:]
    result = np.empty(shape, np.uint8 if max(labels.values) < 256 else np.uint16)
    for part in _chunks(members[0].shape):
        mean = _mean(members, part)
        # a region is painted above one half, which is where a logit is above zero
        result[part] = labels.decide(mean - 0.5 if labels.has_regions else mean)
        if sums is not None:
            for index, plane in enumerate(result[part]):
                sums.add(torch.from_numpy(mean[:, index]), plane)
    return result


def mean_probabilities(members: Sequence[Probabilities]) -> Probabilities:
    """Averaged probabilities (T, Z, Y, X) in memory."""
    result = np.empty(members[0].shape, np.float16)
    for part in _chunks(members[0].shape):
        result[:, part] = _mean(members, part)
    return result


def _mean(members: Sequence[Probabilities], part: slice) -> NDArray[np.float32]:
    total = members[0][:, part].astype(np.float32)
    for member in members[1:]:
        total += member[:, part]
    total /= len(members)
    return total


def _chunks(shape: Sequence[int]) -> list[slice]:
    """Slices of Z that take a bounded number of bytes in float32."""
    tokens, slices, rows, columns = shape
    step = max(1, CHUNK_BYTES // (4 * tokens * rows * columns))
    return [slice(start, min(start + step, slices)) for start in range(0, slices, step)]


class EnsemblePredictor:
    """Segments volumes with models of different configurations or methods, each an average over its own folds.

    One of them at a time is on the device, so that it needs no more memory than the largest.

    Args:
        predictors: One per model folder, for the same channels and labels; at rest.

    Raises:
        CheckpointError: If they are not.
    """

    def __init__(self, predictors: Sequence[Predictor]) -> None:
        self.predictors = list(predictors)
        self.plan = predictors[0].plan
        self.folds = predictors[0].folds
        self.fingerprint = predictors[0].fingerprint
        for other in predictors[1:]:
            check_same_task(self.plan, other.plan)

    def check_prompts(self, *, given: bool) -> None:
        """Refuse prompts, and models that need some."""
        for predictor in self.predictors:
            predictor.check_prompts(given=given)

    def preprocess(self, volume: Volume, *, name: str = "image", files: Case | None = None) -> list[PreprocessedCase]:
        """Bring a volume to every member's store grid; may run ahead in another thread."""
        return [predictor.preprocess(volume, name=name, files=files) for predictor in self.predictors]

    def predict_prepared(
        self, case: Sequence[PreprocessedCase], *, with_probabilities: bool = False, with_signs: bool = False
    ) -> Restored:
        """Segment a preprocessed case; arguments as for :meth:`Predictor.predict_prepared`."""
        labels = self.plan.label_spec
        sums = MaskSums(labels) if with_signs else None
        with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            members: list[Probabilities] = []
            masks: list[Restored] = []
            for index, (predictor, own) in enumerate(zip(self.predictors, case, strict=True)):
                place = on_disk(Path(folder) / f"{index}.npy")
                predictor.wake()
                try:
                    restored = predictor.predict_prepared(
                        own, with_probabilities=True, allocate=place, with_signs=with_signs
                    )
                finally:
                    predictor.rest()
                assert restored.probabilities is not None
                members.append(restored.probabilities)
                if with_signs:
                    masks.append(Restored(restored.labels, signs=restored.signs))
            probabilities = mean_probabilities(members) if with_probabilities else None
            combined = mean_labels(members, labels, sums=sums)
        signs = None if sums is None else join_signs(sums.signs(), [(m.labels, m.signs or {}) for m in masks], labels)
        return Restored(combined, probabilities, signs)

    def predict(self, volume: Volume, *, with_probabilities: bool = False, name: str = "image") -> Restored:
        """Segment a volume; the result lies on its grid. Arguments as for :meth:`Predictor.predict`."""
        return self.predict_prepared(self.preprocess(volume, name=name), with_probabilities=with_probabilities)


def check_same_task(first: Plan, other: Plan) -> None:
    """Refuse to average models of different labels or channels.

    Raises:
        CheckpointError: With what differs.
    """
    facts = [(list(plan.labels.items()), plan.regions_class_order, plan.channel_names) for plan in (first, other)]
    if facts[0] != facts[1]:
        raise CheckpointError(
            "the models were trained for different labels or channels and cannot be averaged",
            expected=str(facts[0]),
            found=str(facts[1]),
            todo="train them from the same plan",
        )
