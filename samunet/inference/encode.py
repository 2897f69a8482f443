"""The one way from a tile of the store to the encoder and back, shared by training and prediction.

Legend: B batch, C stored channels, T mask tokens, V tile side in voxels, S encoder side in pixels.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from numpy.typing import NDArray
from torch import Tensor

from samunet.artifacts.plan import IntensityMap, ResolvedRecipe

SAM_MEAN = (123.675, 116.28, 103.53)
SAM_STD = (58.395, 57.12, 57.375)


def scale_slice(channels: NDArray[np.float32], intensity_map: IntensityMap) -> NDArray[np.float32]:
    """Map a whole slice to [0, 1] by its own extremes where the intensity map asks for that, before tiles are cut.

    All tiles of a slice then share its extremes, and what pads a tile has no part in them. Augmentation comes after.

    Args:
        channels: (C, H, W) stored intensities of the whole slice; each channel has extremes of its own.
        intensity_map: Only "unit_per_slice" changes anything.

    Source: MedSAM (Ma 2024).
    """
    if intensity_map.kind != "unit_per_slice":
        return channels
    lowest, highest = channels.min((1, 2), keepdims=True), channels.max((1, 2), keepdims=True)
    scaled: NDArray[np.float32] = (channels - lowest) / np.maximum(highest - lowest, np.float32(1e-8))
    return scaled


def map_intensities(image: Tensor, intensity_map: IntensityMap) -> Tensor:
    """Stored intensities to what the encoder was trained on.

    Args:
        image: (B, C, V, V) as stored.
        intensity_map: "identity" changes nothing; "unit" maps [lower, upper] to [0, 1]; "sam_pixels" maps it to
            [0, 255] and then to SAM's pixel statistics (of each colour for three channels, their mean otherwise);
            "unit_per_slice" clips to [0, 1], to which :func:`scale_slice` has brought the whole slice.

    Source: Segment Anything (Kirillov 2023), preprocessing; MedSAM (Ma 2024) for [0, 1].
    """
    if intensity_map.kind == "identity":
        return image
    if intensity_map.kind == "unit_per_slice":
        return image.clamp(0, 1)
    channels = image.shape[1]
    lower = _per_channel(intensity_map.lower, channels, image)
    upper = _per_channel(intensity_map.upper, channels, image)
    unit = ((image - lower) / (upper - lower).clamp(min=1e-8)).clamp(0, 1)
    if intensity_map.kind == "unit":
        return unit
    mean = SAM_MEAN if channels == 3 else (sum(SAM_MEAN) / 3,)
    std = SAM_STD if channels == 3 else (sum(SAM_STD) / 3,)
    return (unit * 255 - _per_channel(mean, channels, image)) / _per_channel(std, channels, image)


def _per_channel(values: tuple[float, ...], channels: int, like: Tensor) -> Tensor:
    row = [value for value in values for _ in range(channels // len(values))]
    return like.new_tensor(row).view(1, channels, 1, 1)


def zoom(maps: Tensor, side: int) -> Tensor:
    """Resize square maps bilinearly, aligned by their outer edges, with anti-aliasing when shrinking."""
    if maps.shape[-1] == side:
        return maps
    return F.interpolate(maps, size=(side, side), mode="bilinear", align_corners=False, antialias=maps.shape[-1] > side)


def to_encoder(image: Tensor, valid: Tensor, recipe: ResolvedRecipe) -> Tensor:
    """A tile of the store to encoder input.

    Args:
        image: (B, C, V, V) stored intensities, zero outside the image.
        valid: (B, 1, V, V), 1 inside the image.
        recipe: Its intensity map and input size.

    Returns:
        (B, C, S, S); what is outside the image is zero after the intensity map, as SAM pads.
    """
    return zoom(map_intensities(image, recipe.intensity_map) * valid, recipe.input_size)


def to_store(logits: Tensor, recipe: ResolvedRecipe) -> Tensor:
    """Decoder maps (B, T, S/4, S/4) to the store grid (B, T, V, V), in float32."""
    return zoom(logits.float(), recipe.tile_vox)


@torch.no_grad()
def gaussian_window(side: int, *, sigma_scale: float = 0.125) -> Tensor:
    """(V, V) weight of a tile's voxels when tiles overlap: a Gaussian around its centre, largest value 1.

    The smallest weight is kept above zero so that every voxel is covered.

    Source: sliding-window weights of nnU-Net (Isensee 2021), sigma one eighth of the tile.
    """
    position = torch.arange(side, dtype=torch.float32) - (side - 1) / 2
    profile = torch.exp(-0.5 * (position / (side * sigma_scale)) ** 2)
    window = profile[:, None] * profile[None, :]
    return window.clamp(min=float(window[window > 0].min()))
