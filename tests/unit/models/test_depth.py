"""Depth mechanisms: what they compute, how far they reach, and that slabs never see each other."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from samunet.artifacts.method import DepthAttention, DepthConvolution, Lora
from samunet.artifacts.model_spec import SamSpec
from samunet.core.errors import ConfigError
from samunet.models.peft.inject import inject_adapters, inject_depth
from samunet.models.peft.lora import qkv_rows
from samunet.models.sam.encoder import SamEncoder
from samunet.models.volumetric.attention import DepthAttentionBranch
from samunet.models.volumetric.slab import Slab
from tests.unit.models.model_helpers import images
from tests.unit.models.peft_helpers import SPECS, VIT, adapt, changed, encoder_of, pretend_training

SLICES = 10
DEPTH = 5


def _reach(encoder: SamEncoder, *moves: int) -> list[list[int]]:
    """For each moved slice of two slabs of five, the slices whose embedding changes at all."""
    pixels = images(SLICES, size=64).double()
    noise = 0.5 * torch.randn(3, 64, 64, generator=torch.Generator().manual_seed(4)).double()
    reached = []
    with torch.no_grad():
        before = encoder(pixels)
        for moved in moves:
            other = pixels.clone()
            other[moved] += noise
            reached.append(changed(before, encoder(other)))
    return reached


def _encoder(spec: SamSpec, depth: DepthAttention | DepthConvolution) -> SamEncoder:
    encoder = encoder_of(spec, size=64)
    inject_depth(encoder, depth, max_depth=DEPTH)
    pretend_training(encoder)
    encoder.slab.depth = DEPTH
    return encoder


@SPECS
@pytest.mark.parametrize("method", ["lora", "bottleneck", "fact", "high_frequency"])
def test_without_a_depth_mechanism_slices_do_not_see_each_other(spec: SamSpec, method: str) -> None:
    """Perturbing a slice moves its own embedding only, whatever the slab says."""
    encoder = adapt(encoder_of(spec, size=64), method, depth=DEPTH)
    pretend_training(encoder)
    assert _reach(encoder, 6) == [[6]]


@SPECS
def test_attention_reaches_the_whole_slab_and_no_other(spec: SamSpec) -> None:
    """With depth attention in one block a slice moves every slice of its own slab and nothing else."""
    encoder = _encoder(spec, DepthAttention(blocks=(1,)))
    first, second = list(range(DEPTH)), list(range(DEPTH, SLICES))
    assert _reach(encoder, 0, 3, 5, 9) == [first, first, second, second]


@SPECS
@pytest.mark.parametrize(
    ("blocks", "sites", "distance"),
    [
        ((0,), ("before_attention",), 1),
        ((-1,), ("before_mlp",), 1),
        ((0,), ("before_attention", "before_mlp"), 2),
        ((0, 2, 3), ("before_mlp",), 3),
    ],
)
def test_convolutions_reach_one_neighbour_each(
    spec: SamSpec, blocks: tuple[int, ...], sites: tuple[str, ...], distance: int
) -> None:
    """Each convolution adds exactly one slice of reach on both sides, ending at the slab."""
    encoder = _encoder(spec, DepthConvolution(width=8, blocks=blocks, sites=sites))
    moves = (0, 4, 7)
    expected = [
        [i for i in range(SLICES) if i // DEPTH == moved // DEPTH and abs(i - moved) <= distance] for moved in moves
    ]
    assert _reach(encoder, *moves) == expected


@SPECS
@pytest.mark.parametrize("method", ["depth_attention", "depth_convolution"])
def test_permuting_slabs_permutes_outputs(spec: SamSpec, method: str) -> None:
    """The order of the slabs in a batch does not matter, but the order of the slices in a slab does."""
    encoder = adapt(encoder_of(spec, size=64), method, depth=2)
    pretend_training(encoder)
    pixels = images(6, size=64).double()
    order = torch.tensor([4, 5, 0, 1, 2, 3])
    with torch.no_grad():
        embeddings = encoder(pixels)
        torch.testing.assert_close(encoder(pixels[order]), embeddings[order], rtol=0, atol=1e-11)
        swapped = encoder(pixels.flip(0)).flip(0)
    assert float((swapped - embeddings).abs().max()) > 1e-5


@SPECS
def test_depth_attention_sees_positions_only_through_its_table(spec: SamSpec) -> None:
    """With a table of zeros the slices of a slab are a set: permuting them permutes the outputs."""
    encoder = _encoder(spec, DepthAttention())
    for name, parameter in encoder.named_parameters():
        if name.endswith("depth_bias"):
            parameter.data.zero_()
    pixels = images(DEPTH, size=64).double()
    order = torch.tensor([3, 0, 4, 1, 2])
    with torch.no_grad():
        torch.testing.assert_close(encoder(pixels[order]), encoder(pixels)[order], rtol=0, atol=1e-11)


@SPECS
@pytest.mark.parametrize("depth", [1, 2, 4])
def test_depth_attention_is_attention_along_depth_at_every_position(spec: SamSpec, depth: int) -> None:
    """The branch equals attention written out for one position and one head after the other."""
    encoder = encoder_of(spec, size=64)
    attention = encoder.attention_layers()[-1]
    heads, dim = attention.num_heads, encoder.token_dims()[-1]
    slab = Slab()
    branch = DepthAttentionBranch(
        dim, heads, ratio=0.25, layout=encoder.qkv_layout, slab=slab, max_depth=DEPTH
    ).double()
    pretend_training(branch)
    slab.depth = depth
    normed = torch.randn(2 * depth, 2, 3, dim, generator=torch.Generator().manual_seed(1)).double()
    rows = qkv_rows(attention, encoder.qkv_layout)
    expected = torch.zeros_like(normed)
    with torch.no_grad():
        found = branch(normed, attention)
        for first in (0, depth):
            for h in range(2):
                for w in range(3):
                    sequence = normed[first : first + depth, h, w]
                    mixed = _one_position(sequence, attention, rows, branch.depth_bias, heads)
                    tokens = attention.proj(mixed)
                    expected[first : first + depth, h, w] = branch.adapter.up(
                        functional.gelu(branch.adapter.down(tokens))
                    )
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def _one_position(
    sequence: Tensor, attention: torch.nn.Module, rows: dict[str, Tensor], table: Tensor, heads: int
) -> Tensor:
    """Attention over a sequence (d, D), the score of slices i and j raised by table[i - j + max_depth - 1]."""
    fused = attention.qkv(sequence)
    q, k, v = (fused[:, rows[name]].chunk(heads, dim=1) for name in "qkv")
    outputs = []
    for head in range(heads):
        scores = q[head] @ k[head].T / q[head].shape[1] ** 0.5
        for i in range(len(sequence)):
            for j in range(len(sequence)):
                scores[i, j] += table[i - j + DEPTH - 1, head]
        outputs.append(scores.softmax(dim=1) @ v[head])
    return torch.cat(outputs, dim=1)


@SPECS
def test_depth_branch_uses_the_adapted_attention(spec: SamSpec) -> None:
    """With LoRA on v the depth branch uses the adapted layer, injected before or after it."""
    for lora_first in (True, False):
        encoder = encoder_of(spec, size=64)
        if lora_first:
            inject_adapters(encoder, [Lora(targets=("v",))])
        inject_depth(encoder, DepthAttention(blocks=(0,)), max_depth=2)
        if not lora_first:
            inject_adapters(encoder, [Lora(targets=("v",))])
        block = encoder.attention_blocks()[0]
        branch = block.sites["beside_attention"]
        pretend_training(branch)
        encoder.slab.depth = 2
        normed = torch.randn(2, 3, 3, encoder.token_dims()[0], generator=torch.Generator().manual_seed(1)).double()
        with torch.no_grad():
            plain = branch(normed, block.attn)
            pretend_training(block.attn)
            assert float((branch(normed, block.attn) - plain).abs().max()) > 1e-3


@SPECS
def test_depth_branch_is_beside_the_attention_on_the_whole_map(spec: SamSpec) -> None:
    """The residual gains the branch of the block's normalised map, windows not yet cut."""
    encoder = encoder_of(spec, size=64)
    plain = copy.deepcopy(encoder.attention_blocks()[0])
    inject_depth(encoder, DepthAttention(blocks=(0,)), max_depth=2)
    pretend_training(encoder)
    encoder.slab.depth = 2
    block = encoder.attention_blocks()[0]
    x = torch.randn(4, 9, 9, encoder.token_dims()[0], generator=torch.Generator().manual_seed(1)).double()
    norm = plain.norm1 if spec.family == "vit" else plain.attn.norm
    with torch.no_grad():
        added = block.sites["beside_attention"](norm(x), plain.attn)
        plain.attn.register_forward_hook(lambda *call: _add_to_windows(call[-1], added, plain.window_size))
        torch.testing.assert_close(block(x), plain(x), rtol=0, atol=1e-12)


def _add_to_windows(windows: Tensor, added: Tensor, side: int) -> Tensor:
    """Add a square map to the windows that were cut from a map of its size."""
    padding = -added.shape[1] % side
    padded = functional.pad(added, (0, 0, 0, padding, 0, padding))
    number = padded.shape[1] // side
    cut = padded.view(len(added), number, side, number, side, -1).transpose(2, 3)
    return windows + cut.reshape(windows.shape)


def test_convolution_over_depth_is_written_out() -> None:
    """X + up(GELU(sum of three neighbouring slices' bottlenecks)), zeros beyond the slab's ends."""
    encoder = encoder_of(VIT, size=64)
    inject_depth(encoder, DepthConvolution(width=8, blocks=(0,), sites=("before_mlp",)), max_depth=1)
    pretend_training(encoder)
    encoder.slab.depth = 3
    module = encoder.attention_blocks()[0].sites["before_mlp"]
    x = torch.randn(6, 2, 3, 32, generator=torch.Generator().manual_seed(1)).double()
    with torch.no_grad():
        hidden = module.norm(x) @ module.down.weight.T
        kernel = module.conv.weight[..., 0, 0]
        for i in range(6):
            total = module.conv.bias.expand(2, 3, 8)
            for step in (-1, 0, 1):
                if (i + step) // 3 == i // 3:
                    total = total + hidden[i + step] @ kernel[..., step + 1].T
            expected = x[i] + functional.gelu(total) @ module.up.weight.T
            torch.testing.assert_close(module(x)[i], expected, rtol=0, atol=1e-12)


@SPECS
@pytest.mark.parametrize("method", ["depth_attention", "depth_convolution"])
def test_slabs_of_any_depth_up_to_the_planned_one(spec: SamSpec, method: str) -> None:
    """One slice alone works; slabs deeper than the position table and batches of broken slabs are refused."""
    encoder = adapt(encoder_of(spec, size=64), method)
    pretend_training(encoder)
    with torch.no_grad():
        for depth in (1, 2, 5):
            encoder.slab.depth = depth
            assert bool(encoder(images(depth, size=64).double()).isfinite().all())
        encoder.slab.depth = 2
        with pytest.raises(ConfigError, match="whole slabs"):
            encoder(images(3, size=64).double())
        encoder.slab.depth = 6
        if method == "depth_attention":
            with pytest.raises(ConfigError, match="deeper") as caught:
                encoder(images(6, size=64).double())
            assert caught.value.expected == "at most 5 slices"


@SPECS
def test_two_depth_mechanisms_of_one_kind_are_refused(spec: SamSpec) -> None:
    """A block has one depth branch, and its table needs at least one slice."""
    encoder = encoder_of(spec, size=64)
    inject_depth(encoder, DepthAttention(blocks=(1,)), max_depth=2)
    with pytest.raises(ConfigError, match="beside_attention"):
        inject_depth(encoder, DepthAttention(), max_depth=2)
    with pytest.raises(ConfigError, match="needs slices"):
        inject_depth(encoder_of(spec, size=64), DepthAttention(), max_depth=0)
