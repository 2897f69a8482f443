"""How SAM is adapted: a few composable choices as data, and which of them go together.

A method is encoder x depth x decoder x prompts x fusion; the backbone, the weights and the input size are the
recipe's. Blocks are counted over the whole encoder, negative ones from its end.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from samunet.core.config import Schema
from samunet.core.errors import ConfigError


def _some(blocks: tuple[int, ...]) -> tuple[int, ...]:
    if not blocks:
        raise ValueError("an empty list names no block: name some, or leave blocks out (null) for all")
    return blocks


SIDE_PATH_FIELDS = ("upsampler", "path_stride", "path_width", "path_convolutions", "deep_supervision")
Blocks = Annotated[tuple[int, ...], AfterValidator(_some)] | None


class Lora(Schema):
    """Low-rank updates of linear layers in the encoder's blocks.

    Args:
        targets: Some of q, k, v, o (attention) and mlp1, mlp2.
        rank: r.
        ranks: One r per adapted block, in the blocks' order, instead of the same everywhere; ``rank`` is then the
            uniform rank they stand for.
        alpha: The update is scaled by alpha / r; None: not scaled.
        blocks: Blocks that are adapted; None: all.

    Source: Hu et al., LoRA, 2021; on SAM Zhang and Liu, SAMed, 2023.
    """

    kind: Literal["lora"] = "lora"
    targets: tuple[Literal["q", "k", "v", "o", "mlp1", "mlp2"], ...] = Field(default=("q", "v"), min_length=1)
    rank: int = Field(default=4, ge=1)
    ranks: tuple[Annotated[int, Field(ge=1)], ...] | None = None
    alpha: float | None = Field(default=None, gt=0)
    blocks: Blocks = None

    @model_validator(mode="after")
    def _one_rank_per_block(self) -> Lora:
        if self.ranks is not None and self.blocks is not None and len(self.ranks) != len(set(self.blocks)):
            raise ValueError(f"ranks needs one entry per block: {len(set(self.blocks))}, found {len(self.ranks)}")
        return self

    def ranks_of(self, num_blocks: int) -> tuple[int, ...]:
        """The rank of every adapted block, in order.

        Raises:
            ConfigError: If the ranks are not as many as the adapted blocks.
        """
        if self.ranks is None:
            return (self.rank,) * num_blocks
        if len(self.ranks) != num_blocks:
            raise ConfigError(
                "lora's ranks are one per adapted block",
                expected=f"{num_blocks} ranks",
                found=f"{len(self.ranks)}",
                todo="correct ranks, or set it to null for the same rank everywhere",
            )
        return self.ranks


class Bottleneck(Schema):
    """Small networks after the attention (in sequence) and beside the MLP (in parallel).

    Args:
        sites: Where.
        ratio: Hidden width over token width.
        mlp_scale: Factor on the parallel branch.
        activation: Between the two linear layers.
        blocks: Blocks that are adapted; None: all.

    Source: Wu et al., Medical SAM Adapter, 2025; Gu et al., finetune-SAM, 2025.
    """

    kind: Literal["bottleneck"] = "bottleneck"
    sites: tuple[Literal["attention", "mlp"], ...] = Field(default=("attention", "mlp"), min_length=1)
    ratio: float = Field(default=0.25, gt=0, le=1)
    mlp_scale: float = 0.5
    activation: Literal["gelu", "relu"] = "gelu"
    blocks: Blocks = None


class Fact(Schema):
    """Low-rank updates of q and v whose outer factors all blocks share (tensor-train form).

    Args:
        rank: r.
        scale: Factor on the update.
        dropout: On the inner factor's output while training.
        blocks: Blocks that are adapted; None: all.

    Source: Jie and Deng, FacT, 2023; on SAM Chen et al., MA-SAM, 2024.
    """

    kind: Literal["fact"] = "fact"
    rank: int = Field(default=32, ge=1)
    scale: float = 1.0
    dropout: float = Field(default=0.1, ge=0, lt=1)
    blocks: Blocks = None


class HighFrequency(Schema):
    """Tokens made of the image's high frequencies and its patch embedding, added before every block.

    Args:
        reduction: Token width over the width of the generator.
        mask_fraction: Share of the spectrum's area, around its centre, that is removed.
        positions: Patch embedding taken before or after the position embedding is added.
        inputs: All blocks see the patch embedding ("shared") or each the tokens that reach it ("previous").

    Source: Chen et al., SAM-Adapter, 2023.
    """

    kind: Literal["high_frequency"] = "high_frequency"
    reduction: int = Field(default=32, ge=1)
    mask_fraction: float = Field(default=0.25, ge=0, lt=1)
    positions: Literal["before", "after"] = "before"
    inputs: Literal["shared", "previous"] = "shared"


class PeftLibrary(Schema):
    """A variant of LoRA from the peft library, on whole linear layers.

    Args:
        variant: Which.
        targets: Layers: the fused qkv, the attention's output, the MLP's two.
        rank: r.
        alpha: Scale numerator.
        blocks: Blocks that are adapted; None: all.
    """

    kind: Literal["peft"] = "peft"
    variant: Literal["lora", "dora", "rslora"] = "dora"
    targets: tuple[Literal["qkv", "o", "mlp1", "mlp2"], ...] = Field(default=("qkv",), min_length=1)
    rank: int = Field(default=4, ge=1)
    alpha: float = Field(default=4.0, gt=0)
    blocks: Blocks = None


Adapter = Annotated[Lora | Bottleneck | Fact | HighFrequency | PeftLibrary, Field(discriminator="kind")]


class EncoderMethod(Schema):
    """What of the image encoder trains.

    Args:
        train: Everything, its adapters (those of the depth mechanism included), or nothing.
        adapters: What is injected; under "full" they train beside everything else.
    """

    train: Literal["full", "adapters", "frozen"]
    adapters: tuple[Adapter, ...] = ()


class NoDepth(Schema):
    """Slices do not see each other, beyond neighbours in the channels."""

    kind: Literal["none"] = "none"


class DepthAttention(Schema):
    """Attention over the slices of a slab at every position, with the block's own attention weights.

    Args:
        ratio: Hidden width of the adapter that ends the branch, over token width.
        activation: Between that adapter's two linear layers.
        blocks: Blocks that get it; None: all.

    Source: Wu et al., Medical SAM Adapter, 2025 (SD-Trans); here on the unpartitioned map and with depth positions.
    """

    kind: Literal["attention"] = "attention"
    ratio: float = Field(default=0.25, gt=0, le=1)
    activation: Literal["gelu", "relu"] = "gelu"
    blocks: Blocks = None


class DepthConvolution(Schema):
    """Convolutions over three neighbouring slices inside bottlenecks before the attention and before the MLP.

    Args:
        width: Channels of the bottleneck.
        sites: Where.
        blocks: Blocks that get them; None: all.

    Source: Chen et al., MA-SAM, 2024.
    """

    kind: Literal["convolution"] = "convolution"
    width: int = Field(default=384, ge=1)
    sites: tuple[Literal["before_attention", "before_mlp"], ...] = Field(
        default=("before_attention", "before_mlp"), min_length=1
    )
    blocks: Blocks = None


Depth = Annotated[NoDepth | DepthAttention | DepthConvolution, Field(discriminator="kind")]


class DecoderMethod(Schema):
    """What of the mask decoder trains. Heads (tokens, their networks, the upsampler) train unless nothing does.

    Args:
        train: Everything; heads and low-rank updates of q and v in the transformer; heads and bottlenecks in the
            transformer; heads only; or nothing (prompting SAM as it is).
        rank: Of the low-rank updates.
        ratio: Hidden width of the bottlenecks over 256.
        conditioning: How the bottleneck after the tokens' look at the image depends on the prompt.
        upsampler: SAM's two steps, or four to full resolution, or those that a convolutional path of the image joins.
        path_stride: Of that path's first stage and of the masks; at 2 it sees squares of four pixels at once.
        path_width: Channels of its first stage, twice as many at stride 2 after it; SAM's own at strides 4 and 8.
        path_convolutions: Per stage of that path, down and up.
        deep_supervision: Whether its second and third stage have a loss too, a half and a quarter of the first's.

    Source: SAMed_s (LoRA); Medical SAM Adapter (adapters, HyP-Adpt); MA-SAM (progressive); nnU-Net (deep supervision).
    """

    train: Literal["full", "lora", "adapters", "heads", "none"] = "full"
    rank: int = Field(default=4, ge=1)
    ratio: float = Field(default=0.25, gt=0, le=1)
    conditioning: Literal["none", "add", "concat", "hyper"] = "none"
    upsampler: Literal["sam", "progressive", "side_path"] = "sam"
    path_stride: Literal[1, 2] = 1
    path_width: int = Field(default=16, ge=4)
    path_convolutions: int = Field(default=1, ge=1, le=4)
    deep_supervision: bool = False


class PromptMethod(Schema):
    """Which prompts are simulated in training; with "none" the model segments all classes by itself.

    Args:
        kind: Boxes, clicks, or either at random.
        box_shift: Most that each side of a tight box is moved outwards, as a fraction of the box's side.
        clicks: Clicks of the first round.
        corrections: Rounds that each add one click in the largest error.
    """

    kind: Literal["none", "box", "points", "mixed"] = "none"
    box_shift: float = Field(default=0.1, ge=0)
    clicks: int = Field(default=1, ge=1)
    corrections: int = Field(default=0, ge=0)


class Fusion(Schema):
    """What makes masks of the encoder's embedding.

    Args:
        kind: SAM's mask decoder, or a convolutional U-Net on the image that takes the embedding in at stride 16.
        width: Channels of the U-Net's first stage.

    Source: Li et al., nnSAM, 2023.
    """

    kind: Literal["sam", "unet"] = "sam"
    width: int = Field(default=32, ge=4)


class Method(Schema):
    """One way of adapting SAM.

    Args:
        encoder: What of the image encoder trains.
        depth: How slices of a slab see each other.
        decoder: What of the mask decoder trains.
        prompts: Simulated prompts.
        fusion: What makes masks.
    """

    encoder: EncoderMethod
    depth: Depth = NoDepth()
    decoder: DecoderMethod = DecoderMethod()
    prompts: PromptMethod = PromptMethod()
    fusion: Fusion = Fusion()

    @model_validator(mode="after")
    def _goes_together(self) -> Method:
        faults = faults_of(self)
        if faults:
            raise ValueError("; ".join(faults))
        return self

    @property
    def promptable(self) -> bool:
        """Whether it segments what a prompt points at, instead of all classes."""
        return self.prompts.kind != "none"

    @property
    def trains_anything(self) -> bool:
        """Whether anything trains."""
        return self.encoder.train != "frozen" or self.decoder.train != "none" or self.fusion.kind == "unet"

    def adapter(self, kind: str) -> Any:
        """The encoder's adapter of a kind, or None."""
        return next((a for a in self.encoder.adapters if a.kind == kind), None)


def summarise(method: Method) -> str:
    """A method in a few words, as "lora r4 q,v + full decoder"."""
    encoder = [summarise_encoder(method.encoder)]
    if method.depth.kind != "none":
        encoder.append(f"depth {method.depth.kind}")
    if method.fusion.kind == "unet":
        return " + ".join([*encoder, "U-Net"])
    decoder = f"{method.decoder.train} decoder{_decoder_words(method.decoder)}"
    prompted = [f"{method.prompts.kind} prompts"] if method.promptable else []
    return " + ".join([*encoder, decoder, *prompted])


def summarise_decoder(decoder: DecoderMethod) -> str:
    """What of the decoder trains, and what it has that SAM's own has not, in a few words."""
    return decoder.train + ", progressive upsampler" * (decoder.upsampler == "progressive") + _decoder_words(decoder)


def _decoder_words(decoder: DecoderMethod) -> str:
    words = ""
    if decoder.upsampler == "side_path":
        words = f" with side path {decoder.path_width}/{decoder.path_stride}{', supervised' * decoder.deep_supervision}"
    return words if decoder.conditioning == "none" else f"{words} ({decoder.conditioning})"


def summarise_encoder(encoder: EncoderMethod) -> str:
    """What of the encoder trains, in a few words."""
    words = [_adapter_words(adapter) for adapter in encoder.adapters]
    if encoder.train == "adapters":
        return " + ".join(words) or "adapters"
    return " + ".join([f"{encoder.train} encoder", *words])


def _adapter_words(adapter: Any) -> str:
    if adapter.kind == "bottleneck":
        return f"bottleneck 1/{round(1 / adapter.ratio)}"
    if adapter.kind == "high_frequency":
        return "high frequency"
    name = adapter.variant if adapter.kind == "peft" else adapter.kind
    targets = "" if adapter.kind == "fact" else f" {','.join(adapter.targets)}"
    ranks = getattr(adapter, "ranks", None)
    rank = f"{adapter.rank}" if ranks is None else f"{min(ranks)}-{max(ranks)}"
    return f"{name} r{rank}{targets}"


def faults_of(method: Method) -> list[str]:
    """What does not go together whatever the backbone and weights, each with what to change."""
    encoder, decoder, unet = method.encoder, method.decoder, method.fusion.kind == "unet"
    frozen, has_depth = encoder.train == "frozen", method.depth.kind != "none"
    kinds = [a.kind for a in encoder.adapters]
    faults = {
        "a frozen encoder has no adapters: set encoder.train to adapters, or remove them": frozen and bool(kinds),
        "a depth mechanism is trained inside the encoder: set encoder.train to adapters or full": frozen and has_depth,
        "encoder.train is adapters but there are none: add to encoder.adapters or choose a depth mechanism": (
            encoder.train == "adapters" and not kinds and not has_depth
        ),
        "two adapters of one kind meet in the same layers: keep one in encoder.adapters": len(set(kinds)) < len(kinds),
        "lora, fact and peft all rewrite the attention's layers: keep one of them in encoder.adapters": (
            len({"lora", "fact", "peft"} & set(kinds)) > 1
        ),
        "a finer upsampler has no place for SAM's tokens, which prompts need: set decoder.upsampler to sam": (
            decoder.upsampler != "sam" and method.promptable
        ),
        "a decoder that does not train can only be prompted: set prompts.kind, or decoder.train to heads": (
            decoder.train == "none" and not method.promptable and not unet
        ),
        "a U-Net takes no prompts: set prompts.kind to none, or fusion.kind to sam": unet and method.promptable,
        "a U-Net stands in for the mask decoder: set decoder to {train: none}, or fusion.kind to sam": (
            unet and decoder != DecoderMethod(train="none")
        ),
    }
    return [text for text, wrong in faults.items() if wrong] + _unread(method)


def _unread(method: Method) -> list[str]:
    """Values that are not the default although nothing reads them, each with what to change."""
    decoder, prompts, fusion = method.decoder, method.prompts, method.fusion
    sided, bottlenecks = decoder.upsampler == "side_path", decoder.train == "adapters"
    boxes, clicks = prompts.kind in ("box", "mixed"), prompts.kind in ("points", "mixed")
    simulated = ("box_shift", "clicks", "corrections")
    rows: list[tuple[bool, str, Any, tuple[str, ...], str]] = [
        (decoder.train == "lora", "decoder", decoder, ("rank",), "by low-rank updates only: set decoder.train to lora"),
        (bottlenecks, "decoder", decoder, ("ratio", "conditioning"), "by adapters only: set decoder.train to adapters"),
        (method.promptable, "decoder", decoder, ("conditioning",), "with prompts only: set prompts.kind"),
        (sided, "decoder", decoder, SIDE_PATH_FIELDS[1:], "by the side path only: set decoder.upsampler to side_path"),
        (boxes, "prompts", prompts, ("box_shift",), "for boxes only: set prompts.kind to box or mixed"),
        (clicks, "prompts", prompts, ("clicks", "corrections"), "for clicks only: set prompts.kind to points or mixed"),
        (method.trains_anything, "prompts", prompts, simulated, "in training only: set decoder.train to full"),
        (fusion.kind == "unet", "fusion", fusion, ("width",), "by the U-Net only: set fusion.kind to unet"),
    ]
    for index, part in enumerate(method.encoder.adapters):
        place = f"encoder.adapters.{index}"
        if part.kind == "bottleneck":
            rows.append(("mlp" in part.sites, place, part, ("mlp_scale",), f"at mlp only: add it to {place}.sites"))
        if part.kind == "high_frequency":
            shared = f"with shared inputs only: set {place}.inputs to shared"
            rows.append((part.inputs == "shared", place, part, ("positions",), shared))
    return [
        f"{place}.{name} is read {how}, or leave it at {type(part).model_fields[name].default}"
        for is_read, place, part, names, how in rows
        for name in names
        if not is_read and getattr(part, name) != type(part).model_fields[name].default
    ]
