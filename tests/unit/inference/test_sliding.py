"""Slices, tiles and mirrored views through a model whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from samunet.artifacts.plan import resolve_recipe
from samunet.inference.sliding import SlidingOptions, SlidingPredictor, gather_channels
from tests.planted import PlantedModel
from tests.samples import make_plan, make_recipe


def predict(data: np.ndarray, *, tile: int, models=None, mirror=(), context: int = 0, batch: int = 4) -> torch.Tensor:
    """All slices of a volume as one tensor (T, S, H, W)."""
    plan = make_plan(recipes={"none": {"cpu": make_recipe(input_size=tile, tile_vox=tile)}})
    recipe = resolve_recipe(plan.configuration("2d"), "none", "cpu")
    options = SlidingOptions(
        context=context, tile_overlap=0.5, mirror_axes=mirror, batch_size=batch, device="cpu", precision="fp32"
    )
    found = list(SlidingPredictor(models or [PlantedModel()], recipe, options).slices(data))
    assert [index for index, _ in found] == list(range(data.shape[1]))
    return torch.stack([logits for _, logits in found], 1)


@pytest.mark.parametrize("shape", [(5, 20, 30), (3, 32, 32), (4, 50, 33), (2, 100, 17), (1, 1, 1)])
@pytest.mark.parametrize("mirror", [(), (0,), (0, 1)])
def test_tiles_padding_and_mirroring_leave_a_pointwise_model_exact(shape, mirror):
    """Whatever fits or does not fit a tile, each voxel's logit is that of its own intensity."""
    data = np.random.default_rng(0).normal(50, 30, (1, *shape)).astype(np.float32)
    logits = predict(data, tile=32, mirror=mirror)
    assert torch.allclose(logits[1], torch.from_numpy(data[0]) - 50, atol=1e-3)


def test_batches_do_not_matter():
    """One slice at a time or many: the same logits."""
    data = np.random.default_rng(1).normal(size=(1, 7, 40, 20)).astype(np.float32)
    assert torch.allclose(predict(data, tile=16, batch=1), predict(data, tile=16, batch=64), atol=1e-5)


def test_models_are_averaged():
    """Two models give the mean of their logits."""

    class Constant(nn.Module):
        def __init__(self, value: float) -> None:
            super().__init__()
            self.value = value

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return torch.full((len(images), 2, *images.shape[2:]), self.value)

    data = np.zeros((1, 2, 8, 8), np.float32)
    assert torch.all(predict(data, tile=16, models=[Constant(1.0), Constant(4.0)]) == 2.5)


def test_mirrored_views_are_flipped_back():
    """A model that marks the left half marks, averaged over mirroring, both halves alike."""

    class LeftHalf(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            maps = torch.zeros(len(images), 2, *images.shape[2:])
            maps[:, 1, :, : images.shape[3] // 2] = 2
            return maps

    data = np.zeros((1, 1, 16, 16), np.float32)
    plain = predict(data, tile=16, models=[LeftHalf()])[1, 0]
    assert torch.all(plain[:, :8] == 2)
    assert torch.all(plain[:, 8:] == 0)
    assert torch.all(predict(data, tile=16, models=[LeftHalf()], mirror=(1,))[1] == 1)


def test_channels_of_a_slice_are_its_neighbours_in_order():
    """Context stacks previous, own and next slice per channel; without context one channel is repeated."""
    data = np.arange(2 * 4, dtype=np.float32).reshape(2, 4, 1, 1)
    assert gather_channels(data, 0, 1).ravel().tolist() == [0, 0, 1, 4, 4, 5]
    assert gather_channels(data, 2, 0).ravel().tolist() == [2, 6]
    assert gather_channels(data[:1], 3, 0).ravel().tolist() == [3, 3, 3]
