"""Cross-validation splits, equal to nnU-Net's, and the monitor subset of a training set."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from sklearn.model_selection import KFold

from samunet.core.config import Schema, parse_schema
from samunet.core.errors import ConfigError, UsageError
from samunet.core.files import read_json, write_json

NUM_FOLDS = 5
SPLIT_SEED = 12345
ALL_CASES = "all"

MONITOR_FRACTION = 0.1
MONITOR_MAX_CASES = 10
MONITOR_MIN_TRAINING = 5
MONITOR_ALWAYS = 10


class Split(Schema):
    """One fold: names of training and of validation cases."""

    train: tuple[str, ...]
    val: tuple[str, ...]


class Splits(Schema):
    """All folds, as the list that ``splits_final.json`` holds."""

    folds: tuple[Split, ...]


def make_splits(cases: Sequence[str], groups: Mapping[str, str] | None = None) -> list[Split]:
    """Split cases into folds.

    Five shuffled folds over the sorted case names, or over the sorted groups; with fewer than five of them each is
    left out once, and a single one gives no fold at all.

    Source: nnU-Net's generate_crossval_split (KFold with seed 12345).
    """
    members = by_group(cases, groups)
    units = sorted(members)
    if len(units) < 2:
        return []
    if len(units) < NUM_FOLDS:
        held_out: Iterable[Sequence[int]] = [[index] for index in range(len(units))]
    else:
        folds = KFold(n_splits=NUM_FOLDS, shuffle=True, random_state=SPLIT_SEED)
        held_out = [test.tolist() for _, test in folds.split(units)]
    return [_split_without(members, {units[index] for index in indices}) for indices in held_out]


def load_or_make_splits(file: Path, cases: Sequence[str], groups: Mapping[str, str] | None = None) -> list[Split]:
    """Read nnU-Net's ``splits_final.json``, or make it where there is none.

    A file that exists is respected as it stands, so folds can be edited by hand.

    Raises:
        ConfigError: If the file is malformed, names unknown cases, or trains on a validation case.
    """
    if file.is_file():
        return load_splits(file, cases)
    splits = make_splits(cases, groups)
    write_json(file, [split.model_dump(mode="json") for split in splits])
    return splits


def load_splits(file: Path, cases: Iterable[str]) -> list[Split]:
    """Read nnU-Net's ``splits_final.json``.

    Raises:
        ConfigError: If the file is missing or malformed, names unknown cases, or trains on a validation case.
    """
    content = read_json(file)
    if not isinstance(content, list):
        raise ConfigError("the splits must be a list", expected='[{"train": [...], "val": [...]}, ...]', file=file)
    splits = list(parse_schema(Splits, {"folds": content}, file=file).folds)
    known = set(cases)
    for fold, split in enumerate(splits):
        _check_split(fold, split, known, file)
    return splits


def cases_of_fold(splits: Sequence[Split], fold: str, cases: Sequence[str]) -> Split:
    """The cases of fold "0", "1", ..., or of "all", which trains on every case and validates on none.

    Raises:
        UsageError: If there is no such fold; the message lists those that exist.
    """
    if fold == ALL_CASES:
        return Split(train=tuple(sorted(cases)), val=())
    if not fold.isdecimal() or int(fold) >= len(splits):
        names = [*(str(index) for index in range(len(splits))), ALL_CASES]
        raise UsageError("this fold does not exist", expected=f"one of {', '.join(names)}", found=fold)
    return splits[int(fold)]


def monitor_size(num_training: int, *, early_stop: bool = True) -> tuple[int, str]:
    """How many training cases early stopping and ``best`` look at, and why.

    Args:
        num_training: Training cases.
        early_stop: Whether the run may stop early.
    """
    if num_training < MONITOR_MIN_TRAINING:
        return 0, f"{num_training} training cases, fewer than {MONITOR_MIN_TRAINING}: all train, the last weights count"
    if num_training < MONITOR_ALWAYS and not early_stop:
        return 0, (
            f"{num_training} training cases, fewer than {MONITOR_ALWAYS}, and nothing stops early: one set aside would "
            "cost more than it tells"
        )
    wanted = min(MONITOR_MAX_CASES, max(1, round(MONITOR_FRACTION * num_training)))
    return wanted, f"a tenth of {num_training} training cases, 1 to {MONITOR_MAX_CASES}"


def monitor_subset(
    train: Sequence[str], groups: Mapping[str, str] | None = None, *, seed: int, early_stop: bool = True
) -> tuple[str, ...]:
    """Pick the training cases that early stopping and ``best`` look at.

    A tenth of the cases, between 1 and 10, in whole groups. Where even the smallest group is larger than that, it is
    taken alone: a group is never divided.

    Args:
        train: Training cases.
        groups: Case to group; None: every case is its own.
        seed: Of the draw.
        early_stop: Whether the run may stop early.

    Returns:
        Sorted names; empty where :func:`monitor_size` says so, and where all cases are of one group.
    """
    members = by_group(train, groups)
    wanted, _ = monitor_size(len(train), early_stop=early_stop)
    if wanted == 0 or len(members) < 2:
        return ()
    units = sorted(members)
    order = [units[index] for index in np.random.default_rng(seed).permutation(len(units))]
    chosen: list[str] = []
    for unit in order:
        if len(chosen) + len(members[unit]) <= wanted:
            chosen += members[unit]
    return tuple(sorted(chosen or members[min(order, key=lambda unit: len(members[unit]))]))


def by_group(cases: Iterable[str], groups: Mapping[str, str] | None) -> dict[str, list[str]]:
    """Group to its sorted cases; each case is its own group where none are given."""
    members: dict[str, list[str]] = {}
    for case in sorted(cases):
        if groups is not None and case not in groups:
            raise ConfigError("a case has no group", expected="an entry for every case", case=case)
        members.setdefault(case if groups is None else groups[case], []).append(case)
    return members


def _split_without(members: Mapping[str, list[str]], held_out: set[str]) -> Split:
    train = sorted(case for unit, cases in members.items() if unit not in held_out for case in cases)
    val = sorted(case for unit in held_out for case in members[unit])
    return Split(train=tuple(train), val=tuple(val))


def _check_split(fold: int, split: Split, known: set[str], file: Path) -> None:
    unknown = sorted({*split.train, *split.val} - known)
    if unknown:
        raise ConfigError(
            f"fold {fold} names cases that the dataset does not have",
            found=", ".join(unknown),
            file=file,
            todo="correct the file, or delete it to have new splits made",
        )
    both = sorted(set(split.train) & set(split.val))
    if both:
        raise ConfigError(f"fold {fold} validates on cases it trains on", found=", ".join(both), file=file)
    if not split.train:
        raise ConfigError(f"fold {fold} has no training case", file=file)
