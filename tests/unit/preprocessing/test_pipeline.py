"""One case through all steps, and the record that says how to come back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from samunet.artifacts.dataset import Case
from samunet.artifacts.plan import Plan
from samunet.core.errors import DataError
from samunet.core.geometry import AxisOperation, Geometry
from samunet.core.labels import LARGEST_VALUE, LabelSpec
from samunet.core.volume import Volume
from samunet.preprocessing.checks import check_case
from samunet.preprocessing.pipeline import preprocess_case

PlanMaker = Callable[..., Plan]
Phantom = tuple[Volume, Volume]


def test_crop_is_recorded_and_voxels_are_kept_where_nothing_is_resampled(
    make_plan: PlanMaker, phantom: Phantom
) -> None:
    """Without normalization and resampling the store holds the voxels of the recorded crop."""
    volume, labels = phantom
    case = preprocess_case(*phantom, plan=make_plan(), configuration="2d", name="a", source_sha256="hash")
    record = case.record
    assert (record.crop_start, record.crop_stop) == ((1, 3, 2), (5, 17, 16))
    np.testing.assert_array_equal(case.data[0], volume.data[0, 1:5, 3:17, 2:16])
    assert case.data.dtype == np.float32
    assert case.labels is not None
    assert case.labels.dtype == np.int16
    np.testing.assert_array_equal(case.labels, labels.data[0, 1:5, 3:17, 2:16])
    assert record.store_shape == record.crop_shape == case.data.shape[1:]
    assert record.store_spacing == (3.0, 1.0, 1.0)
    assert record.anatomical_axes == ("superior-inferior", "anterior-posterior", "left-right")
    assert record.source_sha256 == "hash"


def test_slices_with_structures_are_listed(make_plan: PlanMaker, phantom: Phantom) -> None:
    """The record lists, in store slices, where each structure is; absent structures are not listed."""
    plan = make_plan(labels={"background": 0, "organ": 1, "vessel": 2, "absent": 3})
    record = preprocess_case(*phantom, plan=plan, configuration="2d", name="a").record
    assert record.label_slices == {"organ": (1, 2, 3), "vessel": (2,)}
    assert record.valid_slices == (0, 1, 2, 3)


def test_undeclared_label_values_are_refused(make_plan: PlanMaker, phantom: Phantom) -> None:
    """A value that nothing declares is stored neither as itself nor, cut to the store's 16 bits, as a structure."""
    volume, labels = phantom
    marked = labels.data.astype(np.int32)
    marked[:, 3, 8, 8] = 2**16 + 1
    with pytest.raises(DataError, match="does not declare") as caught:
        preprocess_case(volume, labels.with_data(marked), plan=make_plan(), configuration="2d", name="odd")
    assert (caught.value.case, caught.value.found, caught.value.expected) == ("odd", "65537", "0, 1, 2")


def test_the_largest_label_value_is_stored(make_plan: PlanMaker, phantom: Phantom) -> None:
    """The largest value that dataset.json may declare comes back from the store's type as it was."""
    volume, labels = phantom
    plan = make_plan(labels={"background": 0, "organ": 1, "vessel": LARGEST_VALUE})
    high = np.where(labels.data == 2, LARGEST_VALUE, labels.data.astype(np.int32))
    case = preprocess_case(volume, labels.with_data(high), plan=plan, configuration="2d", name="a")
    assert case.labels is not None
    assert set(np.unique(case.labels)) == {0, 1, LARGEST_VALUE}
    assert case.record.label_slices["vessel"] == (2,)


def test_ignored_slices_and_regions(make_plan: PlanMaker, phantom: Phantom) -> None:
    """A slice that is all ignore is not valid, and a region is listed where any of its values is."""
    volume, labels = phantom
    marked = labels.data.copy()
    marked[:, 1] = 9
    marked[:, 2] = 9
    marked[:, 2, 10, 8] = 0
    plan = make_plan(labels={"background": 0, "whole": [1, 2], "core": 2, "ignore": 9}, regions_class_order=(1, 2))
    record = preprocess_case(volume, labels.with_data(marked), plan=plan, configuration="2d", name="a").record
    assert record.label_slices == {"whole": (2, 3), "core": (2,)}
    assert record.valid_slices == (1, 2, 3)


def test_cases_stored_along_other_axes_become_equal(make_plan: PlanMaker, phantom: Phantom) -> None:
    """A case permuted and flipped in its file gives the same stored voxels, and its record tells the operation."""
    volume, labels = phantom
    operation = AxisOperation((2, 0, 1), (True, False, True))
    geometry = operation.apply_geometry(volume.geometry)
    turned = Volume(operation.apply(volume.data), geometry), Volume(operation.apply(labels.data), geometry)
    straight = preprocess_case(volume, labels, plan=make_plan(), configuration="2d", name="a")
    other = preprocess_case(*turned, plan=make_plan(), configuration="2d", name="b")
    np.testing.assert_array_equal(other.data, straight.data)
    np.testing.assert_array_equal(other.labels, straight.labels)
    assert other.record.operation == operation.inverse()
    assert other.record.file_shape == geometry.shape
    assert other.record.canonical_shape == volume.geometry.shape
    assert other.record.anatomical_axes == straight.record.anatomical_axes
    assert other.record.crop_spacing == pytest.approx(straight.record.crop_spacing)
    assert other.record.store_spacing == pytest.approx(straight.record.store_spacing)


def test_two_dimensional_configurations_keep_the_slice_spacing(make_plan: PlanMaker, phantom: Phantom) -> None:
    """With no spacing for the slice axis only the plane is resampled, and the label slices stay."""
    case = preprocess_case(*phantom, plan=make_plan(spacing=(None, 0.5, 0.7)), configuration="2d", name="a")
    assert case.data.shape == (1, 4, 28, 20)
    assert case.record.store_spacing == (3.0, 0.5, 0.7)
    assert case.record.crop_spacing == (3.0, 1.0, 1.0)
    assert case.record.label_slices == {"organ": (1, 2, 3), "vessel": (2,)}


def test_depth_is_resampled_where_the_plan_says_so(make_plan: PlanMaker, phantom: Phantom) -> None:
    """A spacing for the slice axis changes the number of slices."""
    case = preprocess_case(*phantom, plan=make_plan(spacing=(1.5, 1.0, 1.0)), configuration="2d", name="a")
    assert case.data.shape == (1, 8, 14, 14)


def test_normalization_comes_before_resampling(make_plan: PlanMaker, phantom: Phantom) -> None:
    """Mean and deviation are those of the voxels of the file, inside the nonzero region."""
    plan = make_plan(normalization=({"scheme": "zscore", "use_nonzero_mask": True},), spacing=(None, 0.5, 0.5))
    case = preprocess_case(*phantom, plan=plan, configuration="2d", name="a")
    inside = phantom[0].data[phantom[0].data != 0].astype(float)
    top = (inside.max() - inside.mean()) / inside.std()
    assert case.data.max() == pytest.approx(top, rel=1e-5)
    assert abs(case.data.mean()) < 0.05


def test_images_without_labels(make_plan: PlanMaker, phantom: Phantom) -> None:
    """Prediction has no labels, and the record lists none."""
    case = preprocess_case(phantom[0], None, plan=make_plan(), configuration="2d", name="a")
    assert case.labels is None
    assert case.record.label_slices == {}
    assert case.record.valid_slices == ()


def test_labels_never_touch_the_image(make_plan: PlanMaker, phantom: Phantom) -> None:
    """Labels on zeros outside the nonzero region change no voxel, so that prediction sees what training saw."""
    plan = make_plan(normalization=({"scheme": "zscore", "use_nonzero_mask": True},))
    image, labels = phantom[0].data.copy(), np.ones_like(phantom[1].data)
    image[:, 2, 3:8, 2:8] = 0
    volume = phantom[0].with_data(image)
    trained = preprocess_case(volume, phantom[1].with_data(labels), plan=plan, configuration="2d", name="a")
    predicted = preprocess_case(volume, None, plan=plan, configuration="2d", name="a")
    np.testing.assert_array_equal(trained.data, predicted.data)
    assert not trained.data[0, 1, 0:5, 0:6].any()


def test_unusable_cases_are_errors_that_name_the_case(make_plan: PlanMaker, phantom: Phantom) -> None:
    """NaN voxels, a label of another shape, and a wrong number of channels are refused."""
    volume, labels = phantom
    data = volume.data.astype(np.float32)
    data[0, 2, 2, 2:4] = (np.nan, np.inf)
    with pytest.raises(DataError, match="2 of ") as caught:
        preprocess_case(volume.with_data(data), labels, plan=make_plan(), configuration="2d", name="bad")
    assert caught.value.case == "bad"
    small = Volume(labels.data[:, 1:], Geometry.from_spacing((5, 20, 18), (3, 1, 1)))
    with pytest.raises(DataError, match="different shapes"):
        preprocess_case(volume, small, plan=make_plan(), configuration="2d", name="bad")
    mirrored = Volume(labels.data, Geometry(labels.geometry.shape, labels.geometry.affine @ np.diag([-1, 1, 1, 1])))
    with pytest.raises(DataError, match="different places") as caught:
        preprocess_case(volume, mirrored, plan=make_plan(), configuration="2d", name="bad")
    assert "".join(mirrored.geometry.codes) in str(caught.value)
    two = make_plan(normalization=({"scheme": "none"}, {"scheme": "none"}))
    with pytest.raises(DataError, match="2 channels"):
        preprocess_case(volume, labels, plan=two, configuration="2d", name="bad")


def test_an_image_of_zeros_passes(make_plan: PlanMaker, phantom: Phantom) -> None:
    """An empty image is processed whole, to zeros, whatever the normalization."""
    plan = make_plan(normalization=({"scheme": "zscore", "use_nonzero_mask": True},))
    empty = phantom[0].with_data(np.zeros_like(phantom[0].data))
    case = preprocess_case(empty, phantom[1], plan=plan, configuration="2d", name="empty")
    assert case.data.shape == (1, 6, 20, 18)
    assert not case.data.any()


def test_a_case_is_refused_with_its_file(phantom: Phantom) -> None:
    """Of several files it is the channel's, of one file with several channels that one, of labels theirs."""
    volume, labels = phantom
    both = volume.with_data(np.concatenate([volume.data] * 2).astype(np.float32))
    both.data[1, 0, 0, :2] = np.nan
    spec, files = (
        LabelSpec.from_dataset_json({"labels": {"background": 0, "a": 1, "b": 2}}),
        (Path("a_0000.mha"), Path("a_0001.mha")),
    )
    for given, blamed in ((files, files[1]), (files[:1], files[0])):
        with pytest.raises(DataError, match="NaN or infinite") as caught:
            check_case(both, None, num_channels=2, spec=spec, name="a", files=Case("a", given, None))
        assert (caught.value.case, caught.value.file) == ("a", blamed)
        assert caught.value.found == f"2 of {volume.data.size} voxels"
    undeclared = Volume(np.full_like(labels.data, 9), labels.geometry)
    with pytest.raises(DataError, match="does not declare") as caught:
        check_case(
            volume, undeclared, num_channels=1, spec=spec, name="a", files=Case("a", files[:1], Path("labels.mha"))
        )
    assert caught.value.file == Path("labels.mha")


def test_preprocessing_names_the_file(make_plan: PlanMaker, phantom: Phantom) -> None:
    """Training and prediction refuse a case with the file it was read from."""
    volume, _ = phantom
    both = volume.with_data(np.concatenate([volume.data] * 2))
    with pytest.raises(DataError, match="channels do not fit") as caught:
        preprocess_case(both, None, plan=make_plan(), configuration="2d", name="a", files=Case("a", (Path("a.mha"),)))
    assert (caught.value.case, caught.value.file) == ("a", Path("a.mha"))
