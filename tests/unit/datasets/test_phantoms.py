"""Phantoms are what the demo needs: varied, anisotropic, oblique, and beyond thresholds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from samunet.core.geometry import canonical_operation
from samunet.core.volume import Volume
from samunet.datasets.baseline import fit_threshold_prior
from samunet.datasets.integrity import verify_dataset
from samunet.datasets.phantoms import STRUCTURES, make_phantom, write_phantom_dataset
from samunet.datasets.raw import load_raw_dataset
from samunet.imageio import read_geometry, read_labels

Phantom = tuple[Volume, NDArray[np.uint8]]


@pytest.fixture(scope="module")
def phantoms() -> list[Phantom]:
    """Enough phantoms to fit a prior on ten and to test it on four."""
    return [make_phantom(seed) for seed in range(14)]


def test_phantoms_are_reproducible_and_differ(phantoms: list[Phantom]) -> None:
    """One seed gives one volume, another seed another one with another affine."""
    again = make_phantom(1)
    np.testing.assert_array_equal(again[0].data, phantoms[1][0].data)
    np.testing.assert_array_equal(again[1], phantoms[1][1])
    assert len({volume.geometry.affine.tobytes() for volume, _ in phantoms}) == len(phantoms)
    assert not np.array_equal(phantoms[0][1], phantoms[1][1])


def test_every_phantom_holds_every_structure(phantoms: list[Phantom]) -> None:
    """All values and no others; the nodule is small; the scan anisotropic and oblique."""
    for volume, labels in phantoms:
        assert set(np.unique(labels)) == {0, *STRUCTURES.values()}
        assert labels.shape == volume.geometry.shape
        millilitres = (labels == STRUCTURES["nodule"]).sum() * volume.geometry.voxel_volume_mm3 / 1000
        assert 0.2 < millilitres < 4
        assert volume.geometry.spacing[0] > 2 * volume.geometry.spacing[1]
        assert np.abs(volume.geometry.directions).max() < 0.99999
        assert np.isfinite(volume.data).all()
        assert volume.data.min() >= 0


def test_left_is_the_patients_left_however_stored(phantoms: list[Phantom]) -> None:
    """Some phantoms are stored along other axes; in world space the left kidney is left of the right one."""
    assert len({volume.geometry.codes for volume, _ in phantoms}) > 1
    for volume, labels in phantoms:
        toward_right = [
            (volume.geometry.to_world(np.argwhere(labels == STRUCTURES[name])).mean(axis=0))[0]
            for name in ("left_kidney", "right_kidney")
        ]
        assert toward_right[0] < toward_right[1]


def test_kidneys_look_alike(phantoms: list[Phantom]) -> None:
    """Neither their intensity nor their volume tells left from right."""
    left, right = (
        np.array([volume.data[0][labels == STRUCTURES[name]].mean() for volume, labels in phantoms])
        for name in ("left_kidney", "right_kidney")
    )
    assert abs(np.log(left / right).mean()) < np.log(left / right).std()


def test_thresholds_with_a_location_prior_fail(phantoms: list[Phantom]) -> None:
    """The baseline stays below a mean Dice of 0.6, yet is no straw man."""
    prior = fit_threshold_prior(phantoms[:10])
    scores = []
    for volume, labels in phantoms[10:]:
        predicted = prior.predict(volume)
        for value in STRUCTURES.values():
            a, b = predicted == value, labels == value
            scores.append(2 * (a & b).sum() / (a.sum() + b.sum()))
    assert 0.3 < np.mean(scores) < 0.6


def test_the_baseline_is_independent_of_storage(phantoms: list[Phantom]) -> None:
    """A phantom stored along other axes gets the same labels at the same places."""
    volume, _ = phantoms[0]
    prior = fit_threshold_prior(phantoms[:3])
    operation = canonical_operation(
        volume.geometry, reference_codes=("I", "P", "L"), reference_spacing=volume.geometry.spacing, slice_axis=0
    )
    turned = Volume(operation.apply(volume.data), operation.apply_geometry(volume.geometry))
    assert turned.geometry.codes != volume.geometry.codes
    np.testing.assert_array_equal(operation.invert(prior.predict(turned)), prior.predict(volume))


def test_a_phantom_dataset_is_a_correct_raw_dataset(tmp_path: Path) -> None:
    """It verifies without findings, and the held-out cases have their truth in labelsTs."""
    folder = write_phantom_dataset(tmp_path / "Dataset900_Phantom", num_train=2, num_test=1, seed=3)
    dataset = load_raw_dataset(folder)
    assert [case.name for case in dataset.training] == ["phantom_000", "phantom_001"]
    assert [case.name for case in dataset.test] == ["phantom_002"]
    assert verify_dataset(dataset).findings == ()
    truth = folder / "labelsTs" / "phantom_002.nii.gz"
    assert read_geometry(truth).matches(read_geometry(dataset.test[0].images[0]))
    assert int(read_labels(truth).data.max()) == max(STRUCTURES.values())
