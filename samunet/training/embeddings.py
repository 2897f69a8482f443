"""The frozen encoder's embeddings, computed once and read from disk instead of the images.

Possible only where a slice always gives the encoder the same pixels: no augmentation, an encoder that does not train
behind channels that do not either, no depth mechanism, and slices that fit one tile.

Source: MedSAM (Ma et al. 2024) trained its first decoder on precomputed embeddings.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from samunet.artifacts.plan import Configuration, ResolvedRecipe
from samunet.artifacts.store import CaseRecord
from samunet.core.errors import UsageError
from samunet.core.files import atomic_path, sha256_json
from samunet.core.log import Reporter
from samunet.inference.encode import to_encoder
from samunet.inference.sliding import autocast
from samunet.models.segmentation import SegmentationModel
from samunet.preprocessing.planes import turned
from samunet.preprocessing.store import remove_leftovers
from samunet.training.data import Sample, SampleKey, SliceDataset
from samunet.training.objective import Batch, SemanticObjective

SHOWN_HASH = 16


def why_not(recipe: ResolvedRecipe, configuration: Configuration, records: Mapping[str, CaseRecord]) -> str | None:
    """Why the embeddings of a run cannot be cached; None if they can."""
    if recipe.method.encoder.train != "frozen":
        return "the encoder trains: its embeddings change with every step"
    if recipe.augmentation.enabled:
        return "augmentation changes the images: add --no-augmentation"
    if configuration.channels.value == "projection":
        return "the projection of the channels trains before the encoder"
    if recipe.method.promptable or recipe.method.fusion.kind != "sam" or recipe.method.decoder.upsampler == "side_path":
        return "only the mask decoder without prompts reads embeddings alone"
    planes = [turned(record.store_shape, across) for record in records.values() for across in recipe.planes]
    largest = max((max(rows, columns) for _, rows, columns in planes), default=0)
    if largest > recipe.tile_vox:
        return f"slices of {largest} voxels are cut into random tiles of {recipe.tile_vox}"
    return None


class EmbeddingCache:
    """A folder of embeddings, one file per case, named by the hash of the case's files.

    Args:
        folder: Below it a folder is made whose name depends on all that embeddings depend on but the cases.
        identity: Those facts, as JSON values.
        records: Of every case.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], records: Mapping[str, CaseRecord]) -> None:
        self.folder = folder / f"embeddings_{sha256_json(dict(identity))[:10]}"
        self._records = records
        self._open: dict[str, NDArray[np.float16]] = {}

    def fill(self, slices: SliceDataset, model: SegmentationModel, *, device: str, reporter: Reporter) -> None:
        """Compute what is missing or was made of other files; a file appears only when its case is complete.

        Args:
            slices: Training slices, not augmented.
            model: On the device; its mode is restored.
            device: Where it is.
            reporter: Shows progress.
        """
        remove_leftovers(self.folder)
        missing = [name for name in self._records if not self._file(name).is_file()]
        was_training = model.training
        model.eval()
        for name in reporter.track(missing, total=len(missing), what="embeddings"):
            every = range(slices.num_slices(name))
            embedded = np.concatenate([self._encode(slices, model, name, number, device) for number in every])
            with atomic_path(self._file(name)) as temporary, temporary.open("wb") as stream:
                np.save(stream, embedded)
            # A name with a dot first is a file that another run is writing just now.
            for old in self._file(name).parent.glob("[!.]*.npy"):
                if old.name != self._file(name).name:
                    old.unlink(missing_ok=True)
        model.train(was_training)

    def read(self, case: str, number: int) -> NDArray[np.float16]:
        """The embedding (E, S/16, S/16) of one slice, counted over all planes."""
        if case not in self._open:
            self._open[case] = np.load(self._file(case), mmap_mode="r")
        return np.array(self._open[case][number])

    def _file(self, case: str) -> Path:
        return self.folder / case / f"{self._records[case].source_sha256[:SHOWN_HASH] or 'array'}.npy"

    @torch.inference_mode()
    def _encode(
        self, slices: SliceDataset, model: SegmentationModel, case: str, number: int, device: str
    ) -> NDArray[np.float16]:
        image, valid, _ = (part.to(device) for part in slices.whole(case, number))
        with autocast(device, slices.recipe.precision):
            embedding = model.encode(to_encoder(image, valid, slices.recipe))
        return embedding.half().cpu().numpy()


class EmbeddedSlices(Dataset[Sample]):
    """The samples of another dataset with embeddings in place of images.

    Args:
        slices: Not augmented, slices one by one.
        cache: Filled.
    """

    def __init__(self, slices: SliceDataset, cache: EmbeddingCache) -> None:
        self._slices, self._cache = slices, cache

    @property
    def slab_depth(self) -> int:
        """Slices of a sample."""
        return self._slices.slab_depth

    def __getitem__(self, key: SampleKey) -> Sample:
        """Embedding (1, E, S/16, S/16), valid and target (1, ., V, V) of one slice."""
        case, number = self._slices.locate(key)
        _, valid, target = self._slices.whole(case, number)
        return torch.from_numpy(self._cache.read(case, number))[None].float(), valid, target


class EmbeddingObjective(SemanticObjective):
    """The semantic loss of a decoder that reads embeddings."""

    def outputs(self, model: SegmentationModel, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """What the decoder says about embeddings, and the IoU if it estimates that.

        Args:
            model: In train mode.
            batch: Embedding (B, 1, E, S/16, S/16), valid and target (B, 1, ., V, V).
        """
        embeddings = batch[0].flatten(0, 1)
        return model.decode_estimated(embeddings) if model.estimates_iou else (model.decode(embeddings), None)


def refuse(reason: str) -> UsageError:
    """The error for embeddings that cannot be cached."""
    return UsageError("the embeddings of this run cannot be cached", found=reason, todo="leave --cache-embeddings out")
