"""Slices of several stores as samples of one kind: in encoder pixels, three channels, of one size.

Legend: C channels of a store, S encoder side, M target maps.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset

from samunet.artifacts.plan import ResolvedRecipe
from samunet.core.rng import derive_seed
from samunet.inference.encode import to_encoder, zoom
from samunet.training.data import Sample, SampleKey, Slabs

_SOURCE_STREAM = 3


class EncoderSlices(Dataset[Sample]):
    """Samples of another dataset, brought to the encoder's pixels as training brings them there.

    Args:
        samples: Addressed by (epoch, index), in stored intensities.
        recipe: Their intensity map and tile, and the encoder's side.
        channels: Fixed: what makes three channels of C.
    """

    def __init__(self, samples: Slabs, *, recipe: ResolvedRecipe, channels: nn.Module) -> None:
        self._samples, self._recipe = samples, recipe
        self._channels = channels.requires_grad_(False)

    @property
    def slab_depth(self) -> int:
        """Slices of a sample."""
        return self._samples.slab_depth

    @torch.no_grad()
    def __getitem__(self, key: SampleKey) -> Sample:
        """One sample: image (1, 3, S, S), valid (1, 1, S, S) and target (1, M, S, S).

        Args:
            key: (epoch, index within the epoch).
        """
        image, valid, target = self._samples[key]
        side = self._recipe.input_size
        image = self._channels(to_encoder(image, valid, self._recipe))
        inside = (zoom(valid, side) > 1 / 2).to(image)
        return image, inside, _nearest(target, side)


class Mixture(Dataset[Sample]):
    """Samples of several datasets, each sample from one that is drawn.

    Args:
        sources: Datasets whose samples collate with each other's.
        weights: How often each is drawn, relative to the others.
        seed: Of the run.
    """

    def __init__(self, sources: Sequence[Slabs], weights: Sequence[float], *, seed: int) -> None:
        self._sources, self._seed = list(sources), seed
        self._shares = np.asarray(weights, np.float64) / sum(weights)

    @property
    def slab_depth(self) -> int:
        """Slices of a sample."""
        return self._sources[0].slab_depth

    def __getitem__(self, key: SampleKey) -> Sample:
        """One sample.

        Args:
            key: (epoch, index within the epoch).
        """
        generator = np.random.default_rng([derive_seed(self._seed, *key), _SOURCE_STREAM])
        return self._sources[int(generator.choice(len(self._sources), p=self._shares))][key]


def _nearest(target: Tensor, side: int) -> Tensor:
    """Target maps (1, M, V, V) on another grid, each pixel with the value of the voxel it lies in."""
    if target.shape[-1] == side:
        return target
    return functional.interpolate(target.float(), size=(side, side), mode="nearest-exact").to(target.dtype)
