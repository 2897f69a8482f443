"""What pretrained weights have seen of the cases that a run validates on."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from samunet.artifacts.checkpoint import ENDING, BaseWeights
from samunet.artifacts.pretraining import Earlier, SeenDataset, read_exported, read_pretrained
from samunet.artifacts.subset import Subset
from samunet.core.errors import WeightsError
from samunet.core.log import Reporter
from samunet.models.weights import NONE, OFFICIAL, cache_folder, recorded_weights

_BY_SAM = frozenset(file.sha256 for file in OFFICIAL.values())


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
    tell_what_is_unknown(earlier, reporter)
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
    if base.kind == NONE or base.sha256 in _BY_SAM:
        return join_seen(_of_rest(base))
    if Path(base.file).suffix != ENDING:
        return join_seen([_by_record(base), *_of_rest(base)])
    try:
        file = recorded_weights(base.model_copy(update={"rest": None}))
    except WeightsError:
        return join_seen([Earlier(lost=(base.file,)), *_of_rest(base)])
    about = None if file is None else read_pretrained(file.path)
    if about is None:
        return join_seen([Earlier(unrecorded=(base.file,)), *_of_rest(base)])
    earlier = seen_before(about.base) if about.earlier is None else about.earlier
    return join_seen([Earlier(datasets=about.datasets), earlier, *_of_rest(base)])


def tell_what_is_unknown(earlier: Earlier, reporter: Reporter) -> None:
    """Warn where it is not known what taught the weights that a run starts from."""
    reasons = []
    if earlier.lost:
        reasons.append(f"files that they continued from are gone or were replaced: {', '.join(earlier.lost)}")
    if earlier.unrecorded:
        files = ", ".join(earlier.unrecorded)
        reasons.append(f"files hold no record of samunet_pretrain and have none of samunet_export beside them: {files}")
    for reason in reasons:
        reporter.warn(
            f"it is not known which cases taught these weights, as {reason}; if labels of validation cases were read "
            "there, their Dice does not say how well new images will be segmented"
        )


def _by_record(base: BaseWeights) -> Earlier:
    """What the record of samunet_export says, beside the file where it was or in the cache."""
    recorded = Path(base.file)
    found = (read_exported(path, base.sha256) for path in (recorded, cache_folder() / recorded.name))
    exported = next((about for about in found if about is not None), None)
    return Earlier(unrecorded=(base.file,)) if exported is None else exported.seen


def _of_rest(base: BaseWeights) -> list[Earlier]:
    return [] if base.rest is None else [seen_before(base.rest)]


def join_seen(parts: Sequence[Earlier]) -> Earlier:
    """What all parts have seen together, each dataset of a stage and each file once."""
    datasets: list[SeenDataset] = []
    for seen in (seen for part in parts for seen in part.datasets):
        if seen not in datasets:
            datasets.append(seen)
    lost = dict.fromkeys(file for part in parts for file in part.lost)
    unrecorded = dict.fromkeys(file for part in parts for file in part.unrecorded)
    return Earlier(datasets=tuple(datasets), lost=tuple(lost), unrecorded=tuple(unrecorded))


def _seen(earlier: Earlier, dataset: str) -> list[SeenDataset]:
    return [seen for seen in earlier.datasets if seen.name == dataset]


def _taught(earlier: Earlier, dataset: str) -> frozenset[str]:
    return frozenset(case for seen in _seen(earlier, dataset) if seen.labels_read for case in seen.training_cases)
