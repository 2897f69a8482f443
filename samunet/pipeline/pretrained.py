"""What pretrained weights have seen of the cases that a run validates on."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from samunet.artifacts.checkpoint import BaseWeights
from samunet.artifacts.pretraining import SeenDataset, read_pretrained
from samunet.artifacts.subset import Subset
from samunet.core.log import Reporter


def labels_read(base: BaseWeights, dataset: str) -> frozenset[str]:
    """Cases of a dataset with whose labels weights were taught, at whatever remove, as far as the files are here.

    Args:
        base: The weights that a run starts from.
        dataset: Full name.
    """
    return frozenset(case for seen in _seen(base, dataset) if seen.labels_read for case in seen.training_cases)


def tell_what_was_seen(
    base: BaseWeights,
    dataset: str,
    validation: Collection[str],
    reporter: Reporter,
    *,
    subset: Subset | None = None,
) -> None:
    """Warn where labels of validation cases, or from outside of a subset, taught the weights; mention mere images.

    Args:
        base: The weights that a run starts from.
        dataset: Full name.
        validation: Cases of its fold.
        reporter: Who is told.
        subset: The labelled cases that the run is limited to.
    """
    outside = labels_read(base, dataset) - set(validation) - set(() if subset is None else subset.cases)
    if subset is not None and outside:
        reporter.warn(
            f"these weights were taught with the labels of {len(outside)} cases outside of the {len(subset.cases)} "
            f"chosen: the run does not show what {len(subset.cases)} labelled cases are worth"
        )
    for seen in _seen(base, dataset):
        common = len(set(seen.training_cases) & set(validation))
        if common and seen.labels_read:
            reporter.warn(
                f"these weights were taught with the labels of {common} of the {len(validation)} validation cases: "
                "their Dice does not say how well new images will be segmented"
            )
        elif common:
            reporter.info(
                f"these weights were pretrained on the images, not the labels, of {common} of the {len(validation)} "
                "validation cases"
            )


def _seen(base: BaseWeights, dataset: str) -> list[SeenDataset]:
    """What the weights, and those that they continued from, have seen of a dataset, as far as the files are here."""
    found, known = [], set()
    waiting: list[BaseWeights | None] = [base]
    while waiting:
        weights = waiting.pop(0)
        if weights is None or not weights.file or weights.file in known:
            continue
        known.add(weights.file)
        waiting.append(weights.rest)
        file = Path(weights.file)
        about = read_pretrained(file) if file.is_file() else None
        if about is not None:
            found.append(about.seen(dataset))
            waiting.append(about.base)
    return [seen for seen in found if seen is not None]
