"""What samunet_pretrain and samunet_export leave: weights in segment-anything's layout, and beside them what they are.

The description lies, with the file's hash, in a JSON file beside it; that of samunet_pretrain also in the metadata of
the safetensors file. A torch file has no place for one that segment-anything would not stumble over.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from samunet.artifacts.checkpoint import ENDING, BaseWeights, ClockName
from samunet.core.config import Schema, parse_schema
from samunet.core.errors import ConfigError, WeightsError
from samunet.core.files import atomic_path, read_json, sha256_file, write_json

PRETRAINED_VERSION = 1
EXPORTED_VERSION = 1
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
        unrecorded: Files without a record of what they have seen, that are not SAM's official ones either.
    """

    datasets: tuple[SeenDataset, ...] = ()
    lost: tuple[str, ...] = ()
    unrecorded: tuple[str, ...] = ()


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


def differ_in_left_out(first: Pretrained, other: Pretrained) -> bool:
    """Whether two files come from one pretraining that was made several times, each time without other cases.

    Only what one of them left out may be missing there of what the other has seen; steps, minutes and loss may differ.
    What they continued from is not compared.
    """
    if _settings(first) != _settings(other):
        return False
    pairs = zip(first.datasets, other.datasets, strict=True)
    return all(ours.all_cases ^ theirs.all_cases <= {*ours.left_out, *theirs.left_out} for ours, theirs in pairs)


def _settings(about: Pretrained) -> dict[str, Any]:
    """What a pretraining is made with, but for the cases that it sees and what it continued from."""
    settings = about.model_dump(
        mode="json",
        include={"objective", "kind", "backbone", "input_size", "masking", "batch_size", "learning_rate", "seed"},
    )
    seen = [each.model_dump(mode="json", exclude={"images", "left_out"}) for each in about.datasets]
    return settings | {"datasets": seen}


class Exported(Schema):
    """What a file of samunet_export is.

    Args:
        version: Schema version.
        model: Folder of the model.
        fold: Of it.
        checkpoint: "final" or "best".
        scope: "whole" or "encoder".
        backbone: Image encoder.
        input_size: Side of the encoder's input.
        seen: All that taught it, the model's own training and what its weights had seen before.
        provenance: Versions, machine, command, time of the export.
        sha256: Of the file.
    """

    version: int = EXPORTED_VERSION
    model: str
    fold: str
    checkpoint: str
    scope: str
    backbone: str
    input_size: int
    seen: Earlier
    provenance: dict[str, Any] = Field(default_factory=dict)
    sha256: str


def record_file(path: Path) -> Path:
    """The description beside a file of weights."""
    return path.with_suffix(".json")


def read_exported(path: Path, sha256: str) -> Exported | None:
    """What the record beside a file of samunet_export says of it; None without one that names the file's hash.

    Args:
        path: The file of weights, which need not be there any more.
        sha256: Its hash.

    Raises:
        ConfigError: If the record is damaged.
    """
    file = record_file(path)
    try:
        content = read_json(file)
    except (ConfigError, OSError):
        return None
    is_of_it = isinstance(content, dict) and content.get("sha256") == sha256 and "seen" in content
    return parse_schema(Exported, content, file=file) if is_of_it else None


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
    write_json(record_file(path), hashed.model_dump(mode="json"))
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
