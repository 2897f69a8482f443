"""What samunet_pretrain leaves: weights in segment-anything's layout, and beside them what they are.

The description lies in the metadata of the safetensors file and, with the file's hash, in a JSON file beside it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from samunet.artifacts.checkpoint import ENDING, BaseWeights, ClockName
from samunet.core.config import Schema, parse_schema
from samunet.core.errors import WeightsError
from samunet.core.files import atomic_path, sha256_file, write_json

PRETRAINED_VERSION = 1
UNLABELLED = "unlabelled_"
_KEY = "pretrained"

Objective = Literal["masked_images", "supervised", "drawn_shapes"]


class SeenDataset(Schema):
    """What was seen of a dataset.

    Args:
        name: Folder name.
        configuration: Planned configuration, which decides how volumes become slices.
        images: Store folder to the cases that were read from it.
        left_out: Cases of imagesTr that were not, nor images of these names in any other folder.
        labels_read: Whether their labels were read too.
        intensity_map: From stored intensities to what the encoder saw.
        tile_vox: Voxels that were zoomed to the input size.
    """

    name: str
    configuration: str
    images: dict[str, tuple[str, ...]]
    left_out: tuple[str, ...] = ()
    labels_read: bool = False
    intensity_map: dict[str, Any] = Field(default_factory=dict)
    tile_vox: int

    @property
    def training_cases(self) -> tuple[str, ...]:
        """Cases of imagesTr."""
        own = [cases for store, cases in self.images.items() if not store.startswith(UNLABELLED)]
        return tuple(case for cases in own for case in cases)

    @property
    def all_cases(self) -> frozenset[str]:
        """Names of the cases of all stores: a folder may hold images of imagesTr."""
        return frozenset(case for cases in self.images.values() for case in cases)


class Earlier(Schema):
    """What the weights that a run continued from had seen, at whatever remove.

    Args:
        datasets: A part per stage and dataset.
        lost: Files of stages of which it is not known any more.
    """

    datasets: tuple[SeenDataset, ...] = ()
    lost: tuple[str, ...] = ()


class Masking(Schema):
    """How images were masked.

    Args:
        ratio: Share of the units that touch the image.
        unit_px: Side of a unit in encoder pixels.
    """

    ratio: float
    unit_px: int


class Pretrained(Schema):
    """What a file of pretrained weights is.

    Args:
        version: Schema version.
        objective: "masked_images" (no label is read; holds an encoder), "supervised" (holds a whole SAM) or
            "drawn_shapes" (generated images alone; holds an encoder).
        kind: Kind of weights, which decides recipe and intensities.
        backbone: Image encoder.
        input_size: Side of the encoder's input.
        from_random: Whether it began, at whatever remove, with random weights, so that SAM has taught it nothing.
        base: The weights that it continued from.
        datasets: What was seen.
        earlier: What the weights that it continued from had seen; None where an older version did not say.
        masking: Of images; None where there is none.
        steps: Optimizer steps.
        minutes: Training minutes.
        clock: What counted them; None where an older version did not say.
        batch_size: Slices per step.
        learning_rate: Peak.
        loss: Mean of the last epoch.
        seed: Of initialisation, data and masks.
        provenance: Versions, machine, command, time.
        sha256: Of the file; only known beside it.
    """

    version: int = PRETRAINED_VERSION
    objective: Objective
    kind: str
    backbone: str
    input_size: int
    from_random: bool
    base: BaseWeights
    datasets: tuple[SeenDataset, ...]
    earlier: Earlier | None = None
    masking: Masking | None = None
    steps: int
    minutes: float
    clock: ClockName | None = None
    batch_size: int
    learning_rate: float
    loss: float | None = None
    seed: int
    provenance: dict[str, Any] = Field(default_factory=dict)
    sha256: str = ""


def write_pretrained(path: Path, tensors: Mapping[str, Any], about: Pretrained) -> Pretrained:
    """Write weights and, beside them, what they are; returns that with the file's hash.

    Args:
        path: File to write, ending in .safetensors.
        tensors: segment-anything's names to torch tensors.
        about: What they are.
    """
    from safetensors.torch import save_file

    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    with atomic_path(path) as temporary:
        save_file(plain, temporary, metadata={_KEY: about.model_dump_json()})
    hashed = about.model_copy(update={"sha256": sha256_file(path)})
    write_json(path.with_suffix(".json"), hashed.model_dump(mode="json"))
    return hashed


def read_pretrained(path: Path) -> Pretrained | None:
    """What a weights file is; None if samunet_pretrain did not write it.

    Raises:
        WeightsError: If the file is damaged.
        ConfigError: If its description is.
    """
    if path.suffix != ENDING:
        return None
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as stream:
            text = (stream.metadata() or {}).get(_KEY)
    except (SafetensorError, OSError) as error:
        raise WeightsError("the weights file cannot be read", found=str(error), file=path) from None
    return None if text is None else parse_schema(Pretrained, json.loads(text), file=path)
