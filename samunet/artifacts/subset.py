"""Subsets of a fold's training cases: the order in which they are taken, drawn once, and the subset of a run."""

from __future__ import annotations

import re

from samunet.core.config import Schema

SUBSETS_VERSION = 1
SUBSET_SEED = 12345
_IN_LABEL = re.compile(r"-(n\d+(s\d+)?|c[0-9a-f]{6})$")


class SubsetOrder(Schema):
    """The order in which a fold's training cases are taken into subsets; a subset is the beginning of it.

    Args:
        fold: "0" to "4", or "all".
        seed: What it was drawn with.
        groups: The cases, those of one group (patient) together.
    """

    fold: str
    seed: int
    groups: tuple[tuple[str, ...], ...]


class SubsetOrders(Schema):
    """subsets.json: every order that was drawn for a dataset.

    Args:
        version: Schema version.
        orders: One per fold and seed.
    """

    version: int = SUBSETS_VERSION
    orders: tuple[SubsetOrder, ...] = ()

    def find(self, fold: str, seed: int) -> SubsetOrder | None:
        """The order of a fold and seed, or None."""
        return next((order for order in self.orders if (order.fold, order.seed) == (fold, seed)), None)


class Subset(Schema):
    """The labelled cases that a run is limited to.

    Args:
        cases: Sorted names.
        wanted: How many were asked for; None where they were named.
        seed: Of the draw; None where they were named.
    """

    cases: tuple[str, ...]
    wanted: int | None = None
    seed: int | None = None


def is_of_subset(label: str) -> bool:
    """Whether the label in the name of a model folder (preset, changes, subset) is that of a run on a subset."""
    return _IN_LABEL.search(label) is not None
