"""A trained model back into segment-anything's own layout, as far as its contract allows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from samunet.artifacts.checkpoint import ENDING, read_checkpoint
from samunet.core.errors import ConfigError, UsageError
from samunet.core.files import atomic_path
from samunet.inference.loading import rebuild
from samunet.models.merged import ENCODER_ONLY, MergedWeights, merge_for_sam


@dataclass(frozen=True)
class ExportResult:
    """What was written.

    Args:
        file: The file.
        scope: "whole" or "encoder".
        note: How it is loaded.
    """

    file: Path
    scope: str
    note: str


def export_weights(model_folder: Path, fold: str, output: Path, *, checkpoint: str = "final") -> ExportResult:
    """Merge a model's adapters and write what plain segment-anything can load.

    The whole model only where it has SAM's own size (1024), tokens and upsampler; otherwise the encoder alone, which
    loads strictly into segment-anything's encoder built with the same image size.

    Args:
        model_folder: ``results/DATASET/CONFIG__PRESET__WEIGHTS``.
        fold: "0" to "4", or "all".
        output: File to write, ending in .pth.
        checkpoint: "final" or "best".

    Raises:
        ConfigError: If the adapters cannot be merged exactly, or the encoder is no ViT.
        UsageError: If the output's name is not right, or it exists.
    """
    if output.suffix != ".pth":
        raise UsageError("weights in segment-anything's layout end in .pth", found=output.name)
    if output.exists():
        raise UsageError("the file exists already", file=output, todo="give another -o")
    read = read_checkpoint(model_folder / f"fold_{fold}" / f"checkpoint_{checkpoint}{ENDING}")
    recipe = read.manifest.resolved_recipe
    if read.plan.configuration(read.manifest.configuration).channels.value == "projection":
        raise ConfigError(
            "the encoder sees channels through a trained projection, which segment-anything has no place for",
            todo="keep the model as it is",
        )
    merged = merge_for_sam(rebuild(read), recipe)
    _write(merged, output)
    size = recipe.input_size
    note = (
        f"sam_model_registry['{recipe.backbone}'](checkpoint='{output.name}')"
        if merged.scope != ENCODER_ONLY
        else f"ImageEncoderViT(img_size={size}, ...) of segment-anything, strictly; masks need this project's decoder"
    )
    return ExportResult(output, merged.scope, note)


def _write(merged: MergedWeights, output: Path) -> None:
    import torch

    with atomic_path(output) as temporary:
        torch.save(merged.tensors, temporary)
