"""A place in the file is the same place in the store, whatever the orientation, the spacing and the crop."""

from __future__ import annotations

from itertools import permutations, product

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from samunet.artifacts.plan import ChannelNormalization, Frame, Plan
from samunet.artifacts.prompts import Prompt
from samunet.core.config import parse_schema
from samunet.core.geometry import AxisOperation, Geometry
from samunet.core.labels import LabelSpec
from samunet.core.volume import Volume
from samunet.inference.prompt_geometry import place_prompts, store_positions
from samunet.preprocessing.pipeline import PreprocessedCase, preprocess_case
from tests.samples import decided, make_plan

OPERATIONS = [AxisOperation(p, f) for p in permutations(range(3)) for f in product((False, True), repeat=3)]
SHAPE = (9, 22, 17)
SPACING = (3.0, 1.0, 1.4)
LABELS = LabelSpec({"object": (1,)})
SEEDS = st.integers(0, 10_000)


def plan_for(target: tuple[float | None, float, float]) -> Plan:
    """A plan that keeps intensities."""
    frame = Frame(slice_axis=0, orientation=("S", "A", "R"), spacing=SPACING)
    plan = make_plan(labels={"background": 0, "object": 1}, spacing=target, frame=frame)
    return plan.model_copy(update={"normalization": decided((ChannelNormalization(scheme="none"),))})


def make_volume(rng: np.random.Generator, operation: AxisOperation) -> Volume:
    """Grey with an empty margin, oblique, anywhere in the world, stored along other axes."""
    image = np.full(SHAPE, 10.0, np.float32)
    margins = rng.integers(0, 3, (3, 2))
    inside = tuple(slice(a, n - b) for (a, b), n in zip(margins, SHAPE, strict=True))
    cropped = np.zeros_like(image)
    cropped[inside] = image[inside]
    tilt = Rotation.from_euler("xyz", rng.uniform(-12, 12, 3), degrees=True).as_matrix()
    directions = np.eye(3)[::-1] @ tilt.T
    geometry = Geometry.from_spacing(SHAPE, SPACING, directions=directions, origin=rng.uniform(-100, 100, 3).tolist())
    stored = np.ascontiguousarray(operation.apply(cropped))
    return Volume(stored[np.newaxis], operation.apply_geometry(geometry))


def mark(volume: Volume, rng: np.random.Generator) -> tuple[Volume, NDArray[np.int64]]:
    """The volume with one very bright voxel of its content, and that voxel (z, y, x)."""
    voxels = np.argwhere(volume.data[0] > 0)
    voxel = voxels[rng.integers(len(voxels))]
    data = volume.data.copy()
    data[(0, *voxel)] = 1000
    return volume.with_data(data), voxel


def prepared(volume: Volume, target: tuple[float | None, float, float]) -> PreprocessedCase:
    """The volume as the network sees it."""
    return preprocess_case(volume, None, plan=plan_for(target), configuration="2d", name="case")


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(OPERATIONS), SEEDS)
def test_a_marked_voxel_is_the_same_voxel_of_the_store(operation: AxisOperation, seed: int) -> None:
    """Without resampling, (i, j, k) of the file's voxel leads exactly to the voxel that holds its value."""
    rng = np.random.default_rng(seed)
    volume, voxel = mark(make_volume(rng, operation), rng)
    case = prepared(volume, (None, 1.0, 1.4))
    found = store_positions(voxel[::-1], space="voxel_ijk", geometry=volume.geometry, record=case.record)
    assert np.array_equal(found[0], np.argwhere(case.data[0] == 1000)[0])


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(OPERATIONS), SEEDS, st.floats(0.6, 1.3), st.sampled_from([None, 1.5, 4.0]))
def test_a_marked_voxel_is_found_again_after_resampling(
    operation: AxisOperation, seed: int, in_plane: float, across: float | None
) -> None:
    """The brightest voxel of the store lies within one voxel of the coarser grid."""
    rng = np.random.default_rng(seed)
    volume, voxel = mark(make_volume(rng, operation), rng)
    case = prepared(volume, (across, in_plane, in_plane))
    if case.data.max() < 50:
        return  # a thick slice that no slice of the coarser store was picked from
    found = store_positions(voxel[::-1], space="voxel_ijk", geometry=volume.geometry, record=case.record)[0]
    brightest = np.array(np.unravel_index(case.data[0].argmax(), case.data.shape[1:]))
    own, store = np.array(case.record.crop_spacing), np.array(case.record.store_spacing)
    assert np.all(np.abs(found - brightest) <= np.maximum(1, own / store))


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(OPERATIONS), SEEDS, st.sampled_from([(None, 1.0, 1.4), (2.0, 0.8, 0.9)]))
def test_the_way_agrees_with_the_grids_of_core_geometry(
    operation: AxisOperation, seed: int, target: tuple[float | None, float, float]
) -> None:
    """Any continuous place: permuting, flipping and cropping the grid itself puts it at the same position.

    Voxel indices and millimetres of the place give the same position.
    """
    rng = np.random.default_rng(seed)
    volume = make_volume(rng, operation)
    record = prepared(volume, target).record
    zyx = rng.uniform(-3, 25, (7, 3))
    world = volume.geometry.to_world(zyx)
    by_voxel = store_positions(zyx[:, ::-1], space="voxel_ijk", geometry=volume.geometry, record=record)
    by_world = store_positions(world, space="world_ras_mm", geometry=volume.geometry, record=record)
    cropped = record.operation.apply_geometry(volume.geometry).crop(record.crop_start, record.crop_stop)
    scale = np.array(record.store_shape) / np.array(record.crop_shape)
    expected = (cropped.to_voxel(world) + 0.5) * scale - 0.5
    assert np.allclose(by_voxel, expected, atol=1e-6)
    assert np.allclose(by_world, expected, atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(OPERATIONS), SEEDS, st.booleans(), st.booleans())
def test_a_box_is_the_same_region_whatever_its_corners(
    operation: AxisOperation, seed: int, in_world: bool, by_edges: bool
) -> None:
    """A box drawn in the file, from any of its corners and in either space, spans its own slices, rows and columns."""
    rng = np.random.default_rng(seed)
    volume = make_volume(rng, operation)
    inside = np.argwhere(volume.data[0] > 0)
    first, last = inside.min(0), inside.max(0)
    low = rng.integers(first, last)
    high = rng.integers(low + 1, last + 1)
    region = np.zeros(volume.geometry.shape, np.float32)
    region[tuple(slice(a, b + 1) for a, b in zip(low, high, strict=True))] = 1

    margin = 0.5 if by_edges else 0.0
    swapped = rng.random(3) < 0.5
    one, other = np.where(swapped, high + margin, low - margin), np.where(swapped, low - margin, high + margin)
    corners = np.stack([one, other])
    numbers = volume.geometry.to_world(corners) if in_world else corners[:, ::-1]
    space = "world_ras_mm" if in_world else "voxel_ijk"
    prompt = parse_schema(Prompt, {"label": "object", "box": numbers.ravel().tolist(), "space": space})

    record = prepared(volume, (None, 1.0, 1.4)).record
    (placed,) = place_prompts([prompt], geometry=volume.geometry, record=record, labels=LABELS)
    window = tuple(slice(a, b) for a, b in zip(record.crop_start, record.crop_stop, strict=True))
    expected = np.argwhere(record.operation.apply(region)[window])
    slices, rows, columns = expected.T
    assert list(placed.prompts) == list(range(slices.min(), slices.max() + 1))
    edges = (rows.min() - margin, columns.min() - margin, rows.max() + margin, columns.max() + margin)
    assert all(np.allclose(p.box, edges, atol=1e-6) for p in placed.prompts.values())
    assert not placed.extends
