"""Training of models that are prompted: one structure per sample, simulated prompts, clicks that correct.

All prompts of a slice mean one mask: the whole structure on that slice, in one piece or several (as MedSAM trains).
Positions are (row, column) in voxels of the tile, boxes (row0, column0, row1, column1) of voxel edges; only
:class:`PromptBatch` holds SAM's (x, y) in encoder pixels.

Legend: B slabs, D slices of a slab, C channels, M target maps, V tile side, N clicks, R prompted slices, S encoder
side, T mask tokens, h = S / 16.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from samunet.artifacts.method import PromptMethod
from samunet.artifacts.plan import ResolvedRecipe
from samunet.core.labels import IGNORE_INDEX, LabelSpec
from samunet.core.rng import derive_seed
from samunet.inference.encode import to_encoder, to_store
from samunet.inference.simulation import (
    ObjectPrompt,
    clicks,
    error_click,
    jittered_box,
    largest_object,
    tight_box,
)
from samunet.inference.sliding import autocast
from samunet.models.decoders.promptable import PADDING, PromptBatch
from samunet.preprocessing.slicing import voxel_to_pixel
from samunet.training.data import SampleKey, Slabs
from samunet.training.losses import region_loss

NO_CLICK = PADDING
_PROMPT_STREAM = 2


class PromptedSample(NamedTuple):
    """A slab, one structure of it, and the first prompt of each slice that shows it.

    Collated, every tensor has a leading B.

    Args:
        image: (D, C, V, V) stored intensities.
        valid: (D, 1, V, V), 1 inside the image.
        target: (D, 1, V, V) int16: 1 on the structure, 0 elsewhere, IGNORE_INDEX where nothing is known and all over
            the slices that do not show the structure, which have no prompt.
        points: (D, N, 2) float32 clicks, (row, column); N is 0 where boxes only are simulated.
        point_labels: (D, N) int64: 1, or NO_CLICK where there is none.
        boxes: (D, 4) float32 boxes, zero where there is none.
        has_box: (D,) bool.
    """

    image: Tensor
    valid: Tensor
    target: Tensor
    points: Tensor
    point_labels: Tensor
    boxes: Tensor
    has_box: Tensor


class PromptableModel(Protocol):
    """What :class:`PromptedObjective` asks of a model."""

    def encode(self, images: Tensor, *, depth: int = 1) -> Tensor:
        """Embeddings (B * D, E, h, h) of encoder inputs (B * D, C, S, S)."""

    def prompted(self, embeddings: Tensor, prompts: PromptBatch) -> tuple[Tensor, Tensor]:
        """Logits (R, T, 4h, 4h) and estimated IoU (R, T)."""


class PromptedDataset(Dataset[PromptedSample]):
    """Samples of another dataset, with one of their structures as the target and a simulated prompt for it.

    The structure is drawn among those that the sample shows after augmentation, each as likely, and is the same for
    all slices of a slab. A slice's prompt is a box around all of the structure there, or clicks on its largest piece.

    Args:
        samples: Addressed by (epoch, index).
        labels: What the targets mean.
        prompts: Which prompts are simulated.
        seed: Seed of the run; with (epoch, index) it decides everything drawn here.
    """

    def __init__(self, samples: Slabs, *, labels: LabelSpec, prompts: PromptMethod, seed: int) -> None:
        self._samples = samples
        self._labels, self._prompts, self._seed = labels, prompts, seed

    @property
    def slab_depth(self) -> int:
        """Slices of a sample."""
        return self._samples.slab_depth

    def __getitem__(self, key: SampleKey) -> PromptedSample:
        """One sample; without any structure its target is unknown everywhere and it has no prompt.

        Args:
            key: (epoch, index within the epoch).
        """
        image, valid, target = self._samples[key]
        generator = np.random.default_rng([derive_seed(self._seed, *key), _PROMPT_STREAM])
        chosen = choose_structure(target.numpy(), self._labels, generator)
        shown = (chosen == 1).any(axis=(1, 2))
        chosen[~shown] = IGNORE_INDEX
        drawn = self._draw(chosen == 1, shown, generator)
        return PromptedSample(image, valid, torch.from_numpy(chosen[:, np.newaxis]), *drawn)

    def _draw(
        self, masks: NDArray[np.bool_], shown: NDArray[np.bool_], generator: np.random.Generator
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Points, their labels, boxes and whether there is one, for each slice of a slab."""
        kind = self._prompts.kind
        uses_box = kind == "box" or (kind == "mixed" and generator.random() < 0.5)
        num_clicks = 0 if kind == "box" else self._prompts.clicks
        points = np.zeros((len(masks), num_clicks, 2), np.float32)
        labels = np.full((len(masks), num_clicks), NO_CLICK, np.int64)
        boxes = np.zeros((len(masks), 4), np.float32)
        for index in np.flatnonzero(shown):
            prompt = first_prompt(masks[index], self._prompts, generator, use_box=uses_box)
            if prompt.box is not None:
                boxes[index] = prompt.box
            else:
                points[index], labels[index] = prompt.points, prompt.positive
        has_box = shown & uses_box
        return torch.from_numpy(points), torch.from_numpy(labels), torch.from_numpy(boxes), torch.from_numpy(has_box)


def choose_structure(target: NDArray[np.int16], labels: LabelSpec, generator: np.random.Generator) -> NDArray[np.int16]:
    """Draw one of the structures that a slab shows.

    Args:
        target: (D, M, V, V), class indices (M = 1) or one map per region.
        labels: Which of the two.
        generator: Draws the structure.

    Returns:
        (D, V, V) of 0, 1 and IGNORE_INDEX; IGNORE_INDEX everywhere if no structure is shown.
    """
    if labels.has_regions:
        present = [k for k in range(target.shape[1]) if (target[:, k] == 1).any()]
    else:
        present = [int(value) for value in np.unique(target) if value > 0]
    if not present:
        return np.full((len(target), *target.shape[2:]), IGNORE_INDEX, np.int16)
    chosen = present[int(generator.integers(len(present)))]
    if labels.has_regions:
        return target[:, chosen].astype(np.int16)
    maps = target[:, 0]
    return np.where(maps == IGNORE_INDEX, IGNORE_INDEX, maps == chosen).astype(np.int16)


def first_prompt(
    mask: NDArray[np.bool_], prompts: PromptMethod, generator: np.random.Generator, *, use_box: bool
) -> ObjectPrompt:
    """The prompt of the first round for a structure on one slice.

    Args:
        mask: (V, V), not empty.
        prompts: Shift of the box's sides and number of clicks.
        generator: Draws both.
        use_box: A box around everything; else clicks on the largest connected piece.
    """
    if use_box:
        return ObjectPrompt(box=jittered_box(tight_box(mask), prompts.box_shift, generator, mask.shape))
    piece = largest_object(mask)
    points = clicks(mask if piece is None else piece, prompts.clicks, generator)
    return ObjectPrompt(points, (True,) * len(points))


@dataclass(frozen=True)
class PromptRound:
    """The prompted slices of one kind, box or clicks, and what the model is given in a round.

    Args:
        embeddings: (R, E, h, h).
        target: (R, 1, V, V).
        points: (R, N, 2), (row, column) in voxels of the tile.
        point_labels: (R, N).
        boxes: (R, 4) in voxels of the tile; None for clicks.
        masks: (R, 1, 4h, 4h) logits of the round before; None in the first.
    """

    embeddings: Tensor
    target: Tensor
    points: Tensor
    point_labels: Tensor
    boxes: Tensor | None
    masks: Tensor | None = None


class PromptedObjective:
    """The loss of a promptable model: a first prompt, then rounds that each add a click in the largest error.

    In each round, binary cross-entropy and soft Dice of mask token 0 on the tile's grid, per slice, and the squared
    error of its estimated IoU; averaged over the rounds and over the slices that are prompted. The mask shown to the
    next round carries no gradient, all rounds' losses reach the encoder.

    Args:
        recipe: Sizes, intensities, precision, weights of the loss, rounds.
        device: Where the model is.

    Source: Kirillov et al., Segment Anything, 2023 (appendix A), with one mask per prompt.
    """

    def __init__(self, recipe: ResolvedRecipe, *, device: str) -> None:
        self._recipe, self._device = recipe, device

    def loss(self, model: PromptableModel, batch: tuple[Tensor, ...]) -> Tensor:
        """The mean loss of a batch.

        Args:
            model: In train mode, on the device.
            batch: The tensors of a collated :class:`PromptedSample` (B, ...), on the device.

        Returns:
            A scalar with a gradient; 0 if no slice of the batch is prompted.
        """
        return self._losses(model, batch).mean()

    def sums(self, model: PromptableModel, batch: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The losses of the prompted slices, added up, and how many those are."""
        flat = PromptedSample(*batch)
        prompted = flat.has_box | (flat.point_labels != NO_CLICK).any(-1)
        return self._losses(model, batch).sum(), prompted.sum().float()

    def loss_of(self, sums: tuple[Tensor, ...]) -> Tensor:
        """Their mean; 0 if no slice is prompted."""
        total, count = sums
        return total / count.clamp(min=1)

    def _losses(self, model: PromptableModel, batch: tuple[Tensor, ...]) -> Tensor:
        """One loss per prompted slice; a single 0 if none is."""
        depth = batch[0].shape[1]
        flat = PromptedSample(*(part.flatten(0, 1) for part in batch))
        with autocast(self._device, self._recipe.precision):
            embeddings = model.encode(to_encoder(flat.image, flat.valid, self._recipe), depth=depth)
        return torch.cat([self._rounds(model, group) for group in self._groups(flat, embeddings)])

    def _groups(self, flat: PromptedSample, embeddings: Tensor) -> list[PromptRound]:
        """The prompted slices with a box and those with clicks; without any, one slice of which nothing is known."""
        has_clicks = (flat.point_labels != NO_CLICK).any(1)
        groups = []
        for rows, is_box in ((flat.has_box, True), (has_clicks, False)):
            if rows.any():
                groups.append(self._group(flat, embeddings, rows.nonzero()[:, 0], is_box=is_box))
        return groups or [self._group(flat, embeddings, flat.has_box.new_zeros(1, dtype=torch.long), is_box=True)]

    @staticmethod
    def _group(flat: PromptedSample, embeddings: Tensor, rows: Tensor, *, is_box: bool) -> PromptRound:
        points, labels = flat.points[rows], flat.point_labels[rows]
        return PromptRound(
            embeddings=embeddings[rows],
            target=flat.target[rows],
            points=points[:, :0] if is_box else points,
            point_labels=labels[:, :0] if is_box else labels,
            boxes=flat.boxes[rows] if is_box else None,
        )

    def _rounds(self, model: PromptableModel, state: PromptRound) -> Tensor:
        """Losses (R,) of the slices of one group, averaged over the rounds."""
        total = state.embeddings.new_zeros(len(state.target), dtype=torch.float32)
        num_rounds = 1 + self._recipe.method.prompts.corrections
        for index in range(num_rounds):
            with autocast(self._device, self._recipe.precision):
                logits, quality = model.prompted(state.embeddings, self._prompt_batch(state))
            mask = to_store(logits[:, :1], self._recipe)
            total = total + self._slice_losses(mask, quality[:, 0].float(), state.target)
            if index + 1 < num_rounds:
                state = add_corrections(replace(state, masks=logits[:, :1].detach()), mask.detach() > 0)
        return total / num_rounds

    def _prompt_batch(self, state: PromptRound) -> PromptBatch:
        """Tile voxels (row, column) to encoder pixels (x, y)."""
        has_points = state.points.shape[1] > 0
        return PromptBatch(
            points=self._to_pixels(state.points).flip(-1) if has_points else None,
            point_labels=state.point_labels if has_points else None,
            boxes=None if state.boxes is None else self._to_pixels(state.boxes)[:, [1, 0, 3, 2]],
            masks=state.masks,
        )

    def _to_pixels(self, voxels: Tensor) -> Tensor:
        pixels = voxel_to_pixel(voxels.cpu().numpy(), self._recipe.tile_vox, self._recipe.input_size)
        return torch.from_numpy(pixels).to(voxels)

    def _slice_losses(self, mask: Tensor, quality: Tensor, target: Tensor) -> Tensor:
        """Losses (R,) of mask logits (R, 1, V, V) and estimated IoUs (R,); 0 where nothing is known."""
        weights, rows = self._recipe.loss, range(len(mask))
        masks = torch.stack([region_loss(mask[r : r + 1], target[r : r + 1], weights) for r in rows])
        known = (target != IGNORE_INDEX).flatten(1).any(1)
        error = (quality - actual_iou(mask.detach() > 0, target)) ** 2
        return masks + torch.where(known, error, error * 0)


def actual_iou(prediction: Tensor, target: Tensor) -> Tensor:
    """Intersection over union per slice, where the target is known; 1 if both are empty.

    Args:
        prediction: (R, 1, V, V) bool.
        target: (R, 1, V, V) of 0, 1 and IGNORE_INDEX.

    Returns:
        (R,) float32.
    """
    predicted = prediction & (target != IGNORE_INDEX)
    wanted = target == 1
    common = (predicted & wanted).flatten(1).sum(1).float()
    either = (predicted | wanted).flatten(1).sum(1).float()
    return torch.where(either > 0, common / either.clamp(min=1), torch.ones_like(either))


def add_corrections(state: PromptRound, prediction: Tensor) -> PromptRound:
    """Add one click per slice, in the middle of the largest error of its mask; none where there is no error.

    Args:
        state: The round before.
        prediction: (R, 1, V, V) bool.
    """
    predicted, target = prediction[:, 0].cpu().numpy(), state.target[:, 0].cpu().numpy()
    points = np.zeros((len(target), 1, 2), np.float32)
    labels = np.full((len(target), 1), NO_CLICK, np.int64)
    for index, (mask, wanted) in enumerate(zip(predicted, target, strict=True)):
        correction = error_click(mask, wanted == 1, wanted != IGNORE_INDEX)
        if correction is not None:
            points[index, 0], labels[index, 0] = correction.point, int(correction.positive)
    return replace(
        state,
        points=torch.cat([state.points, torch.from_numpy(points).to(state.points)], 1),
        point_labels=torch.cat([state.point_labels, torch.from_numpy(labels).to(state.point_labels)], 1),
    )
