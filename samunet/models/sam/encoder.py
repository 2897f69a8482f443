"""SAM's two families of image encoders, at any input size that is a multiple of 16.

Both keep upstream's parameters and state-dict keys. Shapes: B batch, S input side, D token width, E = 256 channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from samunet.artifacts.model_spec import PROMPT_DIM, TOKEN_SIZE, WINDOW_TOKENS, SamSpec
from samunet.core.errors import ConfigError
from samunet.models.sam import imports
from samunet.models.sam.windows import spare_padding
from samunet.models.volumetric.slab import Slab

INIT_STD = 0.02
LAYER_NORM_EPS = 1e-6
# Pixels per token of TinyViT's attention stages, the last merging at stride one.
TINY_STRIDES = (8, 16, 16)

AddTokens = Callable[[int, Tensor], Tensor]


class AttentionStage(NamedTuple):
    """Consecutive attention blocks of one width.

    Args:
        width: Token width D.
        num_blocks: How many blocks.
        stride: Pixels per token and axis.
    """

    width: int
    num_blocks: int
    stride: int


class TokenPrompts(Protocol):
    """What an encoder asks of a module that adds tokens before every attention block."""

    def details(self, images: Tensor) -> Tensor:
        """What the tokens need of the images (B, 3, S, S), computed once per forward."""

    def start(self, stage: int, details: Tensor, before: Tensor, after: Tensor) -> AddTokens:
        """A function of (block within the stage, its incoming tokens) that gives the tokens for the block.

        Args:
            stage: Index of the attention stage.
            details: What :meth:`details` gave.
            before: Tokens that enter the stage (B, H, W, D), before positions are added.
            after: The same with positions.
        """


class VitEncoder(imports.modeling.ImageEncoderViT):  # type: ignore[misc, name-defined]
    """segment-anything's ViTDet encoder with optional checkpointing of its blocks.

    Where the map is smaller than a window, attention spares the work on padding.

    Args:
        spec: Its widths and depths.
        image_size: Input side S in pixels.
    """

    qkv_layout: Literal["stacked", "per_head"] = "stacked"

    def __init__(self, spec: SamSpec, *, image_size: int) -> None:
        super().__init__(
            img_size=image_size,
            patch_size=TOKEN_SIZE,
            embed_dim=spec.embed_dim,
            depth=spec.depth,
            num_heads=spec.num_heads,
            mlp_ratio=4,
            out_chans=PROMPT_DIM,
            qkv_bias=True,
            norm_layer=partial(nn.LayerNorm, eps=LAYER_NORM_EPS),
            use_rel_pos=True,
            window_size=WINDOW_TOKENS,
            global_attn_indexes=spec.global_blocks,
        )
        self.checkpointing = False
        self.slab = Slab()
        self.token_prompts: TokenPrompts | None = None
        self._stages = [AttentionStage(spec.embed_dim, spec.depth, TOKEN_SIZE)]
        for block in self.blocks:
            if block.window_size * TOKEN_SIZE > image_size:
                spare_padding(block)

    def attention_blocks(self) -> list[nn.Module]:
        """The blocks with attention, in order."""
        return list(self.blocks)

    def set_attention_block(self, index: int, block: nn.Module) -> None:
        """Put another module in the place of the attention block of an index."""
        self.blocks[index] = block

    def attention_layers(self) -> list[nn.Module]:
        """The attention modules, in order; each has ``qkv``, ``proj`` and ``num_heads``."""
        return [block.attn for block in self.blocks]

    def attention_stages(self) -> list[AttentionStage]:
        """The attention blocks, grouped by width."""
        return list(self._stages)

    def token_dims(self) -> list[int]:
        """Token width of every attention block."""
        return [stage.width for stage in self._stages for _ in range(stage.num_blocks)]

    def forward(self, images: Tensor) -> Tensor:
        """Encode images.

        Args:
            images: (B, 3, S, S).

        Returns:
            Embeddings (B, E, S/16, S/16).
        """
        prompts = _prompting(self.token_prompts, images)
        patches = self.patch_embed(images)
        x = patches + self.pos_embed
        x = _run_blocks(self.blocks, x, self.checkpointing, prompts(0, patches, x))
        result: Tensor = self.neck(x.permute(0, 3, 1, 2))
        return result


class TinyVitEncoder(imports.tiny_vit.TinyVit):  # type: ignore[misc, name-defined]
    """MobileSAM's encoder: timm's TinyViT whose last merging keeps the resolution, and SAM's neck.

    The classification head is left out, and attention spares the work on padding. Batch norm runs over each forward's
    batch in train mode.

    Args:
        spec: Its widths and depths.
        drop_path_rate: Stochastic depth of the last block, for training from random weights.

    Source: Zhang et al., Faster Segment Anything (MobileSAM), 2023; Wu et al., TinyViT, 2022.
    """

    qkv_layout: Literal["stacked", "per_head"] = "per_head"

    def __init__(self, spec: SamSpec, *, drop_path_rate: float = 0.0) -> None:
        super().__init__(
            num_classes=0,
            embed_dims=spec.stage_dims,
            depths=spec.stage_depths,
            num_heads=spec.stage_heads,
            window_sizes=spec.stage_windows,
            drop_path_rate=drop_path_rate,
        )
        del self.head
        self.stages[3].downsample.conv2.conv.stride = (1, 1)
        self.neck = _neck(spec.embed_dim)
        self.checkpointing = False
        self.slab = Slab()
        self.token_prompts: TokenPrompts | None = None
        shapes = zip(spec.stage_dims[1:], spec.stage_depths[1:], TINY_STRIDES, strict=True)
        self._stages = [AttentionStage(*shape) for shape in shapes]
        for block in self.attention_blocks():
            spare_padding(block)

    def attention_blocks(self) -> list[nn.Module]:
        """The blocks with attention, in order: those of all stages but the first."""
        return [block for stage in self.stages[1:] for block in stage.blocks]

    def set_attention_block(self, index: int, block: nn.Module) -> None:
        """Put another module in the place of the attention block of an index."""
        places = [(stage.blocks, i) for stage in self.stages[1:] for i in range(len(stage.blocks))]
        blocks, place = places[index]
        blocks[place] = block

    def attention_layers(self) -> list[nn.Module]:
        """The attention modules, in order; each has ``qkv``, ``proj`` and ``num_heads``."""
        return [block.attn for stage in self.stages[1:] for block in stage.blocks]

    def attention_stages(self) -> list[AttentionStage]:
        """The attention blocks, grouped by width."""
        return list(self._stages)

    def token_dims(self) -> list[int]:
        """Token width of every attention block."""
        return [stage.width for stage in self._stages for _ in range(stage.num_blocks)]

    def forward(self, images: Tensor) -> Tensor:
        """Encode images.

        Args:
            images: (B, 3, S, S).

        Returns:
            Embeddings (B, E, S/16, S/16).
        """
        prompts = _prompting(self.token_prompts, images)
        x = _run_blocks(self.stages[0].blocks, self.patch_embed(images), self.checkpointing)
        for index, stage in enumerate(self.stages[1:]):
            x = stage.downsample(x).permute(0, 2, 3, 1)
            x = _run_blocks(stage.blocks, x, self.checkpointing, prompts(index, x, x))
            x = x.permute(0, 3, 1, 2)
        result: Tensor = self.neck(x)
        return result


SamEncoder = VitEncoder | TinyVitEncoder


def build_encoder(spec: SamSpec, *, image_size: int, initialise: bool = True) -> SamEncoder:
    """An image encoder with random weights.

    ViT: linear weights and positions are drawn from a normal distribution with standard deviation 0.02 cut at two of
    them, the patch embedding is Xavier uniform over the flattened patch, relative positions start at zero as
    upstream's. TinyViT: timm's initialisation, which is that of its authors.

    Args:
        spec: Its widths and depths.
        image_size: Input side S in pixels.
        initialise: Draw the weights; without it a ViT's are left undefined, for a checkpoint that holds them all.

    Raises:
        ConfigError: If the size is not a positive multiple of 16.

    Source: He et al., Masked Autoencoders, 2022, appendix A.1 (initialisation).
    """
    if image_size <= 0 or image_size % TOKEN_SIZE:
        raise ConfigError(
            "the encoder cannot take this input size",
            expected=f"a positive multiple of {TOKEN_SIZE}",
            found=str(image_size),
        )
    if spec.family == "tiny_vit":
        return TinyVitEncoder(spec)
    if not initialise:
        with torch.device("meta"):
            skeleton = VitEncoder(spec, image_size=image_size)
        empty: VitEncoder = skeleton.to_empty(device="cpu")
        return empty
    encoder = VitEncoder(spec, image_size=image_size)
    _initialise_vit(encoder)
    return encoder


def run_block(block: nn.Module, x: Tensor, checkpointing: bool) -> Tensor:
    """Run a block, keeping only its input for the backward pass if checkpointing is on and gradients are needed."""
    if not (checkpointing and torch.is_grad_enabled()):
        return block(x)  # type: ignore[no-any-return]
    contexts = partial(_checkpoint_contexts, block)
    return checkpoint(block, x, use_reentrant=False, context_fn=contexts)  # type: ignore[no-any-return]


def _run_blocks(blocks: Iterable[nn.Module], x: Tensor, checkpointing: bool, prompt: AddTokens | None = None) -> Tensor:
    for index, block in enumerate(blocks):
        if prompt is not None:
            x = x + prompt(index, x)
        x = run_block(block, x, checkpointing)
    return x


def _prompting(prompts: TokenPrompts | None, images: Tensor) -> Callable[[int, Tensor, Tensor], AddTokens | None]:
    """A function of (stage, tokens before positions, tokens after) that gives the stage's added tokens, if any."""
    if prompts is None:
        return lambda stage, before, after: None  # noqa: ARG005 - the same call with and without prompts
    details = prompts.details(images)
    return lambda stage, before, after: prompts.start(stage, details, before, after)


def _checkpoint_contexts(block: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    return nullcontext(), _unrecorded_statistics(block)


@contextmanager
def _unrecorded_statistics(block: nn.Module) -> Iterator[None]:
    """Recompute without counting the batch a second time in batch norm's running statistics."""
    norms = [m for m in block.modules() if isinstance(m, nn.BatchNorm2d) and m.training]
    kept = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, kept, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count


def _neck(width: int) -> nn.Sequential:
    norm = imports.image_encoder.LayerNorm2d
    return nn.Sequential(
        nn.Conv2d(width, PROMPT_DIM, kernel_size=1, bias=False),
        norm(PROMPT_DIM),
        nn.Conv2d(PROMPT_DIM, PROMPT_DIM, kernel_size=3, padding=1, bias=False),
        norm(PROMPT_DIM),
    )


def _initialise_vit(encoder: VitEncoder) -> None:
    nn.init.trunc_normal_(encoder.pos_embed, std=INIT_STD, a=-2 * INIT_STD, b=2 * INIT_STD)
    projection = encoder.patch_embed.proj
    nn.init.xavier_uniform_(projection.weight.view(projection.out_channels, -1))
    for module in encoder.blocks.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=INIT_STD, a=-2 * INIT_STD, b=2 * INIT_STD)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
