"""Small models, recipes and weights files for the tests of samunet.models."""

from __future__ import annotations

from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from segment_anything.modeling import ImageEncoderViT
from torch import Tensor, nn

from samunet.artifacts.augmentation import Augmentation
from samunet.artifacts.method import EncoderMethod, Lora, Method
from samunet.artifacts.model_spec import SamSpec
from samunet.artifacts.plan import Decay, IntensityMap, LossWeights, ResolvedRecipe
from samunet.core.files import sha256_file
from samunet.models.build import BuiltModel, build_model
from samunet.models.sam.network import build_network
from samunet.models.weights import WeightsFile

SMALL_VIT = SamSpec(
    name="small_vit", family="vit", embed_dim=32, depth=3, num_heads=2, global_blocks=(1,), pretrained=("sam", "ssl")
)
SMALL_TINY = SamSpec(
    name="small_tiny",
    family="tiny_vit",
    embed_dim=96,
    depth=4,
    stage_dims=(8, 32, 64, 96),
    stage_depths=(1, 1, 1, 1),
    stage_heads=(1, 1, 2, 3),
    stage_windows=(7, 7, 14, 7),
    pretrained=("mobile_sam", "ssl"),
)
METHODS = {
    "full": Method(encoder=EncoderMethod(train="full")),
    "lora": Method(encoder=EncoderMethod(train="adapters", adapters=(Lora(),))),
    "frozen": Method(encoder=EncoderMethod(train="frozen")),
}
BOTH_FAMILIES = ("vit_xs", "vit_t_xs")


def recipe(**changes: Any) -> ResolvedRecipe:
    """A recipe for a small model at 112 pixels, with some values changed."""
    values: dict[str, Any] = {
        "weights_kind": "none",
        "device_class": "cpu",
        "backbone": "vit_t_xs",
        "input_size": 112,
        "tile_vox": 64,
        "method": METHODS["full"],
        "slab_depth": 1,
        "attention": "upstream",
        "intensity_map": IntensityMap(kind="identity"),
        "loss": LossWeights(),
        "learning_rate": 1e-3,
        "weight_decay": 0.1,
        "warmup_steps": 1,
        "decay": Decay(),
        "batch_size": 2,
        "accumulation_steps": 1,
        "iterations": 1,
        "epochs": 1,
        "minutes": None,
        "precision": "fp32",
        "checkpointing": False,
        "ema_decay": 0.0,
        "augmentation": Augmentation(),
        "foreground_fraction": 0.5,
        "memory_gib": 1.0,
    }
    return ResolvedRecipe(**{**values, **changes})


def build(
    chosen: ResolvedRecipe, *, weights: WeightsFile | None = None, seed: int = 0, num_tokens: int = 3
) -> BuiltModel:
    """A built model for three-channel images."""
    return build_model(
        chosen, num_tokens=num_tokens, num_input_channels=3, channels="direct", weights=weights, seed=seed
    )


def perturb(module: nn.Module, *, seed: int = 0, scale: float = 0.05) -> None:
    """Add noise to every parameter and buffer, so that no default of zero or one hides a mistake."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            if not tensor.is_floating_point():
                continue
            noise = torch.randn(tensor.shape, generator=generator).to(tensor.dtype) * scale
            tensor.add_(noise.abs() if name.endswith("running_var") else noise)


@lru_cache(maxsize=16)
def _base_state(spec: SamSpec, image_size: int, seed: int) -> dict[str, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = build_network(spec, image_size=image_size, num_tokens=4)
    perturb(network, seed=seed)
    return {key: tensor.detach() for key, tensor in network.state_dict().items()}


def base_file(folder: Path, spec: SamSpec, *, image_size: int, kind: str = "ssl", seed: int = 5) -> WeightsFile:
    """A complete SAM of a backbone with perturbed random weights and four tokens, written as a torch file."""
    path = folder / f"{spec.name}_{image_size}.pth"
    torch.save(_base_state(spec, image_size, seed), path)
    return WeightsFile(path, sha256_file(path), kind)


def images(batch: int, *, size: int = 112, seed: int = 0) -> Tensor:
    """Random images (batch, 3, size, size)."""
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))


def state_copy(module: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer, non-persistent ones too, copied."""
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def upstream_vit(spec: SamSpec, size: int) -> ImageEncoderViT:
    """segment-anything's own encoder in the shape of a spec, with random weights."""
    return ImageEncoderViT(
        img_size=size,
        patch_size=16,
        embed_dim=spec.embed_dim,
        depth=spec.depth,
        num_heads=spec.num_heads,
        mlp_ratio=4,
        out_chans=256,
        qkv_bias=True,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        use_rel_pos=True,
        window_size=14,
        global_attn_indexes=spec.global_blocks,
    )
