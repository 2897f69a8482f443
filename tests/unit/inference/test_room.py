"""Memory that is short while predicting: fewer slices at once, one line, the same masks; then an error that helps."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from samunet.artifacts.method import DepthAttention, NoDepth
from samunet.core.errors import OutOfMemoryError
from samunet.core.log import SilentReporter
from samunet.inference import room
from samunet.inference.predictor import Predictor
from tests.planted import planted_predictor
from tests.samples import make_case, make_plan, make_recipe

PLENTY, ROOM_FOR_SOME = 1000.0, 0.003


class Bright(nn.Module):
    """Marks what is brighter than the image's mean, on a device that holds so many slices at once.

    Args:
        most: Slices.
        error: What more of them raise.

    Attributes:
        seen: Slices of every forward.
    """

    def __init__(self, most: int = 99, error: type[Exception] = torch.OutOfMemoryError) -> None:
        super().__init__()
        self.most, self.error = most, error
        self.seen: list[int] = []

    def forward(self, images: Tensor, *, depth: int = 1) -> Tensor:
        """(B, C, S, S) to (B, 2, S, S)."""
        self.seen.append(len(images))
        if len(images) > self.most:
            raise self.error("CUDA out of memory. Tried to allocate 2 GiB.\nDetails")
        middle = images[:, images.shape[1] // 2]
        return torch.stack([-middle, middle], 1)


@pytest.fixture(autouse=True)
def plenty_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine's own memory decides nothing."""
    monkeypatch.setattr(room, "available_gib", lambda _: PLENTY)


def predictor(model: nn.Module, reporter: SilentReporter | None = None, *, slab: int = 1, batch: int = 4) -> Predictor:
    """A predictor of 32-voxel tiles whose forwards hold twice the batch."""
    depth = DepthAttention() if slab > 1 else NoDepth()
    recipe = make_recipe(batch_size=batch, depth=depth, mirror_views=1)
    plan = make_plan(labels={"background": 0, "ball": 1}, slab_depth=slab, recipes={"none": {"cpu": recipe}})
    return planted_predictor(plan, model=model, reporter=reporter or SilentReporter())


def labels(found: Predictor, *, shape: tuple[int, int, int] = (9, 30, 26)) -> NDArray[np.integer]:
    """The mask of a volume of nine slices."""
    return found.predict(make_case(0, shape=shape)[0], name="case_0").labels


def test_an_image_unlike_the_training_cases_is_cut_in_one_plane() -> None:
    """Thick slices, a few slices or a huge volume are predicted as they are stored, and it is said why."""
    planes = ("slices", "rows", "columns")
    recipe = make_recipe(batch_size=4, mirror_views=1, planes=planes)
    plan = make_plan(labels={"background": 0, "ball": 1}, recipes={"none": {"cpu": recipe}})
    volume, _ = make_case(0, shape=(9, 30, 26))
    for spacing, number, words in (((2.0, 1.0, 1.0), 9 + 30 + 26, ""), ((5.0, 1.0, 1.0), 9, "5.0 times longer")):
        reporter, model = SilentReporter(), Bright()
        found = planted_predictor(plan, model=model, reporter=reporter)
        found.predict_array(volume.data, spacing=spacing)
        assert sum(model.seen) == number
        assert bool(reporter.messages) == bool(words)
        assert all(words in message for message in reporter.messages)


def test_a_prediction_that_ran_out_of_memory_ends_as_if_it_had_not() -> None:
    """Half the slices, then half of these, with a line each; the mask is the same, and later cases start there."""
    expected = labels(predictor(Bright()))
    reporter, model = SilentReporter(), Bright(3)
    narrow = predictor(model, reporter)
    assert set(np.unique(expected)) == {0, 1}
    assert np.array_equal(labels(narrow), expected)
    assert reporter.messages == [
        "memory ran out while predicting case_0: 4 slices at once instead of 8; going on",
        "memory ran out while predicting case_0: 2 slices at once instead of 4; going on",
    ]
    assert model.seen == [8, 4, 2, 2, 2, 2, 1]
    model.seen.clear()
    assert np.array_equal(labels(narrow), expected)
    assert len(reporter.messages) == 2
    assert set(model.seen) == {2, 1}
    assert narrow.batch_size == 2


def test_what_the_models_say_of_their_masks_is_counted_once() -> None:
    """Sums over the slices of a prediction that failed half-way are not those of the one that follows."""

    class Late(Bright):
        def forward(self, images: Tensor, *, depth: int = 1) -> Tensor:
            if len(self.seen) == 1:
                self.most = 4
            return super().forward(images, depth=depth)

    def said(model: nn.Module) -> object:
        found = predictor(model)
        volume = make_case(0, shape=(9, 30, 26))[0]
        return found.predict_prepared(found.preprocess(volume), with_signs=True).signs

    assert said(Late(8)) == said(Bright())


def test_where_one_slice_does_not_fit_the_error_says_what_to_do() -> None:
    """It is the project's own, names case, device and remedy, and comes after every smaller number was tried."""
    model = Bright(0)
    with pytest.raises(OutOfMemoryError, match="memory of cpu ran out") as failed:
        labels(predictor(model))
    assert model.seen == [8, 4, 2, 1]
    assert failed.value.case == "case_0"
    assert failed.value.found == "CUDA out of memory. Tried to allocate 2 GiB."
    assert "machine with more memory" in str(failed.value.todo)


def test_slabs_stay_whole() -> None:
    """Of slabs of three, two slabs at once become one, which is the least."""
    model = Bright(2)
    with pytest.raises(OutOfMemoryError):
        labels(predictor(model, slab=3, batch=3))
    assert model.seen == [6, 3]


def test_other_errors_are_not_tried_again() -> None:
    """What says nothing of memory fails at once."""
    model = Bright(3, error=ValueError)
    with pytest.raises(ValueError, match="out of memory"):
        labels(predictor(model))
    assert model.seen == [8]


def test_slices_at_once_are_those_that_fit_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """Less free memory, fewer slices per forward, without running out of it first and without another mask."""
    expected, seen = labels(predictor(Bright())), []
    for gib in (PLENTY, ROOM_FOR_SOME, 0.0):
        monkeypatch.setattr(room, "available_gib", lambda _, gib=gib: gib)
        model = Bright(99)
        assert np.array_equal(labels(predictor(model)), expected)
        seen.append(model.seen[0])
    assert seen[0] == 8
    assert 1 < seen[1] < 8
    assert seen[2] == 1


def test_a_cpu_keeps_its_small_batches() -> None:
    """A recipe for a GPU predicts there with no more slices at once than one for the CPU at most does."""
    model = Bright(99)
    labels(predictor(model, batch=24), shape=(40, 30, 26))
    assert max(model.seen) == 16


def test_free_memory_of_a_gpu_is_what_torch_and_others_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    """What nobody holds and what torch holds unused, less a fifth; on a CPU what the system leaves."""
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (3 << 30, 8 << 30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 4 << 30)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 2 << 30)
    assert room.available_gib("cuda:0") == pytest.approx(4.0)
    monkeypatch.setattr(room, "cpu_memory", lambda: (7.5, "planted"))
    assert room.available_gib("cpu") == 7.5
