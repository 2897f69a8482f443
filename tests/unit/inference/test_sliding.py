"""Slices, slabs, tiles and mirrored views through a model whose answer is known."""

from __future__ import annotations

from weakref import WeakSet

import numpy as np
import pytest
import torch
from torch import nn

from samunet.artifacts.plan import IntensityMap, resolve_recipe
from samunet.core.errors import ConfigError
from samunet.inference import sliding
from samunet.inference.sliding import SlidingOptions, SlidingPredictor, gather_channels
from tests.planted import THRESHOLD, PlantedModel
from tests.samples import make_plan, make_recipe


class SlabModel(nn.Module):
    """Class 1 gets what a function makes of the slabs (slabs, D, V, V) of the middle channel; calls are counted."""

    def __init__(self, function=lambda slabs: slabs) -> None:
        super().__init__()
        self.function = function
        self.calls: list[tuple[int, int]] = []

    def forward(self, images: torch.Tensor, *, depth: int = 1) -> torch.Tensor:
        """(slabs * D, C, V, V) to (slabs * D, 2, V, V)."""
        self.calls.append((len(images) // depth, depth))
        slabs = images[:, images.shape[1] // 2].unflatten(0, (-1, depth))
        maps = self.function(slabs).flatten(0, 1) - THRESHOLD
        return torch.stack([-maps, maps], 1)


def make_predictor(
    *, tile: int, models=None, mirror=(), context: int = 0, batch: int = 4, intensities: str = "identity", **slabs
) -> SlidingPredictor:
    """A predictor without zoom."""
    recipe = make_recipe(input_size=tile, tile_vox=tile, intensity_map=IntensityMap(kind=intensities))
    plan = make_plan(recipes={"none": {"cpu": recipe}})
    recipe = resolve_recipe(plan.configuration("2d"), "none", "cpu")
    options = SlidingOptions(
        context=context, tile_overlap=0.5, mirror_axes=mirror, batch_size=batch, device="cpu", precision="fp32", **slabs
    )
    return SlidingPredictor(models or [PlantedModel()], recipe, options)


def predict(data: np.ndarray, **options) -> torch.Tensor:
    """All slices of a volume as one tensor (T, S, H, W)."""
    found = list(make_predictor(**options).slices(data))
    assert [index for index, _ in found] == list(range(data.shape[1]))
    return torch.stack([logits for _, logits in found], 1)


@pytest.mark.parametrize("shape", [(5, 20, 30), (3, 32, 32), (4, 50, 33), (2, 100, 17), (1, 1, 1)])
@pytest.mark.parametrize("mirror", [(), (0,), (0, 1)])
def test_tiles_padding_and_mirroring_leave_a_pointwise_model_exact(shape, mirror):
    """Whatever fits or does not fit a tile, each voxel's logit is that of its own intensity."""
    data = np.random.default_rng(0).normal(50, 30, (1, *shape)).astype(np.float32)
    logits = predict(data, tile=32, mirror=mirror)
    assert torch.allclose(logits[1], torch.from_numpy(data[0]) - 50, atol=1e-3)


@pytest.mark.parametrize(("most", "views"), [(4, 4), (2, 2), (1, 1)])
def test_planned_views_are_the_most_that_are_averaged(most, views):
    """A slice costs as many forward passes as views are planned, and stays exact."""
    model = SlabModel(lambda slabs: slabs)
    data = np.random.default_rng(0).normal(50, 30, (1, 1, 20, 20)).astype(np.float32)
    logits = predict(data, models=[model], tile=32, mirror=(0, 1), mirror_views=most)
    assert len(model.calls) == views
    assert torch.allclose(logits[1], torch.from_numpy(data[0]) - THRESHOLD, atol=1e-3)


@pytest.mark.parametrize("shape", [(3, 40, 24), (2, 9, 50), (2, 10, 12)])
def test_all_tiles_of_a_slice_share_its_extremes(shape):
    """Scaled per slice, each voxel's logit is its place between the slice's extremes, whatever tile shows it."""
    data = np.random.default_rng(0).normal(50, 30, (1, *shape)).astype(np.float32)
    data[0, 1, 0, 0] = 900
    lowest, highest = data.min((2, 3), keepdims=True), data.max((2, 3), keepdims=True)
    logits = predict(data, tile=16, models=[SlabModel()], intensities="unit_per_slice")
    expected = torch.from_numpy((data - lowest) / (highest - lowest))[0] - THRESHOLD
    assert torch.allclose(logits[1], expected, atol=1e-4)


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


@pytest.mark.parametrize("num_slices", [1, 2, 3, 4, 5, 11])
@pytest.mark.parametrize("depth", [1, 2, 4, 5])
@pytest.mark.parametrize(("overlap", "batch"), [(0.5, 8), (0.0, 1), (0.8, 5)])
def test_slabs_of_a_model_that_ignores_depth_change_nothing(num_slices: int, depth: int, overlap: float, batch: int):
    """Tiled, mirrored, with context, deeper or shorter than the slab: the same as slice by slice."""
    data = np.random.default_rng(2).normal(50, 30, (1, num_slices, 20, 13)).astype(np.float32)
    alike = {"tile": 16, "mirror": (1,), "context": 1}
    single = predict(data, **alike)
    slabs = predict(data, models=[SlabModel()], slab_depth=depth, depth_overlap=overlap, batch=batch, **alike)
    assert torch.allclose(slabs, single, atol=1e-3)


def test_a_slab_holds_its_own_slices_in_order():
    """What a model says about slab positions is blended by a Gaussian around each slab's middle."""

    def position(slabs: torch.Tensor) -> torch.Tensor:
        return torch.arange(4.0)[None, :, None, None] * 10 + slabs

    data = np.broadcast_to(np.arange(10, dtype=np.float32)[None, :, None, None] * 100, (1, 10, 20, 20)).copy()
    found = predict(data, tile=16, models=[SlabModel(position)], slab_depth=4, batch=12)[1] + THRESHOLD
    weights = np.exp(-0.5 * ((np.arange(4) - 1.5) / 0.5) ** 2)
    total, covered = np.zeros(10), np.zeros(10)
    for first in (0, 2, 4, 6):
        total[first : first + 4] += weights * np.arange(4) * 10
        covered[first : first + 4] += weights
    expected = torch.from_numpy(total / covered + np.arange(10) * 100)[:, None, None].float()
    assert torch.allclose(found, expected.expand(10, 20, 20), atol=1e-2)


@pytest.mark.parametrize(
    ("num_slices", "depth", "batch", "expected"),
    [
        (7, 3, 8, [(2, 3), (2, 3), (1, 3)]),
        (7, 3, 2, [(1, 3)] * 5),
        (2, 5, 8, [(1, 2)]),
        (1, 5, 8, [(1, 1)]),
        (5, 1, 2, [(2, 1), (2, 1), (1, 1)]),
    ],
)
def test_forwards_hold_whole_slabs(num_slices: int, depth: int, batch: int, expected: list[tuple[int, int]]):
    """batch_size counts slices, at least one slab goes at a time, a short volume is one slab of its own depth."""
    model = SlabModel()
    predict(np.zeros((1, num_slices, 16, 16), np.float32), tile=16, models=[model], slab_depth=depth, batch=batch)
    assert model.calls == expected


def test_slices_come_as_soon_as_their_slabs_are_done():
    """With slabs of 4 every 2 slices, two slices come after each forward and the last four after the last."""
    model = SlabModel()
    stream = make_predictor(tile=16, models=[model], slab_depth=4, batch=4).slices(np.zeros((1, 12, 8, 8), np.float32))
    done = [len(model.calls) for _ in stream]
    assert done == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 5, 5]


def test_only_slices_of_unfinished_slabs_are_kept(monkeypatch: pytest.MonkeyPatch):
    """However deep the volume, no more sums of slices live than a slab has slices."""
    living: WeakSet[sliding._SliceSum] = WeakSet()
    created = sliding._SliceSum.__init__

    def counted(self: sliding._SliceSum, *args: object) -> None:
        created(self, *args)
        living.add(self)

    monkeypatch.setattr(sliding._SliceSum, "__init__", counted)
    stream = make_predictor(tile=16, models=[SlabModel()], slab_depth=4, batch=8)
    counts = [len(living) for _ in stream.slices(np.zeros((1, 30, 8, 8), np.float32))]
    assert len(counts) == 30
    assert 0 < max(counts) <= 4


def test_mirrored_views_keep_the_order_of_slices():
    """Mirroring is in plane only: a model that accumulates along depth gets the same slabs."""
    data = np.random.default_rng(3).normal(size=(1, 6, 16, 16)).astype(np.float32)
    options = {"tile": 16, "slab_depth": 6, "models": [SlabModel(lambda slabs: slabs.cumsum(1))]}
    assert torch.allclose(predict(data, mirror=(0, 1), **options), predict(data, **options), atol=1e-4)
    assert torch.allclose(predict(data, **options)[1] + THRESHOLD, torch.from_numpy(data[0].cumsum(0)), atol=1e-4)


@pytest.mark.parametrize("wrong", [{"slab_depth": 0}, {"slab_depth": 2, "depth_overlap": 1.0}])
def test_impossible_slabs_are_errors(wrong: dict[str, float]):
    """Slabs without slices and full overlap are refused."""
    with pytest.raises(ConfigError):
        predict(np.zeros((1, 5, 8, 8), np.float32), tile=16, models=[SlabModel()], **wrong)


def test_planes_are_averaged_voxel_by_voxel():
    """Each plane's logits come back to their voxels; the stored slices alone pass as they come."""
    data = np.random.default_rng(0).normal(50, 30, (1, 5, 9, 7)).astype(np.float32)

    def cut(_across, volume):
        yield from make_predictor(tile=16, models=[SlabModel(lambda slabs: slabs.roll(1, 2))]).slices(volume)

    volume = torch.from_numpy(data[0]) - THRESHOLD
    # one row down is the next row of a stored slice, but the next slice where rows or columns are cut
    ways = {"slices": 1, "rows": 0, "columns": 0}
    inside = (slice(1, None),) * 3
    for planes in [("slices",), ("columns",), ("slices", "rows"), ("slices", "rows", "columns")]:
        found = list(sliding.average_planes(cut, data, planes))
        assert [index for index, _ in found] == list(range(5))
        maps = torch.stack([logits for _, logits in found], 1)
        expected = torch.stack([volume.roll(1, ways[across]) for across in planes]).mean(0)
        assert torch.allclose(maps[1][inside], expected[inside], atol=1e-4)
        assert torch.allclose(maps[0][inside], -expected[inside], atol=1e-4)
