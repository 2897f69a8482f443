"""Simulated prompts lie where they should, have the quality they are named after, and repeat under a seed."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage

from samunet.core.errors import DataError, UsageError
from samunet.inference.simulation import (
    GRADES,
    box_iou,
    box_with_overlap,
    click,
    clicks,
    error_click,
    jittered_box,
    objects,
    simulate,
    tight_box,
    whole_image_box,
)

SHAPE = (40, 70)


def seeded(seed: int = 0) -> np.random.Generator:
    """A generator."""
    return np.random.default_rng(seed)


def hook() -> NDArray[np.bool_]:
    """An L: a tall thin bar and a short foot, whose centre of mass lies outside it; not on a square."""
    mask = np.zeros(SHAPE, bool)
    mask[4:36, 50:55] = True
    mask[31:36, 50:66] = True
    return mask


def ring() -> NDArray[np.bool_]:
    """A thin ring, which most small boxes inside it miss."""
    rows, columns = np.indices(SHAPE)
    distance = np.hypot(rows - 20, columns - 30)
    return (distance < 18) & (distance > 16.5)


def blobs(seed: int) -> NDArray[np.bool_]:
    """Smooth random shapes, some of which touch the image's edge."""
    noise = ndimage.gaussian_filter(seeded(seed).normal(size=SHAPE), 4, mode="constant")
    return noise > np.quantile(noise, 0.8)


MASKS = [hook(), ring(), *(blobs(seed) for seed in range(6)), np.ones(SHAPE, bool), np.eye(*SHAPE, dtype=bool)]


def test_objects_are_connected_disjoint_and_sorted_by_size():
    """Components join over corners, cover the mask once, and the largest comes first."""
    mask = blobs(1)
    parts = objects(mask)
    sizes = [int(part.sum()) for part in parts]
    assert len(parts) > 1
    assert sizes == sorted(sizes, reverse=True)
    assert np.array_equal(np.sum(parts, axis=0), mask)
    assert len(objects(np.eye(5, dtype=bool))) == 1
    assert objects(np.zeros(SHAPE, bool)) == []


def test_boxes_lie_on_the_edges_of_voxels():
    """Rows and columns are not mixed up, and a box encloses whole voxels."""
    assert tight_box(hook()) == (3.5, 49.5, 35.5, 65.5)
    assert whole_image_box(SHAPE) == (-0.5, -0.5, 39.5, 69.5)
    assert simulate(hook(), "whole_image", None).box == whole_image_box(SHAPE)
    assert simulate(hook(), "box_tight", None).box == tight_box(hook())


@pytest.mark.parametrize("mask", MASKS)
def test_a_jittered_box_grows_by_at_most_the_given_share_within_the_image(mask):
    """Every side moves outwards, at most by shift times the box's side, and stops at the image's edge."""
    tight, generator = np.array(tight_box(mask)), seeded()
    sides = np.array([tight[2] - tight[0], tight[3] - tight[1]] * 2)
    edges = np.array(whole_image_box(SHAPE))
    moves = []
    for _ in range(50):
        outwards = (np.array(jittered_box(tuple(tight), 0.2, generator, SHAPE)) - tight) * (-1, -1, 1, 1)
        assert np.all(outwards >= 0)
        assert np.all(outwards <= 0.2 * sides + 1e-9)
        assert np.all(outwards <= (edges - tight) * (-1, -1, 1, 1) + 1e-9)
        moves.append(outwards / sides)
    free = 0.2 * sides <= (edges - tight) * (-1, -1, 1, 1)
    assert np.all(np.max(moves, axis=0)[free] > 0.15)
    assert jittered_box(tuple(tight), 0.0, generator, SHAPE) == tuple(tight)


@pytest.mark.parametrize("iou", [0.5, 0.75])
@pytest.mark.parametrize("mask", MASKS)
def test_a_box_of_a_given_overlap_has_it_and_meets_the_object(mask, iou):
    """Also for objects that fill the image or are hollow: valid, inside the image, IoU as wanted."""
    tight, edges = tight_box(mask), whole_image_box(SHAPE)
    for seed in range(20):
        box = box_with_overlap(tight, iou, seeded(seed), SHAPE, mask=mask)
        assert box_iou(box, tight) == pytest.approx(iou, abs=1e-6)
        assert edges[0] <= box[0] < box[2] <= edges[2]
        assert edges[1] <= box[1] < box[3] <= edges[3]
        rows = slice(int(np.floor(box[0] + 0.5)), int(np.ceil(box[2] + 0.5)))
        columns = slice(int(np.floor(box[1] + 0.5)), int(np.ceil(box[3] + 0.5)))
        assert mask[rows, columns].any()


def test_boxes_of_a_given_overlap_are_shifted_and_scaled():
    """Over several draws they become larger and smaller and move in all four directions."""
    tight = np.array(tight_box(hook()))
    boxes = np.array([box_with_overlap(tuple(tight), 0.5, seeded(seed), SHAPE) for seed in range(60)])
    moved = boxes - tight
    assert np.all(moved.min(axis=0) < -1)
    assert np.all(moved.max(axis=0) > 1)


def test_a_single_voxel_can_be_boxed_at_any_grade():
    """An object of one voxel in the image's corner still gets valid boxes."""
    mask = np.zeros((5, 9), bool)
    mask[0, 8] = True
    for grade in GRADES:
        prompt = simulate(mask, grade, seeded())
        if prompt.box is not None:
            assert prompt.box[0] < prompt.box[2]
            assert prompt.box[1] < prompt.box[3]
        else:
            assert set(prompt.points) == {(0.0, 8.0)}


@pytest.mark.parametrize("iou", [0.0, -1.0, 1.5])
def test_an_impossible_overlap_is_refused(iou):
    """No box has an IoU of 0 or less, or of more than 1."""
    with pytest.raises(UsageError):
        box_with_overlap((0, 0, 2, 2), iou, seeded(), SHAPE)


@pytest.mark.parametrize("mask", MASKS)
def test_clicks_lie_on_the_object(mask):
    """With and without randomness, one click or several, also where the centre of mass lies outside."""
    for generator in (None, seeded(1), seeded(2)):
        for row, column in (click(mask, generator), *clicks(mask, 3, generator)):
            assert row == int(row)
            assert column == int(column)
            assert mask[int(row), int(column)]


def test_a_click_without_randomness_is_the_voxel_farthest_inside():
    """The middle of a rectangle, row first, not its first voxel; the image's edge counts as outside."""
    mask = np.zeros(SHAPE, bool)
    mask[10:19, 40:45] = True
    assert click(mask) == (14, 42)
    assert click(np.ones((9, 21), bool)) == (4, 10)


def test_random_clicks_stay_in_the_inner_tenth_but_differ():
    """A drawn click lies as deep as the deepest tenth of the voxels, and not always at the same place."""
    rows, columns = np.indices(SHAPE)
    mask = np.hypot(rows - 20, columns - 45) < 16
    generator = seeded()
    found = {click(mask, generator) for _ in range(100)}
    assert len(found) > 10
    radius = 16 * np.sqrt(0.1) + 1.5
    assert all(np.hypot(row - 20, column - 45) < radius for row, column in found)


def test_three_clicks_are_spread_over_the_object():
    """No two lie close together on a long bar, nor on a hook."""
    mask = np.zeros(SHAPE, bool)
    mask[15:21, 3:67] = True
    columns = sorted(column for _, column in clicks(mask, 3))
    assert columns[1] - columns[0] > 10
    assert columns[2] - columns[1] > 10
    prompt = simulate(hook(), "clicks_3", seeded())
    assert len(set(prompt.points)) == 3
    assert prompt.positive == (True, True, True)
    assert prompt.box is None


def test_an_error_click_corrects_the_largest_error():
    """Missed voxels ask for a positive click in them, added ones for a negative one; the larger region decides."""
    reference, prediction = np.zeros(SHAPE, bool), np.zeros(SHAPE, bool)
    reference[5:15, 5:15] = True
    prediction[25:30, 50:55] = True
    everywhere = np.ones(SHAPE, bool)
    missed = error_click(prediction, reference, everywhere)
    assert missed is not None
    assert missed.positive
    assert reference[int(missed.point[0]), int(missed.point[1])]
    added = error_click(prediction | reference, reference, everywhere)
    assert added is not None
    assert not added.positive
    assert 25 <= added.point[0] < 30
    assert 50 <= added.point[1] < 55
    assert error_click(reference, reference, everywhere) is None


def test_errors_are_compared_by_connected_region():
    """Many small missed pieces do not outweigh one larger added piece."""
    reference, prediction = np.zeros(SHAPE, bool), np.zeros(SHAPE, bool)
    reference[::4, ::4] = True
    prediction[20:23, 30:33] = True
    chosen = error_click(prediction, reference, np.ones(SHAPE, bool))
    assert chosen is not None
    assert not chosen.positive


def test_unknown_voxels_are_no_errors():
    """What is ignored neither draws the click nor counts for the size of an error."""
    reference, prediction = hook(), np.zeros(SHAPE, bool)
    valid = np.ones(SHAPE, bool)
    valid[:30] = False
    chosen = error_click(prediction, reference, valid)
    assert chosen is not None
    assert chosen.point[0] >= 30
    assert error_click(prediction, reference, ~reference) is None


@pytest.mark.parametrize("grade", GRADES)
def test_prompts_repeat_under_a_seed(grade):
    """Two generators of one seed give the same prompt; random grades differ between seeds."""
    first, again = (simulate(blobs(2), grade, seeded(5)) for _ in range(2))
    assert first == again
    several = {simulate(hook(), grade, seeded(seed)) for seed in range(6)}
    assert (len(several) > 1) == (grade not in ("whole_image", "box_tight"))


def test_nothing_to_prompt_is_an_error():
    """An empty mask and an unknown grade are refused, as is a random grade without a generator."""
    empty = np.zeros(SHAPE, bool)
    for grade in ("clicks_1", "box_tight", "box_0.5"):
        with pytest.raises(DataError):
            simulate(empty, grade, seeded())
    with pytest.raises(UsageError):
        simulate(hook(), "box_0.9", seeded())
    with pytest.raises(UsageError):
        simulate(hook(), "box_0.5", None)
