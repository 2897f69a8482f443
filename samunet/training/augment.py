"""Augmentation of one tile of a slab with batchgenerators, at the resolution of the store.

The table of transforms and probabilities is nnU-Net's. All randomness comes from the two global generators, which the
caller seeds per sample (core.rng.seed_sample). The slices of a slab move together and change their intensities
together; only noise differs. Nothing is rotated, blurred or coarsened along depth, where voxels may be thick.

Legend: D slices of the slab, C channels, M maps, V tile side.

Source: nnU-Net (Isensee et al. 2021), supplementary note on data augmentation, and its 2D transforms of anisotropic
3D patches.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
from batchgenerators.transforms.abstract_transforms import AbstractTransform, Compose
from batchgenerators.transforms.color_transforms import (
    BrightnessMultiplicativeTransform,
    ContrastAugmentationTransform,
    GammaTransform,
)
from batchgenerators.transforms.noise_transforms import GaussianNoiseTransform
from batchgenerators.transforms.resample_transforms import SimulateLowResolutionTransform
from batchgenerators.transforms.spatial_transforms import MirrorTransform, SpatialTransform
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from samunet.core.labels import IGNORE_INDEX


class SliceAugmentation:
    """Random rotation, scaling, noise, blur, brightness, contrast, resolution and gamma of one tile of a slab.

    Args:
        tile: Side of the square tile in voxels.
        separate_channels: Whether channels are different images (MR sequences, RGB) whose intensities vary on their
            own, rather than neighbouring slices of one.
        rotation_deg: Largest rotation to either side, in degrees.
        scale: Least and largest scaling factor.
        frequency: Factor on the probabilities of nnU-Net's table.
    """

    def __init__(
        self,
        *,
        tile: int,
        separate_channels: bool,
        rotation_deg: float,
        scale: tuple[float, float],
        frequency: float = 1.0,
    ) -> None:
        self._spatial = _spatial_transform(tile, float(np.deg2rad(rotation_deg)), scale, frequency)
        self._intensities = _intensity_transforms(separate_channels, frequency)

    def __call__(self, image: NDArray[np.float32], maps: NDArray[np.int16]) -> tuple[NDArray[Any], NDArray[Any]]:
        """Augment one tile.

        Args:
            image: (D, C, V, V).
            maps: (D, M, V, V) integer maps that move with it; what rotates in from outside is IGNORE_INDEX.
        """
        moved = self._spatial(data=_fold(image), seg=_fold(maps).astype(np.float32))
        by_channel = moved["data"].reshape(1, image.shape[1], image.shape[0], *image.shape[2:])
        changed = self._intensities(data=by_channel)["data"][0].astype(np.float32)
        return changed.swapaxes(0, 1), _unfold(np.rint(moved["seg"]).astype(np.int16), maps)


class InPlaneBlur(AbstractTransform):  # type: ignore[misc]
    """Gaussian blur of every slice of a slab by the same width, drawn per channel.

    Args:
        sigma: Least and largest width in voxels.
        p_per_sample: Probability that a sample is blurred.
        p_per_channel: Probability of each channel of such a sample.
    """

    def __init__(self, sigma: tuple[float, float], *, p_per_sample: float, p_per_channel: float) -> None:
        self._sigma, self._p_per_sample, self._p_per_channel = sigma, p_per_sample, p_per_channel

    def __call__(self, **data_dict: Any) -> dict[str, Any]:
        """Blur ``data`` (B, C, D, V, V) in place."""
        for sample in data_dict["data"]:
            if np.random.uniform() >= self._p_per_sample:  # noqa: NPY002 - the sample's seed is the global generator's
                continue
            for channel in sample:
                if np.random.uniform() <= self._p_per_channel:  # noqa: NPY002
                    width = random.uniform(*self._sigma)
                    channel[...] = gaussian_filter(channel, (0.0, width, width))
        return data_dict


class RandomMirror:
    """Mirror along each of the given in-plane axes with probability one half.

    Args:
        axes: Subset of (0, 1), rows and columns.
    """

    def __init__(self, axes: Sequence[int]) -> None:
        self._transform = MirrorTransform(tuple(axes)) if axes else None

    def __call__(self, image: NDArray[Any], maps: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
        """Mirror all slices of image (D, C, V, V) and maps (D, M, V, V) alike."""
        if self._transform is None:
            return image, maps
        batch = self._transform(data=_fold(image).copy(), seg=_fold(maps).copy())
        return _unfold(batch["data"], image), _unfold(batch["seg"], maps)


def _fold(slab: NDArray[Any]) -> NDArray[Any]:
    """(D, C, V, V) as one 2D sample (1, C * D, V, V), so that all slices are moved alike."""
    return slab.swapaxes(0, 1).reshape(1, -1, *slab.shape[2:])


def _unfold(folded: NDArray[Any], like: NDArray[Any]) -> NDArray[Any]:
    """Undo :func:`_fold` for a slab shaped like another."""
    return folded.reshape(like.shape[1], like.shape[0], *folded.shape[2:]).swapaxes(0, 1)


def _spatial_transform(tile: int, angle: float, scale: tuple[float, float], frequency: float) -> AbstractTransform:
    return SpatialTransform(
        (tile, tile),
        patch_center_dist_from_border=None,
        do_elastic_deform=False,
        do_rotation=True,
        angle_x=(-angle, angle),
        do_scale=True,
        scale=scale,
        border_mode_data="constant",
        border_cval_data=0,
        order_data=1,
        border_mode_seg="constant",
        border_cval_seg=IGNORE_INDEX,
        order_seg=0,
        random_crop=False,
        p_rot_per_sample=min(1.0, 0.2 * frequency),
        p_scale_per_sample=min(1.0, 0.2 * frequency),
    )


def _intensity_transforms(separate: bool, frequency: float) -> AbstractTransform:
    """Transforms of (B, C, D, V, V)."""

    def often(probability: float) -> float:
        return min(1.0, probability * frequency)

    return Compose(
        [
            GaussianNoiseTransform(p_per_sample=often(0.1)),
            InPlaneBlur((0.5, 1.0), p_per_sample=often(0.2), p_per_channel=0.5),
            BrightnessMultiplicativeTransform(
                multiplier_range=(0.75, 1.25), per_channel=separate, p_per_sample=often(0.15)
            ),
            ContrastAugmentationTransform(per_channel=separate, p_per_sample=often(0.15)),
            SimulateLowResolutionTransform(
                zoom_range=(0.5, 1), per_channel=separate, p_per_channel=0.5, p_per_sample=often(0.25), ignore_axes=(0,)
            ),
            GammaTransform((0.7, 1.5), True, separate, retain_stats=True, p_per_sample=often(0.1)),
            GammaTransform((0.7, 1.5), False, separate, retain_stats=True, p_per_sample=often(0.3)),
        ]
    )
