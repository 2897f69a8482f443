"""best.json: which trained models a prediction uses, and how their masks are cleaned, found by cross-validation."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from samunet.artifacts.report import Interval
from samunet.core.config import Schema

BEST_VERSION = 1


class ComponentFilter(Schema):
    """Which connected parts of one structure a mask keeps.

    Args:
        structure: Name of the structure or region.
        kind: "largest": its largest component; "size": components that are not smaller than ``least_mm3``.
        least_mm3: Volume below which components are removed, in mm3; 0 for "largest".
        reason: What it gains in cross-validation.
    """

    structure: str
    kind: Literal["largest", "size"]
    least_mm3: float = Field(default=0.0, ge=0)
    reason: str = ""

    @model_validator(mode="after")
    def _sized(self) -> ComponentFilter:
        if (self.kind == "size") != (self.least_mm3 > 0):
            raise ValueError("kind 'size' needs least_mm3 above 0, kind 'largest' none")
        return self

    def __str__(self) -> str:
        """In a few words."""
        kept = "largest component" if self.kind == "largest" else f"components from {self.least_mm3:.3g} mm3 on"
        return f"{self.structure}: {kept}"


class BestModel(Schema):
    """One model of the choice; the probabilities of several are averaged.

    Args:
        model: Name of its folder: CONFIG__PRESET__WEIGHTS.
        folds: Folds that are averaged.
        identities: Fold to hash of what its final checkpoint says it is, to notice one that was trained again.
    """

    model: str
    folds: tuple[str, ...]
    identities: dict[str, str]


class CandidateScore(Schema):
    """How well a candidate did.

    Args:
        models: Names of its model folders: one, or two whose probabilities are averaged.
        dice: Mean over cases of the mean over structures; a structure that is rightly found nowhere counts 1.
        structures: Structure to its mean over cases.
        behind: How much the candidate with the highest mean is better, paired over cases; None for that one.
    """

    models: tuple[str, ...]
    dice: Interval
    structures: dict[str, float]
    behind: Interval | None = None


class Best(Schema):
    """What samunet_find_best_configuration found.

    Args:
        version: Schema version.
        dataset: Folder name.
        models: What predictions use.
        filters: How their masks are cleaned; at most one per structure.
        filters_reason: Why these filters, or none.
        reason: Why these models.
        candidates: Everything compared, best first.
        filtered_dice: The chosen models' score with the filters; None without any.
        folds: Folds compared.
        cases: Validation cases that all candidates share, on which they were compared.
        mirrored: Whether mirrored views were averaged.
        rule: How the choice is made.
        provenance: Versions, machine, command and time.
    """

    version: int = BEST_VERSION
    dataset: str
    models: tuple[BestModel, ...] = Field(min_length=1)
    filters: tuple[ComponentFilter, ...] = ()
    filters_reason: str = ""
    reason: str
    candidates: tuple[CandidateScore, ...]
    filtered_dice: Interval | None = None
    folds: tuple[str, ...]
    cases: tuple[str, ...]
    mirrored: bool
    rule: str
    provenance: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _readable(self) -> Best:
        if self.version != BEST_VERSION:
            raise ValueError(f"version {self.version} cannot be read, expected {BEST_VERSION}: compare again")
        names = [rule.structure for rule in self.filters]
        if len(set(names)) < len(names):
            raise ValueError("a structure has more than one filter")
        return self


class CaseScores(Schema):
    """Cross-validated Dice of one case, kept so that a comparison can be continued.

    Args:
        case: Case name.
        key: Hash of everything that the scores depend on.
        dice: Candidate to structure to Dice; None where it is in neither mask.
    """

    case: str
    key: str
    dice: dict[str, dict[str, float | None]]
