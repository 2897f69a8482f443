"""Augmentation of one slice tile with batchgenerators, at the resolution of the store.

The table of transforms and probabilities is nnU-Net's. All randomness comes from the two global generators, which the
caller seeds per sample (core.rng.seed_sample).

Source: nnU-Net (Isensee et al. 2021), supplementary note on data augmentation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from batchgenerators.transforms.abstract_transforms import AbstractTransform, Compose
from batchgenerators.transforms.color_transforms import (
    BrightnessMultiplicativeTransform,
    ContrastAugmentationTransform,
    GammaTransform,
)
from batchgenerators.transforms.noise_transforms import GaussianBlurTransform, GaussianNoiseTransform
from batchgenerators.transforms.resample_transforms import SimulateLowResolutionTransform
from batchgenerators.transforms.spatial_transforms import MirrorTransform, SpatialTransform
from numpy.typing import NDArray

from samunet.core.labels import IGNORE_INDEX

NARROW_ROTATION = np.deg2rad(15.0)
WIDE_ROTATION = np.pi


class SliceAugmentation:
    """Random rotation, scaling, noise, blur, brightness, contrast, resolution and gamma of one tile.

    Args:
        tile: Side of the square tile in voxels.
        separate_channels: Whether channels are different images (MR sequences, RGB) whose intensities vary on their
            own, rather than neighbouring slices of one.
        full_rotation: Rotate by any angle (nothing says what is up) instead of up to 15 degrees.
    """

    def __init__(self, *, tile: int, separate_channels: bool, full_rotation: bool) -> None:
        angle = WIDE_ROTATION if full_rotation else NARROW_ROTATION
        self._transforms: AbstractTransform = Compose(
            [
                SpatialTransform(
                    (tile, tile),
                    patch_center_dist_from_border=None,
                    do_elastic_deform=False,
                    do_rotation=True,
                    angle_x=(-angle, angle),
                    do_scale=True,
                    scale=(0.7, 1.4),
                    border_mode_data="constant",
                    border_cval_data=0,
                    order_data=1,
                    border_mode_seg="constant",
                    border_cval_seg=IGNORE_INDEX,
                    order_seg=0,
                    random_crop=False,
                    p_rot_per_sample=0.2,
                    p_scale_per_sample=0.2,
                ),
                GaussianNoiseTransform(p_per_sample=0.1),
                GaussianBlurTransform(
                    (0.5, 1.0), different_sigma_per_channel=True, p_per_sample=0.2, p_per_channel=0.5
                ),
                BrightnessMultiplicativeTransform(
                    multiplier_range=(0.75, 1.25), per_channel=separate_channels, p_per_sample=0.15
                ),
                ContrastAugmentationTransform(per_channel=separate_channels, p_per_sample=0.15),
                SimulateLowResolutionTransform(
                    zoom_range=(0.5, 1), per_channel=separate_channels, p_per_channel=0.5, p_per_sample=0.25
                ),
                GammaTransform((0.7, 1.5), True, separate_channels, retain_stats=True, p_per_sample=0.1),
                GammaTransform((0.7, 1.5), False, separate_channels, retain_stats=True, p_per_sample=0.3),
            ]
        )

    def __call__(self, image: NDArray[np.float32], maps: NDArray[np.int16]) -> tuple[NDArray[Any], NDArray[Any]]:
        """Augment one tile.

        Args:
            image: (C, tile, tile).
            maps: (M, tile, tile) integer maps that move with it; what rotates in from outside is IGNORE_INDEX.
        """
        batch = self._transforms(data=image[np.newaxis], seg=maps[np.newaxis].astype(np.float32))
        return batch["data"][0].astype(np.float32), np.rint(batch["seg"][0]).astype(np.int16)


class RandomMirror:
    """Mirror along each of the given in-plane axes with probability one half.

    Args:
        axes: Subset of (0, 1), rows and columns.
    """

    def __init__(self, axes: Sequence[int]) -> None:
        self._transform = MirrorTransform(tuple(axes)) if axes else None

    def __call__(self, image: NDArray[Any], maps: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
        """Mirror image and maps alike."""
        if self._transform is None:
            return image, maps
        batch = self._transform(data=image[np.newaxis].copy(), seg=maps[np.newaxis].copy())
        return batch["data"][0], batch["seg"][0]
