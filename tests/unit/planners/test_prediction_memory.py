"""The memory of a prediction: the model against forwards that were counted, and how many slices it lets through."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.memory import LIMIT, load_of
from benchmarks.training_step import GpuCasts, LiveBytes, _valueless, build, recipe_of
from samunet.artifacts.plan import ResolvedRecipe
from samunet.core.labels import LabelSpec
from samunet.inference.agreement import ViewAgreement
from samunet.inference.sliding import SlidingOptions, SlidingPredictor
from samunet.planners import memory
from samunet.planners.load import Load

BOTH_AXES, VIEWS = (0, 1), 4
FORWARDS = {
    "one label at 1120 px": ("vit_b", 1120, "lora", "bf16", "folded", {"tile_vox": 512, "num_tokens": 2}),
    "a hundred labels at 1120 px": ("vit_b", 1120, "lora", "bf16", "folded", {"tile_vox": 512, "num_tokens": 101}),
    "in full precision": ("vit_b", 448, "lora", "fp32", "folded_global", {"slices": 8}),
    "with score matrices": ("vit_xs", 448, "lora", "fp32", "upstream", {"slices": 8}),
    "TinyViT": ("vit_t", 448, "full", "fp32", "upstream", {"slices": 8}),
    "TinyViT on a GPU, 40 labels": ("vit_t", 448, "full", "bf16", "upstream", {"slices": 8, "num_tokens": 41}),
    "whole encoder trained": ("vit_b", 448, "full", "bf16", "folded", {"slices": 8}),
    "slabs, progressive upsampling": ("vit_b", 448, "ma_sam", "bf16", "folded", {"slices": 6}),
    "progressive upsampling, 20 labels": ("vit_xs", 224, "ma_sam", "fp32", "upstream", {"slices": 6, "num_tokens": 21}),
    "side path": ("vit_t_xs", 448, "side_path", "fp32", "upstream", {"slices": 4}),
    "side path on a GPU, 20 labels": ("vit_t_xs", 448, "side_path", "bf16", "upstream", {"num_tokens": 21}),
    "side path at stride 2": ("vit_t_xs", 448, "side_path_at_stride_2", "fp32", "upstream", {"slices": 4}),
    "side path at stride 2, 20 labels": (
        "vit_t_xs",
        448,
        "side_path_at_stride_2",
        "bf16",
        "upstream",
        {"num_tokens": 21},
    ),
    "U-Net": ("vit_xs", 448, "nnsam", "fp32", "folded_global", {}),
    "U-Net on a GPU": ("vit_xs", 448, "nnsam", "bf16", "folded", {"slices": 8}),
    "high frequencies": ("vit_b", 448, "sam_adapter", "bf16", "folded", {"slices": 4}),
}


def count(load: Load, *, models: int = 1, mirror: tuple[int, ...] = BOTH_AXES) -> int:
    """Peak bytes beside the weights of averaging one batch over views and models, under fake tensors as on a GPU."""
    meter, recipe = LiveBytes(), recipe_of(load)
    structures = {f"structure {value}": value for value in range(1, load.num_tokens)}
    labels = LabelSpec.from_dataset_json({"labels": {"background": 0, **structures}})
    with ExitStack() as stack:
        for patch in [*_valueless(), FakeTensorMode(), meter, *([GpuCasts()] if load.is_half else [])]:
            stack.enter_context(patch)
        networks = [build(load).eval() for _ in range(models)]
        predictor = sliding(networks, load, recipe, labels, mirror)
        meter.phase, before = "predict", meter.now
        side = load.tile_vox
        batch = torch.rand(load.slices, 3, side, side), torch.ones(load.slices, 1, side, side)
        # Inference mode would take operations apart where autocast does not see them.
        torch.no_grad()(SlidingPredictor._average.__wrapped__)(predictor, *batch, load.slab_depth)
    return meter.peaks["predict"] - before


def sliding(
    networks: list[torch.nn.Module], load: Load, recipe: ResolvedRecipe, labels: LabelSpec, mirror: tuple[int, ...]
) -> SlidingPredictor:
    """What samunet_predict averages views and models with."""
    options = SlidingOptions(0, 0.5, mirror, load.slices, "cpu", load.precision, load.slab_depth)
    return SlidingPredictor(networks, recipe, options, views=ViewAgreement(labels))


@pytest.mark.parametrize("words", FORWARDS.values(), ids=FORWARDS)
def test_predicted_peak_is_that_of_a_prediction(words: tuple[str, int, str, str, str, dict[str, int]]) -> None:
    """Encoder, decoder and the copies of maps on the store's grid: what is alive at most is met within 15 percent."""
    *row, changes = words
    load = load_of(*row, **changes)  # type: ignore[arg-type]
    assert memory.prediction_bytes(load, views=VIEWS) == pytest.approx(count(load), rel=LIMIT)


@pytest.mark.parametrize(("models", "mirror", "views"), [(3, BOTH_AXES, VIEWS), (3, (), 1), (1, (), 1)])
def test_every_model_and_view_is_counted(models: int, mirror: tuple[int, ...], views: int) -> None:
    """The maps of several models stand beside each other; of one model and view there is no sum."""
    load = load_of("vit_xs", 224, "lora", "fp32", "upstream", slices=4, tile_vox=200, num_tokens=60)
    predicted = memory.prediction_bytes(load, models=models, views=views)
    assert predicted == pytest.approx(count(load, models=models, mirror=mirror), rel=LIMIT)


def test_what_a_gpu_was_planned_for_holds_a_prediction_too() -> None:
    """At 1120 px 8 GiB hold a training step of 12 slices, but not the forward of 48; one that fits they do."""
    load = load_of("vit_b", 1120, "lora", "bf16", "folded", tile_vox=512, num_tokens=2)
    for tokens in (2, 101):
        wanted = replace(load, num_tokens=tokens)
        assert memory.prediction_bytes(replace(wanted, slices=48), views=VIEWS) > 7 * memory.GIB
        fitting = memory.largest_prediction(wanted, budget_gib=6, cap=48, views=VIEWS, plane_vox=512**2)
        assert 8 <= fitting < 48
        needed = [
            memory.prediction_bytes(replace(wanted, slices=slices), views=VIEWS, plane_vox=512**2)
            for slices in (fitting, fitting + 1)
        ]
        assert needed[0] <= 6 * memory.GIB < needed[1]


def test_slabs_stay_whole() -> None:
    """The number is one of whole slabs: at most the cap, and one slab where not even that fits."""
    load = load_of("vit_b", 448, "ma_sam", "bf16", "folded")
    assert load.slab_depth == 3
    assert memory.largest_prediction(load, budget_gib=1000, cap=20) == 18
    assert memory.largest_prediction(load, budget_gib=0.001, cap=20) == 3
    assert memory.largest_prediction(load, budget_gib=1000, cap=2) == 3
