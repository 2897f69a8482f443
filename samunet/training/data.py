"""Slabs for training: which one comes next, read from the store, cut, augmented; reproducible to the bit.

A slab is slab_depth consecutive slices of one volume, a single one in 2d. Everything about sample n follows from
(seed, epoch, index): not from workers, order of arrival or interruptions.

Legend: D slices of the slab, C channels, M target maps, H W in-plane store grid, V tile side.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from samunet.artifacts.plan import Plan, ResolvedRecipe
from samunet.artifacts.store import CaseRecord
from samunet.core.errors import ConfigError, SamunetError, TrainingError
from samunet.core.labels import IGNORE_INDEX, LabelSpec
from samunet.core.rng import seed_sample
from samunet.inference.encode import scale_slice
from samunet.inference.sliding import gather_channels
from samunet.inference.tta import mirror_axes
from samunet.preprocessing.planes import planes_of
from samunet.preprocessing.slicing import cut_tile, tile_starts
from samunet.preprocessing.store import CaseReader
from samunet.training.augment import RandomMirror, SliceAugmentation
from samunet.training.stacks import Stack, Stacks, Volumes

_LOST_WORKER = "DataLoader worker (pid"
_SIGNAL_SECONDS = 5.0
SampleKey = tuple[int, int]
Sample = tuple[Tensor, ...]


class Slabs(Protocol):
    """Anything that gives samples of slabs by (epoch, index)."""

    @property
    def slab_depth(self) -> int:
        """Slices of a sample."""

    def __getitem__(self, key: SampleKey) -> Sample:
        """Tensors whose first axis is the slab's; the last target maps."""


@dataclass(frozen=True)
class SliceChoice:
    """A slice to train on: case, slice index, and the structure it was chosen for (None: any slice)."""

    case: str
    index: int
    structure: str | None


def choose_slice(
    stacks: Mapping[str, Stack], foreground_fraction: float, generator: np.random.Generator
) -> SliceChoice:
    """Draw a case, then a slice of it; a given fraction of draws is forced onto a structure of the case.

    Args:
        stacks: Training cases by name; each has at least one valid slice.
        foreground_fraction: Fraction of draws for which a structure present in the case is drawn first.
        generator: Randomness of this sample.
    """
    names = sorted(stacks)
    case = names[int(generator.integers(len(names)))]
    stack = stacks[case]
    present = sorted(name for name, slices in stack.label_slices.items() if slices)
    if present and generator.random() < foreground_fraction:
        structure = present[int(generator.integers(len(present)))]
        slices = stack.label_slices[structure]
        return SliceChoice(case, slices[int(generator.integers(len(slices)))], structure)
    return SliceChoice(case, stack.valid_slices[int(generator.integers(len(stack.valid_slices)))], None)


def slab_places(index: int, num_slices: int, depth: int, generator: np.random.Generator) -> NDArray[np.int64]:
    """Draw where a slab lies that holds a given slice: inside the volume, or over all of it where that is shorter.

    Args:
        index: Slice that the slab must hold.
        num_slices: Slices of the volume.
        depth: Slices of the slab.
        generator: Randomness of this sample; not touched for a single slice.

    Returns:
        (depth,) consecutive slices; those below 0 or from num_slices on are missing.
    """
    if depth == 1:
        return np.array([index])
    if num_slices < depth:
        low, high = num_slices - depth, 0
    else:
        low, high = max(0, index - depth + 1), min(index, num_slices - depth)
    return int(generator.integers(low, high + 1)) + np.arange(depth)


class SliceDataset(Dataset[Sample]):
    """Augmented tiles of training slabs, addressed by (epoch, index).

    Args:
        store: Gives the cases.
        cases: Training cases.
        plan: Labels and mirror axes.
        recipe: Tile, slab depth, foreground fraction, rotation and scaling.
        context: Neighbouring slices on each side of every slice that become channels.
        seed: Seed of the run.
        augment: Whether to augment.
        read_labels: Whether there are labels to read; without them every slice counts, and targets are background.

    Attributes:
        volumes: What is read.
    """

    def __init__(
        self,
        store: CaseReader,
        cases: Sequence[str],
        *,
        plan: Plan,
        recipe: ResolvedRecipe,
        context: int,
        seed: int,
        augment: bool = True,
        read_labels: bool = True,
    ) -> None:
        self._store = store
        self._read_labels = read_labels
        self._records = {name: record for name in cases if (record := self._record(name)).valid_slices}
        self._labels: LabelSpec = plan.label_spec
        self.volumes = Volumes(self._store, with_labels=read_labels)
        self._mirror = plan.mirror_axes.value
        self._recipe, self._context, self._seed = recipe, context, seed
        self._stacks = self._in_planes(plan)
        self._separate = len(plan.channel_names) > 1
        self._augmentation = (
            SliceAugmentation(
                tile=recipe.tile_vox,
                separate_channels=self._separate,
                rotation_deg=recipe.augmentation.rotation_deg,
                scale=recipe.augmentation.scale,
                frequency=recipe.augmentation.frequency,
            )
            if augment
            else None
        )

    @property
    def recipe(self) -> ResolvedRecipe:
        """Of the run."""
        return self._recipe

    @property
    def records(self) -> Mapping[str, CaseRecord]:
        """Cases that have something to train on."""
        return self._records

    @property
    def slab_depth(self) -> int:
        """Slices of a sample."""
        return self._recipe.slab_depth

    def __getitem__(self, key: SampleKey) -> Sample:
        """One sample.

        Args:
            key: (epoch, index within the epoch).

        Returns:
            image (D, C, V, V) float32 in stored intensities, or scaled by slice where the intensity map asks for that;
            valid (D, 1, V, V) float32, 0 outside the image; target (D, M, V, V) int16 with IGNORE_INDEX where nothing
            is known. Slices that a short volume lacks repeat its edge in the image and are outside it in the others.
        """
        generator = seed_sample(self._seed, *key)
        plane, choice = self._choose(generator)
        stacks = self._stacks[plane]
        stack = stacks[choice.case]
        places = slab_places(choice.index, stack.num_slices, self._recipe.slab_depth, generator)
        image, labels = self._read(stacks, choice.case, places)
        start = self._tile_start(choice, labels[choice.index - places[0]], generator)
        side = self._recipe.tile_vox
        image = cut_tile(image, start, side, fill=0)
        maps = cut_tile(self._maps(stack, places, labels), start, side, fill=IGNORE_INDEX)
        if self._augmentation is not None:
            image, maps = self._augmentation(image, maps)
            axes = mirror_axes(self._mirror, stack.anatomical_axes)
            image, maps = RandomMirror(axes)(image, maps)
        return _as_sample(image, maps)

    def locate(self, key: SampleKey) -> tuple[str, int]:
        """Case that a sample is drawn for, and which of its slices, counted over all planes."""
        plane, choice = self._choose(seed_sample(self._seed, *key))
        return choice.case, choice.index + self._first(choice.case, plane)

    def num_slices(self, case: str) -> int:
        """Slices of a case in all planes."""
        return self._first(case, len(self._stacks))

    def whole(self, case: str, number: int) -> Sample:
        """One slice in the tile that holds all of it, as it is: image, valid and target as in a sample of depth 1.

        Args:
            case: Its name.
            number: Which of its slices, counted over all planes.
        """
        known = (index for index, stacks in enumerate(self._stacks) if case in stacks)
        plane = max(index for index in known if self._first(case, index) <= number)
        places, stacks = np.array([number - self._first(case, plane)]), self._stacks[plane]
        image, labels = self._read(stacks, case, places)
        side = self._recipe.tile_vox
        rows, columns = (tile_starts(length, side, 0.0)[0] for length in labels.shape[1:])
        maps = cut_tile(self._maps(stacks[case], places, labels), (rows, columns), side, fill=IGNORE_INDEX)
        return _as_sample(cut_tile(image, (rows, columns), side, fill=0), maps)

    def _first(self, case: str, plane: int) -> int:
        """Slices of a case in the planes before one."""
        return sum(stacks[case].num_slices for stacks in self._stacks[:plane] if case in stacks)

    def _in_planes(self, plan: Plan) -> list[Stacks]:
        """The cases in every plane that some of them can be cut in."""
        planes = {name: planes_of(record, plan, self._recipe.planes)[0] for name, record in self._records.items()}
        meant = self._labels if self._read_labels else None
        made = []
        for across in ("slices", "rows", "columns"):
            fit = {name: record for name, record in self._records.items() if across in planes[name]}
            made += [Stacks(self.volumes, fit, across, meant)] if fit else []
        return made

    def _record(self, case: str) -> CaseRecord:
        """How a case was made; where no label is read, without what its labels say."""
        record = self._store.record(case)
        if self._read_labels:
            return record
        every = tuple(range(record.store_shape[0]))
        return record.model_copy(update={"label_slices": {}, "valid_slices": every})

    def _choose(self, generator: np.random.Generator) -> tuple[int, SliceChoice]:
        """Draw a plane where there are several, then a slice of it."""
        plane = int(generator.integers(len(self._stacks))) if len(self._stacks) > 1 else 0
        return plane, choose_slice(self._stacks[plane], self._recipe.foreground_fraction, generator)

    def _read(
        self, stacks: Stacks, case: str, places: NDArray[np.int64]
    ) -> tuple[NDArray[np.float32], NDArray[np.int16]]:
        """Channels (D, C, H, W) and labels (D, H, W) of a slab; missing slices repeat the edge."""
        data, reference = stacks.voxels(case)
        num_slices = stacks[case].num_slices
        inside = np.clip(places, 0, num_slices - 1)
        first, last = int(inside[0]), int(inside[-1]) + 1
        # the window ends where the context or the volume does, so edges repeat only at the volume's
        begin, end = max(0, first - self._context), min(num_slices, last + self._context)
        near = data[:, begin:end]
        slices = (gather_channels(near, int(place) - begin, self._context) for place in inside)
        image = np.stack([scale_slice(channels, self._recipe.intensity_map) for channels in slices])
        if not self._read_labels:
            return image, np.zeros((len(image), *image.shape[-2:]), np.int16)
        return image, reference[first:last][inside - first]

    def _maps(self, stack: Stack, places: NDArray[np.int64], labels: NDArray[np.int16]) -> NDArray[np.int16]:
        """Target maps, and one more that is 0 inside the image: (D, M + 1, H, W)."""
        target = self._labels.encode(labels)
        target = target.swapaxes(0, 1) if self._labels.has_regions else target[:, np.newaxis]
        maps = np.concatenate([target, np.zeros((len(labels), 1, *labels.shape[1:]), np.int16)], axis=1)
        maps[(places < 0) | (places >= stack.num_slices)] = IGNORE_INDEX
        return maps

    def _tile_start(
        self, choice: SliceChoice, labels: NDArray[np.int16], generator: np.random.Generator
    ) -> tuple[int, int]:
        """First row and column of the tile: centred where the slice fits, else over the chosen structure, else random.

        Where voxels may be ignored, random means over any that is not: strokes are few, and a tile without one teaches
        nothing.
        """
        side, centre = self._recipe.tile_vox, None
        wanted = None
        if choice.structure is not None:
            wanted = self._labels.structure_mask(labels, choice.structure)
        elif self._labels.ignore is not None and max(labels.shape) > side:
            wanted = labels != self._labels.ignore
        if wanted is not None and wanted.any():
            rows, columns = np.nonzero(wanted)
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


def _as_sample(image: NDArray[Any], maps: NDArray[np.int16]) -> Sample:
    """Image (D, C, V, V), and maps (D, M + 1, V, V) whose last says what is inside the image."""
    return (
        torch.from_numpy(np.ascontiguousarray(image, dtype=np.float32)),
        torch.from_numpy((maps[:, -1:] != IGNORE_INDEX).astype(np.float32)),
        torch.from_numpy(np.ascontiguousarray(maps[:, :-1])),
    )


class EndlessSampler(Sampler[SampleKey]):
    """(epoch, index) keys in order, from any starting point, without end.

    Args:
        samples_per_epoch: Samples (slabs) in an epoch.
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
    dataset: Slabs, start: int, *, batch_size: int, samples_per_epoch: int, num_workers: int, pin_memory: bool
) -> DataLoader[Sample]:
    """An endless loader of batches (image, valid, target), continuing after ``start`` samples.

    Workers open the store themselves and compute with one thread each. On Linux they are forked: a fresh interpreter
    would first import torch.

    Args:
        dataset: Of slabs.
        start: Samples (slabs) already consumed.
        batch_size: Slices of a batch, which holds batch_size / slab_depth samples.
        samples_per_epoch: Samples (slabs) in an epoch.
        num_workers: Loader processes.
        pin_memory: Whether batches are pinned for a GPU.

    Raises:
        ConfigError: If a batch does not hold a whole number of slabs.
    """
    method = "fork" if sys.platform == "linux" else "spawn"
    return DataLoader(
        cast("Dataset[Sample]", dataset),
        # Of its own: a loader draws a seed when it starts, and a resumed run starts one more than an uninterrupted one.
        generator=torch.Generator(),
        batch_size=slabs_per_batch(batch_size, dataset.slab_depth),
        sampler=EndlessSampler(samples_per_epoch, start),
        num_workers=num_workers,
        pin_memory=pin_memory,
        multiprocessing_context=method if num_workers else None,
        prefetch_factor=4 if num_workers else None,
        worker_init_fn=_quiet_worker if num_workers else None,
    )


def slabs_per_batch(batch_size: int, slab_depth: int) -> int:
    """How many slabs make a batch of so many slices.

    Raises:
        ConfigError: If they do not fill it exactly.
    """
    if batch_size < slab_depth or batch_size % slab_depth:
        below = batch_size // slab_depth * slab_depth
        fitting = f"{below} or {below + slab_depth}" if below else str(slab_depth)
        raise ConfigError(
            "a batch does not hold a whole number of slabs",
            expected=f"a batch size that is a multiple of the slab depth {slab_depth}",
            found=f"batch size {batch_size}",
            todo=f"set batch_size to {fitting}, or change slab_depth in the plan",
        )
    return batch_size // slab_depth


def next_batch(batches: Iterator[Sample]) -> Sample:
    """The next batch; an error of ours in a worker says what it said there, without the worker's traceback."""
    try:
        return next(batches)
    except (EOFError, ConnectionError) as error:
        # A process that ends while it hands over a batch is first noticed by the connection. On the signal of its end
        # torch raises wherever the run is then, so it is awaited here, where that is told from other errors.
        time.sleep(_SIGNAL_SECONDS)
        raise RuntimeError(f"{_LOST_WORKER} unknown) closed its connection: {type(error).__name__}") from None
    except SamunetError as error:
        said = error.problem.rsplit(f"{type(error).__name__}: ", 1)[-1].strip()
        raise type(error)(said) from None


def worker_died(error: BaseException) -> bool:
    """Whether an error says that a loader process was ended from outside; torch raises it wherever the run is then."""
    return isinstance(error, RuntimeError) and _LOST_WORKER in str(error)


def loader_lost(found: str, *, saved_step: int) -> TrainingError:
    """The error of a run whose loader process died, for the user.

    Args:
        found: What torch says.
        saved_step: Of the last checkpoint.
    """
    return TrainingError(
        "the system ended a loader process, most likely because memory ran out",
        found=found.split("\n")[0],
        todo=f"close other programs and go on from step {saved_step} with --c; fewer --workers take less",
    )


def _quiet_worker(_worker: int) -> None:
    torch.set_num_threads(1)
