"""Subsets of training cases, for few labels: drawn once per fold and seed, nested, patients kept together."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from samunet.artifacts.subset import SubsetOrder, SubsetOrders
from samunet.core.config import load_schema, save_schema
from samunet.core.errors import ConfigError, UsageError
from samunet.datasets.splits import Split, by_group

_NAMES_SHOWN = 5


def draw_order(
    train: Sequence[str], groups: Mapping[str, str] | None = None, *, seed: int
) -> tuple[tuple[str, ...], ...]:
    """The order in which cases are taken into subsets: shuffled groups, the sorted cases of a group together.

    A large group waits until as many cases are taken as it has, and the first is no larger than the median, so that it
    stands in the way of no smaller subset: a beginning of the order holds at least half of what is asked for, wherever
    the sizes allow. Groups of one size come as they are shuffled.

    Args:
        train: Training cases of a fold.
        groups: Case to group (patient); None: every case is its own.
        seed: Of the draw.
    """
    members = by_group(train, groups)
    units = sorted(members)
    shuffled = np.random.default_rng(seed).permutation(len(units))
    waiting = [tuple(members[units[index]]) for index in shuffled]
    order: list[tuple[str, ...]] = []
    limit = int(np.median([len(group) for group in waiting]))
    while waiting:
        fitting = (group for group in waiting if len(group) <= limit)
        chosen = next(fitting, None) or min(waiting, key=len)
        waiting.remove(chosen)
        order.append(chosen)
        limit = sum(map(len, order))
    return tuple(order)


def first_cases(order: Sequence[Sequence[str]], num_cases: int) -> tuple[str, ...]:
    """The beginning of an order: whole groups as long as they do not exceed the number.

    The first that does not fit ends it, also where a later one would: so one subset of an order always holds every
    smaller one. Of a first group that is larger than the number its first cases are taken.

    Args:
        order: Groups of cases, as :func:`draw_order` gives them.
        num_cases: Most cases to take.

    Returns:
        Sorted names.

    Raises:
        UsageError: If there are not that many cases.
    """
    total = sum(len(group) for group in order)
    if not 1 <= num_cases <= total:
        raise UsageError("the fold has fewer training cases", expected=f"1 to {total}", found=str(num_cases))
    if len(order[0]) > num_cases:
        return tuple(sorted(order[0][:num_cases]))
    taken: list[str] = []
    for group in order:
        if len(taken) + len(group) > num_cases:
            break
        taken += group
    return tuple(sorted(taken))


def load_or_draw_order(
    file: Path, fold: str, train: Sequence[str], groups: Mapping[str, str] | None = None, *, seed: int
) -> tuple[tuple[str, ...], ...]:
    """The order written down for a fold and seed, or a new one that is written down now.

    Args:
        file: subsets.json of the dataset.
        fold: Name of the fold.
        train: Its training cases.
        groups: Case to group.
        seed: Of the draw.

    Raises:
        ConfigError: If the file is malformed, or its order is of other cases than the fold has now.
    """
    known = load_schema(SubsetOrders, file) if file.is_file() else SubsetOrders()
    order = known.find(fold, seed)
    if order is None:
        order = SubsetOrder(fold=fold, seed=seed, groups=draw_order(train, groups, seed=seed))
        save_schema(SubsetOrders(orders=(*known.orders, order)), file)
        return order.groups
    recorded = [case for group in order.groups for case in group]
    if sorted(recorded) != sorted(train):
        raise ConfigError(
            f"the order of subsets of fold {fold} with seed {seed} is of other cases than the fold has",
            expected=f"{len(train)} cases, as {_some(sorted(train))}",
            found=f"{len(recorded)} cases, as {_some(sorted(recorded))}",
            file=file,
            todo="delete its entry, or the file, to have it drawn anew; runs made with it keep their cases",
        )
    return order.groups


def named_cases(names: Sequence[str], split: Split, fold: str) -> tuple[str, ...]:
    """A subset given by its cases, sorted.

    Raises:
        UsageError: If a name is given twice, or is no training case of the fold.
    """
    twice = sorted({name for name in names if list(names).count(name) > 1})
    foreign = sorted(set(names) - set(split.train))
    validating = sorted(set(foreign) & set(split.val))
    if not names or twice or foreign:
        raise UsageError(
            f"--cases does not name training cases of fold {fold}"
            + (f": {_some(validating)} validate" if validating else ""),
            expected=f"distinct names, as {_some(sorted(split.train))}",
            found=_some(twice or foreign) or "no name",
        )
    return tuple(sorted(names))


def read_case_list(text: str) -> tuple[str, ...]:
    """Case names from a file (a JSON list, or one name per line) or from a list with commas.

    Raises:
        UsageError: If a file of that name is neither, or no text in UTF-8.
    """
    path = Path(text)
    if not _is_file(path):
        return tuple(name.strip() for name in text.split(",") if name.strip())
    try:
        content = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UsageError("the list of cases is no text in UTF-8", file=path, todo="save it as UTF-8") from None
    if not content.lstrip().startswith("["):
        return tuple(line.strip() for line in content.splitlines() if line.strip())
    try:
        names = json.loads(content)
    except json.JSONDecodeError as error:
        raise UsageError("the list of cases is not valid JSON", file=path, found=str(error)) from None
    if not all(isinstance(name, str) for name in names):
        raise UsageError("the list of cases holds something else than names", expected='["case_1", ...]', file=path)
    return tuple(names)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # longer than any file's name
        return False


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_NAMES_SHOWN])
    return f"{shown} and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else shown
