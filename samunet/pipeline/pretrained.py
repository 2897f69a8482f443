"""What pretrained weights have seen of the cases that a run validates on."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path

from samunet.artifacts.checkpoint import BaseWeights
from samunet.artifacts.pretraining import SeenDataset, read_pretrained
from samunet.core.log import Reporter


def tell_what_was_seen(base: BaseWeights, dataset: str, validation: Collection[str], reporter: Reporter) -> None:
    """Warn where labels of validation cases taught the weights; mention where only their images did.

    Args:
        base: The weights that a run starts from.
        dataset: Full name.
        validation: Cases of its fold.
        reporter: Who is told.
    """
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


def _seen(base: BaseWeights, dataset: str) -> Iterator[SeenDataset]:
    """What the weights, and those that they continued from, have seen of a dataset, as far as the files are here."""
    file = Path(base.file)
    about = read_pretrained(file) if base.file and file.is_file() else None
    if about is None:
        return
    seen = about.seen(dataset)
    if seen is not None:
        yield seen
    yield from _seen(about.base, dataset)
