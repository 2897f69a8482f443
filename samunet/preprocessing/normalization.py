"""Intensity normalization: nnU-Net's schemes, chosen by channel name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from samunet.artifacts.plan import ChannelNormalization, Scheme
from samunet.core.errors import ConfigError, DataError

SMALLEST_DIVISOR = 1e-8
MEDSAM_PERCENTILES = (0.5, 99.5)

_SCHEMES: dict[str, Scheme] = {
    "ct": "ct",
    "nonorm": "none",
    "zscore": "zscore",
    "rescale_to_0_1": "rescale_to_01",
    "rgb_to_0_1": "rgb_to_01",
}


def scheme_for_channel(name: str) -> Scheme:
    """The normalization that a channel name in dataset.json asks for, whatever its case; z-score by default.

    Source: nnU-Net (Isensee et al., Nature Methods 2021), normalization by modality.
    """
    return _SCHEMES.get(name.casefold(), "zscore")


def normalize(
    data: NDArray[Any], mask: NDArray[np.bool_] | None, specs: Sequence[ChannelNormalization]
) -> NDArray[np.float32]:
    """Normalize every channel by its own scheme, into a new array.

    Args:
        data: (C, Z, Y, X), any real type.
        mask: (Z, Y, X), True inside the nonzero region; needed where a channel's scheme uses it.
        specs: One per channel.

    Raises:
        ConfigError: If the number of specs is not the number of channels, or a mask is needed and missing.
        DataError: If an 8-bit RGB channel holds values outside 0 to 255.
    """
    if len(specs) != data.shape[0]:
        raise ConfigError(
            "the plan's normalization does not fit the image's channels",
            expected=f"{data.shape[0]} channels",
            found=f"{len(specs)} normalization entries",
        )
    result = np.empty(data.shape, dtype=np.float32)
    for channel, spec in enumerate(specs):
        result[channel] = data[channel]
        _normalize_channel(result[channel], mask, spec)
    return result


def _normalize_channel(image: NDArray[np.float32], mask: NDArray[np.bool_] | None, spec: ChannelNormalization) -> None:
    """Normalize one channel in place."""
    if spec.scheme == "zscore":
        _zscore(image, mask, use_mask=spec.use_nonzero_mask)
    elif spec.scheme == "ct":
        np.clip(image, spec.lower, spec.upper, out=image)
        image -= spec.mean
        image /= max(spec.std, SMALLEST_DIVISOR)
    elif spec.scheme == "rescale_to_01":
        image -= image.min()
        image /= max(float(image.max()), SMALLEST_DIVISOR)
    elif spec.scheme == "window_to_01":
        _scale(image, spec.lower, spec.upper)
    elif spec.scheme == "percentiles_to_01":
        positive = image[image > 0]
        _scale(image, *(np.percentile(positive, MEDSAM_PERCENTILES) if positive.size else (0.0, 1.0)))
    elif spec.scheme == "rgb_to_01":
        low, high = float(image.min()), float(image.max())
        if low < 0 or high > 255:
            raise DataError(
                "an RGB channel holds values that 8 bits cannot",
                expected="0 to 255",
                found=f"{low:g} to {high:g}",
                todo="name the channel otherwise in dataset.json, or store the image with 8 bits",
            )
        image /= 255.0


def _scale(image: NDArray[np.float32], lower: float, upper: float) -> None:
    """Clip to a window and scale it to [0, 1], in place."""
    np.clip(image, lower, upper, out=image)
    image -= lower
    image /= max(upper - lower, SMALLEST_DIVISOR)


def _zscore(image: NDArray[np.float32], mask: NDArray[np.bool_] | None, *, use_mask: bool) -> None:
    if not use_mask:
        mean, std = float(image.mean(dtype=np.float64)), float(image.std(dtype=np.float64))
        image -= mean
        image /= max(std, SMALLEST_DIVISOR)
        return
    if mask is None:
        raise ConfigError("this normalization needs the nonzero mask", expected="a mask", found="none")
    inside = image[mask]
    if inside.size:
        mean, std = float(inside.mean(dtype=np.float64)), float(inside.std(dtype=np.float64))
        image[mask] = (inside - mean) / max(std, SMALLEST_DIVISOR)
