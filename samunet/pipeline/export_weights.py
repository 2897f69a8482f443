"""A trained model back into segment-anything's own layout, as far as its contract allows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from samunet.artifacts.checkpoint import ENDING, read_checkpoint
from samunet.artifacts.model_spec import get_spec
from samunet.artifacts.plan import ResolvedRecipe
from samunet.core.errors import ConfigError, UsageError
from samunet.core.files import atomic_path
from samunet.inference.loading import rebuild
from samunet.models.merged import ENCODER_ONLY, MergedWeights, merge_for_sam

REGISTRY = ("vit_b", "vit_l", "vit_h")


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
    return ExportResult(output, merged.scope, how_to_load(merged.scope, recipe, output.name))


def how_to_load(scope: str, recipe: ResolvedRecipe, name: str) -> str:
    """How segment-anything loads what was exported: by its registry where that has the backbone, else built by hand.

    Args:
        scope: "whole" or "encoder".
        recipe: As trained.
        name: Of the file.
    """
    spec = get_spec(recipe.backbone)
    encoder = (
        f"ImageEncoderViT(img_size={recipe.input_size}, embed_dim={spec.embed_dim}, depth={spec.depth}, "
        f"num_heads={spec.num_heads}, global_attn_indexes={spec.global_blocks}, ...)"
    )
    if scope == ENCODER_ONLY:
        return f"{encoder} of segment-anything, strictly; masks need this project's decoder"
    if recipe.backbone in REGISTRY:
        return f"sam_model_registry['{recipe.backbone}'](checkpoint='{name}')"
    return f"Sam with {encoder}, strictly: segment-anything's registry has no {recipe.backbone}"


def _write(merged: MergedWeights, output: Path) -> None:
    import torch

    with atomic_path(output) as temporary:
        torch.save(merged.tensors, temporary)
