"""Slices for training: which one comes next, read from the store, cut, augmented; reproducible to the bit.

Everything about sample n follows from (seed, epoch, index): not from workers, order of arrival or interruptions.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from samunet.artifacts.plan import Plan, ResolvedRecipe
from samunet.artifacts.store import CaseRecord
from samunet.core.errors import SamunetError
from samunet.core.labels import IGNORE_INDEX, LabelSpec
from samunet.core.rng import seed_sample
from samunet.inference.sliding import gather_channels
from samunet.inference.tta import mirror_axes
from samunet.preprocessing.slicing import cut_tile, tile_starts
from samunet.preprocessing.store import CaseStore, OpenCase
from samunet.training.augment import RandomMirror, SliceAugmentation

SampleKey = tuple[int, int]
Sample = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class SliceChoice:
    """A slice to train on: case, slice index, and the structure it was chosen for (None: any slice)."""

    case: str
    index: int
    structure: str | None


def choose_slice(
    records: Mapping[str, CaseRecord], foreground_fraction: float, generator: np.random.Generator
) -> SliceChoice:
    """Draw a case, then a slice of it; a given fraction of draws is forced onto a structure of the case.

    Args:
        records: Training cases by name; each has at least one valid slice.
        foreground_fraction: Fraction of draws for which a structure present in the case is drawn first.
        generator: Randomness of this sample.
    """
    names = sorted(records)
    case = names[int(generator.integers(len(names)))]
    record = records[case]
    present = sorted(name for name, slices in record.label_slices.items() if slices)
    if present and generator.random() < foreground_fraction:
        structure = present[int(generator.integers(len(present)))]
        slices = record.label_slices[structure]
        return SliceChoice(case, slices[int(generator.integers(len(slices)))], structure)
    return SliceChoice(case, record.valid_slices[int(generator.integers(len(record.valid_slices)))], None)


class SliceDataset(Dataset[Sample]):
    """Augmented tiles of training slices, addressed by (epoch, index).

    Args:
        store_folder: Folder of the store.
        cases: Training cases.
        plan: Labels and mirror axes.
        recipe: Tile and foreground fraction.
        context: Neighbouring slices on each side.
        seed: Seed of the run.
        augment: Whether to augment.
    """

    def __init__(
        self,
        store_folder: Path,
        cases: Sequence[str],
        *,
        plan: Plan,
        recipe: ResolvedRecipe,
        context: int,
        seed: int,
        augment: bool = True,
    ) -> None:
        self._store = CaseStore(store_folder)
        self._records = {name: record for name in cases if (record := self._store.record(name)).valid_slices}
        self._labels: LabelSpec = plan.label_spec
        self._mirror = plan.mirror_axes.value
        self._recipe, self._context, self._seed = recipe, context, seed
        self._separate = len(plan.channel_names) > 1
        self._augmentation = (
            SliceAugmentation(tile=recipe.tile_vox, separate_channels=self._separate, full_rotation=False)
            if augment
            else None
        )
        self._open: dict[str, OpenCase] = {}

    def __getitem__(self, key: SampleKey) -> Sample:
        """One sample.

        Args:
            key: (epoch, index within the epoch).

        Returns:
            image (channels, V, V) float32 in stored intensities; valid (1, V, V) float32, 0 outside the image;
            target (1 or T, V, V) int16 with IGNORE_INDEX where nothing is known.
        """
        generator = seed_sample(self._seed, *key)
        choice = choose_slice(self._records, self._recipe.foreground_fraction, generator)
        image, labels = self._read(choice)
        start = self._tile_start(choice, labels, generator)
        side = self._recipe.tile_vox
        target = self._labels.encode(labels)
        target = target if self._labels.has_regions else target[np.newaxis]
        maps = np.concatenate([target, np.zeros((1, *labels.shape), np.int16)])
        image = cut_tile(image, start, side, fill=0)
        maps = cut_tile(maps, start, side, fill=IGNORE_INDEX)
        if self._augmentation is not None:
            image, maps = self._augmentation(image, maps)
            axes = mirror_axes(self._mirror, self._records[choice.case].anatomical_axes)
            image, maps = RandomMirror(axes)(image, maps)
        valid = (maps[-1:] != IGNORE_INDEX).astype(np.float32)
        return (
            torch.from_numpy(np.ascontiguousarray(image, dtype=np.float32)),
            torch.from_numpy(valid),
            torch.from_numpy(np.ascontiguousarray(maps[:-1])),
        )

    def _read(self, choice: SliceChoice) -> tuple[NDArray[np.float32], NDArray[np.int16]]:
        opened = self._open.get(choice.case)
        if opened is None:
            opened = self._open[choice.case] = self._store.open(choice.case)
        num_slices = opened.record.store_shape[0]
        first, last = max(0, choice.index - self._context), min(num_slices, choice.index + self._context + 1)
        near = opened.data[:, first:last]
        if choice.index - self._context < 0 or choice.index + self._context >= num_slices:
            below, above = self._context - (choice.index - first), self._context - (last - 1 - choice.index)
            near = np.pad(near, ((0, 0), (below, above), (0, 0), (0, 0)), mode="edge")
        return gather_channels(near, self._context, self._context), opened.labels[choice.index]

    def _tile_start(
        self, choice: SliceChoice, labels: NDArray[np.int16], generator: np.random.Generator
    ) -> tuple[int, int]:
        """First row and column of the tile: centred where the slice fits, else random, over the chosen structure."""
        side, centre = self._recipe.tile_vox, None
        if choice.structure is not None:
            rows, columns = np.nonzero(self._labels.structure_mask(labels, choice.structure))
            pick = int(generator.integers(len(rows)))
            centre = (int(rows[pick]), int(columns[pick]))
        starts = []
        for axis, length in enumerate(labels.shape):
            if length <= side:
                starts.append(tile_starts(length, side, 0.0)[0])
            elif centre is None:
                starts.append(int(generator.integers(length - side + 1)))
            else:
                jittered = centre[axis] - side // 2 + int(generator.integers(-side // 4, side // 4 + 1))
                starts.append(min(max(jittered, 0), length - side))
        return starts[0], starts[1]


class EndlessSampler(Sampler[SampleKey]):
    """(epoch, index) keys in order, from any starting point, without end.

    Args:
        samples_per_epoch: Samples in an epoch.
        start: Samples already consumed.
    """

    def __init__(self, samples_per_epoch: int, start: int = 0) -> None:
        self._per_epoch = samples_per_epoch
        self._start = start

    def __iter__(self) -> Iterator[SampleKey]:
        position = self._start
        while True:
            yield position // self._per_epoch, position % self._per_epoch
            position += 1


def make_loader(
    dataset: SliceDataset, start: int, *, batch_size: int, samples_per_epoch: int, num_workers: int, pin_memory: bool
) -> DataLoader[Sample]:
    """An endless loader of batches (image, valid, target), continuing after ``start`` samples.

    Workers open the store themselves and compute with one thread each. On Linux they are forked: a fresh interpreter
    would first import torch.
    """
    method = "fork" if sys.platform == "linux" else "spawn"
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=EndlessSampler(samples_per_epoch, start),
        num_workers=num_workers,
        pin_memory=pin_memory,
        multiprocessing_context=method if num_workers else None,
        prefetch_factor=4 if num_workers else None,
        worker_init_fn=_quiet_worker if num_workers else None,
    )


def next_batch(batches: Iterator[Sample]) -> Sample:
    """The next batch; an error of ours in a worker says what it said there, without the worker's traceback."""
    try:
        return next(batches)
    except SamunetError as error:
        said = error.problem.rsplit(f"{type(error).__name__}: ", 1)[-1].strip()
        raise type(error)(said) from None


def _quiet_worker(_worker: int) -> None:
    torch.set_num_threads(1)
