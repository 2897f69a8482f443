"""What a prediction run did, written beside the masks."""

from __future__ import annotations

from typing import Literal

from samunet.core.config import Schema

PREDICTION_VERSION = 1


class CasePrediction(Schema):
    """What became of one image.

    Args:
        case: Case name.
        status: "predicted" now, "kept" from an earlier run, or "failed".
        problem: Why it failed.
    """

    case: str
    status: Literal["predicted", "kept", "failed"]
    problem: str | None = None


class PredictionReport(Schema):
    """A prediction run.

    Args:
        version: Schema version.
        dataset: Dataset the model was trained on.
        model: Name of the model folder.
        folds: Folds that were averaged.
        checkpoint: Which checkpoint of each.
        mirrored: Whether mirrored views were averaged.
        cases: Per image, sorted by name.
    """

    version: int = PREDICTION_VERSION
    dataset: str
    model: str
    folds: tuple[str, ...]
    checkpoint: str
    mirrored: bool
    cases: tuple[CasePrediction, ...]

    @property
    def failed(self) -> tuple[str, ...]:
        """Images without a mask."""
        return tuple(c.case for c in self.cases if c.status == "failed")
