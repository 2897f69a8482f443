"""Masked image modelling: parts of slices are hidden, the encoder's embedding says what they were.

Units of two tokens by two are hidden, as smaller holes are filled from their rims, and only where there is image; units
of one token where the input is small. What is predicted are the pixels of each 16-pixel patch after its own mean and
spread are taken out; only hidden pixels count.

Legend: B samples of one slice, S encoder side, p = 16 pixels of a token, N = S / p.

Source: Xie et al., SimMIM, 2022 (units of 32 pixels, ratio 0.6); He et al., Masked Autoencoders, 2022.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.swa_utils import update_bn
from torch.utils.data import Dataset

from samunet.artifacts.model_spec import TOKEN_SIZE
from samunet.artifacts.plan import ResolvedRecipe
from samunet.core.rng import derive_seed
from samunet.inference.sliding import autocast
from samunet.models.pretraining import patches, unpatched
from samunet.models.segmentation import SegmentationModel
from samunet.training.data import Sample, SampleKey, Slabs
from samunet.training.objective import Batch, Sums

MASK_RATIO = 0.6
LEAST_UNITS = 7
# A patch that varies by less than a tenth of the whole sample's deviation is background: its noise is not worth
# predicting.
FLAT_SHARE = 0.01
_NO_VARIANCE = 1e-6
STATISTICS_BATCHES = 32
_MASK_STREAM = 4


def mask_unit(side: int) -> int:
    """Side of what is hidden at once, in pixels: two tokens where that leaves seven units along an input, else one."""
    return 2 * TOKEN_SIZE if side >= 2 * TOKEN_SIZE * LEAST_UNITS else TOKEN_SIZE


def draw_mask(
    valid: NDArray[np.bool_], generator: np.random.Generator, *, unit: int, ratio: float = MASK_RATIO
) -> NDArray[np.bool_]:
    """Choose which tokens are hidden: a fixed share of the units that touch the image, none of the others.

    Args:
        valid: (S, S), where there is image.
        generator: Draws the units.
        unit: Side of a unit in pixels, a multiple of 16.
        ratio: Share of the units; at least one is hidden and, where there are two, at least one is seen.

    Returns:
        (N, N).
    """
    side = valid.shape[0]
    rows = math.ceil(side / unit)
    padded = np.zeros((rows * unit, rows * unit), bool)
    padded[:side, :side] = valid
    touching = np.flatnonzero(padded.reshape(rows, unit, rows, unit).any(axis=(1, 3)))
    number = min(max(1, round(ratio * len(touching))), max(1, len(touching) - 1))
    hidden = np.zeros(rows * rows, bool)
    hidden[generator.permutation(touching)[:number]] = True
    tokens = hidden.reshape(rows, rows).repeat(unit // TOKEN_SIZE, axis=0).repeat(unit // TOKEN_SIZE, axis=1)
    return tokens[: side // TOKEN_SIZE, : side // TOKEN_SIZE]


class MaskedSlices(Dataset[Sample]):
    """Samples of another dataset with a mask that depends on (seed, epoch, index) alone.

    Args:
        samples: Images (1, 3, S, S), valid (1, 1, S, S) and targets, which are not passed on.
        seed: Of the run.
    """

    def __init__(self, samples: Slabs, *, seed: int) -> None:
        self._samples, self._seed = samples, seed

    @property
    def slab_depth(self) -> int:
        """Slices of a sample."""
        return self._samples.slab_depth

    def __getitem__(self, key: SampleKey) -> Sample:
        """Image (1, 3, S, S), valid (1, 1, S, S), mask (1, 1, N, N) of 0 and 1.

        Args:
            key: (epoch, index within the epoch).
        """
        image, valid, _ = self._samples[key]
        generator = np.random.default_rng([derive_seed(self._seed, *key), _MASK_STREAM])
        mask = draw_mask(valid[0, 0].numpy() > 0, generator, unit=mask_unit(valid.shape[-1]))
        return image, valid, torch.from_numpy(mask.astype(np.float32))[None, None]


class MaskedImageObjective:
    """Mean squared error of the hidden pixels, in units of each patch's own deviation: 1 is knowing only its mean.

    Args:
        recipe: Its precision.
        device: Where the model is.
    """

    def __init__(self, recipe: ResolvedRecipe, *, device: str) -> None:
        self._recipe, self._device = recipe, device

    def loss(self, model: SegmentationModel, batch: Batch) -> Tensor:
        """The mean over all hidden pixels of a batch; 0 if none is.

        Args:
            model: As :func:`samunet.models.pretraining.build_masked_model` makes it, on the device.
            batch: Image (B, 1, 3, S, S), valid (B, 1, 1, S, S) and mask (B, 1, 1, N, N).
        """
        return self.loss_of(self.sums(model, batch))

    def sums(self, model: SegmentationModel, batch: Batch) -> Sums:
        """Squared errors of the hidden pixels, added up, and how many those are."""
        image, valid, mask = (part.flatten(0, 1) for part in batch)
        predicted = self.predict(model, image, mask)
        wanted, _, _ = normalised(patches(image))
        weight = patches(valid).repeat(1, image.shape[1], 1, 1) * mask
        return (weight * (predicted - wanted) ** 2).sum(), weight.sum()

    def loss_of(self, sums: Sums) -> Tensor:
        """Their mean."""
        total, count = sums
        mean: Tensor = total / count.clamp(min=1)
        return mean

    def predict(self, model: SegmentationModel, image: Tensor, mask: Tensor) -> Tensor:
        """Normalised values (B, 3 * p * p, N, N) of all patches of images (B, 3, S, S) under masks (B, 1, N, N)."""
        hidden = functional.interpolate(mask, size=image.shape[-2:], mode="nearest")
        with autocast(self._device, self._recipe.precision):
            predicted: Tensor = model(torch.cat([image, hidden], dim=1))
        return predicted.float()


def normalised(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Patches (B, V, N, N) with mean 0 and deviation 1, and what was taken out: mean and deviation (B, 1, N, N)."""
    mean, variance = values.mean(1, keepdim=True), values.var(1, keepdim=True, correction=0)
    least = FLAT_SHARE * values.var((1, 2, 3), keepdim=True, correction=0) + _NO_VARIANCE
    deviation = (variance + least).sqrt()
    return (values - mean) / deviation, mean, deviation


@torch.no_grad()
def reconstruction(
    objective: MaskedImageObjective, model: SegmentationModel, batch: Batch
) -> tuple[Tensor, Tensor, Tensor]:
    """Images, the same with their hidden part grey, and with their hidden part as predicted.

    A hidden patch gets back its own mean and deviation, which are not predicted.

    Args:
        objective: Of the run.
        model: On its device.
        batch: As for the objective.

    Returns:
        Each (B, 3, S, S).
    """
    image, valid, mask = (part.flatten(0, 1) for part in batch)
    predicted = objective.predict(model, image, mask)
    _, mean, deviation = normalised(patches(image))
    filled = unpatched(torch.where(mask > 0, predicted * deviation + mean, patches(image)))
    hidden = functional.interpolate(mask, size=image.shape[-2:], mode="nearest") > 0
    return image, image.masked_fill(hidden, float(image.mean())), filled * valid


def see_whole_images(encoder: nn.Module, batches: Iterator[Sample], *, device: str) -> None:
    """Measure batch norm's statistics anew on images of which nothing is hidden; without batch norm nothing happens.

    In training they are those of images with holes, which no image to be segmented has.

    Args:
        encoder: The image encoder, changed in place; its mode stays.
        batches: Of samples whose first tensor is an image (B, 1, 3, S, S).
        device: Where the encoder is.
    """
    images = (next(batches)[0].flatten(0, 1) for _ in range(STATISTICS_BATCHES))
    update_bn(images, encoder, device=torch.device(device))
