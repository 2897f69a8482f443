"""A trained model back into segment-anything's own layout, as far as its contract allows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from samunet.artifacts.checkpoint import ENDING, Checkpoint, read_checkpoint
from samunet.artifacts.model_spec import get_spec
from samunet.artifacts.plan import ResolvedRecipe
from samunet.artifacts.pretraining import Earlier, Exported, SeenDataset, record_file
from samunet.artifacts.workspace import fold_folder
from samunet.core.errors import ConfigError, UsageError
from samunet.core.files import atomic_path, sha256_file, write_json
from samunet.inference.loading import rebuild
from samunet.models.merged import ENCODER_ONLY, MergedWeights, merge_for_sam
from samunet.pipeline.pretrained import join_seen, seen_before
from samunet.pipeline.provenance import describe
from samunet.pipeline.training_run import CASES_FILE, RunCases

REGISTRY = ("vit_b", "vit_l", "vit_h")


@dataclass(frozen=True)
class ExportResult:
    """What was written.

    Args:
        file: The file.
        scope: "whole" or "encoder".
        note: How it is loaded.
        record: What has taught it, beside the file.
    """

    file: Path
    scope: str
    note: str
    record: Path


def export_weights(model_folder: Path, fold: str, output: Path, *, checkpoint: str = "final") -> ExportResult:
    """Merge a model's adapters and write what plain segment-anything can load, and beside it what has taught it.

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
    for file in (output, record_file(output)):
        if file.exists():
            raise UsageError("the file exists already", file=file, todo="give another -o")
    folder = fold_folder(model_folder, fold)
    read = read_checkpoint(folder / f"checkpoint_{checkpoint}{ENDING}")
    recipe = read.manifest.resolved_recipe
    if read.plan.configuration(read.manifest.configuration).channels.value == "projection":
        raise ConfigError(
            "the encoder sees channels through a trained projection, which segment-anything has no place for",
            todo="keep the model as it is",
        )
    merged = merge_for_sam(rebuild(read), recipe)
    seen = what_taught(read, folder, scope=merged.scope)
    _write(merged, output)
    about = Exported(
        model=str(model_folder.resolve()),
        fold=fold,
        checkpoint=checkpoint,
        scope=merged.scope,
        backbone=recipe.backbone,
        input_size=recipe.input_size,
        seen=seen,
        provenance=describe(),
        sha256=sha256_file(output),
    )
    write_json(record_file(output), about.model_dump(mode="json"))
    return ExportResult(output, merged.scope, how_to_load(merged.scope, recipe, output.name), record_file(output))


def what_taught(checkpoint: Checkpoint, folder: Path, *, scope: str) -> Earlier:
    """All that has taught what is exported: the cases of the run, and what its weights had seen before.

    Args:
        checkpoint: Of the fold.
        folder: Of the fold.
        scope: "whole" or "encoder", which a frozen one leaves as it was.
    """
    manifest = checkpoint.manifest
    recipe, before = manifest.resolved_recipe, seen_before(manifest.base)
    is_changed = recipe.method.encoder.train != "frozen" if scope == ENCODER_ONLY else recipe.method.trains_anything
    if not is_changed:
        return before
    file = folder / CASES_FILE
    if not file.is_file():
        return join_seen([Earlier(lost=(str(file),)), before])
    cases = RunCases.read(file)
    taught = {*cases.trained, *cases.labels_seen}
    own = SeenDataset(
        name=manifest.dataset,
        configuration=manifest.configuration,
        images={checkpoint.plan.store_key(manifest.configuration): tuple(sorted(taught))},
        left_out=tuple(sorted({*cases.validation} - taught)),
        labels_read=True,
        intensity_map=recipe.intensity_map.model_dump(mode="json"),
        tile_vox=recipe.tile_vox,
    )
    names = tuple(sorted({*cases.unlabelled} - taught))
    looked_at = own.model_copy(update={"images": dict.fromkeys(own.images, names), "labels_read": False})
    return join_seen([Earlier(datasets=(own, looked_at) if names else (own,)), before])


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
