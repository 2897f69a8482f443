"""What a step falls back to, in which order, and that its gradient stays the same."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from samunet.artifacts.method import Method, PromptMethod
from samunet.artifacts.model_spec import STOCK_TOKENS, get_spec
from samunet.artifacts.plan import Recipe, ResolvedRecipe, strip_reasons
from samunet.core.labels import IGNORE_INDEX
from samunet.models.device import ran_out
from samunet.models.sam.network import build_network
from samunet.models.segmentation import SegmentationModel
from samunet.planners import memory
from samunet.training.data import Sample
from samunet.training.fallback import Footprint, Ladder, Volatile, in_advance, ladder_of, predicted_gib
from samunet.training.gradients import accumulate
from samunet.training.objective import Objective, SemanticObjective
from samunet.training.prompted import NO_CLICK, PromptedObjective, PromptedSample
from tests.samples import lora_encoder, make_recipe
from tests.unit.models.model_helpers import METHODS, base_file, build, perturb, recipe

TILE, INPUT = 32, 64
PLANNED = Footprint(parts=1, checkpointing=False)


def footprints(ladder: Ladder, start: Footprint = PLANNED) -> Iterator[tuple[int, bool]]:
    """All footprints below a start, as (parts, checkpointing)."""
    below = ladder.below(start)
    while below is not None:
        yield below.parts, below.checkpointing
        below = ladder.below(below)


def small(**changes: object) -> tuple[SegmentationModel, ResolvedRecipe]:
    """A perturbed small model without batch norm."""
    values = {"backbone": "vit_xs", "input_size": INPUT, "tile_vox": TILE, **changes}
    made: Recipe = make_recipe(**values)
    resolved = strip_reasons(made, "none", "cpu", slab_depth=1)
    num_tokens = STOCK_TOKENS if resolved.method.promptable else 3
    torch.manual_seed(1)
    network = build_network(get_spec(resolved.backbone), image_size=INPUT, num_tokens=num_tokens)
    model = SegmentationModel(network, channel_input=nn.Identity(), method=resolved.method)
    perturb(model)
    return model, resolved


def slices(number: int, *, maps: int = 1, seed: int = 0) -> Sample:
    """Random slices with less known in each than in the one before, one structure on the first two only."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(number, 1, 3, TILE, TILE, generator=generator)
    target = torch.randint(0, 2, (number, 1, maps, TILE, TILE), generator=generator).to(torch.int16)
    target[:2, ..., 10:20] += int(maps == 1)
    for index in range(number):
        target[index, ..., : 4 * index] = IGNORE_INDEX
    return image, torch.ones(number, 1, 1, TILE, TILE), target


def prompted_slices(number: int) -> PromptedSample:
    """Slices with boxes, with clicks, and the last without a prompt."""
    image, valid, target = slices(number)
    target = target.clamp(max=1)
    boxes = torch.tensor([4.0, 4.0, 20.0, 24.0]).repeat(number, 1, 1)
    labels = torch.full((number, 1, 1), NO_CLICK)
    has_box = torch.zeros(number, 1, dtype=torch.bool)
    has_box[0], labels[1:-1] = True, 1
    target[-1] = IGNORE_INDEX
    points = torch.full((number, 1, 1, 2), 12.0)
    return PromptedSample(image, valid, target, points, labels, boxes, has_box)


def gradients(
    model: SegmentationModel, objective: Objective, batch: tuple[Tensor, ...], *, pieces: int, parts: int = 1
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of a batch."""
    model.zero_grad(set_to_none=True)
    scaler = torch.amp.GradScaler(enabled=False)
    loss = accumulate(model, objective, batch, parts=parts, pieces=pieces, least=1, scaler=scaler)
    return loss, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def largest_difference(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    """Of all gradients, relative to the largest of them."""
    assert first.keys() == second.keys()
    scale = max(float(value.abs().max()) for value in first.values())
    return max(float((first[name] - second[name]).abs().max()) for name in first) / scale


def test_blocks_are_recomputed_first_and_then_the_step_is_cut():
    """Without batch norm the pieces double until one sample is left, from the planned parts on."""
    assert list(footprints(Ladder(6, 1, 1, True))) == [(1, True), (2, True), (4, True), (6, True)]
    assert list(footprints(Ladder(8, 2, 1, True), Footprint(2, True))) == [(4, True), (8, True)]
    assert list(footprints(Ladder(4, 1, 1, False))) == [(2, False), (4, False)]
    assert list(footprints(Ladder(1, 1, 1, False))) == []


@pytest.mark.parametrize(
    ("batch", "depth", "planned", "expected"),
    [
        (24, 1, 1, [(1, True), (2, True), (3, True)]),
        (8, 1, 1, [(1, True)]),
        (4, 1, 1, [(1, True)]),
        (32, 1, 2, [(2, True), (4, True)]),
        (16, 4, 1, [(1, True), (2, True)]),
        (16, 8, 1, [(1, True)]),
    ],
)
def test_batch_norm_that_trains_keeps_eight_slices_of_two_samples(
    batch: int, depth: int, planned: int, expected: list[tuple[int, bool]]
):
    """A TinyViT that trains fully is checkpointed, then cut only as far as its statistics allow."""
    chosen = recipe(batch_size=batch, accumulation_steps=planned)
    model = build(chosen).model.train()
    resolved = recipe(batch_size=batch, accumulation_steps=planned, slab_depth=depth)
    assert list(footprints(ladder_of(model, resolved), Footprint(planned, False))) == expected


@pytest.mark.parametrize(
    ("method", "expected"), [("frozen", [(2, False)]), ("lora", [(1, True), (2, True)]), ("full", [(1, True)])]
)
def test_the_ladder_follows_what_trains(method: str, expected: list[tuple[int, bool]], tmp_path: Path):
    """A frozen encoder has nothing to recompute, and frozen batch norm does not mind small pieces."""
    chosen = recipe(method=METHODS[method], weights_kind="ssl")
    model = build(chosen, weights=base_file(tmp_path, get_spec(chosen.backbone), image_size=112)).model
    assert list(footprints(ladder_of(model, chosen))) == expected


@pytest.mark.parametrize("maps", [1, 3], ids=["labels", "regions"])
@pytest.mark.parametrize(("parts", "pieces"), [(1, 4), (2, 3)])
def test_more_pieces_give_the_same_gradient(maps: int, parts: int, pieces: int):
    """Dice over all slices and unevenly known voxels included, whatever the loss is the mean of."""
    model, chosen = small()
    objective = SemanticObjective(chosen, has_regions=maps > 1, device="cpu")
    batch = slices(6, maps=maps)
    loss, whole = gradients(model, objective, batch, parts=parts, pieces=1)
    cut_loss, cut = gradients(model, objective, batch, parts=parts, pieces=pieces)
    other = gradients(model, objective, batch, parts=3, pieces=1)[1]
    assert float(cut_loss) == pytest.approx(float(loss), rel=1e-5)
    assert largest_difference(whole, cut) < 1e-4
    assert largest_difference(whole, other) > 1e-2


def test_more_pieces_give_the_same_gradient_of_prompted_slices():
    """The mean runs over the slices that are prompted, of which one piece has none."""
    model, chosen = small(prompts=PromptMethod(kind="mixed", corrections=1))
    objective = PromptedObjective(chosen, device="cpu")
    batch = prompted_slices(4)
    loss, whole = gradients(model, objective, batch, pieces=1)
    cut_loss, cut = gradients(model, objective, batch, pieces=4)
    other = gradients(model, objective, batch, parts=4, pieces=1)[1]
    assert float(cut_loss) == pytest.approx(float(loss), rel=1e-5)
    assert largest_difference(whole, cut) < 1e-4
    assert largest_difference(whole, other) > 1e-2


def test_a_batch_of_which_nothing_is_known_costs_nothing_in_pieces():
    """Loss and gradient are zero, not NaN."""
    model, chosen = small()
    image, valid, target = slices(2)
    objective = SemanticObjective(chosen, has_regions=False, device="cpu")
    loss, found = gradients(model, objective, (image, valid, torch.full_like(target, IGNORE_INDEX)), pieces=2)
    assert float(loss) == 0
    assert found
    assert all(float(value.abs().max()) == 0 for value in found.values())


class _Noisy:
    """An objective that draws a number in each forward and remembers it."""

    def __init__(self) -> None:
        self.drawn: list[float] = []

    def loss(self, model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        return self.sums(model, batch)[0]

    def sums(self, model: nn.Module, batch: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        self.drawn.append(float(torch.rand(())))
        return (model(batch[0]).sum(),)

    def loss_of(self, sums: tuple[Tensor, ...]) -> Tensor:
        return sums[0]


def test_both_runs_of_a_piece_are_the_same_and_count_once():
    """Dropout would draw alike in both, and batch norm's statistics see every piece once."""
    model, objective = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).train(), _Noisy()
    scaler = torch.amp.GradScaler(enabled=False)
    batch = (torch.randn(6, 3, 4, 4),)
    accumulate(model, objective, batch, parts=1, pieces=3, least=2, scaler=scaler)  # type: ignore[arg-type]
    assert len(set(objective.drawn[:3])) == 3
    assert objective.drawn[:3] == objective.drawn[3:]
    assert int(model[1].num_batches_tracked) == 3


def test_pieces_are_never_smaller_than_allowed():
    """Seven samples in pieces of at least three are cut in two, whatever is asked for."""
    model, objective = nn.Sequential(nn.Conv2d(3, 4, 1)), _Noisy()
    scaler = torch.amp.GradScaler(enabled=False)
    batch = (torch.randn(7, 3, 4, 4),)
    accumulate(model, objective, batch, parts=1, pieces=4, least=3, scaler=scaler)  # type: ignore[arg-type]
    assert len(objective.drawn) == 4


def test_what_a_forward_changes_is_put_back():
    """Random state and running statistics are those of before."""
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Dropout(0.5)).train()
    images = torch.randn(2, 3, 4, 4) + 5
    start = Volatile.of(model)
    first = model(images)
    changed = model[0].running_mean.clone()
    start.restore()
    assert float(changed.min()) > 0.1
    assert model[0].running_mean.tolist() == [0, 0, 0]
    assert int(model[0].num_batches_tracked) == 0
    assert torch.equal(model(images), first)


def test_running_out_of_memory_is_recognised():
    """By the error of a GPU, by what the CPU's allocator really says, and nothing else."""
    with pytest.raises(RuntimeError) as refused:
        torch.empty(1 << 52, dtype=torch.uint8)
    assert ran_out(refused.value)
    assert ran_out(torch.OutOfMemoryError("CUDA out of memory"))
    assert ran_out(RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."))
    assert ran_out(RuntimeError("MPS backend out of memory (MPS allocated: 9 GB). Tried to allocate 2 GB."))
    assert ran_out(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    assert ran_out(RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"))
    assert ran_out(RuntimeError("CUDA error: out of memory"))
    assert not ran_out(RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED"))
    assert not ran_out(RuntimeError("shapes do not match"))
    assert not ran_out(ValueError("DefaultCPUAllocator: not enough memory"))


def test_the_first_footprint_that_fits_is_taken_in_advance():
    """One that saves nothing is passed over; without any that fits, the smallest is taken."""
    ladder = Ladder(8, 1, 1, True)
    need = {(1, False): 9.0, (1, True): 9.0, (2, True): 5.0, (4, True): 3.0, (8, True): 3.0}

    def chosen(available_gib: float) -> tuple[int, bool]:
        found = in_advance(ladder, PLANNED, lambda f: need[f.parts, f.checkpointing], available_gib)
        return found.parts, found.checkpointing

    assert [chosen(available) for available in (9.0, 8.0, 4.0, 1.0)] == [(1, False), (2, True), (4, True), (4, True)]


@pytest.mark.parametrize("depth", [1, 2])
def test_the_prediction_is_the_planners(depth: int):
    """It is that of the largest part's slices, and every footprint below takes less."""
    method = Method(encoder=lora_encoder())
    chosen = recipe(backbone="vit_b", method=method, batch_size=20, accumulation_steps=2, slab_depth=depth)
    planned, ladder = Footprint(2, False), Ladder(20 // depth, 2, 1, True)
    load = memory.Load(get_spec("vit_b"), 112, 64, 3, 10, method, slab_depth=depth, accumulates=True)
    assert predicted_gib(chosen, 3, planned) == memory.memory_gib(load)
    found = [predicted_gib(chosen, 3, Footprint(*below)) for below in footprints(ladder, planned)]
    assert found[-1] == memory.memory_gib(replace(load, slices=depth, checkpointing=True))
    assert all(a >= b for a, b in pairwise([predicted_gib(chosen, 3, planned), *found]))
