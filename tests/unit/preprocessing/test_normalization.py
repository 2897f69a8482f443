"""Normalization schemes against the formulas they stand for."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

from samunet.artifacts.plan import ChannelNormalization
from samunet.core.errors import ConfigError, DataError
from samunet.preprocessing.normalization import normalize, scheme_for_channel


@pytest.fixture
def image() -> np.ndarray:
    return np.random.default_rng(1).integers(1, 200, (1, 4, 6, 5)).astype(np.int16)


@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        ("CT", "ct"),
        ("ct", "ct"),
        ("noNorm", "none"),
        ("zscore", "zscore"),
        ("rescale_to_0_1", "rescale_to_01"),
        ("rgb_to_0_1", "rgb_to_01"),
        ("RGB_to_0_1", "rgb_to_01"),
        ("T2w", "zscore"),
        ("CT_windowed", "zscore"),
    ],
)
def test_scheme_follows_the_channel_name(name: str, scheme: str) -> None:
    """Only nnU-Net's own names, whatever their case, ask for anything but the z-score."""
    assert scheme_for_channel(name) == scheme


def test_zscore_of_the_whole_image(image: np.ndarray) -> None:
    """Without a mask, mean 0 and standard deviation 1 over all voxels; the input is not changed."""
    before = image.copy()
    result = normalize(image, None, [ChannelNormalization(scheme="zscore")])
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, (image - image.mean()) / image.std(), atol=1e-6)
    np.testing.assert_array_equal(image, before)


def test_zscore_inside_the_mask_leaves_the_outside_at_zero(image: np.ndarray) -> None:
    """With a mask only its voxels are counted and changed."""
    mask = np.zeros(image.shape[1:], bool)
    mask[1:3, 2:5, 1:4] = True
    image[:, ~mask] = 0
    result = normalize(image, mask, [ChannelNormalization(scheme="zscore", use_nonzero_mask=True)])
    inside = image[0][mask].astype(float)
    np.testing.assert_allclose(result[0][mask], (inside - inside.mean()) / inside.std(), atol=1e-6)
    assert not result[0][~mask].any()


def test_zscore_of_a_constant_image_is_zero() -> None:
    """A standard deviation of zero does not divide by zero."""
    result = normalize(np.full((1, 2, 2, 2), 7), None, [ChannelNormalization(scheme="zscore")])
    assert not result.any()


def test_zscore_with_an_empty_mask_changes_nothing() -> None:
    """An image of zeros stays zero and warns of nothing."""
    spec = ChannelNormalization(scheme="zscore", use_nonzero_mask=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not normalize(np.zeros((1, 2, 2, 2)), np.zeros((2, 2, 2), bool), [spec]).any()


def test_ct_clips_then_uses_the_datasets_statistics(image: np.ndarray) -> None:
    """CT uses the plan's numbers, not the image's own."""
    spec = ChannelNormalization(scheme="ct", mean=60.0, std=30.0, lower=20.0, upper=120.0)
    expected = (np.clip(image, 20, 120) - 60.0) / 30.0
    np.testing.assert_allclose(normalize(image, None, [spec]), expected, atol=1e-6)


def test_rescale_and_rgb_and_none(image: np.ndarray) -> None:
    """Rescaling uses the image's range, RGB the range of 8 bits, and none only changes the type."""
    stacked = np.repeat(image, 3, axis=0)
    specs = [ChannelNormalization(scheme=scheme) for scheme in ("rescale_to_01", "rgb_to_01", "none")]
    rescaled, rgb, raw = normalize(stacked, None, specs)
    low, high = image.min(), image.max()
    np.testing.assert_allclose(rescaled, (image[0] - low) / (high - low), atol=1e-6)
    np.testing.assert_allclose(rgb, image[0] / 255, atol=1e-6)
    np.testing.assert_array_equal(raw, image[0])


def test_integers_near_their_limit_do_not_overflow() -> None:
    """Arithmetic happens in floating point."""
    image = np.array([-32768, 32767], np.int16).reshape(1, 1, 1, 2)
    result = normalize(image, None, [ChannelNormalization(scheme="rescale_to_01")])
    np.testing.assert_allclose(result.ravel(), [0, 1])


def test_rgb_outside_eight_bits_is_an_error() -> None:
    """The message names the range found."""
    with pytest.raises(DataError, match="-3 to 300"):
        normalize(np.array([-3, 300]).reshape(1, 1, 1, 2), None, [ChannelNormalization(scheme="rgb_to_01")])


def test_missing_mask_and_wrong_number_of_channels_are_errors(image: np.ndarray) -> None:
    """A plan that does not fit the image is refused."""
    with pytest.raises(ConfigError, match="mask"):
        normalize(image, None, [ChannelNormalization(scheme="zscore", use_nonzero_mask=True)])
    with pytest.raises(ConfigError, match="channels"):
        normalize(image, None, [])
