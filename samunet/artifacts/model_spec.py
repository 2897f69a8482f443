"""The shapes of SAM's image encoders as data, so that planning never imports torch."""

from __future__ import annotations

from typing import Literal

from samunet.core.config import Schema
from samunet.core.errors import ConfigError

TOKEN_SIZE = 16
WINDOW_TOKENS = 14
SIZE_STEP = TOKEN_SIZE * WINDOW_TOKENS
DECODER_STRIDE = 4
PROMPT_DIM = 256
STOCK_TOKENS = 4
MOST_UNET_CHANNELS = 512
SAM_UPSAMPLED = (32, 64)
"""Channels of SAM's upsampler at strides 4 and 8."""
SAM_SIZE = 1024


def side_path_widths(stride: int, width: int) -> list[int]:
    """Channels of a side path's stages: its own from its stride on, then SAM's at strides 4 and 8."""
    return [*([width, 2 * width] if stride == 1 else [width]), *SAM_UPSAMPLED]


class SamSpec(Schema):
    """A SAM image encoder.

    Args:
        name: What plans call it.
        family: "vit" is segment-anything's ViTDet encoder, "tiny_vit" is MobileSAM's, built through timm.
        embed_dim: Token width; for tiny_vit the width of the last stage.
        depth: Number of blocks; for tiny_vit the sum over stages.
        num_heads: Attention heads per block (vit).
        global_blocks: Indices of the blocks with global attention (vit).
        stage_dims: Width per stage (tiny_vit).
        stage_depths: Blocks per stage (tiny_vit).
        stage_heads: Attention heads per stage (tiny_vit).
        stage_windows: Attention window per stage (tiny_vit).
        pretrained: Kinds of weights it may start from.
    """

    name: str
    family: Literal["vit", "tiny_vit"]
    embed_dim: int
    depth: int
    num_heads: int = 0
    global_blocks: tuple[int, ...] = ()
    stage_dims: tuple[int, ...] = ()
    stage_depths: tuple[int, ...] = ()
    stage_heads: tuple[int, ...] = ()
    stage_windows: tuple[int, ...] = ()
    pretrained: tuple[str, ...] = ()

    @property
    def num_attention_blocks(self) -> int:
        """Blocks that attend, which is what methods count; TinyViT's first stage has none."""
        return self.depth if self.family == "vit" else sum(self.stage_depths[1:])


SPECS: dict[str, SamSpec] = {
    spec.name: spec
    for spec in (
        SamSpec(
            name="vit_b",
            family="vit",
            embed_dim=768,
            depth=12,
            num_heads=12,
            global_blocks=(2, 5, 8, 11),
            pretrained=("sam", "medsam", "ssl"),
        ),
        SamSpec(
            name="vit_l",
            family="vit",
            embed_dim=1024,
            depth=24,
            num_heads=16,
            global_blocks=(5, 11, 17, 23),
            pretrained=("sam", "ssl"),
        ),
        SamSpec(
            name="vit_h",
            family="vit",
            embed_dim=1280,
            depth=32,
            num_heads=16,
            global_blocks=(7, 15, 23, 31),
            pretrained=("sam", "ssl"),
        ),
        SamSpec(
            name="vit_t",
            family="tiny_vit",
            embed_dim=320,
            depth=12,
            stage_dims=(64, 128, 160, 320),
            stage_depths=(2, 2, 6, 2),
            stage_heads=(2, 4, 5, 10),
            stage_windows=(7, 7, 14, 7),
            pretrained=("mobile_sam", "ssl"),
        ),
        SamSpec(
            name="vit_xs",
            family="vit",
            embed_dim=192,
            depth=6,
            num_heads=6,
            global_blocks=(2, 5),
            pretrained=("sam", "medsam", "ssl"),
        ),
        SamSpec(
            name="vit_t_xs",
            family="tiny_vit",
            embed_dim=128,
            depth=5,
            stage_dims=(32, 64, 96, 128),
            stage_depths=(1, 1, 2, 1),
            stage_heads=(1, 2, 3, 4),
            stage_windows=(7, 7, 14, 7),
            pretrained=("mobile_sam", "sam", "medsam", "ssl"),
        ),
    )
}


def get_spec(name: str) -> SamSpec:
    """Look a backbone up by name.

    Raises:
        ConfigError: If there is none of that name; the message lists those that exist.
    """
    if name not in SPECS:
        raise ConfigError("unknown backbone", expected=f"one of {', '.join(SPECS)}", found=name)
    return SPECS[name]
