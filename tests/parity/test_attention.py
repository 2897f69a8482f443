"""Folded attention equals segment-anything's own in outputs and gradients, and keeps no score matrix."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from segment_anything.modeling import ImageEncoderViT
from segment_anything.modeling.image_encoder import Attention
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.attention import build, saved_bytes, saved_tensors
from samunet.artifacts.method import Lora
from samunet.artifacts.model_spec import TOKEN_SIZE, WINDOW_TOKENS, SamSpec
from samunet.core.errors import ConfigError
from samunet.models.peft.state import adapter_parameters, freeze_all_but
from samunet.models.sam.attention import FoldedAttention, PositionTables, fold_attention
from samunet.models.sam.encoder import VitEncoder
from samunet.models.sam.windows import PaddedTinyAttention, PaddedVitAttention
from tests.unit.models.model_helpers import images, perturb, upstream_vit
from tests.unit.models.peft_helpers import (
    EVERY_METHOD,
    TINY,
    VIT,
    adapt,
    encoder_of,
    inject_some,
    pretend_training,
)

# Windows of 14 tokens need padding on grids of 7 and 20 tokens per side, and none on 14.
SIZES = pytest.mark.parametrize("size", [112, 224, 320], ids=["grid 7", "grid 14", "grid 20"])
WIDTH, HEADS = 24, 2
GIB = 1 << 30


def _layer(side: int) -> nn.Module:
    """Upstream's attention with tables for ``side`` tokens per side; its head width of 12 needs padding."""
    layer: nn.Module = Attention(WIDTH, num_heads=HEADS, use_rel_pos=True, input_size=(side, side))
    perturb(layer, scale=0.5)
    return layer.double()


def _gradients(module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Output, and gradients of the input and of every parameter, for one fixed random direction."""
    module.zero_grad(set_to_none=True)
    x = x.detach().clone().requires_grad_()
    out = module(x)
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(8)).to(out)
    (out * direction).sum().backward()
    grads = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    assert x.grad is not None
    return {"output": out.detach(), "input": x.grad, **grads}


def _assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor], *, tolerance: float = 1e-11) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        limit = tolerance * max(1.0, float(tensor.abs().max()))
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=limit, msg=lambda text, name=name: name + text)


@pytest.mark.parametrize(
    ("height", "width", "table"),
    [(14, 14, 14), (20, 20, 20), (7, 7, 7), (7, 7, 14), (20, 20, 14), (9, 5, 7)],
    ids=str,
)
def test_layer_is_upstreams(height: int, width: int, table: int) -> None:
    """Output and gradients of input, qkv, proj and both position tables, interpolated where their length differs."""
    layer = _layer(table)
    x = torch.randn(2, height, width, WIDTH, generator=torch.Generator().manual_seed(1)).double()
    expected = _gradients(layer, x)
    assert {"rel_pos_h", "rel_pos_w", "qkv.weight", "qkv.bias", "proj.weight", "proj.bias"} <= set(expected)
    _assert_equal(_gradients(FoldedAttention(layer, PositionTables()), x), expected)


def test_layer_shares_everything_under_upstreams_names() -> None:
    """Keys are upstream's in upstream's order, values are the same tensors, and constants are in no state."""
    layer = _layer(14)
    folded = FoldedAttention(layer, PositionTables())
    folded(torch.zeros(1, 14, 14, WIDTH).double())
    ours, upstreams = folded.state_dict(keep_vars=True), layer.state_dict(keep_vars=True)
    assert list(ours) == list(upstreams)
    assert all(ours[key] is tensor for key, tensor in upstreams.items())
    assert not list(folded.buffers())


def test_constants_are_made_once_and_serve_training_after_inference() -> None:
    """What a first pass in inference mode cached is used again, also by a backward pass and in another precision."""
    tables = PositionTables()
    folded = FoldedAttention(_layer(14), tables)
    x = torch.randn(1, 9, 9, WIDTH).double()
    with torch.inference_mode():
        folded(x)
    kept = tables.distances(9, x.device), tables.places(9, 9, 2, x)
    _gradients(folded, x)
    assert tables.distances(9, x.device) is kept[0]
    assert tables.places(9, 9, 2, x) is kept[1]
    assert folded.float()(x.float()).dtype == torch.float32


def test_half_precision_is_as_close_as_upstreams() -> None:
    """Under bfloat16 autocast the output has upstream's type and is no further from the float32 result."""
    layer = _layer(20).float()
    folded = FoldedAttention(layer, PositionTables())
    x = torch.randn(2, 20, 20, WIDTH, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        exact = layer(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            theirs, ours = layer(x), folded(x)
    assert ours.dtype == theirs.dtype == torch.bfloat16
    errors = [float((out.float() - exact).square().mean()) for out in (ours, theirs)]
    assert 0 < errors[0] <= 1.1 * errors[1]


def _upstream(size: int) -> ImageEncoderViT:
    encoder = upstream_vit(VIT, size)
    perturb(encoder)
    return encoder.double().eval()


@SIZES
@pytest.mark.parametrize("global_only", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_encoder_is_upstreams(size: int, global_only: bool, checkpointing: bool) -> None:
    """Embeddings and the gradients of all parameters are upstream's, and the state loads strictly both ways."""
    upstream = _upstream(size)
    ours = VitEncoder(VIT, image_size=size).double().eval()
    fold_attention(ours, global_only=global_only)
    ours.load_state_dict(upstream.state_dict(), strict=True)
    ours.checkpointing = checkpointing
    kinds = [type(layer) for layer in ours.attention_layers()]
    in_windows = (
        PaddedVitAttention if size < WINDOW_TOKENS * TOKEN_SIZE else Attention if global_only else FoldedAttention
    )
    assert kinds == [FoldedAttention if i in VIT.global_blocks else in_windows for i in range(4)]
    assert list(ours.state_dict()) == list(upstream.state_dict())
    _assert_equal(_gradients(ours, images(1, size=size).double()), _gradients(upstream, images(1, size=size).double()))


def test_folding_again_changes_nothing() -> None:
    """A second call, also one for fewer blocks, keeps every module."""
    encoder = encoder_of(VIT)
    fold_attention(encoder)
    layers = encoder.attention_layers()
    fold_attention(encoder)
    fold_attention(encoder, global_only=True)
    assert all(a is b for a, b in zip(encoder.attention_layers(), layers, strict=True))


def test_tiny_vit_is_refused() -> None:
    """Its attention has other positions; the error comes before anything is changed."""
    encoder = encoder_of(TINY)
    layers = encoder.attention_layers()
    with pytest.raises(ConfigError, match="cannot be folded"):
        fold_attention(encoder)
    assert all(a is b for a, b in zip(encoder.attention_layers(), layers, strict=True))


@EVERY_METHOD
@pytest.mark.parametrize("first", ["fold", "adapt"])
def test_adapters_work_before_and_after_folding(method: str, first: str) -> None:
    """With trained adapters of every kind the folded encoder has the plain one's output, gradients and keys."""
    plain = encoder_of(VIT, size=224)
    folded = copy.deepcopy(plain)
    adapt(plain, method)
    steps: list[Callable[[], object]] = [lambda: fold_attention(folded), lambda: adapt(folded, method)]
    for step in steps if first == "fold" else reversed(steps):
        step()
    pretend_training(plain)
    pretend_training(folded)
    assert set(folded.state_dict()) == set(plain.state_dict())
    assert all(isinstance(layer, FoldedAttention) for layer in folded.attention_layers())
    pixels = images(1, size=224).double()
    _assert_equal(_gradients(folded, pixels), _gradients(plain, pixels), tolerance=1e-10)


@EVERY_METHOD
@pytest.mark.parametrize("spec", [VIT, TINY], ids=["vit", "tiny_vit"])
def test_adapters_meet_no_difference_where_padding_is_spared(
    method: str, spec: SamSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With trained adapters, output and gradients are those of attention from and to all padded tokens."""
    spared = encoder_of(spec)
    adapt(spared, method)
    pretend_training(spared)
    found = _gradients(spared, images(1).double())
    unknown = property(lambda _: None, lambda *_: None)
    for kind in (PaddedVitAttention, PaddedTinyAttention):
        monkeypatch.setattr(kind, "map_size", unknown, raising=False)
    _assert_equal(found, _gradients(spared, images(1).double()), tolerance=1e-10)


def _lora(blocks: tuple[int, ...] | None = None, *, size: int = 320) -> VitEncoder:
    """A float32 encoder in which only LoRA on q and v trains."""
    encoder = inject_some(encoder_of(VIT, size=size, double=False), [Lora(targets=("q", "v"), rank=2, blocks=blocks)])
    assert isinstance(encoder, VitEncoder)
    freeze_all_but(encoder, adapter_parameters(encoder))
    return encoder


def _is_score_matrix(tensor: Tensor) -> bool:
    """Whether a tensor has a number for every pair of tokens, of a window or of the whole grid of 20 x 20."""
    return tensor.shape[-2:] in ((400, 400), (196, 196)) or tensor.shape[-4:] == (20, 20, 20, 20)


@pytest.mark.parametrize("precision", [None, torch.bfloat16])
def test_no_score_matrix_is_kept(precision: torch.dtype | None) -> None:
    """Upstream keeps scores of all four blocks, the folded form none, and less in all."""
    encoder = _lora()
    pixels = images(1, size=320)
    before = saved_bytes(encoder, pixels, precision)
    assert sum(_is_score_matrix(t) for t in saved_tensors(encoder, pixels, precision)) >= 4
    fold_attention(encoder)
    found = saved_tensors(encoder, pixels, precision)
    assert found
    assert not any(_is_score_matrix(tensor) for tensor in found)
    assert saved_bytes(encoder, pixels, precision) < before


@pytest.mark.parametrize("checkpointing", [False, True])
def test_nothing_is_kept_of_frozen_blocks_ahead_of_the_adapted_ones(checkpointing: bool) -> None:
    """With LoRA in the last block no gradient enters the first three, and they add nothing to what is kept."""
    encoder = _lora((-1,))
    fold_attention(encoder)
    encoder.checkpointing = checkpointing
    needs: list[bool] = []
    for block in encoder.blocks:
        block.register_forward_hook(lambda *call: needs.append(call[-1].requires_grad))
    saved = saved_tensors(encoder, images(1, size=320), None)
    assert needs[:4] == [False, False, False, True]
    encoder.blocks = encoder.blocks[3:]
    alone = saved_tensors(encoder, images(1, size=320), None)
    counts = [sum(tensor.numel() for tensor in tensors) for tensors in (saved, alone)]
    assert counts[0] == counts[1] > 0


def test_bytes_of_vit_b_at_1024() -> None:
    """One image with LoRA in bfloat16: upstream keeps 2.8 GiB, folded at most 1.6, with checkpointing at most 0.2."""
    gib = {}
    for form in ("upstream", "folded", "checkpointed"):
        with FakeTensorMode():
            gib[form] = saved_bytes(build("vit_b", 1024, form), torch.randn(1, 3, 1024, 1024)) / GIB
    assert gib["upstream"] > 2.7
    assert gib["folded"] <= 1.6
    assert gib["checkpointed"] <= 0.2


@pytest.mark.parametrize("form", ["upstream", "folded", "checkpointed"])
def test_fake_tensors_count_what_real_ones_do(form: str) -> None:
    """The bytes of the smallest ViT at 224 pixels, counted both ways."""
    real = saved_bytes(build("vit_xs", 224, form), images(1, size=224))
    with FakeTensorMode():
        fake = saved_bytes(build("vit_xs", 224, form), torch.randn(1, 3, 224, 224))
    assert real == fake > 0
