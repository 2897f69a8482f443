"""What each adapter computes once it has values, against the formulas written out."""

from __future__ import annotations

import math

import pytest
import torch
from segment_anything.modeling.image_encoder import window_partition, window_unpartition
from torch import Tensor, nn
from torch.nn import functional

from samunet.artifacts.method import Bottleneck, DepthConvolution, Fact, HighFrequency, Lora
from samunet.artifacts.model_spec import SamSpec
from samunet.core.errors import ConfigError
from samunet.models.peft.blocks import AdaptedBlock, adapt_block, chosen_blocks, put
from samunet.models.peft.bottleneck import BottleneckAdapter
from samunet.models.peft.fact import FactLinear
from samunet.models.peft.high_frequency import high_pass
from samunet.models.peft.inject import inject_adapters, inject_depth
from samunet.models.peft.lora import qkv_rows
from samunet.models.peft.state import adapter_parameters
from samunet.models.sam.attention import fold_attention
from samunet.models.sam.encoder import SamEncoder
from tests.unit.models.model_helpers import images
from tests.unit.models.peft_helpers import (
    EVERY_METHOD,
    SPECS,
    TINY,
    VIT,
    adapt,
    encoder_of,
    inject_some,
    pretend_training,
)


def _tokens(encoder: SamEncoder, index: int, *, side: int) -> Tensor:
    shape = (2, side, side, encoder.token_dims()[index])
    return torch.randn(shape, generator=torch.Generator().manual_seed(9)).double()


def _network(x: Tensor, layers: nn.Module, activation: str) -> Tensor:
    """A bottleneck's two layers, written out."""
    state = layers.state_dict()
    hidden = getattr(functional, activation)(x @ state["down.weight"].T + state["down.bias"])
    return hidden @ state["up.weight"].T + state["up.bias"]


# --- blocks ---


@SPECS
def test_blocks_are_counted_over_the_encoder_and_from_its_end(spec: SamSpec) -> None:
    """Chosen blocks come once and in order, negative ones counted from the end; unknown ones are refused."""
    encoder = encoder_of(spec)
    assert chosen_blocks(encoder, None) == [0, 1, 2, 3]
    assert chosen_blocks(encoder, (-1, 0, 3)) == [0, 3]
    with pytest.raises(ConfigError, match="these blocks") as caught:
        chosen_blocks(encoder, (1, -5, 4))
    assert caught.value.found == "-5, 4"


@SPECS
def test_token_dims_and_blocks_follow_the_spec(spec: SamSpec) -> None:
    """Widths, blocks and attention modules are listed in the same order."""
    encoder = encoder_of(spec)
    assert encoder.token_dims() == [block.attn.qkv.in_features for block in encoder.attention_blocks()]
    assert encoder.attention_layers() == [block.attn for block in encoder.attention_blocks()]
    marker = nn.Identity()
    encoder.set_attention_block(2, marker)
    assert [block is marker for block in encoder.attention_blocks()] == [False, False, True, False]


@SPECS
def test_only_chosen_blocks_are_replaced_and_only_once(spec: SamSpec) -> None:
    """Blocks that get nothing stay upstream's own objects, and a block that has sites keeps them."""
    encoder = encoder_of(spec)
    before = encoder.attention_blocks()
    inject_adapters(encoder, [Bottleneck(blocks=(-1,))])
    after = encoder.attention_blocks()
    assert [old is new for old, new in zip(before, after, strict=True)] == [True, True, True, False]
    assert adapt_block(encoder, 3) is after[3]
    assert not after[3].training


@SPECS
def test_a_site_holds_one_module(spec: SamSpec) -> None:
    """A taken site is refused, naming both; so is a site that does not exist."""
    encoder = encoder_of(spec)
    inject_adapters(encoder, [Bottleneck(sites=("mlp",), blocks=(1,))])
    with pytest.raises(ConfigError, match="beside_mlp") as caught:
        inject_adapters(encoder, [Bottleneck(blocks=(1,))])
    assert caught.value.found == "bottleneck and bottleneck"
    with pytest.raises(ConfigError, match="no such site"):
        put(adapt_block(encoder, 0), "after_mlp", nn.Identity())


@pytest.mark.parametrize("training", [False, True])
def test_stochastic_depth_of_a_tiny_block_is_upstreams(training: bool) -> None:
    """An adapted TinyViT block draws and scales its paths as the block it stands for."""
    from timm.models.tiny_vit import TinyVitBlock

    block = TinyVitBlock(32, 2, window_size=7, drop_path=0.5).double().train(training)
    encoder = encoder_of(TINY)
    encoder.set_attention_block(0, block)
    x = torch.randn(6, 9, 9, 32, generator=torch.Generator().manual_seed(2)).double()
    with torch.no_grad():
        torch.manual_seed(0)
        expected = block(x)
        torch.manual_seed(0)
        found = adapt_block(encoder, 0)(x)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


# --- bottlenecks ---


@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_bottlenecks_of_a_vit_block(activation: str) -> None:
    """After the attention in sequence with a skip, beside the MLP on its normalised input with a factor."""
    encoder = encoder_of(VIT)
    block = encoder.attention_blocks()[0]
    inject_adapters(encoder, [Bottleneck(activation=activation, mlp_scale=0.7, blocks=(0,))])
    pretend_training(encoder)
    adapted = encoder.attention_blocks()[0]
    x = _tokens(encoder, 0, side=9)
    with torch.no_grad():
        windows, padded = window_partition(block.norm1(x), 14)
        attended = window_unpartition(block.attn(windows), 14, padded, (9, 9))
        middle = x + attended + _network(attended, adapted.sites["after_attention"], activation)
        normed = block.norm2(middle)
        expected = middle + block.mlp(normed) + 0.7 * _network(normed, adapted.sites["beside_mlp"], activation)
        torch.testing.assert_close(adapted(x), expected, rtol=0, atol=1e-12)


def test_bottlenecks_of_a_tiny_block() -> None:
    """The same in TinyViT, where the MLP normalises inside itself and a convolution lies between."""
    encoder = encoder_of(TINY)
    block = encoder.attention_blocks()[0]
    inject_adapters(encoder, [Bottleneck(blocks=(0,))])
    pretend_training(encoder)
    adapted = encoder.attention_blocks()[0]
    x = _tokens(encoder, 0, side=7)
    with torch.no_grad():
        attended = block.attn(x.flatten(1, 2)).view(x.shape)
        middle = x + attended + _network(attended, adapted.sites["after_attention"], "gelu")
        middle = block.local_conv(middle.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        beside = _network(block.mlp.norm(middle), adapted.sites["beside_mlp"], "gelu")
        torch.testing.assert_close(adapted(x), middle + block.mlp(middle) + 0.5 * beside, rtol=0, atol=1e-12)


def test_a_bottleneck_is_never_thinner_than_one() -> None:
    """A ratio that rounds to nothing leaves one hidden unit; 2 D h + h + D parameters."""
    encoder = inject_some(encoder_of(VIT), [Bottleneck(ratio=0.001, blocks=(0,), sites=("mlp",))])
    module = encoder.attention_blocks()[0].sites["beside_mlp"]
    assert isinstance(module, BottleneckAdapter)
    assert module.down.out_features == 1
    assert sum(p.numel() for p in module.parameters()) == 2 * 32 + 1 + 32


# --- FacT ---


@SPECS
def test_fact_update_is_the_product_of_its_factors(spec: SamSpec) -> None:
    """In every block the rows of q and v gain s V S U x with the width's own U and V; k gains nothing."""
    encoder = encoder_of(spec)
    bases = [attention.qkv for attention in encoder.attention_layers()]
    inject_some(encoder, [Fact(rank=3, scale=1.7)])
    pretend_training(encoder)
    for base, attention in zip(bases, encoder.attention_layers(), strict=True):
        layer = attention.qkv
        dim = base.in_features
        u, v = encoder.fact.fact_u[str(dim)], encoder.fact.fact_v[str(dim)]
        assert (tuple(u.shape), tuple(v.shape)) == ((3, dim), (dim, 3))
        x = torch.randn(5, dim, generator=torch.Generator().manual_seed(0)).double()
        with torch.no_grad():
            difference = layer(x) - base(x)
            rows = qkv_rows(attention, encoder.qkv_layout)
            for target in ("q", "v"):
                expected = 1.7 * x @ (v @ layer.fact_core[target] @ u).T
                torch.testing.assert_close(difference[:, rows[target]], expected, rtol=0, atol=1e-12)
            assert float(difference[:, rows["k"]].abs().max()) == 0


@SPECS
def test_fact_shares_one_pair_of_factors_per_width(spec: SamSpec) -> None:
    """The outer factors are stored once, and each block adds two small matrices."""
    encoder = inject_some(encoder_of(spec), [Fact(rank=3, blocks=(0, 1, -1))])
    dims = [encoder.token_dims()[i] for i in (0, 1, 3)]
    names = set(adapter_parameters(encoder))
    shared = {f"fact.fact_{side}.{dim}" for side in "uv" for dim in dims}
    assert {name for name in names if name.startswith("fact.")} == shared
    assert len(names - shared) == 2 * 3
    assert names <= set(encoder.state_dict())
    assert sum(p.numel() for p in adapter_parameters(encoder).values()) == 2 * 3 * sum(set(dims)) + 3 * 2 * 9


def test_fact_dropout_acts_only_in_train_mode() -> None:
    """With dropout the output varies while the dropout layer trains, and never in eval mode."""
    encoder = inject_some(encoder_of(VIT), [Fact(rank=3, dropout=0.5)])
    pretend_training(encoder)
    layer = encoder.attention_layers()[0].qkv
    assert isinstance(layer, FactLinear)
    x = torch.randn(4, 32).double()
    with torch.no_grad():
        assert torch.equal(layer(x), layer(x))
        layer.train()
        assert not torch.equal(layer(x), layer(x))
        layer.eval()
        for module in encoder.modules():
            if isinstance(module, nn.Dropout):
                module.train()
        assert not torch.equal(layer(x), layer(x))


@pytest.mark.parametrize("choices", [(Fact(), Fact()), (Lora(), Fact()), (Fact(), Lora())])
def test_two_adapters_cannot_rewrite_one_layer(choices: tuple[Fact | Lora, ...]) -> None:
    """Low-rank updates of the same fused layer are refused, whichever comes first."""
    encoder = encoder_of(VIT)
    inject_adapters(encoder, choices[:1])
    before = set(encoder.state_dict())
    with pytest.raises(ConfigError, match=r"plain linear|shared factors"):
        inject_adapters(encoder, choices[1:])
    assert set(encoder.state_dict()) == before


# --- high-frequency prompts ---


@pytest.mark.parametrize(("height", "width"), [(64, 64), (112, 112), (48, 80)])
def test_high_pass_removes_the_centre_of_the_spectrum(height: int, width: int) -> None:
    """A wave inside the removed rectangle vanishes, one outside stays, along either axis and at any proportions."""
    y, x = torch.meshgrid(torch.arange(height).double(), torch.arange(width).double(), indexing="ij")
    for axis, side in ((y, height), (x, width)):
        slow = torch.cos(2 * math.pi * (side // 4 - 1) * axis / side)
        fast = torch.cos(2 * math.pi * (side // 4 + 1) * axis / side)
        assert float(high_pass(slow + 3, 0.25).max()) < 1e-10
        torch.testing.assert_close(high_pass(slow + fast + 3, 0.25), fast.abs(), rtol=0, atol=1e-10)
        torch.testing.assert_close(high_pass(slow, 0.0), slow.abs(), rtol=0, atol=1e-10)


@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.6])
def test_high_pass_removes_the_share_of_the_area(fraction: float) -> None:
    """Of white noise the removed share of the energy is about the share of the spectrum's area, also off-square."""
    noise = torch.randn(200, 320, generator=torch.Generator().manual_seed(0)).double()
    left = float(high_pass(noise, fraction).square().mean() / noise.square().mean())
    assert left == pytest.approx(1 - fraction, abs=0.02)


def test_high_pass_needs_no_half_precision_transform() -> None:
    """Half-precision images of any size, under autocast too, give the float32 result in their own type."""
    pixels = torch.randn(1, 3, 48, 80, generator=torch.Generator().manual_seed(0))
    expected = high_pass(pixels.double(), 0.25).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(high_pass(pixels, 0.25), expected, rtol=0, atol=1e-6)
        half = high_pass(pixels.bfloat16(), 0.25)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half, high_pass(pixels.bfloat16().float(), 0.25).bfloat16())


def _details(stage: nn.Module, pixels: Tensor) -> Tensor:
    detail: Tensor = stage.details(high_pass(pixels, 0.25)).permute(0, 2, 3, 1)
    return detail


@pytest.mark.parametrize("size", [112, 320])
@pytest.mark.parametrize(("positions", "inputs"), [("before", "shared"), ("after", "shared"), ("before", "previous")])
def test_high_frequency_prompts_of_a_vit(size: int, positions: str, inputs: str) -> None:
    """Before every block up(GELU(W_i(details + tokens))) is added, with tokens from where the choice says."""
    encoder = encoder_of(VIT, size=size)
    choice = HighFrequency(reduction=8, positions=positions, inputs=inputs)
    inject_some(encoder, [choice])
    pretend_training(encoder)
    stage = encoder.token_prompts.stages[0]
    pixels = images(1, size=size).double()
    with torch.no_grad():
        patches = encoder.patch_embed(pixels)
        x = patches + encoder.pos_embed
        chosen = patches if positions == "before" else x
        for layer, block in zip(stage.per_block, encoder.blocks, strict=True):
            seen = x if inputs == "previous" else chosen
            x = block(x + stage.up(functional.gelu(layer(_details(stage, pixels) + stage.tokens(seen)))))
        expected = encoder.neck(x.permute(0, 3, 1, 2))
        torch.testing.assert_close(encoder(pixels), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("inputs", ["shared", "previous"])
def test_high_frequency_prompts_of_a_tiny_vit(inputs: str) -> None:
    """Each attention stage has its own generator at its own stride, fed by the tokens that enter it."""
    encoder = encoder_of(TINY)
    inject_some(encoder, [HighFrequency(reduction=8, inputs=inputs)])
    pretend_training(encoder)
    pixels = images(1).double()
    with torch.no_grad():
        x = encoder.stages[0].blocks(encoder.patch_embed(pixels))
        for stage, generator in zip(encoder.stages[1:], encoder.token_prompts.stages, strict=True):
            x = entered = stage.downsample(x).permute(0, 2, 3, 1)
            for layer, block in zip(generator.per_block, stage.blocks, strict=True):
                seen = x if inputs == "previous" else entered
                features = _details(generator, pixels) + generator.tokens(seen)
                x = block(x + generator.up(functional.gelu(layer(features))))
            x = x.permute(0, 3, 1, 2)
        torch.testing.assert_close(encoder(pixels), encoder.neck(x), rtol=0, atol=1e-10)


def test_a_second_generator_is_refused() -> None:
    """An encoder adds tokens from one generator only."""
    encoder = inject_some(encoder_of(VIT), [HighFrequency()])
    with pytest.raises(ConfigError, match="already adds tokens"):
        inject_adapters(encoder, [HighFrequency()])


def test_sites_run_in_their_order() -> None:
    """Modules before the attention and before the MLP see the map there, and all residuals are theirs."""
    encoder = encoder_of(VIT)
    block = encoder.attention_blocks()[1]
    inject_depth(encoder, DepthConvolution(width=4, blocks=(1,)), max_depth=1)
    pretend_training(encoder)
    adapted = encoder.attention_blocks()[1]
    assert isinstance(adapted, AdaptedBlock)
    x = _tokens(encoder, 1, side=7)
    with torch.no_grad():
        first = adapted.sites["before_attention"](x)
        second = adapted.sites["before_mlp"](first + block.attn(block.norm1(first)))
        torch.testing.assert_close(adapted(x), second + block.mlp(block.norm2(second)), rtol=0, atol=1e-12)


@EVERY_METHOD
@pytest.mark.parametrize("fold_first", [True, False])
def test_folded_attention_takes_the_same_adapters(method: str, fold_first: bool) -> None:
    """Attention may be folded before or after injection: trained adapters give the same embeddings."""
    plain, folded = encoder_of(VIT), encoder_of(VIT)
    if fold_first:
        fold_attention(folded)
    for encoder in (plain, folded):
        pretend_training(adapt(encoder, method, depth=2))
    if not fold_first:
        fold_attention(folded)
    pixels = images(2).double()
    with torch.no_grad():
        expected = plain(pixels)
        torch.testing.assert_close(folded(pixels), expected, rtol=0, atol=1e-10 * float(expected.abs().max()))
    assert set(folded.state_dict()) == set(plain.state_dict())
