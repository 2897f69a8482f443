"""Cases that a run labels itself: whose labels they get, when they are drawn, and what is not learnt from."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from samunet.artifacts.plan import Plan, resolve_recipe
from samunet.artifacts.workspace import Workspace
from samunet.core.config import save_schema
from samunet.core.errors import DataError, OutOfMemoryError
from samunet.core.log import SilentReporter
from samunet.inference.restore import Restored
from samunet.preprocessing.store import CaseStore, RelabelledCases
from samunet.training import self_training
from samunet.training.data import SliceDataset
from samunet.training.self_training import LABELLED_SHARE, SelfTaughtSlices
from tests.samples import DATASET, make_plan, make_recipe, prepare

LABELLED, UNLABELLED = ["case_0", "case_1"], ["case_2", "case_3", "case_4"]


@dataclass
class Teacher:
    """Stands for a predictor: marks everything, or what a test wants of a case."""

    answers: dict[str, int | Exception]

    def predict_preprocessed(self, data: np.ndarray, record) -> Restored:
        """As a predictor does: on the grid of the record's file."""
        answer = self.answers.get(record.name, 1)
        if isinstance(answer, Exception):
            raise answer
        assert data.shape[1:] == record.file_shape
        return Restored(np.full(record.file_shape, answer, np.uint8))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Plan, Path]:
    """A small preprocessed dataset."""
    workspace = Workspace.locate(workspace=tmp_path_factory.mktemp("data"), environment={})
    plan = prepare(workspace, num_train=5)
    return plan, workspace.store_folder(DATASET, plan.store_key("2d"))


def make_slices(prepared: tuple[Plan, Path], folder: Path, reporter: SilentReporter | None = None) -> SelfTaughtSlices:
    """Two cases with labels, three without."""
    plan, store = prepared
    recipe = resolve_recipe(make_plan(recipes={"none": {"cpu": make_recipe()}}).configuration("2d"), "none", "cpu")
    make = partial(SliceDataset, plan=plan, recipe=recipe, context=0, seed=1, augment=False)
    return SelfTaughtSlices(
        make(CaseStore(store), LABELLED),
        dict.fromkeys(UNLABELLED, CaseStore(store)),
        make=make,
        folder=folder,
        labels=plan.label_spec,
        seed=1,
        reporter=reporter or SilentReporter(),
    )


def share_of_own_labels(slices: SelfTaughtSlices, number: int = 200) -> float:
    """How many samples hold what the teacher says: a structure in every voxel inside the image."""
    targets = [(target[valid > 0] == 1).all() for _, valid, target in (slices[0, index] for index in range(number))]
    return float(np.mean([bool(found) for found in targets]))


def teach(slices: SelfTaughtSlices, lesson: int = 1, *, seconds: float | None = None, **answers: int | Exception):
    """One lesson; the clock goes on by a second whenever it is read."""
    ticks = iter(range(1000))
    teacher = Teacher(answers)
    slices.teach(teacher, lesson, seconds=seconds, clock=lambda: float(next(ticks)))  # type: ignore[arg-type]


def own_labels(prepared: tuple[Plan, Path], folder: Path, *, lessons: int = 1) -> list[str]:
    """Cases that have labels after so many lessons."""
    folders = [folder / f"lesson_{lesson}" for lesson in range(1, lessons + 1)]
    return RelabelledCases(folders, dict.fromkeys(UNLABELLED, CaseStore(prepared[1]))).names()


def test_before_the_first_lesson_only_labelled_cases_are_drawn(prepared, tmp_path: Path):
    """Afterwards a fixed share is still theirs, and the rest has the labels that the run made, not those stored."""
    slices = make_slices(prepared, tmp_path)
    assert share_of_own_labels(slices) == 0
    teach(slices)
    assert share_of_own_labels(slices) == pytest.approx(1 - LABELLED_SHARE, abs=0.12)
    slices.take_up(0)
    assert share_of_own_labels(slices) == 0


def test_a_run_that_goes_on_takes_up_its_last_lesson(prepared, tmp_path: Path):
    """Labels are found again on disk; a lesson in which nothing was labelled leaves those of the one before."""
    teach(make_slices(prepared, tmp_path))
    again = make_slices(prepared, tmp_path)
    again.take_up(1)
    assert share_of_own_labels(again) > 0
    teach(again, 2, case_2=0, case_3=0, case_4=0)
    assert share_of_own_labels(again) > 0
    first = make_slices(prepared, tmp_path)
    first.take_up(2)
    assert all(np.array_equal(first[0, n][2], again[0, n][2]) for n in range(20))


def test_a_case_in_which_nothing_is_found_or_that_fails_is_not_learnt_from(prepared, tmp_path: Path):
    """The other cases are; the user is told of both."""
    reporter = SilentReporter()
    slices = make_slices(prepared, tmp_path, reporter)
    teach(slices, case_2=0, case_3=DataError("the network's output is not finite", case="case_3"))
    assert own_labels(prepared, tmp_path) == ["case_4"]
    said = "\n".join([*reporter.messages, *reporter.warnings])
    assert "labelled 1 of 3 images" in said
    assert "nothing was found in 1" in said
    assert "not learnt from" in said
    teach(slices, 2, case_3=OutOfMemoryError("memory ran out"))
    assert own_labels(prepared, tmp_path, lessons=2) == ["case_2", "case_4"]


def test_a_lesson_ends_with_its_time_and_what_an_earlier_try_left_is_removed(prepared, tmp_path: Path):
    """Of an interrupted try at the same lesson nothing is left; the next lesson labels the same cases first."""
    slices = make_slices(prepared, tmp_path)
    teach(slices)
    teach(slices, seconds=1.5)
    first = own_labels(prepared, tmp_path)
    assert len(first) == 1
    teach(slices, 2, seconds=1.5)
    assert own_labels(prepared, tmp_path, lessons=2) == first


def test_few_own_labels_have_no_more_than_their_share(prepared, tmp_path: Path):
    """One case beside two labelled ones is a third of the samples, not half."""
    slices = make_slices(prepared, tmp_path)
    teach(slices, case_2=0, case_3=0)
    assert share_of_own_labels(slices) == pytest.approx(1 / 3, abs=0.1)


def test_labels_of_an_image_that_has_changed_or_gone_are_not_learnt_from(prepared, tmp_path: Path):
    """What was labelled is told from what is stored now by the hash of its files and its shape."""
    slices = make_slices(prepared, tmp_path)
    teach(slices)
    assert own_labels(prepared, tmp_path) == UNLABELLED
    record = RelabelledCases([tmp_path / "lesson_1"], {"case_2": CaseStore(prepared[1])}).record("case_2")
    save_schema(record.model_copy(update={"source_sha256": "another"}), tmp_path / "lesson_1/records/case_2.json")
    assert own_labels(prepared, tmp_path) == UNLABELLED[1:]
    assert RelabelledCases([tmp_path / "lesson_1"], {}).names() == []


def test_a_full_disk_ends_the_lesson_and_not_the_run(prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What was written before is learnt from, and the user is told once."""
    written = self_training.write_labels_of

    def full(folder: Path, labels: np.ndarray, record) -> None:
        if (folder / "records").is_dir():
            raise RuntimeError("Error while creating the NDArray")
        written(folder, labels, record)

    monkeypatch.setattr(self_training, "write_labels_of", full)
    reporter = SilentReporter()
    slices = make_slices(prepared, tmp_path, reporter)
    teach(slices)
    assert len(own_labels(prepared, tmp_path)) == 1
    assert share_of_own_labels(slices) > 0
    assert len(reporter.warnings) == 1


def test_voxels_come_from_the_store_and_labels_never(prepared, tmp_path: Path):
    """What is read of a case without labels is its image; its record says what the new labels hold."""
    store = CaseStore(prepared[1])
    teach(make_slices(prepared, tmp_path), case_2=2)
    found = RelabelledCases([tmp_path / "lesson_1"], {"case_2": store}).open("case_2")
    assert np.array_equal(found.data[:], store.open("case_2").data[:])
    assert (found.labels[:] == 2).all()
    every = tuple(range(found.record.store_shape[0]))
    assert found.record.label_slices == {"cube": every}
    assert found.record.valid_slices == every
    assert found.record.crop_shape == store.record("case_2").crop_shape
