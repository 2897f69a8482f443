"""Learning from images without labels: a run labels them itself, and goes on with both kinds.

The averaged weights label the images on the store's grid in a few lessons, each with better weights than the last. At
least half of the samples that follow are drawn from the cases whose labels a person made.

Source: self-training for segmentation (Bai et al. 2017, Semi-supervised learning for network-based cardiac MR image
segmentation); augmented samples from labels made without augmentation as in Noisy Student (Xie et al. 2020).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from samunet.artifacts.store import CaseRecord
from samunet.core.errors import SamunetError
from samunet.core.labels import LabelSpec
from samunet.core.log import Reporter
from samunet.inference.predictor import Predictor
from samunet.preprocessing.planes import occupied_slices
from samunet.preprocessing.store import CaseReader, CaseStore, RelabelledCases, write_labels_of
from samunet.training.data import Sample, SampleKey, SliceDataset
from samunet.training.mixture import Mixture

LESSONS = (0.3, 0.6)
LABELLED_SHARE = 0.5
_ORDER_STREAM = 5
MakeSlices = Callable[[CaseReader, Sequence[str]], SliceDataset]


class SelfTaughtSlices(Dataset[Sample]):
    """Samples of labelled cases and, after the first lesson, of cases that the run has labelled itself.

    Args:
        labelled: Of the cases with labels.
        sources: Case without labels to the store that holds its voxels.
        make: Gives the samples of further cases, as those of the labelled ones are made.
        folder: Where labels that the run makes are kept, lesson by lesson.
        labels: Meaning of the values.
        seed: Of the run.
        reporter: Told what a lesson came to.
    """

    def __init__(
        self,
        labelled: SliceDataset,
        sources: Mapping[str, CaseStore],
        *,
        make: MakeSlices,
        folder: Path,
        labels: LabelSpec,
        seed: int,
        reporter: Reporter,
    ) -> None:
        self._labelled, self._sources, self._make = labelled, sources, make
        self._folder, self._labels, self._seed, self._reporter = folder, labels, seed, reporter
        self._samples: SliceDataset | Mixture = labelled

    @property
    def slab_depth(self) -> int:
        """Slices of a sample."""
        return self._labelled.slab_depth

    def __getitem__(self, key: SampleKey) -> Sample:
        """One sample.

        Args:
            key: (epoch, index within the epoch).
        """
        return self._samples[key]

    def take_up(self, lessons: int) -> None:
        """Draw from what so many lessons labelled, too; of a case that was labelled in several, the last one counts.

        As long as own labels are fewer cases than the labelled ones, all cases are drawn equally often.
        """
        store = self._store(lessons)
        names = store.names()
        self._samples = self._labelled
        if names:
            known = len(self._labelled.records)
            share = max(LABELLED_SHARE, known / (known + len(names)))
            self._samples = Mixture((self._labelled, self._make(store, names)), (share, 1 - share), seed=self._seed)

    def teach(self, predictor: Predictor, lesson: int, *, seconds: float | None, clock: Callable[[], float]) -> None:
        """Label cases, the same first in every lesson; where nothing is found nothing is learnt.

        Args:
            predictor: Of the averaged weights.
            lesson: Its number, from 1.
            seconds: About how long it may take; None: as long as it takes.
            clock: What tells the seconds.
        """
        folder, began, empty, made = self._lesson_folder(lesson), clock(), 0, 0
        shutil.rmtree(folder, ignore_errors=True)
        names = self._in_order()
        for name in names:
            if seconds is not None and clock() - began > seconds:
                break
            try:
                labels, record = self._labels_of(name, predictor)
            except SamunetError as error:
                self._reporter.warn(f"not learnt from: {error}")
                continue
            if not record.label_slices:
                empty += 1
                continue
            try:
                write_labels_of(folder, labels, record)
            except (OSError, RuntimeError) as error:  # blosc2 raises the latter where a disk is full
                self._reporter.warn(f"own labels could not be written to {folder}, the others are not made: {error}")
                break
            made += 1
        nothing = f"; nothing was found in {empty}" if empty else ""
        self._reporter.info(f"labelled {made} of {len(names)} images without labels to learn from{nothing}")
        self.take_up(lesson)

    def _in_order(self) -> list[str]:
        """All cases in an order drawn by the seed."""
        names = sorted(self._sources)
        return [names[place] for place in np.random.default_rng([self._seed, _ORDER_STREAM]).permutation(len(names))]

    def _labels_of(self, name: str, predictor: Predictor) -> tuple[NDArray[np.int16], CaseRecord]:
        """Predicted labels of a case on the store's grid, and its record with the slices that hold them."""
        case = self._sources[name].open(name)
        restored = predictor.predict_preprocessed(case.data[:], case.record.on_store_grid())
        labels: NDArray[np.int16] = restored.labels.astype(np.int16)
        return labels, case.record.model_copy(update=occupied_slices(labels, self._labels)._asdict())

    def _store(self, lessons: int) -> RelabelledCases:
        """What so many lessons have labelled."""
        return RelabelledCases([self._lesson_folder(lesson) for lesson in range(1, lessons + 1)], self._sources)

    def _lesson_folder(self, lesson: int) -> Path:
        return self._folder / f"lesson_{lesson}"
