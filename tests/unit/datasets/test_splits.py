"""Folds as nnU-Net makes them, groups kept whole, and the monitor subset."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.model_selection import KFold

from samunet.core.errors import ConfigError, UsageError
from samunet.datasets.splits import cases_of_fold, load_or_make_splits, load_splits, make_splits, monitor_subset

CASES = [f"case_{index:02d}" for index in range(23)]


def test_folds_are_those_of_a_shuffled_kfold_over_sorted_names() -> None:
    """nnU-Net's rule, whatever the order the names come in."""
    folds = list(KFold(n_splits=5, shuffle=True, random_state=12345).split(CASES))
    for split, (train, val) in zip(make_splits(CASES[::-1]), folds, strict=True):
        assert split.train == tuple(np.array(CASES)[train])
        assert split.val == tuple(np.array(CASES)[val])


@given(st.lists(st.integers(0, 8), min_size=1, max_size=40))
def test_every_unit_is_validated_once_and_never_divided(numbers: list[int]) -> None:
    """Folds partition the cases, and no group stands on both sides."""
    groups = {f"c{index:02d}": f"g{number}" for index, number in enumerate(numbers)}
    splits = make_splits(list(groups), groups)
    units = len(set(groups.values()))
    assert len(splits) == (0 if units == 1 else min(5, units))
    if splits:
        assert Counter(case for split in splits for case in split.val) == Counter(list(groups))
    for split in splits:
        assert sorted(split.train + split.val) == sorted(groups)
        assert not {groups[case] for case in split.train} & {groups[case] for case in split.val}


def test_few_cases_are_left_out_one_by_one() -> None:
    """Below five cases there are as many folds as cases; a single case has none."""
    assert [split.val for split in make_splits(["b", "a", "c"])] == [("a",), ("b",), ("c",)]
    assert make_splits(["a"]) == []


def test_a_case_without_a_group_is_refused() -> None:
    """It is named."""
    with pytest.raises(ConfigError) as caught:
        make_splits(["a", "b"], {"a": "g"})
    assert caught.value.case == "b"


def test_files_are_made_once_and_then_respected(tmp_path: Path) -> None:
    """The file has nnU-Net's form, and a fold edited by hand stays edited."""
    file = tmp_path / "splits_final.json"
    splits = load_or_make_splits(file, CASES)
    content = json.loads(file.read_text())
    assert [entry["val"] for entry in content] == [list(split.val) for split in splits]
    content = [{"train": CASES[:3], "val": CASES[3:4]}]
    file.write_text(json.dumps(content))
    assert load_or_make_splits(file, CASES)[0].val == (CASES[3],)


@pytest.mark.parametrize(
    "content",
    [
        {"train": []},
        [{"train": ["case_00", "unknown"], "val": []}],
        [{"train": ["case_00"], "val": ["case_00"]}],
        [{"train": [], "val": ["case_00"]}],
        [{"train": ["case_00"], "validation": ["case_01"]}],
    ],
)
def test_wrong_files_are_refused(tmp_path: Path, content: object) -> None:
    """Unknown cases, cases on both sides, empty or misnamed sides."""
    file = tmp_path / "splits_final.json"
    file.write_text(json.dumps(content))
    with pytest.raises(ConfigError) as caught:
        load_or_make_splits(file, CASES)
    assert caught.value.file == file


def test_every_fault_of_a_file_names_its_fold(tmp_path: Path) -> None:
    """Two malformed folds are told at once."""
    file = tmp_path / "splits_final.json"
    file.write_text(json.dumps([{"train": ["case_00"]}, {"train": ["case_00"], "val": ["case_01"]}, {"val": []}]))
    with pytest.raises(ConfigError, match=r"folds\.0\.val: (?s:.*)folds\.2\.train: "):
        load_splits(file, CASES)


def test_folds_are_named_zero_to_four_or_all() -> None:
    """Anything else is a usage error that lists what exists."""
    splits = make_splits(CASES)
    assert cases_of_fold(splits, "3", CASES) == splits[3]
    assert cases_of_fold(splits, "all", CASES).train == tuple(CASES)
    assert cases_of_fold(splits, "all", CASES).val == ()
    for wrong in ("5", "-1", "first", ""):
        with pytest.raises(UsageError) as caught:
            cases_of_fold(splits, wrong, CASES)
        assert caught.value.expected == "one of 0, 1, 2, 3, 4, all"


@given(st.integers(0, 300), st.integers(0, 5))
def test_the_monitor_is_a_seeded_tenth(count: int, seed: int) -> None:
    """A tenth of the cases, at least 1 and at most 10, none below 5; the same for the same seed."""
    train = [f"c{index:03d}" for index in range(count)]
    chosen = monitor_subset(train, seed=seed)
    assert len(chosen) == (0 if count < 5 else min(10, max(1, round(count / 10))))
    assert list(chosen) == sorted(set(chosen) & set(train))
    assert chosen == monitor_subset(train[::-1], seed=seed)


def test_the_monitor_depends_on_the_seed() -> None:
    """Two seeds choose differently."""
    assert len({monitor_subset(CASES, seed=seed) for seed in range(6)}) > 1


@given(st.lists(st.integers(0, 12), min_size=5, max_size=80), st.integers(0, 3))
def test_the_monitor_takes_whole_groups(numbers: list[int], seed: int) -> None:
    """No group is divided, and something is left to train on."""
    groups = {f"c{index:02d}": f"g{number}" for index, number in enumerate(numbers)}
    chosen = set(monitor_subset(list(groups), groups, seed=seed))
    touched = {groups[case] for case in chosen}
    assert chosen == {case for case, group in groups.items() if group in touched}
    assert bool(chosen) == (len(set(numbers)) > 1)
    assert len(chosen) < len(groups)
