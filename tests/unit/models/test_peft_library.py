"""Variants of LoRA from the optional peft library, and what is said where it is not installed."""

from __future__ import annotations

import importlib.util
import sys

import pytest
import torch
from torch import nn

from samunet.artifacts.method import EncoderMethod, Lora, Method, PeftLibrary
from samunet.artifacts.model_spec import SamSpec
from samunet.core.errors import ConfigError, UsageError
from samunet.models.peft.inject import inject_adapters
from samunet.models.peft.lora import inject_lora
from samunet.models.peft.state import adapter_parameters, freeze_all_but, merge, validate
from samunet.planners.counts import encoder_adapter_parameters
from tests.unit.models.model_helpers import images
from tests.unit.models.peft_helpers import SPECS, VIT, count, encoder_of, inject_some, pretend_training

EVERY_LAYER = ("qkv", "o", "mlp1", "mlp2")
VARIANTS = pytest.mark.parametrize("variant", ["lora", "dora", "rslora"])


needs_library = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="the peft library is not installed")


def test_a_missing_library_is_named_with_the_line_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the library the error says how to install it, and the encoder is as it was."""
    monkeypatch.setitem(sys.modules, "peft", None)
    encoder = encoder_of(VIT)
    before = set(encoder.state_dict())
    with pytest.raises(UsageError, match="peft library") as caught:
        inject_adapters(encoder, [PeftLibrary()])
    assert "pip install samunet[peft]" in str(caught.value.todo)
    assert set(encoder.state_dict()) == before


def test_wrappers_are_known_by_where_their_class_is_defined() -> None:
    """Parameters that a wrapper added are adapters; those of the layer inside are not."""

    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base_layer = nn.Linear(4, 4)
            self.lora_A = nn.ModuleDict({"default": nn.Linear(4, 2, bias=False)})

    model = nn.Sequential(Wrapper())
    assert adapter_parameters(model) == {}
    Wrapper.__module__ = "peft.tuners.lora.layer"
    assert list(adapter_parameters(model)) == ["0.lora_A.default.weight"]


@needs_library
@SPECS
@VARIANTS
def test_library_starts_as_the_identity(spec: SamSpec, variant: str) -> None:
    """Freshly wrapped layers leave the embeddings as they are, and the planner's count is right."""
    encoder = encoder_of(spec)
    pixels = images(2).double()
    choice = PeftLibrary(variant=variant, targets=EVERY_LAYER, rank=3, blocks=(0, -1))
    with torch.no_grad():
        before = encoder(pixels)
        inject_some(encoder, [choice])
        torch.testing.assert_close(encoder(pixels), before, rtol=0, atol=1e-10 * float(before.abs().max()))
    method = Method(encoder=EncoderMethod(train="adapters", adapters=(choice,)))
    assert count(encoder) == encoder_adapter_parameters(method, spec) > 0


@needs_library
@SPECS
@VARIANTS
def test_library_layers_are_trained_and_merged(spec: SamSpec, variant: str) -> None:
    """Its parameters are found, train, and merge into upstream's keys with the same embeddings."""
    encoder = encoder_of(spec)
    keys = set(encoder.state_dict())
    pixels = images(1).double()
    inject_some(encoder, [PeftLibrary(variant=variant, targets=EVERY_LAYER, rank=3, alpha=2.0)])
    names = set(adapter_parameters(encoder))
    freeze_all_but(encoder, names)
    validate(encoder, covered=set(dict(encoder.named_parameters())) - names)
    start = encoder(pixels)
    start.square().mean().backward()
    assert any(float(p.grad.abs().max()) > 0 for p in adapter_parameters(encoder).values())
    with torch.no_grad():
        for parameter in adapter_parameters(encoder).values():
            parameter.add_(0.1 * torch.randn(parameter.shape).double())
        trained = encoder(pixels)
        merge(encoder)
        merged = encoder(pixels)
    assert float((trained - start).abs().max()) > 1e-3
    torch.testing.assert_close(merged, trained, rtol=0, atol=1e-9 * float(trained.abs().max()))
    assert set(encoder.state_dict()) == keys
    assert not adapter_parameters(encoder)


@needs_library
@SPECS
def test_our_lora_is_the_librarys(spec: SamSpec) -> None:
    """With the same factors on the attention's output both give the same embeddings."""
    ours, theirs = encoder_of(spec), encoder_of(spec)
    inject_lora(ours, Lora(targets=("o",), rank=3, alpha=5.0))
    inject_some(theirs, [PeftLibrary(variant="lora", targets=("o",), rank=3, alpha=5.0)])
    pretend_training(ours)
    with torch.no_grad():
        plain = encoder_of(spec)(images(1).double())
        for mine, other in zip(ours.attention_layers(), theirs.attention_layers(), strict=True):
            other.proj.lora_A["default"].weight.copy_(mine.proj.lora_a["o"])
            other.proj.lora_B["default"].weight.copy_(mine.proj.lora_b["o"])
        found, expected = ours(images(1).double()), theirs(images(1).double())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11 * float(expected.abs().max()))
    assert float((found - plain).abs().max()) > 1e-3


@needs_library
def test_library_and_lora_do_not_meet_in_one_layer() -> None:
    """A layer that carries one kind of low-rank update is not wrapped by the other."""
    encoder = inject_some(encoder_of(VIT), [Lora()])
    with pytest.raises(ConfigError, match="plain linear"):
        inject_adapters(encoder, [PeftLibrary()])
    encoder = inject_some(encoder_of(VIT), [PeftLibrary()])
    with pytest.raises(ConfigError, match="plain linear"):
        inject_adapters(encoder, [Lora()])
