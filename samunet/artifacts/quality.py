"""What a model says about its own masks: how that was calibrated beside a checkpoint, what it came to beside masks."""

from __future__ import annotations

from pydantic import Field, model_validator

from samunet.core.config import Schema

QUALITY_VERSION = 1
CALIBRATION_FILE = "quality.json"
QUALITY_FILE = "quality.json"
QUALITY_TABLE = "quality.csv"
QUALITY_JOURNAL = "quality.partial.jsonl"


class StructureSigns(Schema):
    """What speaks for or against a structure's mask, each in [0, 1], 1 the best; None where it was not measured.

    Args:
        voxels: Of the mask.
        expected: Dice that the probabilities themselves lead one to expect.
        certainty: 1 - entropy (bits) of the structure's probability, averaged over the mask.
        agreement: Mean Dice between the masks of two mirrored views of one model.
        iou_head: Dice that follows from the IoU which SAM's mask decoder estimates, averaged over the mask's slices.
        models_agree: Mean Dice between the masks of two models (folds or configurations).
    """

    voxels: int = Field(ge=0)
    expected: float | None = None
    certainty: float | None = None
    agreement: float | None = None
    iou_head: float | None = None
    models_agree: float | None = None


class Observation(Schema):
    """A mask whose true Dice is known.

    Args:
        case: Case name.
        structure: Structure or region.
        dice: Its true Dice.
        signs: What the model said about it.
    """

    case: str
    structure: str
    dice: float
    signs: StructureSigns


class CalibrationFit(Schema):
    """From signs to Dice: offset + sum of weights x signs, cut to [0, 1].

    Args:
        structure: The one it is for; None: any.
        signs: Names of the signs it reads.
        weights: One per sign, none negative: a better sign never lowers the estimate.
        offset: Added.
        low: Lower end of the interval, in units of :func:`samunet.evaluation.calibration.spread` of the estimate.
        high: Upper end.
        error: Mean absolute error of the estimate on masks it was not fitted on.
        num_masks: Masks it was fitted on.
    """

    structure: str | None
    signs: tuple[str, ...]
    weights: tuple[float, ...]
    offset: float
    low: float
    high: float
    error: float
    num_masks: int

    @model_validator(mode="after")
    def _monotone(self) -> CalibrationFit:
        if len(self.weights) != len(self.signs):
            raise ValueError("every sign needs a weight")
        if any(weight < 0 for weight in self.weights):
            raise ValueError("weights are not negative")
        return self


class FactRange(Schema):
    """Where a fact lay in training, and how far from there is not yet worth a warning.

    Args:
        fact: In words, with its unit.
        low: Lower end in training, without the most extreme hundredth.
        high: Upper end.
        least: Smallest value that is not flagged.
        most: Largest value that is not flagged.
    """

    fact: str
    low: float
    high: float
    least: float
    most: float


class Calibration(Schema):
    """How a fold's model judges itself, written beside its checkpoint.

    Args:
        version: Schema version.
        identity: Hash of what the checkpoint says it is.
        fits: Most specific first; none where masks of known Dice are missing (of cases with ignored voxels it is not
            known).
        reason: Why there are no fits, or what they were fitted on.
        intensities: Ranges of the training images' intensities.
        observations: What the fits were made from.
    """

    version: int = QUALITY_VERSION
    identity: str
    fits: tuple[CalibrationFit, ...] = ()
    reason: str
    intensities: tuple[FactRange, ...] = ()
    observations: tuple[Observation, ...] = ()


class Flag(Schema):
    """Something about an image or its mask that is unlike the training cases.

    Args:
        fact: In words, with its unit.
        found: Its value here.
        training: Its values in training.
    """

    fact: str
    found: str
    training: str

    def __str__(self) -> str:
        """In one phrase."""
        return f"{self.fact} {self.found}, in training {self.training}"


class StructureQuality(Schema):
    """The estimate for one structure of one case.

    Args:
        dice: Estimated Dice; None for an empty mask. Of several models the mean of their estimates, where only some of
            them are calibrated for this structure that of theirs.
        low: Lower end of the interval, None where not calibrated. It is made to hold nine of ten masks like those
            calibrated on; measured, it held 0.78 of such masks and 0.69 of all
            (documentation/how-to/quality-control.md).
        high: Upper end.
        calibrated: Whether the estimate was calibrated on masks of known Dice, for every model that made the mask.
        volume_ml: Volume of the mask as written.
        signs: What the estimate was made from; like it, of the mask before component filters.
    """

    dice: float | None
    low: float | None = None
    high: float | None = None
    calibrated: bool = False
    volume_ml: float
    signs: StructureSigns


class CaseQuality(Schema):
    """The estimates for one case.

    Args:
        case: Case name.
        lowest: Lowest estimate of its structures; 0 where one is missing that most training cases have; None if
            nothing was found and nothing missed.
        structures: Per structure; where prompts were given, those of the structures that they point at.
        flags: What is unlike the training cases.
    """

    case: str
    lowest: float | None
    structures: dict[str, StructureQuality]
    flags: tuple[Flag, ...] = ()


class QualityReport(Schema):
    """The model's own judgement of the masks in a folder.

    Args:
        version: Schema version.
        dataset: Dataset the model was trained on.
        model: As in prediction.json.
        calibrated: Whether all estimates were calibrated on masks of known Dice, for every model; each says it for
            itself.
        note: How, or why not.
        look_first: Cases to look at first: all that are flagged, then those with the lowest estimates, each part worst
            first.
        cases: Per case, sorted by name.
    """

    version: int = QUALITY_VERSION
    dataset: str
    model: str
    calibrated: bool
    note: str
    look_first: tuple[str, ...]
    cases: tuple[CaseQuality, ...]
