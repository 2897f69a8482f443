"""Which slices are drawn, what a sample holds, and that it depends on nothing but seed, epoch and index."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from samunet.artifacts.plan import Plan, resolve_recipe
from samunet.artifacts.workspace import Workspace
from samunet.core.labels import IGNORE_INDEX
from samunet.preprocessing.store import CaseStore
from samunet.training.data import EndlessSampler, SliceDataset, choose_slice, make_loader
from tests.samples import DATASET, make_plan, make_recipe, prepare

CASES = ["case_0", "case_1", "case_2"]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Plan, Path]:
    """A small preprocessed dataset."""
    workspace = Workspace.locate(workspace=tmp_path_factory.mktemp("data"), environment={})
    plan = prepare(workspace, num_train=3)
    return plan, workspace.store_folder(DATASET, plan.store_key("2d"))


def make_dataset(prepared: tuple[Plan, Path], *, context: int = 0, seed: int = 1, augment: bool = True, tile: int = 32):
    """A dataset over the small store."""
    plan, store = prepared
    changed = make_plan(recipes={"none": {"cpu": make_recipe(tile_vox=tile)}})
    recipe = resolve_recipe(changed.configuration("2d"), "none", "cpu")
    return SliceDataset(store, CASES, plan=plan, recipe=recipe, context=context, seed=seed, augment=augment)


def test_a_sample_is_the_stored_slice_centred_in_its_tile(prepared):
    """Without augmentation image, mask of validity and target are the slice in the middle of zeros and ignore."""
    dataset = make_dataset(prepared, augment=False)
    image, valid, target = dataset[(0, 5)]
    assert image.shape == (3, 32, 32)
    assert valid.shape == (1, 32, 32)
    assert target.shape == (1, 32, 32)
    inside = valid[0] == 1
    assert int(inside.sum()) == 30 * 26
    assert torch.all(target[0][~inside] == IGNORE_INDEX)
    assert torch.all(image[:, ~inside] == 0)
    store = CaseStore(prepared[1])
    slices = [store.open(n).data[0, s] for n in CASES for s in range(6)]
    shown = image[0, 1:31, 3:29].numpy()
    assert any(np.array_equal(shown, s) for s in slices)


def test_context_gives_the_neighbours_as_channels(prepared):
    """The middle channel is the slice itself, the others its neighbours, repeated at the ends."""
    store = CaseStore(prepared[1])
    volumes = {n: store.open(n).data[0] for n in CASES}
    dataset = make_dataset(prepared, context=1, augment=False)
    for index in range(20):
        image = dataset[(0, index)][0][:, 1:31, 3:29].numpy()
        matches = [(n, s) for n, v in volumes.items() for s in range(6) if np.array_equal(v[s], image[1])]
        assert len(matches) == 1
        name, place = matches[0]
        assert np.array_equal(image[0], volumes[name][max(0, place - 1)])
        assert np.array_equal(image[2], volumes[name][min(5, place + 1)])


def test_tiles_of_a_large_slice_hold_the_chosen_structure(prepared):
    """Where the slice exceeds the tile, a forced structure lies inside the tile."""
    plan, store = prepared
    dataset = make_dataset(prepared, augment=False, tile=16)
    records = {n: CaseStore(store).record(n) for n in CASES}
    for index in range(30):
        from samunet.core.rng import seed_sample

        choice = choose_slice(records, 0.5, seed_sample(1, 0, index))
        if choice.structure is not None:
            wanted = list(plan.label_spec.names).index(choice.structure) + 1
            assert wanted in dataset[(0, index)][2]


def test_forced_draws_hit_every_structure_alike(prepared):
    """With all draws forced both structures are drawn about equally often, and only where they are."""
    records = {n: CaseStore(prepared[1]).record(n) for n in CASES}
    generator = np.random.default_rng(0)
    choices = [choose_slice(records, 1.0, generator) for _ in range(400)]
    counts = {name: sum(c.structure == name for c in choices) for name in ("ball", "cube")}
    assert min(counts.values()) > 150
    assert all(c.index in records[c.case].label_slices[c.structure] for c in choices if c.structure)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_batches_do_not_depend_on_workers_or_on_where_a_run_resumes(prepared, workers: int):
    """Batches 3 to 5 are the same from any number of workers and when starting there."""
    dataset = make_dataset(prepared)
    reference = [dataset[(n // 10, n % 10)] for n in range(12, 24)]
    loader = make_loader(dataset, 12, batch_size=4, samples_per_epoch=10, num_workers=workers, pin_memory=False)
    flat = [tuple(part[i] for part in batch) for batch in islice(loader, 3) for i in range(4)]
    for got, wanted in zip(flat, reference, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_another_seed_or_epoch_gives_other_samples(prepared):
    """Nothing repeats from epoch to epoch."""
    first, other = make_dataset(prepared, seed=1), make_dataset(prepared, seed=2)
    assert not torch.equal(first[(0, 0)][0], first[(1, 0)][0])
    assert not torch.equal(first[(0, 0)][0], other[(0, 0)][0])


def test_the_sampler_counts_through_epochs():
    """Keys continue over the epoch boundary."""
    assert list(islice(EndlessSampler(3, start=2), 3)) == [(0, 2), (1, 0), (1, 1)]
