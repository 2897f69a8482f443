"""Slabs are moved and changed as one; a single slice is augmented as batchgenerators does it in 2D."""

from __future__ import annotations

import random

import numpy as np
import pytest
from batchgenerators.transforms.abstract_transforms import AbstractTransform, Compose
from batchgenerators.transforms.color_transforms import (
    BrightnessMultiplicativeTransform,
    ContrastAugmentationTransform,
    GammaTransform,
)
from batchgenerators.transforms.noise_transforms import GaussianBlurTransform, GaussianNoiseTransform
from batchgenerators.transforms.resample_transforms import SimulateLowResolutionTransform
from batchgenerators.transforms.spatial_transforms import SpatialTransform

from samunet.core.labels import IGNORE_INDEX
from samunet.training import augment
from samunet.training.augment import InPlaneBlur, RandomMirror, SliceAugmentation

TILE = 24
SEEDS = range(80)
USUAL = {"rotation_deg": 15.0, "scale": (0.7, 1.4)}


class Nothing(AbstractTransform):
    """Stands for a transform that is left out."""

    def __init__(self, **_: object) -> None:
        pass

    def __call__(self, **data_dict: object) -> dict[str, object]:
        return data_dict


@pytest.fixture
def without_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Augmentation whose slices share everything."""
    monkeypatch.setattr(augment, "GaussianNoiseTransform", Nothing)


def seed_everything(seed: int) -> None:
    """As core.rng does before a sample."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - batchgenerators reads the legacy global generator


def make_slab(depth: int, channels: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Equal slices: a textured image (D, C, V, V) and maps (D, 2, V, V) with a square."""
    generator = np.random.default_rng(4)
    image = generator.normal(50, 20, (1, channels, TILE, TILE)).astype(np.float32)
    maps = np.zeros((1, 2, TILE, TILE), np.int16)
    maps[:, 0, 5:12, 8:20] = 1
    return np.repeat(image, depth, 0), np.repeat(maps, depth, 0)


def table_in_2d(separate: bool) -> Compose:
    """The same transforms as the library applies them to single slices."""
    return Compose(
        [
            SpatialTransform(
                (TILE, TILE),
                patch_center_dist_from_border=None,
                do_elastic_deform=False,
                angle_x=(-np.deg2rad(15.0), np.deg2rad(15.0)),
                scale=(0.7, 1.4),
                border_mode_data="constant",
                order_data=1,
                border_cval_seg=IGNORE_INDEX,
                order_seg=0,
                random_crop=False,
                p_rot_per_sample=0.2,
                p_scale_per_sample=0.2,
            ),
            GaussianNoiseTransform(p_per_sample=0.1),
            GaussianBlurTransform((0.5, 1.0), p_per_sample=0.2, p_per_channel=0.5),
            BrightnessMultiplicativeTransform((0.75, 1.25), per_channel=separate, p_per_sample=0.15),
            ContrastAugmentationTransform(per_channel=separate, p_per_sample=0.15),
            SimulateLowResolutionTransform((0.5, 1), per_channel=separate, p_per_channel=0.5, p_per_sample=0.25),
            GammaTransform((0.7, 1.5), True, separate, retain_stats=True, p_per_sample=0.1),
            GammaTransform((0.7, 1.5), False, separate, retain_stats=True, p_per_sample=0.3),
        ]
    )


@pytest.mark.parametrize("separate", [False, True])
def test_a_single_slice_is_augmented_as_the_library_does_it_in_2d(separate: bool):
    """Bit by bit, with the same draws in the same order."""
    augmentation = SliceAugmentation(tile=TILE, separate_channels=separate, **USUAL)
    reference = table_in_2d(separate)
    image, maps = make_slab(1)
    changed = 0
    for seed in SEEDS:
        seed_everything(seed)
        found, moved = augmentation(image.copy(), maps.copy())
        seed_everything(seed)
        wanted = reference(data=image.copy(), seg=maps.astype(np.float32))
        assert np.array_equal(found, wanted["data"])
        assert np.array_equal(moved, wanted["seg"])
        changed += not np.array_equal(found, image)
    assert changed > len(SEEDS) / 2


@pytest.mark.usefixtures("without_noise")
@pytest.mark.parametrize("separate", [False, True])
def test_equal_slices_stay_equal(separate: bool):
    """One rotation, one scale, one gamma and so on for all slices of a slab, whatever is drawn."""
    augmentation = SliceAugmentation(tile=TILE, separate_channels=separate, rotation_deg=180.0, scale=(0.7, 1.4))
    image, maps = make_slab(3)
    moved = 0
    for seed in SEEDS:
        seed_everything(seed)
        found, labels = augmentation(image.copy(), maps.copy())
        assert found.shape == image.shape
        assert labels.shape == maps.shape
        assert labels.dtype == np.int16
        assert np.array_equal(found, np.repeat(found[:1], 3, 0))
        assert np.array_equal(labels, np.repeat(labels[:1], 3, 0))
        moved += not np.array_equal(labels, maps)
    assert moved > 10


def test_only_noise_differs_between_slices():
    """Equal slices come out different only as often as noise is drawn."""
    augmentation = SliceAugmentation(tile=TILE, separate_channels=False, **USUAL)
    image, maps = make_slab(3)
    different = 0
    for seed in SEEDS:
        seed_everything(seed)
        found, _ = augmentation(image.copy(), maps.copy())
        different += not np.array_equal(found[0], found[1])
    assert 0 < different < 0.25 * len(SEEDS)


@pytest.mark.usefixtures("without_noise")
def test_nothing_leaks_along_depth():
    """A flat slice between textured ones stays flat, and its maps stay its own."""
    augmentation = SliceAugmentation(tile=TILE, separate_channels=True, **USUAL)
    image, maps = make_slab(3)
    image[1], maps[1] = 0, IGNORE_INDEX
    for seed in SEEDS:
        seed_everything(seed)
        found, labels = augmentation(image.copy(), maps.copy())
        assert np.ptp(found[1], axis=(1, 2)).max() == 0
        assert np.all(labels[1] == IGNORE_INDEX)
        assert np.ptp(found[0]) > 0


def test_blur_has_one_width_per_channel():
    """Each channel is blurred by a width of its own, each slice of it by the same."""
    image, _ = make_slab(2)
    seed_everything(1)
    blurred = InPlaneBlur((0.5, 3.0), p_per_sample=1, p_per_channel=1)(data=image.swapaxes(0, 1)[np.newaxis].copy())
    first, second = blurred["data"][0]
    assert np.array_equal(first[0], first[1])
    assert np.array_equal(second[0], second[1])
    spreads = [channel[0].std() / image[0, index].std() for index, channel in enumerate((first, second))]
    assert abs(spreads[0] - spreads[1]) > 0.05


@pytest.mark.parametrize("axes", [(), (0,), (1,), (0, 1)])
def test_mirroring_turns_all_slices_alike_and_only_in_plane(axes: tuple[int, ...]):
    """Image and maps of every slice are mirrored along the same axes; the order of slices stays."""
    generator = np.random.default_rng(0)
    image = generator.normal(size=(3, 2, TILE, TILE))
    maps = generator.integers(0, 3, (3, 1, TILE, TILE))
    mirror, seen = RandomMirror(axes), set()
    for seed in range(20):
        seed_everything(seed)
        found, moved = mirror(image, maps)
        matches = [
            chosen
            for chosen in [(), (2,), (3,), (2, 3)]
            if np.array_equal(found, np.flip(image, chosen)) and np.array_equal(moved, np.flip(maps, chosen))
        ]
        assert len(matches) == 1
        seen.add(matches[0])
    allowed = {(), *((axis + 2,) for axis in axes), tuple(axis + 2 for axis in axes)}
    assert seen == allowed


@pytest.mark.usefixtures("without_noise")
def test_planned_limits_hold():
    """Without rotation and scaling nothing moves; with a wide range of angles an off-centre spot gets anywhere."""
    image, maps = make_slab(1)
    maps[:] = 0
    maps[0, 0, 3:5, 11:13] = 1
    still = SliceAugmentation(tile=TILE, separate_channels=False, rotation_deg=0.0, scale=(1.0, 1.0))
    angles = {limit: set() for limit in (15.0, 180.0)}
    for seed in SEEDS:
        seed_everything(seed)
        assert np.array_equal(still(image.copy(), maps.copy())[1], maps)
        for limit, found in angles.items():
            seed_everything(seed)
            turning = SliceAugmentation(tile=TILE, separate_channels=False, rotation_deg=limit, scale=(1.0, 1.0))
            rows, columns = np.nonzero(turning(image.copy(), maps.copy())[1][0, 0] == 1)
            middle = (TILE - 1) / 2
            found.add(round(float(np.degrees(np.arctan2(columns.mean() - middle, middle - rows.mean())))))
    assert max(map(abs, angles[15.0])) <= 20
    assert max(map(abs, angles[180.0])) > 90


def test_frequency_is_how_often_images_are_varied():
    """Of many tiles none is changed at 0, few are left as they are at the most, and more at 2.5 than at 1."""
    image, maps = make_slab(1)

    def unchanged(frequency: float) -> int:
        augmentation = SliceAugmentation(tile=TILE, separate_channels=True, **USUAL, frequency=frequency)
        same = 0
        for seed in range(60):
            seed_everything(seed)
            varied, moved = augmentation(image.copy(), maps.copy())
            same += np.allclose(varied, image, atol=1e-6) and np.array_equal(moved, maps)
        return same

    counts = [unchanged(frequency) for frequency in (0.0, 1.0, 2.5, 10.0)]
    assert counts[0] == 60
    assert counts[0] > counts[1] > counts[2] >= counts[3] == 0
