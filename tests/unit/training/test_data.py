"""Which slices are drawn, what a sample holds, and that it depends on nothing but seed, epoch and index."""

from __future__ import annotations

import signal
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from samunet.artifacts.plan import IntensityMap, Plan, resolve_recipe
from samunet.artifacts.plan_parts import STORED, Planes
from samunet.artifacts.workspace import Workspace
from samunet.core.errors import ConfigError
from samunet.core.labels import IGNORE_INDEX
from samunet.core.rng import seed_sample
from samunet.preprocessing.planes import turn
from samunet.preprocessing.store import CaseStore
from samunet.training.data import (
    EndlessSampler,
    SliceDataset,
    choose_slice,
    make_loader,
    next_batch,
    slab_places,
    worker_died,
)
from samunet.training.stacks import Stacks
from tests.samples import DATASET, LABELS, make_plan, make_recipe, prepare

CASES = ["case_0", "case_1", "case_2"]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Plan, Path]:
    """A small preprocessed dataset."""
    workspace = Workspace.locate(workspace=tmp_path_factory.mktemp("data"), environment={})
    plan = prepare(workspace, num_train=3)
    return plan, workspace.store_folder(DATASET, plan.store_key("2d"))


def make_dataset(
    prepared: tuple[Plan, Path],
    *,
    context: int = 0,
    seed: int = 1,
    augment: bool = True,
    tile: int = 32,
    depth: int = 1,
    intensities: str = "identity",
    planes: Planes = STORED,
    read_labels: bool = True,
) -> SliceDataset:
    """A dataset over the small store."""
    plan, store = prepared
    changed = make_plan(
        recipes={"none": {"cpu": make_recipe(tile_vox=tile, intensity_map=IntensityMap(kind=intensities))}}
    )
    recipe = replace(resolve_recipe(changed.configuration("2d"), "none", "cpu"), slab_depth=depth, planes=planes)
    settings = {"context": context, "seed": seed, "augment": augment, "read_labels": read_labels}
    return SliceDataset(CaseStore(store), CASES, plan=plan, recipe=recipe, **settings)


def slices_shown(prepared: tuple[Plan, Path], image: np.ndarray) -> list[tuple[str, int]]:
    """Case and index of the slices (D, 30, 26) of an unaugmented sample."""
    store = CaseStore(prepared[1])
    volumes = {n: store.open(n).data[0] for n in CASES}
    found = [[(n, s) for n, v in volumes.items() for s in range(6) if np.array_equal(v[s], one)] for one in image]
    assert all(len(matches) == 1 for matches in found)
    return [matches[0] for matches in found]


def test_a_sample_is_the_stored_slice_centred_in_its_tile(prepared):
    """Without augmentation image, mask of validity and target are the slice in the middle of zeros and ignore."""
    image, valid, target = make_dataset(prepared, augment=False)[(0, 5)]
    assert image.shape == (1, 3, 32, 32)
    assert valid.shape == (1, 1, 32, 32)
    assert target.shape == (1, 1, 32, 32)
    inside = valid[0, 0] == 1
    assert int(inside.sum()) == 30 * 26
    assert torch.all(target[0, 0][~inside] == IGNORE_INDEX)
    assert torch.all(image[0][:, ~inside] == 0)
    assert len(slices_shown(prepared, image[:, 0, 1:31, 3:29].numpy())) == 1


@pytest.mark.parametrize("context", [0, 1])
@pytest.mark.parametrize(("across", "size"), [("slices", (30, 26)), ("rows", (6, 26)), ("columns", (6, 30))])
def test_slices_are_cut_across_any_axis(prepared, across, size, context: int):
    """Image, neighbours and target are those of the volume with that axis in front, and structures are found in it."""
    store = CaseStore(prepared[1])
    dataset = make_dataset(prepared, planes=(across,), context=context, augment=False)
    high, wide = size
    place = slice((32 - high + 1) // 2, (32 - high + 1) // 2 + high), slice((32 - wide + 1) // 2, (32 + wide + 1) // 2)
    for number in range(12):
        case, index = dataset.locate((0, number))
        opened = store.open(case)
        volume, labels = turn(opened.data[0], across), turn(opened.labels[:], across)
        image, valid, target = (part[0].numpy() for part in dataset[(0, number)])
        near = np.clip([index - context, index, index + context], 0, len(volume) - 1)
        assert np.array_equal(image[(slice(None), *place)], volume[near])
        assert np.array_equal(target[(0, *place)], labels[index])
        assert valid.sum() == valid[(0, *place)].sum() == high * wide


def test_planes_are_drawn_alike_often_with_the_same_structures(prepared):
    """Each of three planes gives about a third of the samples, and slices are forced onto structures in all of them."""
    dataset = make_dataset(prepared, planes=("slices", "rows", "columns"), augment=False)
    shapes, with_structure = Counter(), Counter()
    for number in range(300):
        _, valid, target = dataset[(0, number)]
        rows = valid[0, 0].any(1).sum(), valid[0, 0].any(0).sum()
        shapes[tuple(map(int, rows))] += 1
        with_structure[tuple(map(int, rows))] += int((target > 0).any())
    assert set(shapes) == {(30, 26), (6, 26), (6, 30)}
    assert all(70 <= number <= 130 for number in shapes.values())
    assert all(with_structure[shape] >= 0.6 * number for shape, number in shapes.items())


def test_every_slice_of_every_plane_is_found_by_its_number(prepared):
    """Without augmentation a sample of the tile that holds the slice is the whole slice of its number."""
    dataset = make_dataset(prepared, planes=("columns", "slices", "rows"), augment=False)
    assert dataset.num_slices("case_0") == 26 + 6 + 30
    for key in ((0, number) for number in range(40)):
        sample = dataset[key]
        assert all(torch.equal(a, b) for a, b in zip(dataset.whole(*dataset.locate(key)), sample, strict=True))


def test_without_labels_every_slice_across_every_axis_counts(prepared):
    """Unlabelled volumes are cut across all axes too; targets are background."""
    dataset = make_dataset(prepared, planes=("rows", "columns"), augment=False, read_labels=False)
    seen = {dataset.locate((0, number)) for number in range(900)}
    assert {number for _, number in seen} == set(range(dataset.num_slices("case_0"))) == set(range(30 + 26))
    assert all(set(np.unique(dataset[(0, number)][2])) <= {0, IGNORE_INDEX} for number in range(5))


def test_a_case_that_other_planes_would_squeeze_is_cut_in_one(prepared):
    """Voxels 2 mm long are too long for a plan whose target is cubic: only stored slices are drawn."""
    plan, store = prepared
    cubic = plan.model_copy(
        update={"target_spacing": plan.target_spacing.model_copy(update={"value": (1.0, 1.0, 1.0)})}
    )
    both = [make_dataset((each, store), planes=("slices", "rows"), augment=False) for each in (plan, cubic)]
    assert [dataset.num_slices("case_0") for dataset in both] == [6 + 30, 6]
    assert all(dataset[(0, number)][1].sum() in (6 * 26, 30 * 26) for dataset in both for number in range(20))
    assert all(both[1][(0, number)][1].sum() == 30 * 26 for number in range(20))


def test_whole_volumes_are_held_only_as_far_as_there_is_room(prepared, monkeypatch):
    """A volume that had to make way is read again and gives the same sample."""
    planes = ("slices", "columns")
    expected = [make_dataset(prepared, planes=planes)[(0, number)] for number in range(30)]
    one = CaseStore(prepared[1]).open(CASES[0])
    monkeypatch.setattr("samunet.training.stacks.HELD_BYTES", one.data[:].nbytes + one.labels[:].nbytes)
    dataset = make_dataset(prepared, planes=planes)
    for number, sample in enumerate(expected):
        assert all(torch.equal(a, b) for a, b in zip(dataset[(0, number)], sample, strict=True))
        assert len(dataset.volumes.held) <= 1
    assert dataset.volumes.held


@pytest.mark.parametrize("tile", [16, 32])
def test_a_tile_has_the_extremes_of_its_whole_slice(prepared, tile: int):
    """Scaled per slice, a tile is the same part of the stored slice between that slice's extremes; padding is none."""
    plain = make_dataset(prepared, augment=False, tile=tile)
    scaled = make_dataset(prepared, augment=False, tile=tile, intensities="unit_per_slice")
    store = CaseStore(prepared[1])
    for number in range(6):
        case, index = plain.locate((0, number))
        stored = store.open(case).data[0, index]
        image, valid, _ = plain[(0, number)]
        expected = (image - float(stored.min())) / float(stored.max() - stored.min()) * valid
        assert torch.allclose(scaled[(0, number)][0], expected, atol=1e-5)


@pytest.mark.parametrize("depth", [1, 3])
def test_context_gives_the_neighbours_as_channels(prepared, depth: int):
    """The middle channel is the slice itself, the others its neighbours, repeated at the ends of the volume only."""
    volumes = {n: CaseStore(prepared[1]).open(n).data[0] for n in CASES}
    dataset = make_dataset(prepared, context=1, augment=False, depth=depth)
    for index in range(20):
        image = dataset[(0, index)][0][:, :, 1:31, 3:29].numpy()
        for channels, (name, place) in zip(image, slices_shown(prepared, image[:, 1]), strict=True):
            assert np.array_equal(channels[0], volumes[name][max(0, place - 1)])
            assert np.array_equal(channels[2], volumes[name][min(5, place + 1)])


@pytest.mark.parametrize("depth", [1, 3, 9])
def test_tiles_of_a_large_slice_hold_the_chosen_structure(prepared, depth: int):
    """Where the slice exceeds the tile, a forced structure lies inside the tile, also as one slice of a slab."""
    plan, store = prepared
    dataset = make_dataset(prepared, augment=False, tile=16, depth=depth)
    records = {n: CaseStore(store).record(n) for n in CASES}
    forced = 0
    for index in range(30):
        choice = choose_slice(records, 0.5, seed_sample(1, 0, index))
        if choice.structure is not None:
            forced += 1
            wanted = list(plan.label_spec.names).index(choice.structure) + 1
            assert wanted in dataset[(0, index)][2]
    assert forced > 5


def test_a_slab_is_consecutive_slices_with_the_drawn_one_anywhere_in_it(prepared):
    """Slices of one volume in order, never beyond it, the drawn one as often at each place as the ends allow."""
    records = {n: CaseStore(prepared[1]).record(n) for n in CASES}
    dataset = make_dataset(prepared, augment=False, depth=3)
    positions = Counter()
    for index in range(60):
        image, valid, target = dataset[(0, index)]
        assert image.shape == (3, 3, 32, 32)
        assert valid.shape == target.shape == (3, 1, 32, 32)
        names, places = zip(*slices_shown(prepared, image[:, 0, 1:31, 3:29].numpy()), strict=True)
        choice = choose_slice(records, 0.5, seed_sample(1, 0, index))
        assert set(names) == {choice.case}
        assert list(places) == list(range(places[0], places[0] + 3))
        positions[choice.index - places[0]] += 1
        labels = CaseStore(prepared[1]).open(choice.case).labels[places[0] : places[0] + 3]
        assert np.array_equal(target[:, 0, 1:31, 3:29].numpy(), labels)
        assert valid.sum() == 3 * 30 * 26
    assert set(positions) == {0, 1, 2}


def test_all_slices_of_a_slab_are_cut_at_one_place(prepared):
    """A tile smaller than the slice shows the same rows and columns of every slice."""
    volumes = [CaseStore(prepared[1]).open(n).data[0] for n in CASES]
    dataset = make_dataset(prepared, augment=False, tile=16, depth=3)
    for index in range(10):
        image = dataset[(0, index)][0][:, 0].numpy()
        windows = [np.lib.stride_tricks.sliding_window_view(v, (3, 16, 16)) for v in volumes]
        assert sum(np.all(w == image, axis=(-3, -2, -1)).sum() for w in windows) == 1


@pytest.mark.parametrize("augment", [False, True])
def test_a_volume_shorter_than_the_slab_leaves_slices_without_target(prepared, augment: bool):
    """Missing slices repeat the edge in the image and are ignored and invalid; the volume lies anywhere in the slab."""
    dataset = make_dataset(prepared, augment=augment, depth=8)
    offsets = set()
    for index in range(20):
        image, valid, target = dataset[(0, index)]
        present = valid.flatten(1).any(1).numpy()
        first = int(np.argmax(present))
        assert present.tolist() == [first <= place < first + 6 for place in range(8)]
        assert torch.all(target[~torch.from_numpy(present)] == IGNORE_INDEX)
        offsets.add(first)
        if not augment:
            assert torch.equal(image[0], image[first])
            assert torch.equal(image[-1], image[first + 5])
    assert offsets == {0, 1, 2}


def test_regions_are_target_maps_of_every_slice(prepared):
    """Region labels give one 0/1 map per region and slice."""
    plan, store = prepared
    regions = make_plan(labels={"background": 0, "ball": [1, 2], "cube": 2}, regions_class_order=(1, 2))
    recipe = replace(resolve_recipe(regions.configuration("2d"), "none", "cpu"), slab_depth=2)
    plain = SliceDataset(CaseStore(store), CASES, plan=plan, recipe=recipe, context=0, seed=1, augment=False)
    overlapping = SliceDataset(CaseStore(store), CASES, plan=regions, recipe=recipe, context=0, seed=1, augment=False)
    shown = 0
    for index in range(5):
        classes, maps = plain[(0, index)][2], overlapping[(0, index)][2]
        assert maps.shape == (2, 2, 32, 32)
        assert torch.equal(maps[:, 0] > 0, classes[:, 0] > 0)
        assert torch.equal(maps[:, 1] == 1, classes[:, 0] == 2)
        assert torch.equal(maps[:, 0] == IGNORE_INDEX, classes[:, 0] == IGNORE_INDEX)
        shown += int((maps == 1).sum())
    assert shown > 0


@pytest.mark.parametrize(("num_slices", "depth"), [(1, 1), (7, 1), (7, 3), (7, 7), (4, 7), (1, 5)])
def test_every_slice_lies_at_every_place_of_the_slab_that_the_volume_allows(num_slices: int, depth: int):
    """All allowed slabs are drawn and no other; short volumes are wholly in the slab."""
    generator = np.random.default_rng(0)
    for index in range(num_slices):
        drawn = {tuple(slab_places(index, num_slices, depth, generator)) for _ in range(150)}
        firsts = range(num_slices - depth + 1) if depth <= num_slices else range(num_slices - depth, 1)
        expected = {tuple(range(f, f + depth)) for f in firsts if f <= index < f + depth}
        assert drawn == expected


def test_forced_draws_hit_every_structure_alike(prepared):
    """With all draws forced both structures are drawn about equally often, and only where they are."""
    records = {n: CaseStore(prepared[1]).record(n) for n in CASES}
    generator = np.random.default_rng(0)
    choices = [choose_slice(records, 1.0, generator) for _ in range(400)]
    counts = {name: sum(c.structure == name for c in choices) for name in ("ball", "cube")}
    assert min(counts.values()) > 150
    assert all(c.index in records[c.case].label_slices[c.structure] for c in choices if c.structure)


@pytest.mark.parametrize(("workers", "depth"), [(0, 1), (1, 1), (2, 1), (2, 2)])
def test_batches_do_not_depend_on_workers_or_on_where_a_run_resumes(prepared, workers: int, depth: int):
    """Batches 3 to 5 are the same from any number of workers and when starting there."""
    dataset = make_dataset(prepared, depth=depth)
    reference = [dataset[(n // 10, n % 10)] for n in range(12, 24)]
    size = 4 * depth
    loader = make_loader(dataset, 12, batch_size=size, samples_per_epoch=10, num_workers=workers, pin_memory=False)
    flat = [tuple(part[i] for part in batch) for batch in islice(loader, 3) for i in range(4)]
    for got, wanted in zip(flat, reference, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_batch_size_counts_slices(prepared):
    """Six slices are two slabs of three."""
    loader = make_loader(
        make_dataset(prepared, depth=3), 0, batch_size=6, samples_per_epoch=10, num_workers=0, pin_memory=False
    )
    image, valid, target = next(iter(loader))
    assert image.shape == (2, 3, 3, 32, 32)
    assert valid.shape == target.shape == (2, 3, 1, 32, 32)


@pytest.mark.parametrize(("batch_size", "fitting"), [(2, "set batch_size to 3,"), (4, "to 3 or 6"), (7, "to 6 or 9")])
def test_a_batch_that_holds_no_whole_number_of_slabs_is_refused(prepared, batch_size: int, fitting: str):
    """The message names the sizes that would do."""
    dataset = make_dataset(prepared, depth=3)
    with pytest.raises(ConfigError) as error:
        make_loader(dataset, 0, batch_size=batch_size, samples_per_epoch=10, num_workers=0, pin_memory=False)
    assert fitting in str(error.value)
    assert "slab_depth" in str(error.value)


def test_another_seed_or_epoch_gives_other_samples(prepared):
    """Nothing repeats from epoch to epoch."""
    first, other = make_dataset(prepared, seed=1), make_dataset(prepared, seed=2)
    assert not torch.equal(first[(0, 0)][0], first[(1, 0)][0])
    assert not torch.equal(first[(0, 0)][0], other[(0, 0)][0])


def test_the_sampler_counts_through_epochs():
    """Keys continue over the epoch boundary."""
    assert list(islice(EndlessSampler(3, start=2), 3)) == [(0, 2), (1, 0), (1, 1)]


def test_tiles_of_a_scribbled_slice_hold_a_stroke(tmp_path: Path) -> None:
    """Where most voxels are ignored, every tile that is smaller than its slice shows one that is not."""
    workspace = Workspace.locate(workspace=tmp_path, environment={})
    plan = prepare(workspace, num_train=1)
    store = workspace.store_folder(DATASET, plan.store_key("2d"))
    scribbled = make_plan(labels={**LABELS, "ignore": 3})
    recipe = resolve_recipe(scribbled.configuration("2d"), "none", "cpu")
    recipe = replace(recipe, tile_vox=8, foreground_fraction=0.0)
    slices = SliceDataset(CaseStore(store), ["case_0"], plan=scribbled, recipe=recipe, context=0, seed=1, augment=False)
    read = slices._read

    def strokes(stacks: Stacks, case: str, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        image, labels = read(stacks, case, places)
        sparse = np.full_like(labels, 3)
        sparse[:, 2, 3:6] = 0
        sparse[:, 24, 20] = 1
        return image, sparse

    slices._read = strokes
    shown = [slices[0, index][2] for index in range(40)]
    assert all((target != IGNORE_INDEX).any() for target in shown)
    assert sum(bool((target == 1).any()) for target in shown) in range(3, 25)


@pytest.mark.parametrize("error", [EOFError(), ConnectionResetError("reset")])
def test_a_loader_that_ends_in_the_middle_of_a_batch_is_known_as_ended(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The connection notices before torch does; another error of the loader is not taken for that."""

    def batches():
        raise error
        yield

    monkeypatch.setattr("samunet.training.data._SIGNAL_SECONDS", 0.0)
    with pytest.raises(RuntimeError) as lost:
        next_batch(batches())
    assert worker_died(lost.value)
    assert not worker_died(RuntimeError("shapes do not fit"))


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this system has no interval timers")
def test_the_signal_of_an_ended_loader_is_awaited_where_it_is_understood() -> None:
    """What torch raises on the signal, a moment after the connection closed, comes out of the same call."""

    def ended(_number: int, _frame: object) -> None:
        raise RuntimeError("DataLoader worker (pid 3) is killed by signal: Killed.")

    def batches():
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        raise EOFError
        yield

    before = signal.signal(signal.SIGALRM, ended)
    try:
        with pytest.raises(RuntimeError, match="pid 3") as lost:
            next_batch(batches())
    finally:
        signal.signal(signal.SIGALRM, before)
    assert worker_died(lost.value)
