"""LoRA with a rank of its own in every block."""

from __future__ import annotations

import pytest
import torch

from samunet.artifacts.method import EncoderMethod, Lora, Method
from samunet.core.errors import ConfigError
from samunet.models.peft.inject import inject_adapters
from samunet.models.peft.lora import LoraLinear
from samunet.models.peft.state import adapter_parameters
from samunet.planners.counts import encoder_adapter_parameters
from tests.unit.models.peft_helpers import SPECS, VIT, SamSpec, encoder_of


@SPECS
def test_every_block_has_its_rank_and_the_planner_counts_it(spec: SamSpec) -> None:
    """Factors have the block's rank, the output is the encoder's, and the formula gives the injected number."""
    encoder = encoder_of(spec)
    images = torch.randn(1, 3, 112, 112, dtype=torch.float64)
    ranks = tuple(range(1, len(encoder.token_dims()) + 1))
    choice = Lora(targets=("q", "v", "o"), rank=2, ranks=ranks)
    with torch.no_grad():
        before = encoder(images)
        inject_adapters(encoder, [choice])
        assert torch.equal(encoder(images), before)
    for layer, rank in zip(encoder.attention_layers(), ranks, strict=True):
        assert {factor.shape[0] for factor in layer.qkv.lora_a.values()} == {rank}
        assert layer.proj.lora_b["o"].shape[1] == rank
        assert layer.qkv.scaling == 1
    method = Method(encoder=EncoderMethod(train="adapters", adapters=(choice,)))
    names = set(adapter_parameters(encoder))
    counted = sum(p.numel() for name, p in encoder.named_parameters() if name in names)
    assert counted == encoder_adapter_parameters(method, spec)


def test_ranks_go_with_the_chosen_blocks() -> None:
    """Named blocks get the ranks in their order in the encoder; alpha is divided by each block's own."""
    encoder = encoder_of(VIT)
    inject_adapters(encoder, [Lora(blocks=(-1, 1), ranks=(3, 2), alpha=6.0)])
    found = {i: layer.qkv for i, layer in enumerate(encoder.attention_layers()) if isinstance(layer.qkv, LoraLinear)}
    assert {i: layer.lora_a["q"].shape[0] for i, layer in found.items()} == {1: 3, 3: 2}
    assert {i: layer.scaling for i, layer in found.items()} == {1: 2.0, 3: 3.0}


def test_another_number_of_ranks_is_refused() -> None:
    """Four blocks need four ranks, in the encoder and in the planner's count."""
    choice = Lora(ranks=(1, 2, 3))
    with pytest.raises(ConfigError, match="4 ranks"):
        inject_adapters(encoder_of(VIT), [choice])
    with pytest.raises(ConfigError, match="4 ranks"):
        encoder_adapter_parameters(Method(encoder=EncoderMethod(train="adapters", adapters=(choice,))), VIT)
