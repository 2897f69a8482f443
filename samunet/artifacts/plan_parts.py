"""Parts of a plan's decisions: axes, intensities, loss and learning rate, and the hardware it was made for."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, field_validator, model_validator

from samunet.artifacts.decided import Finite, NotNegative, Positive, PositiveTriple
from samunet.core.config import Schema
from samunet.core.geometry import AxisOperation, Geometry, Triple, canonical_operation

Scheme = Literal["zscore", "ct", "rgb_to_01", "rescale_to_01", "window_to_01", "percentiles_to_01", "none"]
Across = Literal["slices", "rows", "columns"]
_OPPOSITES = ("LR", "AP", "SI")


def _distinct(planes: tuple[Across, ...]) -> tuple[Across, ...]:
    if not planes or len(set(planes)) < len(planes):
        raise ValueError(f"expected slices, rows and columns at most once each, and one of them, found {planes}")
    return planes


Planes = Annotated[tuple[Across, ...], AfterValidator(_distinct)]
STORED: Planes = ("slices",)


class Frame(Schema):
    """The axes in which all cases are processed: slices first, then the two in-plane axes.

    Args:
        slice_axis: The file axis (0 Z, 1 Y, 2 X) across which slices are stacked.
        orientation: Majority orientation codes of the training cases per file axis (Z, Y, X).
        spacing: Median spacing of the cases of that orientation, per file axis, in mm.
    """

    slice_axis: Literal[0, 1, 2]
    orientation: tuple[str, str, str]
    spacing: PositiveTriple

    @field_validator("orientation")
    @classmethod
    def _one_code_per_anatomical_axis(cls, value: tuple[str, str, str]) -> tuple[str, str, str]:
        if any(sum(code in set(pair) for code in value) != 1 for pair in _OPPOSITES):
            raise ValueError(f"expected one of L and R, one of A and P and one of S and I, found {', '.join(value)}")
        return value

    @property
    def file_axes(self) -> Triple:
        """The file axes of slices, rows and columns."""
        rows, columns = (axis for axis in range(3) if axis != self.slice_axis)
        return self.slice_axis, rows, columns

    def operation_for(self, geometry: Geometry) -> AxisOperation:
        """The exact, invertible axis operation from a case's file axes to (slice, row, column)."""
        return canonical_operation(
            geometry,
            reference_codes=self.orientation,
            reference_spacing=self.spacing,
            slice_axis=self.slice_axis,
        )


class ChannelNormalization(Schema):
    """How one channel is normalized (nnU-Net's schemes).

    Args:
        scheme: nnU-Net's scheme, chosen by channel name.
        use_nonzero_mask: Restrict mean and standard deviation to nonzero voxels, and leave the rest at zero.
        mean: Foreground mean of the dataset (scheme "ct").
        std: Foreground standard deviation of the dataset (scheme "ct").
        lower: Clip below (scheme "ct": percentile 0.5 of the foreground; "window_to_01": lower end of the window).
        upper: Clip above (scheme "ct": percentile 99.5 of the foreground; "window_to_01": upper end).
    """

    scheme: Scheme
    use_nonzero_mask: bool = False
    mean: Finite = 0.0
    std: NotNegative = 1.0
    lower: Finite = 0.0
    upper: Finite = 0.0

    @model_validator(mode="after")
    def _clips_to_a_range(self) -> ChannelNormalization:
        if self.lower > self.upper or (self.scheme == "window_to_01" and self.lower == self.upper):
            raise ValueError(
                f"scheme {self.scheme} needs a lower end below the upper, found {self.lower:g} and {self.upper:g}"
            )
        return self


class IntensityMap(Schema):
    """The one map from stored intensities to what the encoder sees.

    Stored values are clipped to [lower, upper] and scaled to [0, 1]; "sam_pixels" goes on to [0, 255] and SAM's pixel
    statistics. "identity" changes nothing; it and "unit_per_slice" have no bounds.

    Args:
        kind: "identity" for random weights, "sam_pixels" for SAM's pixel statistics, "unit" for [0, 1],
            "unit_per_slice" for [0, 1] with each slice's own extremes after the clip (MedSAM).
        lower: Per image channel; neighbouring slices share their channel's.
        upper: Per image channel.
    """

    kind: Literal["identity", "sam_pixels", "unit", "unit_per_slice"]
    lower: tuple[Finite, ...] = ()
    upper: tuple[Finite, ...] = ()

    @model_validator(mode="after")
    def _bounded(self) -> IntensityMap:
        unbounded = self.kind in ("identity", "unit_per_slice")
        if len(self.lower) != len(self.upper) or unbounded == bool(self.lower):
            raise ValueError(f"{self.kind} needs {'no bounds' if unbounded else 'lower and upper bounds'}")
        if any(low >= high for low, high in zip(self.lower, self.upper, strict=True)):
            raise ValueError(f"{self.kind} needs each lower bound below its upper, found {self.lower} and {self.upper}")
        return self


class LossWeights(Schema):
    """Weights of the loss's parts.

    Args:
        cross_entropy: Of cross-entropy (binary for regions and prompted masks).
        dice: Of 1 - soft Dice.
        estimated_iou: Of the squared error of the IoU that SAM's mask decoder estimates for its masks, where it works
            without prompts; it trains the head that estimates, and nothing else. (With prompts it always counts once,
            and trains all that leads to it.)
    """

    cross_entropy: NotNegative = 1.0
    dice: NotNegative = 1.0
    estimated_iou: NotNegative = 0.0


class Decay(Schema):
    """How the learning rate falls over a run, after the warm-up.

    Args:
        kind: (1 - progress) ** power, half a cosine, or not at all.
        power: Of the polynomial.
    """

    kind: Literal["polynomial", "cosine", "constant"] = "polynomial"
    power: Positive = 0.9


class Budget(Schema):
    """What the plan was made for.

    Args:
        gpu_memory_gib: Memory of the GPU planned for.
        cpu_memory_gib: Memory planned for on a CPU.
        cpu_minutes: Training minutes planned for on a CPU.
        reason: Where these figures come from.
    """

    gpu_memory_gib: Positive
    cpu_memory_gib: NotNegative
    cpu_minutes: Positive
    reason: str = ""
