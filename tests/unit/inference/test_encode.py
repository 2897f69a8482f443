"""Intensities and zoom between store and encoder."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from samunet.artifacts.plan import IntensityMap, resolve_recipe
from samunet.inference.encode import (
    SAM_MEAN,
    SAM_STD,
    gaussian_window,
    map_intensities,
    scale_slice,
    to_encoder,
    to_store,
    zoom,
)
from samunet.inference.tta import mirror_axes, mirror_combinations
from tests.samples import make_plan, make_recipe


def recipe_with(**changes):
    """A resolved recipe with changes."""
    plan = make_plan(recipes={"none": {"cpu": make_recipe(**changes)}})
    return resolve_recipe(plan.configuration("2d"), "none", "cpu")


def test_sam_pixels_map_the_bounds_to_black_and_white_of_sam():
    """The lower bound becomes (0 - mean) / std, the upper (255 - mean) / std, and both clip."""
    image = torch.tensor([-9.0, -1.0, 3.0, 99.0]).view(1, 1, 2, 2).repeat(1, 3, 1, 1)
    mapped = map_intensities(image, IntensityMap(kind="sam_pixels", lower=(-1.0,), upper=(3.0,)))
    for channel in range(3):
        black, white = -SAM_MEAN[channel] / SAM_STD[channel], (255 - SAM_MEAN[channel]) / SAM_STD[channel]
        assert mapped[0, channel].flatten().tolist() == pytest.approx([black, black, white, white], abs=1e-5)


def test_unit_map_and_identity():
    """MedSAM's map ends at [0, 1]; the identity returns what it was given."""
    image = torch.tensor([0.0, 5.0, 10.0, 20.0]).view(1, 1, 2, 2)
    unit = map_intensities(image, IntensityMap(kind="unit", lower=(0.0,), upper=(10.0,)))
    assert unit.flatten().tolist() == [0.0, 0.5, 1.0, 1.0]
    assert map_intensities(image, IntensityMap(kind="identity")) is image


def test_a_slice_is_scaled_as_a_whole_and_by_channel():
    """Each channel of a slice ends at 0 and 1, a constant one at 0; what augmentation pushes beyond is clipped."""
    per_slice = IntensityMap(kind="unit_per_slice")
    channels = np.stack([np.arange(12.0).reshape(3, 4), -np.arange(12.0).reshape(3, 4), np.full((3, 4), 7.0)])
    scaled = scale_slice(channels.astype(np.float32), per_slice)
    assert scaled.dtype == np.float32
    assert np.allclose(scaled[0], np.arange(12).reshape(3, 4) / 11)
    assert np.allclose(scaled[1], 1 - scaled[0], atol=1e-6)
    assert np.all(scaled[2] == 0)
    assert scale_slice(channels, IntensityMap(kind="identity")) is channels
    assert map_intensities(torch.tensor([-0.5, 0.25, 3.0]).view(1, 1, 1, 3), per_slice).tolist() == [[[[0, 0.25, 1]]]]


def test_what_is_outside_the_image_is_zero_after_the_map():
    """Padding enters SAM as zero, not as a mapped zero."""
    recipe = recipe_with(
        input_size=32, tile_vox=32, intensity_map=IntensityMap(kind="sam_pixels", lower=(-1.0,), upper=(1.0,))
    )
    valid = torch.ones(1, 1, 32, 32)
    valid[..., :8] = 0
    encoded = to_encoder(torch.zeros(1, 3, 32, 32), valid, recipe)
    assert torch.all(encoded[..., :8] == 0)
    assert torch.all(encoded[..., 8:] != 0)


def test_zoom_keeps_edges_and_centroid():
    """Outer edges coincide: a linear ramp keeps its centre value and symmetric shapes stay centred."""
    ramp = torch.arange(10.0).view(1, 1, 1, 10).expand(1, 1, 10, 10)
    large = zoom(ramp, 40)
    assert float(large.mean()) == pytest.approx(4.5, abs=1e-4)
    assert torch.allclose(large, 9 - large.flip(-1), atol=1e-5)
    assert torch.allclose(zoom(large, 10)[..., 1:-1], ramp[..., 1:-1], atol=0.1)


def test_logits_return_to_the_tile_in_float32():
    """Half-precision decoder maps come back at the tile's size as float32."""
    back = to_store(torch.zeros(2, 3, 16, 16, dtype=torch.bfloat16), recipe_with(input_size=64, tile_vox=30))
    assert back.shape == (2, 3, 30, 30)
    assert back.dtype == torch.float32


def test_the_window_of_tiles_is_positive_and_symmetric():
    """No voxel has weight zero, however large the tile."""
    window = gaussian_window(512)
    assert float(window.min()) > 0
    assert torch.equal(window, window.flip(0))
    assert torch.equal(window, window.T)


def test_mirror_axes_follow_each_case():
    """The plan's anatomical axes become rows or columns as the case lies; a mirrored slice axis is no in-plane axis."""
    axial = ("superior-inferior", "anterior-posterior", "left-right")
    sagittal = ("left-right", "superior-inferior", "anterior-posterior")
    assert mirror_axes(("left-right",), axial) == (1,)
    assert mirror_axes(("left-right",), sagittal) == ()
    assert mirror_axes(("anterior-posterior", "left-right"), sagittal) == (1,)
    assert mirror_combinations((0, 1)) == [(), (0,), (1,), (0, 1)]
