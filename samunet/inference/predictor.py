"""A resident predictor: models stay loaded, volumes go in, masks on the volumes' own grid come out."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from samunet.artifacts.dataset import Case
from samunet.artifacts.plan import Configuration, Plan, ResolvedRecipe
from samunet.artifacts.plan_parts import STORED, Across, Planes
from samunet.artifacts.prompts import Prompt
from samunet.artifacts.store import CaseRecord
from samunet.core.errors import DataError, UsageError
from samunet.core.geometry import Geometry
from samunet.core.log import Reporter, SilentReporter
from samunet.core.volume import Volume
from samunet.inference.agreement import ViewAgreement
from samunet.inference.loading import Member, choose_folds, load_members, tell_other_weights
from samunet.inference.prompt_geometry import place_prompts
from samunet.inference.prompted import UNPROMPTED, PromptedOptions, PromptedPredictor
from samunet.inference.restore import Allocate, Restored, SliceLogits, restore
from samunet.inference.room import Room
from samunet.inference.signs import MaskSums
from samunet.inference.sliding import SlidingOptions, SlidingPredictor, average_planes
from samunet.inference.tta import mirror_axes, mirror_combinations
from samunet.models.device import resolve_device, usable_precision
from samunet.preprocessing.pipeline import PreprocessedCase, preprocess_case
from samunet.preprocessing.planes import planes_of, turned


class Predictor:
    """Segments volumes with one model or the average of several.

    Args:
        members: Models trained with the same configuration and input, in eval mode.
        device: Where they are.
        mirror: Average over the mirrored views that the plan allows.
        batch_size: Most slices per forward; twice the training batch by default. Fewer are taken where these are not
            predicted to fit the device, and half as many from where its memory ran out.
        reporter: Told where memory ran out, and which cases are not cut in every plane.

    Example:
        >>> predictor = Predictor.from_folder(Path("results/Dataset004_Hippocampus/2d__auto__none"))
        >>> mask = predictor.predict_array(image, spacing=(1.0, 1.0, 1.0)).labels
    """

    def __init__(
        self,
        members: Sequence[Member],
        *,
        device: str,
        mirror: bool = True,
        batch_size: int | None = None,
        reporter: Reporter | None = None,
    ) -> None:
        self._models = [member.model for member in members]
        self._manifests = [member.manifest for member in members]
        self.plan: Plan = members[0].plan
        self.configuration_name = members[0].manifest.configuration
        self.recipe: ResolvedRecipe = members[0].manifest.resolved_recipe
        self.folds = [member.manifest.fold for member in members]
        self.fingerprint = members[0].fingerprint
        self._device, self._mirror, self._reporter = device, mirror, reporter or SilentReporter()
        self._precision = usable_precision(self.recipe, device)
        self._room = Room(
            self.recipe,
            num_tokens=self.plan.label_spec.num_tokens,
            models=len(members),
            device=device,
            precision=self._precision,
            most=batch_size,
            reporter=self._reporter,
        )

    @classmethod
    def from_folder(
        cls,
        model_folder: Path,
        *,
        folds: list[str] | None = None,
        checkpoint: str = "final",
        device: str = "auto",
        mirror: bool = True,
        reporter: Reporter | None = None,
    ) -> Predictor:
        """Load whichever folds are finished.

        Args:
            model_folder: ``results/DATASET/CONFIG__PRESET__WEIGHTS``.
            folds: Folds to average; all that are finished by default.
            checkpoint: "final" or "best".
            device: "auto", "cpu", "cuda", "cuda:1", "mps".
            mirror: Average over mirrored views.
            reporter: Told where memory ran out, and where folds start from different weights.
        """
        place = resolve_device(device)
        chosen = choose_folds(model_folder, folds, checkpoint)
        members = load_members(model_folder, chosen, checkpoint=checkpoint, device=place)
        tell_other_weights([member.manifest for member in members], model_folder, reporter or SilentReporter())
        return cls(members, device=place, mirror=mirror, reporter=reporter)

    def rest(self) -> None:
        """Take the models off a GPU, so that others find room there, until :meth:`wake`."""
        for model in self._models:
            model.to("cpu")

    def wake(self) -> None:
        """Put the models back where they predict."""
        for model in self._models:
            model.to(self._device)

    @property
    def batch_size(self) -> int:
        """Most slices per forward, as far as memory allowed it until now."""
        return self._room.most

    @property
    def identities(self) -> dict[str, str]:
        """Fold to hash of what its checkpoint says it is."""
        return {manifest.fold: manifest.identity for manifest in self._manifests}

    @property
    def configuration(self) -> Configuration:
        """The planned configuration the models were trained with."""
        return self.plan.configuration(self.configuration_name)

    def preprocess(self, volume: Volume, *, name: str = "image", files: Case | None = None) -> PreprocessedCase:
        """Bring a volume to the store's grid; may run ahead in another thread."""
        return preprocess_case(
            volume, None, plan=self.plan, configuration=self.configuration_name, name=name, files=files
        )

    def predict_preprocessed(
        self,
        data: NDArray[np.float32],
        record: CaseRecord,
        *,
        with_probabilities: bool = False,
        allocate: Allocate | None = None,
        with_signs: bool = False,
    ) -> Restored:
        """Segment a preprocessed case.

        Args:
            data: (C, S, H, W) as stored.
            record: How it was preprocessed.
            with_probabilities: Also return probabilities.
            allocate: Gives the array that they are written to; in memory by default.
            with_signs: Also return what the models say about each structure's mask.

        Raises:
            UsageError: If the model segments only what prompts point at.
        """
        self.check_prompts(given=False)
        views, planes = self.recipe.mirror_views, self._planes_of(record)

        def segment(slices: int) -> Restored:
            options = SlidingOptions(
                context=self.configuration.context_slices.value,
                tile_overlap=self.configuration.tile_overlap.value,
                mirror_axes=(),
                batch_size=slices,
                device=self._device,
                precision=self._precision,
                slab_depth=self.recipe.slab_depth,
                depth_overlap=self.configuration.depth_overlap.value,
                mirror_views=views,
            )
            return self._slide(
                data,
                record,
                planes,
                options,
                with_probabilities=with_probabilities,
                allocate=allocate,
                with_signs=with_signs,
            )

        return self._room.predict(
            segment,
            case=record.name,
            views=max(len(mirror_combinations(self._mirror_axes(record, across), views)) for across in planes),
            plane_vox=max(_plane_vox(record, across) for across in planes),
            held_vox=0 if planes == STORED else math.prod(record.store_shape),
        )

    def _planes_of(self, record: CaseRecord) -> Planes:
        """The planes in which a case is cut; says why where it is not cut as the training cases were."""
        planes, reason = planes_of(record, self.plan, self.recipe.planes)
        if reason is not None:
            self._reporter.info(f"{record.name}: predicted from stored slices only, as {reason}")
        return planes

    def _mirror_axes(self, record: CaseRecord, across: Across) -> tuple[int, ...]:
        """In-plane axes over which mirrored views are averaged where a case is cut across an axis."""
        return mirror_axes(self.plan.mirror_axes.value, turned(record.anatomical_axes, across)) if self._mirror else ()

    def _slide(
        self,
        data: NDArray[np.float32],
        record: CaseRecord,
        planes: Planes,
        options: SlidingOptions,
        *,
        with_probabilities: bool,
        allocate: Allocate | None,
        with_signs: bool,
    ) -> Restored:
        labels = self.plan.label_spec
        views, sums = (ViewAgreement(labels), MaskSums(labels)) if with_signs else (None, None)

        def cut(across: Across, volume: NDArray[np.float32]) -> Iterator[SliceLogits]:
            mirrored = replace(options, mirror_axes=self._mirror_axes(record, across))
            return SlidingPredictor(self._models, self.recipe, mirrored, views=views).slices(volume)

        logits = self._finite(average_planes(cut, data, planes), record)
        restored = restore(logits, record, labels, with_probabilities=with_probabilities, allocate=allocate, sums=sums)
        if views is None or restored.signs is None:
            return restored
        return replace(restored, signs=views.complete(restored.signs))

    def predict_prepared(
        self,
        case: PreprocessedCase,
        *,
        with_probabilities: bool = False,
        allocate: Allocate | None = None,
        with_signs: bool = False,
    ) -> Restored:
        """Segment what :meth:`preprocess` gave; arguments as for :meth:`predict_preprocessed`."""
        return self.predict_preprocessed(
            case.data, case.record, with_probabilities=with_probabilities, allocate=allocate, with_signs=with_signs
        )

    def check_prompts(self, *, given: bool) -> None:
        """Refuse prompts for a model that takes none, and a model that needs them without."""
        method = self.recipe.method
        if given and not method.promptable:
            raise UsageError(
                "this model segments its classes by itself and takes no prompts",
                expected=", ".join(self.plan.label_spec.names),
                todo="predict without prompts, or train with a preset whose prompts.kind is not none",
            )
        if method.promptable and not given:
            raise UsageError(
                "this model segments what prompts point at",
                expected=f"prompts ({method.prompts.kind} in training)",
                found="none",
                todo="give samunet_predict --prompts prompts.json, or call predict_prompted",
            )

    def predict_prompted_preprocessed(
        self,
        case: PreprocessedCase,
        geometry: Geometry,
        prompts: Sequence[Prompt],
        *,
        with_probabilities: bool = False,
        propagate: bool = True,
        with_signs: bool = False,
    ) -> Restored:
        """Segment what prompts point at in a preprocessed case.

        Args:
            case: As :meth:`preprocess` returns it.
            geometry: Grid of the volume it was made from.
            prompts: Entries of this case.
            with_probabilities: Also return probabilities.
            propagate: Follow objects to the slices beside the marked ones.
            with_signs: Also return what the probabilities say about each structure's mask.
        """
        self.check_prompts(given=True)
        labels = self.plan.label_spec
        objects = place_prompts(prompts, geometry=geometry, record=case.record, labels=labels)

        def segment(slices: int) -> Restored:
            options = PromptedOptions(
                context=self.configuration.context_slices.value,
                batch_size=slices,
                device=self._device,
                precision=self._precision,
                propagate=propagate,
            )
            logits = PromptedPredictor(self._models, self.recipe, options).slices(case.data, objects, labels)
            return restore(
                self._finite(logits, case.record),
                case.record,
                labels,
                with_probabilities=with_probabilities,
                sums=MaskSums(labels) if with_signs else None,
                absent=UNPROMPTED,
            )

        return self._room.predict(segment, case=case.record.name, plane_vox=_plane_vox(case.record))

    def _finite(self, logits: Iterable[SliceLogits], record: CaseRecord) -> Iterator[SliceLogits]:
        """The logits of every slice; NaN, of which the largest is taken for a structure, is an error of the case."""
        for index, maps in logits:
            if not torch.isfinite(maps).all():
                raise DataError(
                    "the network's output is not finite",
                    case=record.name,
                    expected="finite logits",
                    found=f"NaN or infinity in slice {index} of the preprocessed image, in {self._precision} on "
                    f"{self._device}",
                    todo="predict with --device cpu, in full precision; if it says the same, train the model again",
                )
            yield index, maps

    def predict_prompted(
        self,
        volume: Volume,
        prompts: Sequence[Prompt],
        *,
        with_probabilities: bool = False,
        propagate: bool = True,
        name: str = "image",
    ) -> Restored:
        """Segment what prompts point at in a volume; the result lies on its grid. Mirrored views are not used.

        Args:
            volume: (C, Z, Y, X) with the plan's channels.
            prompts: What is pointed at, in the volume's voxels (i, j, k) = (X, Y, Z) or in RAS+ mm.
            with_probabilities: Also return (T, Z, Y, X) probabilities.
            propagate: Follow objects to the slices beside the marked ones.
            name: For messages.

        Raises:
            DataError: If the volume or a prompt does not fit; the message lists every such prompt.
            UsageError: If the model takes no prompts.
        """
        case = self.preprocess(volume, name=name)
        return self.predict_prompted_preprocessed(
            case, volume.geometry, prompts, with_probabilities=with_probabilities, propagate=propagate
        )

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


def _plane_vox(record: CaseRecord, across: Across = "slices") -> int:
    """Voxels of a slice of a case that is cut across an axis, in the store or where it is restored, or more of both."""
    return max(math.prod(shape[1:]) for shape in (turned(record.store_shape, across), record.crop_shape))
