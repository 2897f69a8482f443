"""Free functions over adapters: freeze, collect, refuse."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from samunet.core.errors import ConfigError
from samunet.models.peft.inject import inject
from samunet.models.peft.lora import LoraInjector
from samunet.models.peft.state import adapter_parameters, freeze_all_but, merge, trainable_state, validate
from samunet.models.sam.encoder import build_encoder
from tests.unit.models.model_helpers import SMALL_VIT


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
    inject(encoder, [LoraInjector()])
    encoder.extra = _Bottleneck()
    before = set(encoder.state_dict())
    with pytest.raises(ConfigError, match="cannot be merged") as caught:
        merge(encoder)
    assert caught.value.found == "extra"
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
