"""Preprocessing a dataset: every case once, again only where something changed."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from samunet.artifacts.dataset import Case, DatasetDescription, RawDataset
from samunet.artifacts.plan import Plan
from samunet.artifacts.store import CaseRecord
from samunet.core.errors import StoreError
from samunet.core.log import SilentReporter
from samunet.core.volume import Volume
from samunet.distributed.casewise import Outcome
from samunet.preprocessing.runner import preprocess_dataset, source_hash
from samunet.preprocessing.store import CaseStore

PlanMaker = Callable[..., Plan]


def write_nifti(path: Path, volume: Volume) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(volume.data[0].T, volume.geometry.affine), path)


@pytest.fixture
def dataset(tmp_path: Path, phantom: tuple[Volume, Volume]) -> RawDataset:
    """Three cases as NIfTI files."""
    volume, labels = phantom
    cases = []
    for index in range(3):
        image, label = tmp_path / f"imagesTr/case{index}_0000.nii.gz", tmp_path / f"labelsTr/case{index}.nii.gz"
        write_nifti(image, volume.with_data(volume.data + index * (volume.data != 0).astype(np.int16)))
        write_nifti(label, labels)
        cases.append(Case(f"case{index}", (image,), label))
    description = DatasetDescription(
        channel_names={"0": "MRI"}, labels={"background": 0, "organ": 1, "vessel": 2}, file_ending=".nii.gz"
    )
    return RawDataset(tmp_path, description, tuple(cases))


def run(
    dataset: RawDataset, plan: Plan, processes: int = 1, reporter: SilentReporter | None = None
) -> list[Outcome[CaseRecord]]:
    folder = dataset.folder / "store"
    reporter = reporter or SilentReporter()
    return preprocess_dataset(dataset, plan, "2d", folder, processes=processes, reporter=reporter)


def modified(dataset: RawDataset) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (dataset.folder / "store/data").iterdir()}


def test_every_case_is_stored(dataset: RawDataset, make_plan: PlanMaker) -> None:
    """The store holds each case's voxels and the outcomes its record, in the dataset's order."""
    outcomes = run(dataset, make_plan())
    store = CaseStore(dataset.folder / "store")
    assert [outcome.name for outcome in outcomes] == store.names() == ["case0", "case1", "case2"]
    assert [outcome.result for outcome in outcomes] == [store.record(name) for name in store.names()]
    first, last = store.open("case0").slices(0, 4), store.open("case2").slices(0, 4)
    np.testing.assert_array_equal(last, first + 2)


def test_a_second_run_keeps_what_is_finished(dataset: RawDataset, make_plan: PlanMaker) -> None:
    """Nothing is written again, and the user is told."""
    first = run(dataset, make_plan())
    before, reporter = modified(dataset), SilentReporter()
    second = run(dataset, make_plan(), reporter=reporter)
    assert modified(dataset) == before
    assert [outcome.result for outcome in second] == [outcome.result for outcome in first]
    assert reporter.messages == ["2d: 3 of 3 cases are already preprocessed"]


def test_changed_and_unfinished_cases_are_made_again(
    dataset: RawDataset, make_plan: PlanMaker, phantom: tuple[Volume, Volume]
) -> None:
    """A changed label and a missing completion mark are noticed; the rest is kept."""
    run(dataset, make_plan())
    before = modified(dataset)
    leftover = dataset.folder / "store/data/.partial-abc-case0.b2nd"
    leftover.write_bytes(b"half")
    os.utime(leftover, (0, 0))
    (dataset.folder / "store/records/case0.json").unlink()
    relabelled = phantom[1].with_data(np.minimum(phantom[1].data, 1))
    assert dataset.training[1].label is not None
    write_nifti(dataset.training[1].label, relabelled)
    outcomes = run(dataset, make_plan())
    assert not leftover.exists()
    after = modified(dataset)
    assert [before[f"case{i}.b2nd"] == after[f"case{i}.b2nd"] for i in range(3)] == [False, False, True]
    assert outcomes[1].result is not None
    assert "vessel" not in outcomes[1].result.label_slices


def test_one_bad_case_does_not_stop_the_others(dataset: RawDataset, make_plan: PlanMaker) -> None:
    """A truncated image gives an error that names its case, in several processes, and no stored case."""
    image = dataset.training[1].images[0]
    image.write_bytes(image.read_bytes()[:100])
    outcomes = run(dataset, make_plan(), processes=2)
    assert [outcome.succeeded for outcome in outcomes] == [True, False, True]
    assert outcomes[1].error is not None
    assert outcomes[1].error.case == "case1"
    assert CaseStore(dataset.folder / "store").names() == ["case0", "case2"]


def test_left_out_cases_are_not_made(dataset: RawDataset, make_plan: PlanMaker) -> None:
    """Cases that the plan leaves out appear neither in the store nor among the outcomes."""
    outcomes = run(dataset, make_plan(left_out=("case1",)))
    assert [outcome.name for outcome in outcomes] == ["case0", "case2"]


def test_a_store_of_another_plan_is_refused(dataset: RawDataset, make_plan: PlanMaker) -> None:
    """Voxels of two plans are never mixed in one folder."""
    run(dataset, make_plan())
    with pytest.raises(StoreError, match="another plan"):
        run(dataset, make_plan(spacing=(None, 0.5, 0.5)))


def test_the_side_file_that_is_read_is_a_source(tmp_path: Path) -> None:
    """A changed spacing of an image or of a label map changes the hash of a case whose name ends in a number."""
    case = Case("cell_0001", (tmp_path / "images/cell_0001_0000.tif",), tmp_path / "labels/cell_0001.tif")
    files = [*case.images, *([] if case.label is None else [case.label])]
    for file in files:
        file.parent.mkdir()
        file.write_bytes(b"pages")
    hashes = [source_hash(case)]
    for folder in ("images", "labels"):
        (tmp_path / folder / "cell_0001.json").write_text('{"spacing": [2, 1, 1]}')
        hashes.append(source_hash(case))
    assert len(set(hashes)) == 3
