"""What pretrained weights have seen of the cases that a run validates on."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from samunet.artifacts.checkpoint import ENDING, BaseWeights
from samunet.artifacts.pretraining import Earlier, SeenDataset, read_pretrained
from samunet.artifacts.subset import Subset
from samunet.core.errors import WeightsError
from samunet.core.log import Reporter
from samunet.models.weights import recorded_weights


def labels_read(base: BaseWeights, dataset: str) -> frozenset[str]:
    """Cases of a dataset with whose labels weights were taught, at whatever remove, as far as it is known.

    Args:
        base: The weights that a run starts from.
        dataset: Full name.
    """
    return _taught(seen_before(base), dataset)


def tell_what_was_seen(
    base: BaseWeights,
    dataset: str,
    validation: Collection[str],
    reporter: Reporter,
    *,
    subset: Subset | None = None,
) -> None:
    """Warn where labels of validation cases, or from outside of a subset, taught the weights, or that is not known.

    Where merely images were seen it is mentioned.

    Args:
        base: The weights that a run starts from.
        dataset: Full name.
        validation: Cases of its fold.
        reporter: Who is told.
        subset: The labelled cases that the run is limited to.
    """
    earlier = seen_before(base)
    if earlier.lost:
        reporter.warn(
            "it is not known which cases taught these weights, as files that they continued from are gone or were "
            f"replaced: {', '.join(earlier.lost)}; if labels of validation cases were read there, their Dice does not "
            "say how well new images will be segmented"
        )
    taught = _taught(earlier, dataset)
    outside = taught - set(validation) - set(() if subset is None else subset.cases)
    if subset is not None and outside:
        reporter.warn(
            f"these weights were taught with the labels of {len(outside)} cases outside of the {len(subset.cases)} "
            f"chosen: the run does not show what {len(subset.cases)} labelled cases are worth"
        )
    if common := taught & set(validation):
        reporter.warn(
            f"these weights were taught with the labels of {len(common)} of the {len(validation)} validation cases: "
            "their Dice does not say how well new images will be segmented"
        )
    seen = frozenset(case for part in _seen(earlier, dataset) for case in part.all_cases)
    if common := (seen - taught) & set(validation):
        reporter.info(
            f"these weights were pretrained on the images, not the labels, of {len(common)} of the {len(validation)} "
            "validation cases"
        )


def seen_before(base: BaseWeights) -> Earlier:
    """All that weights have seen, with what those had seen that they continued from.

    A file is only believed if it has the hash that is recorded: another one may lie in its place by now.
    """
    if Path(base.file).suffix != ENDING:
        return Earlier() if base.rest is None else seen_before(base.rest)
    try:
        file = recorded_weights(base.model_copy(update={"rest": None}))
    except WeightsError:
        return _joined([Earlier(lost=(base.file,)), *_of_rest(base)])
    about = None if file is None else read_pretrained(file.path)
    if about is None:
        return _joined(_of_rest(base))
    earlier = seen_before(about.base) if about.earlier is None else about.earlier
    return _joined([Earlier(datasets=about.datasets), earlier, *_of_rest(base)])


def _of_rest(base: BaseWeights) -> list[Earlier]:
    return [] if base.rest is None else [seen_before(base.rest)]


def _joined(parts: Sequence[Earlier]) -> Earlier:
    """All parts, each dataset of a stage and each file once."""
    datasets: list[SeenDataset] = []
    for seen in (seen for part in parts for seen in part.datasets):
        if seen not in datasets:
            datasets.append(seen)
    lost = dict.fromkeys(file for part in parts for file in part.lost)
    return Earlier(datasets=tuple(datasets), lost=tuple(lost))


def _seen(earlier: Earlier, dataset: str) -> list[SeenDataset]:
    return [seen for seen in earlier.datasets if seen.name == dataset]


def _taught(earlier: Earlier, dataset: str) -> frozenset[str]:
    return frozenset(case for seen in _seen(earlier, dataset) if seen.labels_read for case in seen.training_cases)
