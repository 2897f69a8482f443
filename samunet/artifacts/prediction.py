"""What a prediction run did, written beside the masks."""

from __future__ import annotations

from typing import Literal

from samunet.artifacts.best import ComponentFilter
from samunet.core.config import Schema

PREDICTION_VERSION = 1


class CasePrediction(Schema):
    """What became of one image.

    Args:
        case: Case name.
        status: "predicted" now, "kept" from an earlier run, "failed", or "pending" while the run has not ended: then
            its mask is there or not.
        problem: Why it failed.
        source: Hash of its files' names, sizes and times; empty in reports that did not hold it.
    """

    case: str
    status: Literal["predicted", "kept", "failed", "pending"]
    problem: str | None = None
    source: str = ""


class ModelUsed(Schema):
    """A model folder that masks come from.

    Args:
        model: Its name.
        identities: Fold to hash of what its checkpoint says it is.
    """

    model: str
    identities: dict[str, str]


class PromptsUsed(Schema):
    """The prompts that masks answer.

    Args:
        file: Name of the prompts' file.
        sha256: Its hash.
        oracle: Whether its name says that it was made from reference labels.
    """

    file: str
    sha256: str
    oracle: bool


class PredictionReport(Schema):
    """A prediction run; written before the first mask, and again at the end.

    Args:
        version: Schema version.
        dataset: Dataset the model was trained on.
        model: Name of the model folder; of several whose probabilities were averaged, with " + " between them.
        models: Each of them, with its checkpoints.
        folds: Folds that were averaged.
        checkpoint: Which checkpoint of each.
        mirrored: Whether mirrored views were averaged.
        prompts: What the masks answer; None for a model that takes no prompts.
        propagated: Whether prompted objects were followed to the slices beside the marked ones.
        filters: Which components of structures the masks keep.
        cases: Per image, sorted by name.
    """

    version: int = PREDICTION_VERSION
    dataset: str
    model: str
    models: tuple[ModelUsed, ...] = ()
    folds: tuple[str, ...]
    checkpoint: str
    mirrored: bool
    prompts: PromptsUsed | None = None
    propagated: bool = False
    filters: tuple[ComponentFilter, ...] = ()
    cases: tuple[CasePrediction, ...]

    @property
    def failed(self) -> tuple[str, ...]:
        """Images without a mask."""
        return tuple(c.case for c in self.cases if c.status == "failed")
