"""LoRA on fused attention: identity at the start, the right rows, exact counts, exact merge."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from samunet.artifacts.method import Lora
from samunet.artifacts.model_spec import SamSpec, get_spec
from samunet.core.errors import ConfigError
from samunet.models.peft.lora import LoraLinear, inject_lora, qkv_rows
from samunet.models.peft.protocol import AdapterModule, MergeableModule
from samunet.models.peft.state import adapter_parameters, merge
from samunet.models.sam.encoder import TinyVitEncoder, VitEncoder, build_encoder
from tests.unit.models.model_helpers import SMALL_TINY, SMALL_VIT, images, perturb

SPECS = pytest.mark.parametrize("spec", [SMALL_VIT, SMALL_TINY], ids=lambda s: s.family)


def _trained(encoder: nn.Module) -> None:
    """Give the adapters values, as training would."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in adapter_parameters(encoder).values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)


@pytest.mark.parametrize(
    ("name", "targets", "count"),
    [
        ("vit_b", ("q", "v"), 147_456),
        ("vit_l", ("q", "v"), 393_216),
        ("vit_h", ("q", "v"), 655_360),
        ("vit_t", ("q", "v"), 29_696),
        ("vit_b", ("q", "k", "v", "o"), 294_912),
        ("vit_l", ("q", "k", "v", "o"), 786_432),
        ("vit_h", ("q", "k", "v", "o"), 1_310_720),
    ],
)
def test_published_parameter_counts(name: str, targets: tuple[str, ...], count: int) -> None:
    """Rank 4 in all blocks adds exactly the published number of parameters."""
    spec = get_spec(name)
    with torch.device("meta"):
        encoder = TinyVitEncoder(spec) if spec.family == "tiny_vit" else VitEncoder(spec, image_size=1024)
        inject_lora(encoder, Lora(targets=targets, rank=4))
    assert sum(p.numel() for p in adapter_parameters(encoder).values()) == count


@SPECS
@pytest.mark.parametrize("size", [64, 224])
def test_adapters_start_as_the_identity(spec: SamSpec, size: int) -> None:
    """A freshly adapted encoder gives bit-equal embeddings, with padded windows and without."""
    encoder = build_encoder(spec, image_size=size).eval()
    perturb(encoder)
    with torch.no_grad():
        before = encoder(images(2, size=size))
        inject_lora(encoder, Lora(targets=("q", "k", "v", "o"), rank=3))
        assert torch.equal(encoder(images(2, size=size)), before)


@SPECS
def test_upstream_keys_stay_and_adapters_are_beside_them(spec: SamSpec) -> None:
    """After injection all upstream keys exist with the same values, and every other key is an adapter's."""
    encoder = build_encoder(spec, image_size=64)
    before = {key: tensor.clone() for key, tensor in encoder.state_dict().items()}
    inject_lora(encoder, Lora())
    after = encoder.state_dict()
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())
    assert set(after) - set(before) == set(adapter_parameters(encoder))


@SPECS
@pytest.mark.parametrize("target", ["q", "k", "v"])
def test_only_the_rows_of_the_target_change(spec: SamSpec, target: str) -> None:
    """An update of one target changes exactly its part of the attention's own split into q, k and v."""
    encoder = build_encoder(spec, image_size=64)
    attention = encoder.attention_layers()[-1]
    base = attention.qkv
    rows = {target: qkv_rows(attention, encoder.qkv_layout)[target]}
    adapted = LoraLinear(base, rows, rank=2, alpha=2)
    nn.init.ones_(adapted.lora_b[target])
    with torch.no_grad():
        x = torch.randn(5, base.in_features)
        difference = adapted(x) - base(x)
    heads = attention.num_heads
    if spec.family == "vit":  # upstream: reshape(B, HW, 3, heads, -1), then q, k, v
        parts = difference.reshape(5, 3, -1).unbind(1)
    else:  # timm: view(B, N, heads, -1).split([key_dim, key_dim, val_dim])
        sizes = [attention.key_dim, attention.key_dim, attention.val_dim]
        parts = difference.view(5, heads, -1).split(sizes, dim=2)
    for name, part in zip("qkv", parts, strict=True):
        assert bool((part.abs() > 1e-6).all()) == (name == target)
        assert bool((part == 0).all()) == (name != target)


def test_update_is_scaled_by_alpha_over_rank() -> None:
    """Doubling alpha doubles the update; by default it is B A itself."""
    base = nn.Linear(6, 4)
    rows = {"o": torch.arange(4)}
    x = torch.randn(3, 6)
    single, double = LoraLinear(base, rows, rank=2, alpha=2), LoraLinear(base, rows, rank=2, alpha=4)
    for layer in (single, double):
        with torch.no_grad():
            layer.lora_a["o"].fill_(0.1)
            layer.lora_b["o"].fill_(0.3)
    plain = x @ (single.lora_b["o"] @ single.lora_a["o"]).T
    torch.testing.assert_close(single(x) - base(x), plain)
    torch.testing.assert_close(double(x) - base(x), 2 * plain)


def test_both_factors_receive_gradients_after_one_step() -> None:
    """At the start only B has a gradient, and once B moved A has one too."""
    layer = LoraLinear(nn.Linear(6, 6), {"o": torch.arange(6)}, rank=2, alpha=2)
    optimizer = torch.optim.SGD(layer.lora_b.parameters(), lr=0.1)
    x = torch.randn(4, 6)
    layer(x).square().sum().backward()
    assert float(layer.lora_a["o"].grad.abs().max()) == 0
    assert float(layer.lora_b["o"].grad.abs().min()) > 0
    optimizer.step()
    layer(x).square().sum().backward()
    assert float(layer.lora_a["o"].grad.abs().max()) > 0


@SPECS
def test_merging_keeps_the_output_and_can_be_repeated(spec: SamSpec) -> None:
    """A merged encoder gives the unmerged one's embeddings under upstream's keys; merging again changes nothing."""
    encoder = build_encoder(spec, image_size=112).eval().double()
    keys = set(encoder.state_dict())
    inject_lora(encoder, Lora(targets=("q", "v", "o"), rank=3, alpha=6))
    perturb(encoder, scale=0.02)
    with torch.no_grad():
        unadapted = {k: t for k, t in encoder.state_dict().items() if k in keys}
        unmerged = encoder(images(1).double())
        merge(encoder)
        merged = encoder(images(1).double())
    torch.testing.assert_close(merged, unmerged, rtol=0, atol=1e-10 * float(unmerged.abs().max()))
    assert set(encoder.state_dict()) == keys
    once = {key: tensor.clone() for key, tensor in encoder.state_dict().items()}
    assert any(not torch.equal(once[key], unadapted[key]) for key in keys)
    merge(encoder)
    assert all(torch.equal(tensor, once[key]) for key, tensor in encoder.state_dict().items())


@SPECS
def test_some_blocks_only(spec: SamSpec) -> None:
    """With a choice of blocks, only those are adapted."""
    encoder = build_encoder(spec, image_size=64)
    inject_lora(encoder, Lora(blocks=(-1, 2)))
    adapted = [isinstance(attention.qkv, LoraLinear) for attention in encoder.attention_layers()]
    assert adapted == [False, False, True]


@SPECS
def test_the_mlp_can_be_adapted(spec: SamSpec) -> None:
    """With targets in the MLP its two layers are replaced, 5 D r parameters each, and the attention is left alone."""
    encoder = build_encoder(spec, image_size=64)
    inject_lora(encoder, Lora(targets=("mlp1", "mlp2"), rank=3, alpha=1.5, blocks=(-1,)))
    dim = encoder.token_dims()[-1]
    layers = [m for m in encoder.attention_blocks()[-1].mlp.modules() if isinstance(m, LoraLinear)]
    assert [layer.scaling for layer in layers] == [0.5, 0.5]
    assert [sum(layer.get_parameter(n).numel() for n in layer.adapter_params()) for layer in layers] == [15 * dim] * 2
    assert sum(isinstance(m, LoraLinear) for m in encoder.modules()) == 2


@pytest.mark.parametrize("blocks", [(3,), (-4,), (0, 7)])
def test_unknown_blocks_are_refused(blocks: tuple[int, ...]) -> None:
    """Blocks that do not exist are an error that says which exist."""
    with pytest.raises(ConfigError, match="blocks") as caught:
        inject_lora(build_encoder(SMALL_VIT, image_size=64), Lora(blocks=blocks))
    assert caught.value.expected == "0 to 2, or -3 to -1 from the end"


@pytest.mark.parametrize("targets", [("q",), ("o",), ("mlp2",)])
def test_adapting_twice_is_refused(targets: tuple[str, ...]) -> None:
    """A layer that already carries LoRA is not wrapped again."""
    encoder = build_encoder(SMALL_VIT, image_size=64)
    inject_lora(encoder, Lora(targets=targets))
    with pytest.raises(ConfigError, match="plain linear"):
        inject_lora(encoder, Lora(targets=targets))


def test_lora_follows_the_protocols() -> None:
    """A LoRA layer is an adapter module that can be merged; a plain layer is neither."""
    layer = LoraLinear(nn.Linear(4, 4, bias=False), {"o": torch.arange(4)}, rank=1, alpha=1)
    assert isinstance(layer, AdapterModule)
    assert isinstance(layer, MergeableModule)
    assert not isinstance(nn.Linear(4, 4), AdapterModule)
    assert sorted(layer.adapter_params()) == ["lora_a.o", "lora_b.o"]
    assert layer.merged().bias is None


def test_float32_merge_is_exact_to_rounding() -> None:
    """In float32 the merged ViT differs from the unmerged one by rounding only."""
    encoder = build_encoder(SMALL_VIT, image_size=224).eval()
    inject_lora(encoder, Lora())
    _trained(encoder)
    with torch.no_grad():
        unmerged = encoder(images(1, size=224))
        merge(encoder)
        assert float((encoder(images(1, size=224)) - unmerged).abs().max()) < 1e-5 * float(unmerged.abs().max())
