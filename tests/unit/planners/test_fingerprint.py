"""Facts of cases in memory and of whole datasets on disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from samunet.artifacts.dataset import DatasetDescription, RawDataset
from samunet.core.errors import DataError
from samunet.core.files import write_json
from samunet.core.geometry import Geometry
from samunet.core.labels import LabelSpec
from samunet.core.log import SilentReporter
from samunet.core.volume import Volume
from samunet.datasets.raw import load_raw_dataset
from samunet.imageio import write_image, write_labels
from samunet.planners import fingerprint as module
from samunet.planners.fingerprint import extract_fingerprint, inputs_hash, majority_orientation, measure_case
from tests.planning_facts import case as facts_of

LABELS = LabelSpec({"ball": (1,)}, ignore=2)
GRID = Geometry.from_spacing((12, 20, 24), (3.0, 1.0, 1.5))


def _volume(seed: int = 0) -> tuple[Volume, Volume]:
    generator = np.random.default_rng(seed)
    image = np.zeros((1, *GRID.shape), dtype=np.float32)
    image[0, 2:10, 3:18, 4:20] = generator.integers(50, 200, (8, 15, 16))
    labels = np.zeros((1, *GRID.shape), dtype=np.uint8)
    labels[0, 4:8, 5:12, 6:14] = 1
    labels[0, 4:8, 12:15, 6:14] = 2
    return Volume(image, GRID), Volume(labels, GRID)


def _dataset(folder: Path, *, num_cases: int = 3, empty: str | None = None) -> RawDataset:
    for index in range(num_cases):
        name = f"case_{index}"
        image, labels = _volume(index)
        if name == empty:
            labels = labels.with_data(labels.data * 0)
        write_image(folder / "imagesTr" / f"{name}_0000.nii.gz", image)
        write_labels(folder / "labelsTr" / f"{name}.nii.gz", labels.data[0], geometry=GRID)
    description = DatasetDescription(
        channel_names={"0": "MRI"}, labels={"background": 0, "ball": 1, "ignore": 2}, file_ending=".nii.gz"
    )
    write_json(folder / "dataset.json", description.model_dump(exclude_none=True))
    return load_raw_dataset(folder)


@pytest.fixture(autouse=True)
def few_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "NUM_SAMPLES_DATASET", 3000)


def test_one_case() -> None:
    """Crop, foreground and slices are counted without background and without the ignore label."""
    found = measure_case(*_volume(), labels=LABELS, num_samples=1000)
    assert found.facts.shape_after_crop == (8, 15, 16)
    assert found.facts.relative_size_after_crop == pytest.approx(8 * 15 * 16 / (12 * 20 * 24))
    assert found.facts.num_foreground_voxels == 4 * 7 * 8
    assert found.facts.num_foreground_slices == (4, 7, 8)
    assert found.facts.spacing == pytest.approx((3.0, 1.0, 1.5))
    assert list(found.facts.structures) == ["ball"]
    assert found.drawn[0].total == 1000
    image, labels = _volume()
    allowed = np.unique(image.data[labels.data == 1])
    assert np.isin(found.drawn[0].values, allowed).all()


def test_dataset_fingerprint(tmp_path: Path) -> None:
    """All cases are measured, statistics are those of the draws, and a case without foreground harms none."""
    dataset = _dataset(tmp_path / "Dataset001_Balls", empty="case_1")
    found = extract_fingerprint(dataset, processes=1, reporter=SilentReporter())
    assert list(found.cases) == ["case_0", "case_1", "case_2"]
    draws = []
    for index in (0, 2):
        image, labels = _volume(index)
        draws.append(np.random.RandomState(1234).choice(image.data[labels.data == 1], 1000))
    expected = np.concatenate(draws).astype(np.float64)
    statistics = found.foreground_intensities[0]
    assert statistics is not None
    assert statistics.mean == pytest.approx(expected.mean(), rel=1e-6)
    assert statistics.std == pytest.approx(expected.std(), rel=1e-6)
    assert statistics.percentile_99_5 == pytest.approx(np.percentile(expected, 99.5), rel=1e-6)
    assert found.zscore_ranges[0] is not None


def test_skipped_cases_are_left_out(tmp_path: Path) -> None:
    """Rejected cases appear only in the list of what was left out; if none remains that is an error."""
    dataset = _dataset(tmp_path / "Dataset001_Balls")
    found = extract_fingerprint(dataset, processes=1, reporter=SilentReporter(), skip=["case_2"])
    assert list(found.cases) == ["case_0", "case_1"]
    assert found.left_out == ("case_2",)
    with pytest.raises(DataError, match="no training case"):
        extract_fingerprint(dataset, processes=1, reporter=SilentReporter(), skip=[*found.cases, "case_2"])


def test_an_unreadable_case_is_named(tmp_path: Path) -> None:
    """A broken file stops the fingerprint with the case's name and what to do."""
    dataset = _dataset(tmp_path / "Dataset001_Balls")
    dataset.training[1].images[0].write_bytes(b"no image")
    with pytest.raises(DataError) as caught:
        extract_fingerprint(dataset, processes=1, reporter=SilentReporter())
    assert caught.value.case == "case_1"


def test_finished_cases_are_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a cache an interrupted run goes on where it stopped, and gives the same fingerprint."""
    dataset = _dataset(tmp_path / "Dataset001_Balls")
    cache = tmp_path / "cache"
    first = extract_fingerprint(dataset, processes=1, reporter=SilentReporter(), cache=cache)
    measured: list[str] = []
    original = module.extract_case_facts

    def counting(case: module.Case, **options: object) -> module.CaseMeasurement:
        measured.append(case.name)
        return original(case, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "extract_case_facts", counting)
    next(cache.glob("case_1*")).unlink()
    assert extract_fingerprint(dataset, processes=1, reporter=SilentReporter(), cache=cache) == first
    assert measured == ["case_1"]


def test_inputs_hash_sees_changed_files(tmp_path: Path) -> None:
    """The hash is stable, and changes with a file's content, with a missing file and with dataset.json."""
    dataset = _dataset(tmp_path / "Dataset001_Balls")
    before = inputs_hash(dataset.training, {"a": 1})
    assert inputs_hash(list(reversed(dataset.training)), {"a": 1}) == before
    assert inputs_hash(dataset.training, {"a": 2}) != before
    dataset.training[0].images[0].write_bytes(b"changed")
    changed = inputs_hash(dataset.training, {"a": 1})
    assert changed != before
    dataset.training[0].images[0].unlink()
    assert inputs_hash(dataset.training, {"a": 1}) not in (before, changed)


def test_facts_hash_ignores_where_the_files_lie(tmp_path: Path) -> None:
    """A copied dataset has the same facts, so its plan stays valid."""
    found = extract_fingerprint(_dataset(tmp_path / "Dataset001_Balls"), processes=1, reporter=SilentReporter())
    copied = found.model_copy(update={"inputs_sha256": "other", "verified": True})
    assert copied.facts_sha256 == found.facts_sha256
    assert found.model_copy(update={"left_out": ("x",)}).facts_sha256 != found.facts_sha256


def test_majority_orientation_is_independent_of_order() -> None:
    """The most frequent codes win; a tie goes to the first in the alphabet, whatever the order of cases."""
    one, two = facts_of(codes=("S", "A", "R")), facts_of(codes=("A", "I", "L"))
    assert majority_orientation([one, one, two]) == ("S", "A", "R")
    assert majority_orientation([one, two]) == majority_orientation([two, one]) == ("A", "I", "L")


def test_real_dataset_is_measured(shared_data: Path) -> None:
    """A few real cases give facts within what anatomy and scanners allow."""
    dataset = load_raw_dataset(shared_data / "Dataset021_SunnybrookLV")
    kept = {case.name for case in dataset.training[:2]}
    skip = [case.name for case in dataset.training if case.name not in kept]
    found = extract_fingerprint(dataset, processes=1, reporter=SilentReporter(), skip=skip)
    for facts in found.cases.values():
        assert set(facts.structures) <= set(dataset.labels.names)
        assert all(0 < value <= 1 for value in facts.effective_resolution)


def _spoil(dataset: RawDataset, index: int, how: str) -> Path:
    """Make a case one that cannot be measured; returns the file to blame."""
    case = dataset.training[index]
    image, labels = _volume(index)
    file = case.images[0]
    if how in ("nan", "infinite"):
        image.data[0, 0, 0, 0] = np.nan if how == "nan" else np.inf
        write_image(file, image)
    elif how == "damaged":
        file.write_bytes(b"no image")
    elif how == "label shape":
        assert case.label is not None
        file = case.label
        smaller = Geometry.from_spacing((12, 20, 23), GRID.spacing)
        write_labels(file, labels.data[0, ..., :-1], geometry=smaller)
    else:
        write_image(file, image.with_data(np.concatenate([image.data] * 3)))
    return file


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize("how", ["nan", "infinite", "damaged", "label shape"])
def test_what_cannot_be_measured_is_one_message(tmp_path: Path, how: str) -> None:
    """It names case, file, what was found and what to do, each once, and nothing else is printed."""
    dataset = _dataset(tmp_path / "Dataset001_Balls")
    file = _spoil(dataset, 1, how)
    with pytest.raises(DataError) as caught:
        extract_fingerprint(dataset, processes=1, reporter=SilentReporter())
    text = str(caught.value)
    assert (caught.value.case, caught.value.file) == ("case_1", file)
    for row in ("case:", "file:", "found:", "what to do:", "--skip-bad-cases"):
        assert text.count(row) == 1, text
    assert "1 of 3 cases could not be measured" in text


@pytest.mark.parametrize("how", ["nan", "damaged", "label shape"])
def test_leaving_out_while_measuring_is_leaving_out_before(tmp_path: Path, how: str) -> None:
    """The fingerprint is the one of a run that was told to skip these cases, whichever they are."""
    dataset = _dataset(tmp_path / "Dataset001_Balls", num_cases=4)
    expected = extract_fingerprint(dataset, processes=1, reporter=SilentReporter(), skip=["case_0", "case_2"])
    _spoil(dataset, 2, how)
    reporter = SilentReporter()
    found = extract_fingerprint(
        dataset, processes=1, reporter=reporter, skip=["case_0"], skip_unmeasured=True, cache=tmp_path / "cache"
    )
    assert found == expected
    assert found.left_out == ("case_0", "case_2")
    assert len(reporter.warnings) == 1
    assert "case_2" in reporter.warnings[0]
    for index in (1, 3):
        _spoil(dataset, index, "nan")
    with pytest.raises(DataError, match="no training case is left"):
        extract_fingerprint(dataset, processes=1, reporter=reporter, skip=["case_0"], skip_unmeasured=True)
