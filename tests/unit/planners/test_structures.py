"""Facts of structures and grids on shapes whose measures are known."""

from __future__ import annotations

import numpy as np
import pytest

from samunet.core.geometry import Geometry
from samunet.core.labels import LabelSpec
from samunet.planners.structures import coherence_curve, effective_resolution, half_distance, structure_facts

LABELS = LabelSpec({"box": (1,), "thin": (2,), "both": (1, 2)}, regions_class_order=(1, 2, 3))


@pytest.fixture
def label_map() -> np.ndarray:
    volume = np.zeros((20, 30, 40), dtype=np.int16)
    volume[5:15, 10:20, 10:30] = 1
    volume[3, 5:25, 2:4] = 2
    volume[17, 0, 0] = 2
    return volume


def test_measures_of_a_box(label_map: np.ndarray) -> None:
    """Volume, slices, extent, width and centroid of a box are those of the box, in mm."""
    geometry = Geometry.from_spacing(label_map.shape, (2.0, 1.0, 0.5))
    box = structure_facts(label_map, LABELS, geometry)["box"]
    assert box.volume_mm3 == pytest.approx(2000 * 1.0)
    assert box.num_slices == (10, 10, 20)
    assert box.extent_mm == pytest.approx((20, 10, 10))
    assert box.width_mm == pytest.approx(10.0, abs=1.0)
    assert box.num_components == 1
    assert box.centroid_mm == pytest.approx((0.5 * 19.5, 14.5, 2 * 9.5))
    assert box.coherence == (1.0, 1.0, 1.0)


def test_regions_and_absent_structures(label_map: np.ndarray) -> None:
    """A region is the union of its values; a structure that is absent is left out."""
    geometry = Geometry.from_spacing(label_map.shape, (1, 1, 1))
    found = structure_facts(label_map, LABELS, geometry)
    assert found["both"].volume_mm3 == found["box"].volume_mm3 + found["thin"].volume_mm3
    assert found["thin"].num_components == 2
    assert set(structure_facts(label_map * 0, LABELS, geometry)) == set()


def test_a_flat_structure_has_its_in_plane_width() -> None:
    """In a one-slice image the width is measured in plane, and a structure that fills the image is as wide as it."""
    labels = LabelSpec({"box": (1,)})
    flat = np.zeros((1, 50, 50), dtype=np.int16)
    geometry = Geometry.from_spacing(flat.shape, (999, 1, 1))
    flat[0, 10:20, 5:45] = 1
    assert structure_facts(flat, labels, geometry)["box"].width_mm == pytest.approx(10, abs=1)
    filled = structure_facts(flat * 0 + 1, labels, Geometry.from_spacing(flat.shape, (1, 1, 1)))
    assert filled["box"].width_mm == pytest.approx(50)


def test_the_image_border_is_no_outside() -> None:
    """A slab that touches the border is as thick as its distance to the inner side says."""
    labels = LabelSpec({"slab": (1,)})
    volume = np.zeros((1, 40, 200), dtype=np.int16)
    volume[0, :10] = 1
    width = structure_facts(volume, labels, Geometry.from_spacing(volume.shape, (1, 1, 1)))["slab"].width_mm
    assert width == pytest.approx(20, abs=1)


def test_coherence_falls_with_distance() -> None:
    """A bar that moves one voxel per slice loses a quarter of its overlap per slice and half in two."""
    mask = np.zeros((12, 20, 1), dtype=bool)
    for index in range(12):
        mask[index, index : index + 4] = True
    curve = coherence_curve(mask, 0)
    assert curve[1] == pytest.approx(0.75)
    assert half_distance(curve) == pytest.approx(2.0)


def test_single_slice_structures_do_not_cohere() -> None:
    """A structure in one slice only has no neighbour to agree with."""
    mask = np.ones((1, 5, 5), dtype=bool)
    assert coherence_curve(mask, 0) == {0: 1.0}


def test_effective_resolution_sees_zero_filled_upsampling() -> None:
    """White noise uses its grid fully; interpolated twofold by zero filling along one axis it uses half of that."""
    noise = np.random.default_rng(0).normal(size=(1, 32, 32, 64))
    spectrum = np.fft.fftshift(np.fft.fft(noise, axis=3), axes=3)
    padded = np.pad(spectrum, ((0, 0), (0, 0), (0, 0), (32, 32)))
    smooth = np.fft.ifft(np.fft.ifftshift(padded, axes=3), axis=3).real
    assert min(effective_resolution(noise)) > 0.9
    found = effective_resolution(smooth)
    assert found[2] == pytest.approx(0.5, abs=0.06)
    assert min(found[:2]) > 0.85


def test_effective_resolution_of_a_constant_image_is_full() -> None:
    """Constant images and very short axes give no reason to plan less."""
    assert effective_resolution(np.full((2, 4, 20, 20), 7.0)) == (1.0, 1.0, 1.0)
