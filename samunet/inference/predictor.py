"""A resident predictor: models stay loaded, volumes go in, masks on the volumes' own grid come out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from samunet.artifacts.plan import Configuration, Plan, ResolvedRecipe
from samunet.artifacts.store import CaseRecord
from samunet.core.geometry import Geometry
from samunet.core.volume import Volume
from samunet.inference.loading import Member, choose_folds, load_members
from samunet.inference.restore import Restored, restore
from samunet.inference.sliding import SlidingOptions, SlidingPredictor
from samunet.inference.tta import mirror_axes
from samunet.models.device import resolve_device, usable_precision
from samunet.preprocessing.pipeline import PreprocessedCase, preprocess_case


class Predictor:
    """Segments volumes with one model or the average of several.

    Args:
        members: Models trained with the same configuration and input, in eval mode.
        device: Where they are.
        mirror: Average over the mirrored views that the plan allows.
        batch_size: Slices per forward; twice the training batch by default.

    Example:
        >>> predictor = Predictor.from_folder(Path("results/Dataset004_Hippocampus/2d__auto__none"))
        >>> mask = predictor.predict_array(image, spacing=(1.0, 1.0, 1.0)).labels
    """

    def __init__(
        self, members: Sequence[Member], *, device: str, mirror: bool = True, batch_size: int | None = None
    ) -> None:
        self._models = [member.model for member in members]
        self.plan: Plan = members[0].plan
        self.configuration_name = members[0].manifest.configuration
        self.recipe: ResolvedRecipe = members[0].manifest.resolved_recipe
        self.folds = [member.manifest.fold for member in members]
        self._device, self._mirror = device, mirror
        self._batch_size = batch_size or 2 * self.recipe.batch_size

    @classmethod
    def from_folder(
        cls,
        model_folder: Path,
        *,
        folds: list[str] | None = None,
        checkpoint: str = "final",
        device: str = "auto",
        mirror: bool = True,
    ) -> Predictor:
        """Load whichever folds are finished.

        Args:
            model_folder: ``results/DATASET/CONFIG__PRESET__WEIGHTS``.
            folds: Folds to average; all that are finished by default.
            checkpoint: "final" or "best".
            device: "auto", "cpu", "cuda", "cuda:1", "mps".
            mirror: Average over mirrored views.
        """
        place = resolve_device(device)
        chosen = choose_folds(model_folder, folds, checkpoint)
        members = load_members(model_folder, chosen, checkpoint=checkpoint, device=place)
        return cls(members, device=place, mirror=mirror)

    @property
    def configuration(self) -> Configuration:
        """The planned configuration the models were trained with."""
        return self.plan.configuration(self.configuration_name)

    def preprocess(self, volume: Volume, *, name: str = "image") -> PreprocessedCase:
        """Bring a volume to the store's grid; may run ahead in another thread."""
        return preprocess_case(volume, None, plan=self.plan, configuration=self.configuration_name, name=name)

    def predict_preprocessed(
        self,
        data: NDArray[np.float32],
        record: CaseRecord,
        *,
        with_probabilities: bool = False,
    ) -> Restored:
        """Segment a preprocessed case.

        Args:
            data: (C, S, H, W) as stored.
            record: How it was preprocessed.
            with_probabilities: Also return probabilities.
        """
        axes = mirror_axes(self.plan.mirror_axes.value, record.anatomical_axes) if self._mirror else ()
        options = SlidingOptions(
            context=self.configuration.context_slices.value,
            tile_overlap=self.configuration.tile_overlap.value,
            mirror_axes=axes,
            batch_size=self._batch_size,
            device=self._device,
            precision=usable_precision(self.recipe, self._device),
        )
        logits = SlidingPredictor(self._models, self.recipe, options).slices(data)
        return restore(logits, record, self.plan.label_spec, with_probabilities=with_probabilities)

    def predict(self, volume: Volume, *, with_probabilities: bool = False, name: str = "image") -> Restored:
        """Segment a volume; the result lies on its grid.

        Args:
            volume: (C, Z, Y, X) with the plan's channels.
            with_probabilities: Also return (T, Z, Y, X) probabilities.
            name: For messages.

        Raises:
            DataError: If the channels do not fit or voxels are not finite.
        """
        case = self.preprocess(volume, name=name)
        return self.predict_preprocessed(case.data, case.record, with_probabilities=with_probabilities)

    def predict_array(
        self, array: ArrayLike, *, spacing: Sequence[float], directions: Any = None, with_probabilities: bool = False
    ) -> Restored:
        """Segment an array.

        Args:
            array: (C, Z, Y, X), or (Z, Y, X) for one channel.
            spacing: Millimetres along (Z, Y, X).
            directions: (3, 3), row per array axis, unit RAS directions; default X to R, Y to A, Z to S.
            with_probabilities: Also return probabilities.
        """
        data = np.asarray(array, dtype=np.float32)
        data = data[np.newaxis] if data.ndim == 3 else data
        geometry = Geometry.from_spacing(data.shape[1:], spacing, directions=directions)
        return self.predict(Volume(data, geometry), with_probabilities=with_probabilities)
