"""Exact sizes of the mask decoder: all, injected, trained; and what a progressive one shares with SAM's."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from torch import nn

from samunet.artifacts.method import DecoderMethod
from samunet.models.decoders.adapters import decoder_parameters_to_train, inject_decoder
from samunet.models.decoders.semantic import predict_all_tokens
from samunet.models.peft.state import adapter_parameters
from samunet.models.sam.network import CLASS_SPECIFIC, build_mask_decoder, fresh_keys
from tests.unit.models.decoder_helpers import EVERY_METHOD, GRID, METHODS, embeddings, parts

TRANSFORMER, UPSCALER, TOKEN, HYPERNETWORK = 3_291_264, 73_952, 256, 139_808
LORA_RANK_4, BOTTLENECKS = 23_552, 198_528


def _quality_head(num_tokens: int) -> int:
    return 131_584 + 257 * num_tokens


def _heads(num_tokens: int) -> int:
    """Tokens, their networks, the upscaler and the head that estimates the quality."""
    return (num_tokens + 1) * TOKEN + num_tokens * HYPERNETWORK + UPSCALER + _quality_head(num_tokens)


def _decoder(num_tokens: int, method: DecoderMethod | None = None, upsampler: Any = "sam") -> Any:
    with torch.device("meta"):
        decoder = build_mask_decoder(num_tokens, upsampler)
        if method is not None:
            inject_decoder(decoder, method)
    return decoder


def _size(decoder: nn.Module, names: set[str]) -> int:
    return sum(parameter.numel() for name, parameter in decoder.named_parameters() if name in names)


@pytest.mark.parametrize(
    ("method", "injected"),
    [
        ("lora", LORA_RANK_4),
        ("adapters", BOTTLENECKS),
        ("add", BOTTLENECKS + 2 * (257 * 64)),
        ("concat", BOTTLENECKS + 2 * (257 * 64 + 129 * 64)),
        ("hyper", 6 * (2 * 256 * 16 + 16 + 256) + 2 * (257 * 16**2 + 2 * 16)),
    ],
)
def test_injected_parameters(method: str, injected: int) -> None:
    """Low-rank updates hold 5,888 parameters per rank, three bottlenecks of 64 in both layers 198,528."""
    decoder = _decoder(4, METHODS[method])
    assert sum(p.numel() for p in adapter_parameters(decoder).values()) == injected
    assert sum(p.numel() for p in decoder.parameters()) == 3_497_056 + 4 * 140_321 + injected


@pytest.mark.parametrize(("num_tokens", "class_specific"), [(2, 412_482), (3, 552_803), (9, 1_394_729)])
def test_class_specific_parts_have_the_published_size(num_tokens: int, class_specific: int) -> None:
    """What no checkpoint of SAM supplies, and with the upscaler what trains as heads."""
    decoder = _decoder(num_tokens)
    renewed = tuple(prefix.removeprefix("mask_decoder.") for prefix in CLASS_SPECIFIC)
    assert _size(decoder, {n for n, _ in decoder.named_parameters() if n.startswith(renewed)}) == class_specific
    trained = decoder_parameters_to_train(decoder, METHODS["heads"], promptable=True)
    assert _size(decoder, trained) == class_specific + UPSCALER == _heads(num_tokens)


@pytest.mark.parametrize("num_tokens", [2, 4, 9])
@pytest.mark.parametrize("promptable", [False, True])
@EVERY_METHOD
def test_trained_parameters(method: str, num_tokens: int, *, promptable: bool) -> None:
    """Heads train unless nothing does, the transformer under "full" only, the quality head where prompts use it."""
    decoder = _decoder(num_tokens, METHODS[method])
    heads = _heads(num_tokens) - (0 if promptable else _quality_head(num_tokens))
    injected = sum(p.numel() for p in adapter_parameters(decoder).values())
    expected = {"none": 0, "full": TRANSFORMER + heads}.get(method, heads + injected)
    trained = decoder_parameters_to_train(decoder, METHODS[method], promptable=promptable)
    assert _size(decoder, trained) == expected
    assert trained <= {name for name, _ in decoder.named_parameters()}


def test_the_published_totals_of_samed() -> None:
    """With eight organs the small variant of SAMed trains 1,645,909 parameters and SAMed 4,913,621."""
    encoder, prompt_encoder = 147_456, 6_220
    small, whole = _decoder(9, METHODS["lora"]), _decoder(9)
    for decoder, method, total in ((small, "lora", 1_645_909), (whole, "full", 4_913_621)):
        trained = decoder_parameters_to_train(decoder, METHODS[method], promptable=True)
        assert encoder + prompt_encoder + _size(decoder, trained) == total


def test_totals_of_encoder_and_decoder_tuning_for_one_class() -> None:
    """LoRA or bottlenecks in both parts and LoRA with a whole decoder, for ViT-B and two tokens."""
    lora, whole = _decoder(2, METHODS["lora"]), _decoder(2)
    trained = decoder_parameters_to_train(lora, METHODS["lora"], promptable=True)
    assert 147_456 + _size(lora, trained) == 657_442
    trained = decoder_parameters_to_train(whole, METHODS["full"], promptable=True)
    assert 147_456 + _size(whole, trained) == 3_925_154


def test_all_but_what_trains_is_the_transformer() -> None:
    """With low-rank updates exactly the transformer's own parameters stay, and of them all."""
    decoder = _decoder(4, METHODS["lora"])
    trained = decoder_parameters_to_train(decoder, METHODS["lora"], promptable=True)
    fixed = {name for name, _ in decoder.named_parameters()} - trained
    assert fixed == {f"transformer.{name}" for name, _ in _decoder(4).transformer.named_parameters()}


def test_progressive_decoder_has_the_published_size() -> None:
    """With the thirteen tokens of twelve organs and background the progressive decoder holds 5,243,725 parameters."""
    assert sum(p.numel() for p in _decoder(13, upsampler="progressive").parameters()) == 5_243_725


def test_progressive_upsampler_is_four_doublings() -> None:
    """Each deconvolution doubles the grid; norms follow the first three, an activation follows all four."""
    steps = list(_decoder(2, upsampler="progressive").output_upscaling)
    kinds = [type(step).__name__ for step in steps]
    assert kinds == ["ConvTranspose2d", "LayerNorm2d", "GELU"] * 3 + ["ConvTranspose2d", "GELU"]
    deconvolutions = [step for step in steps if isinstance(step, nn.ConvTranspose2d)]
    assert [d.in_channels for d in deconvolutions] == [256, 64, 32, 16]
    assert [d.out_channels for d in deconvolutions] == [64, 32, 16, 8]
    assert {(d.kernel_size, d.stride, d.padding) for d in deconvolutions} == {((2, 2), (2, 2), (0, 0))}


@pytest.mark.parametrize(("upsampler", "factor"), [("sam", 4), ("progressive", 16)])
def test_logits_are_finer_than_the_embedding(upsampler: Literal["sam", "progressive"], factor: int) -> None:
    """SAM's upsampler gives four cells per cell of the embedding, the progressive one sixteen, along each axis."""
    encoder, decoder = parts(3, upsampler=upsampler)
    with torch.no_grad():
        assert predict_all_tokens(encoder, decoder, embeddings(2)).shape == (2, 3, factor * GRID, factor * GRID)


def test_fresh_keys_are_exactly_what_sam_cannot_supply() -> None:
    """Beside the class-specific parts, a progressive decoder of four tokens differs from SAM's in these keys only."""
    stock = {f"mask_decoder.{key}": tensor.shape for key, tensor in _decoder(4).state_dict().items()}
    decoder = _decoder(4, upsampler="progressive")
    ours = {f"mask_decoder.{key}": tensor.shape for key, tensor in decoder.state_dict().items()}
    differing = {key for key, shape in ours.items() if stock.get(key) != shape}
    assert {key for key in differing if not key.startswith(CLASS_SPECIFIC)} == {
        key for key in ours if key.startswith(fresh_keys(decoder))
    }
    shared = {f"mask_decoder.output_upscaling.{i}.{kind}" for i in (0, 1, 3) for kind in ("weight", "bias")}
    assert shared <= set(ours) - differing
    assert set(stock) <= set(ours)
    assert fresh_keys(_decoder(4)) == ()
