"""Free functions over adapters: freeze, collect, refuse."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from samunet.artifacts.method import Lora
from samunet.artifacts.model_spec import SamSpec
from samunet.core.errors import ConfigError
from samunet.models.peft.lora import inject_lora
from samunet.models.peft.state import adapter_parameters, freeze_all_but, merge, trainable_state, validate
from samunet.models.sam.encoder import build_encoder
from tests.unit.models.model_helpers import SMALL_VIT, images, state_copy
from tests.unit.models.peft_helpers import EVERY_METHOD, SPECS, adapt, encoder_of, pretend_training


class _Bottleneck(nn.Module):
    """An adapter with a non-linearity, which no weight can absorb."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(2, 2)

    def adapter_params(self) -> list[str]:
        return ["up.weight", "up.bias"]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.relu(self.up(x))


def test_freezing_leaves_exactly_the_named_parameters() -> None:
    """Only the named parameters train afterwards, also those that were frozen before."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).requires_grad_(False)
    freeze_all_but(model, {"1.bias"})
    assert list(trainable_state(model)) == ["1.bias"]
    with pytest.raises(KeyError, match=r"2\.bias"):
        freeze_all_but(model, {"2.bias"})


def test_merging_a_nonlinear_adapter_is_refused_and_changes_nothing() -> None:
    """Merge names what it cannot merge and leaves the mergeable ones in place."""
    encoder = build_encoder(SMALL_VIT, image_size=64)
    inject_lora(encoder, Lora())
    encoder.extra = _Bottleneck()
    before = set(encoder.state_dict())
    with pytest.raises(ConfigError, match="cannot be merged") as caught:
        merge(encoder)
    assert caught.value.found == "extra (_Bottleneck)"
    assert set(encoder.state_dict()) == before


def test_adapter_parameters_are_found_at_any_depth() -> None:
    """Names are full, and the model itself may be an adapter."""
    assert set(adapter_parameters(_Bottleneck())) == {"up.weight", "up.bias"}
    assert set(adapter_parameters(nn.Sequential(_Bottleneck()))) == {"0.up.weight", "0.up.bias"}


def test_a_parameter_that_is_random_and_frozen_is_refused() -> None:
    """What neither trains nor came from a checkpoint is an error, unless no output depends on it."""
    model = nn.Sequential(nn.Linear(2, 2), _Bottleneck())
    freeze_all_but(model, {"1.up.weight", "1.up.bias", "0.bias"})
    validate(model, covered={"0.weight"})
    validate(model, covered=set(), unused={"0.weight"})
    with pytest.raises(ConfigError, match="1 parameters are frozen") as caught:
        validate(model, covered=set())
    assert caught.value.found == "0.weight"
    freeze_all_but(model, {"0.bias"})
    with pytest.raises(ConfigError):
        validate(model, covered={name for name, _ in model.named_parameters()})


@SPECS
@pytest.mark.parametrize("method", ["bottleneck", "high_frequency", "depth_attention", "depth_convolution"])
def test_what_is_not_linear_is_refused_by_name(spec: SamSpec, method: str) -> None:
    """Merging names the kind of adapter that has no exact merge, and changes nothing."""
    encoder = adapt(encoder_of(spec, size=64), method)
    inject_lora(encoder, Lora())
    before = set(encoder.state_dict())
    with pytest.raises(ConfigError, match="cannot be merged") as caught:
        merge(encoder)
    word = "bottleneck" if method == "bottleneck" else method.replace("_", " ")
    assert f"({word})" in str(caught.value.found)
    assert "(lora)" not in str(caught.value.found)
    assert set(encoder.state_dict()) == before


@SPECS
@EVERY_METHOD
def test_only_adapters_move_in_a_step(spec: SamSpec, method: str) -> None:
    """After optimizer steps with decay exactly the adapters differ: no base parameter, no running statistic."""
    encoder = adapt(encoder_of(spec, size=64, double=False), method, depth=2)
    pretend_training(encoder, scale=0.1)
    freeze_all_but(encoder, adapter_parameters(encoder))
    assert set(trainable_state(encoder)) == set(adapter_parameters(encoder))
    before = state_copy(encoder)
    optimizer = torch.optim.AdamW([p for p in encoder.parameters() if p.requires_grad], lr=0.01, weight_decay=0.1)
    for step in range(2):
        optimizer.zero_grad()
        encoder(images(2, size=64, seed=step)).square().mean().backward()
        optimizer.step()
    moved = {name for name, tensor in state_copy(encoder).items() if not torch.equal(tensor, before[name])}
    assert moved == set(adapter_parameters(encoder))


@SPECS
@EVERY_METHOD
def test_the_last_layers_learn_at_once_and_the_others_after_a_step(spec: SamSpec, method: str) -> None:
    """At the start exactly the layers that begin at zero have a gradient; after one step every adapter has one."""
    encoder = adapt(encoder_of(spec, size=64), method, depth=3)
    adapters = adapter_parameters(encoder)
    freeze_all_but(encoder, adapters)
    optimizer = torch.optim.SGD(adapters.values(), lr=1.0)
    pixels = images(3, size=64).double()
    target = torch.randn(3, 256, 4, 4, generator=torch.Generator().manual_seed(6)).double()
    (encoder(pixels) * target).mean().backward()
    last = ("lora_b.", "fact_v.", "up.weight", "up.bias")
    for name, parameter in adapters.items():
        largest = float(parameter.grad.abs().max())
        assert (largest > 0) == any(part in name for part in last), name
    optimizer.step()
    optimizer.zero_grad()
    (encoder(pixels) * target).mean().backward()
    assert [name for name, parameter in adapters.items() if not float(parameter.grad.abs().max())] == []


@SPECS
@pytest.mark.parametrize("method", ["everything", "ma_sam"])
def test_checkpointing_changes_neither_output_nor_gradients(spec: SamSpec, method: str) -> None:
    """Recomputing adapted blocks in the backward pass gives the same output and the same gradients."""
    encoder = adapt(encoder_of(spec, size=64), method, depth=2)
    pretend_training(encoder)
    freeze_all_but(encoder, adapter_parameters(encoder))
    results = []
    for checkpointing in (False, True):
        encoder.checkpointing = checkpointing
        encoder.zero_grad()
        output = encoder(images(2, size=64).double())
        output.square().mean().backward()
        results.append([output.detach(), *(p.grad.clone() for p in adapter_parameters(encoder).values())])
    for plain, recomputed in zip(*results, strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=1e-12, atol=1e-14)


@SPECS
def test_a_copy_shares_nothing(spec: SamSpec) -> None:
    """A deep copy of an encoder with everything in it, slab and shared factors too, is independent and equal."""
    encoder = adapt(encoder_of(spec, size=64), "ma_sam", depth=2)
    pretend_training(encoder)
    twin = copy.deepcopy(encoder)
    pixels = images(2, size=64).double()
    with torch.no_grad():
        before = encoder(pixels)
        assert torch.equal(twin(pixels), before)
        twin.slab.depth = 1
        for name, parameter in adapter_parameters(twin).items():
            if "fact_v" in name:
                parameter.zero_()
        assert torch.equal(encoder(pixels), before)
        assert not torch.equal(twin(pixels), before)
        encoder.load_state_dict(twin.state_dict())
        encoder.slab.depth = 1
        assert torch.equal(encoder(pixels), twin(pixels))


@SPECS
@pytest.mark.parametrize("method", ["everything", "ma_sam", "previous"])
def test_half_precision_training_stays_close(spec: SamSpec, method: str) -> None:
    """Under bf16 autocast an adapted encoder gives about the float32 output."""
    encoder = adapt(encoder_of(spec, size=64, double=False), method, depth=2)
    pretend_training(encoder, scale=0.1)
    with torch.no_grad():
        full = encoder(images(2, size=64))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            half = encoder(images(2, size=64))
    assert float((half.float() - full).abs().mean()) < 0.05 * float(full.abs().mean())
