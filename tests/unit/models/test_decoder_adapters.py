"""What is put into the mask decoder: its size, its mathematics, and that it starts as nothing."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from samunet.artifacts.method import DecoderMethod
from samunet.core.errors import ConfigError
from samunet.models.decoders.adapters import DecoderBottleneck, DecoderContext, inject_decoder
from samunet.models.decoders.promptable import predict_prompted
from samunet.models.decoders.semantic import predict_all_tokens
from samunet.models.peft.lora import LoraLinear
from samunet.models.peft.state import adapter_parameters, merge
from tests.unit.models.decoder_helpers import (
    EVERY_METHOD,
    INJECTING,
    METHODS,
    embeddings,
    parts,
    pretend_training,
    prompts,
)

CONDITIONED = pytest.mark.parametrize("method", ["add", "concat", "hyper"])


@pytest.mark.parametrize("upsampler", ["sam", "progressive"])
@EVERY_METHOD
def test_every_method_starts_as_the_stock_decoder(method: str, upsampler: str) -> None:
    """Masks with and without a prompt are those of the decoder before anything was injected."""
    encoder, decoder = parts(upsampler=upsampler)
    asked, seen = prompts("box and points"), embeddings(3)
    with torch.no_grad():
        automatic, prompted = (
            predict_all_tokens(encoder, decoder, seen),
            predict_prompted(encoder, decoder, seen, asked),
        )
        inject_decoder(decoder, METHODS[method])
        assert torch.equal(predict_all_tokens(encoder, decoder, seen), automatic)
        for ours, stock in zip(predict_prompted(encoder, decoder, seen, asked), prompted, strict=True):
            assert torch.equal(ours, stock)


@pytest.mark.parametrize("method", INJECTING)
def test_every_new_parameter_has_a_say_after_a_step(method: str) -> None:
    """The last projection has a gradient at the start, and once it has moved every new parameter has one."""
    encoder, decoder = parts()
    inject_decoder(decoder, METHODS[method])
    new = adapter_parameters(decoder)

    def gradients() -> dict[str, Tensor]:
        masks, _ = predict_prompted(encoder, decoder, embeddings(3), prompts("box"))
        return dict(zip(new, torch.autograd.grad(masks.square().mean(), list(new.values())), strict=True))

    moving = {name for name, gradient in gradients().items() if gradient.abs().max() > 0}
    assert moving == {name for name in new if ".up." in name or ".lora_b." in name}
    pretend_training(decoder)
    assert all(gradient.abs().max() > 0 for gradient in gradients().values())


@pytest.mark.parametrize("method", INJECTING)
def test_automatic_batch_of_three_equals_three_of_one(method: str) -> None:
    """The one set of tokens that all images share meets each of them alone, whatever is in the decoder."""
    encoder, decoder = parts()
    inject_decoder(decoder, METHODS[method])
    pretend_training(decoder)
    seen = embeddings(3)
    with torch.no_grad():
        together = predict_all_tokens(encoder, decoder, seen)
        apart = torch.cat([predict_all_tokens(encoder, decoder, seen[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(together, apart, rtol=0, atol=1e-11)
    assert not torch.allclose(together[0], together[1])


@pytest.mark.parametrize("method", INJECTING)
def test_base_parameters_keep_their_keys_and_are_not_copied(method: str) -> None:
    """All that the stock decoder holds is there under its own key; what is new says so in its name."""
    _, decoder = parts()
    before = dict(decoder.named_parameters())
    inject_decoder(decoder, METHODS[method])
    after = dict(decoder.named_parameters())
    assert all(after[name] is parameter for name, parameter in before.items())
    assert set(after) - set(before) == set(adapter_parameters(decoder))
    assert set(decoder.state_dict()) == set(after)
    assert all(parameter.dtype == torch.float64 for parameter in after.values())


def test_low_rank_updates_are_on_q_and_v_of_every_attention() -> None:
    """Self-attention and both cross-attentions of both layers, and the last look at the image; never k."""
    _, decoder = parts()
    inject_decoder(decoder, METHODS["lora"])
    found = {name for name, module in decoder.named_modules() if isinstance(module, LoraLinear)}
    kinds = ("self_attn", "cross_attn_token_to_image", "cross_attn_image_to_token")
    attentions = [f"layers.{layer}.{kind}" for layer in (0, 1) for kind in kinds] + ["final_attn_token_to_image"]
    assert found == {f"transformer.{name}.{part}_proj" for name in attentions for part in "qv"}


def test_merged_low_rank_updates_are_the_stock_decoder() -> None:
    """After merging, the decoder has the stock modules and keys and gives the same masks."""
    encoder, decoder = parts()
    stock = copy.deepcopy(decoder)
    inject_decoder(decoder, METHODS["lora"])
    pretend_training(decoder)
    with torch.no_grad():
        adapted = predict_all_tokens(encoder, decoder, embeddings())
        assert not torch.allclose(adapted, predict_all_tokens(encoder, stock, embeddings()))
        merge(decoder)
        stock.load_state_dict(decoder.state_dict(), strict=True)
        torch.testing.assert_close(predict_all_tokens(encoder, stock, embeddings()), adapted, rtol=0, atol=1e-10)


def test_merging_bottlenecks_is_refused() -> None:
    """Bottlenecks are not linear; nothing of the decoder changes when merging is asked for."""
    _, decoder = parts()
    inject_decoder(decoder, METHODS["adapters"])
    keys = list(decoder.state_dict())
    with pytest.raises(ConfigError, match="not linear"):
        merge(decoder)
    assert list(decoder.state_dict()) == keys


@pytest.mark.parametrize("method", ["lora", "adapters"])
def test_a_second_method_is_refused(method: str) -> None:
    """A decoder is adapted once."""
    _, decoder = parts()
    inject_decoder(decoder, METHODS["lora"])
    with pytest.raises(ConfigError, match="already"):
        inject_decoder(decoder, METHODS[method])


def _with_bottlenecks(block: Any, queries: Tensor, keys: Tensor, places: tuple[Tensor, Tensor]) -> list[Tensor]:
    """A layer of the two-way transformer with its three bottlenecks, step by step."""
    query_pe, key_pe = places

    def bottleneck(x: Tensor, module: Any) -> Tensor:
        down, up = module.down, module.up
        change: Tensor = (x @ down.weight.T + down.bias).clamp(min=0) @ up.weight.T + up.bias
        return change

    def normed(x: Tensor, module: Any) -> Tensor:
        return functional.layer_norm(x, (256,), module.weight, module.bias, 1e-5)

    if block.skip_first_layer_pe:
        tokens = block.self_attn(q=queries, k=queries, v=queries)
    else:
        tokens = queries + block.self_attn(q=queries + query_pe, k=queries + query_pe, v=queries)
    tokens = normed(tokens, block.norm1)
    tokens = tokens + block.cross_attn_token_to_image(q=tokens + query_pe, k=keys + key_pe, v=keys)
    tokens = normed(tokens + bottleneck(tokens, block.norm2.adapter), block.norm2)
    wide = block.mlp.lin2(functional.relu(block.mlp.lin1(tokens)))
    tokens = normed(tokens + wide + 0.5 * bottleneck(tokens, block.mlp.adapter), block.norm3)
    image = keys + block.cross_attn_image_to_token(q=keys + key_pe, k=tokens + query_pe, v=tokens)
    return [tokens, normed(image + bottleneck(image, block.norm4.adapter), block.norm4)]


@pytest.mark.parametrize("index", [0, 1])
def test_bottlenecks_stand_where_the_paper_has_them(index: int) -> None:
    """One after the tokens look at the image, one beside the MLP at half weight, one on the image in the end."""
    _, decoder = parts()
    inject_decoder(decoder, METHODS["adapters"])
    pretend_training(decoder)
    layer = decoder.transformer.layers[index]
    queries, keys, query_pe, key_pe = torch.randn(4, 2, 6, 256, generator=torch.Generator().manual_seed(2)).double()
    with torch.no_grad():
        found = layer(queries=queries, keys=keys, query_pe=query_pe, key_pe=key_pe)
        expected = _with_bottlenecks(layer, queries, keys, (query_pe, key_pe))
    for ours, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-11)


def _conditioned(module: DecoderBottleneck, tokens: Tensor, prompt: Tensor, conditioning: str) -> Tensor:
    """One image's (N, 256) tokens and (256,) prompt embedding through a bottleneck, as the formulas say."""
    reduced = module.down(tokens)
    if conditioning == "add":
        inner = reduced + module.prompt(prompt)
    elif conditioning == "concat":
        left, right = module.mix.weight.chunk(2, dim=1)
        inner = reduced @ left.T + right @ module.prompt(prompt) + module.mix.bias
    else:
        matrix = (module.generator.weight @ prompt + module.generator.bias).reshape(module.hidden, module.hidden)
        mixed = torch.einsum("ni,ij->nj", reduced, matrix)
        centred = mixed - mixed.mean(1, keepdim=True)
        inner = centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt() * module.norm.weight + module.norm.bias
    result: Tensor = module.up(inner.relu())
    return result


@CONDITIONED
def test_conditioning_is_the_formula_of_each_image(method: str) -> None:
    """The prompt's embedding enters as its mean token, added, mixed in, or as the weights of a layer."""
    generator = torch.Generator().manual_seed(5)
    context = DecoderContext()
    module = DecoderBottleneck(16, conditioning=METHODS[method].conditioning, context=context).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        tokens, sparse = torch.randn(2, 3, 5, 256, generator=generator).double()
        context.set_prompts(sparse)
        found = module(tokens)
        for image in range(3):
            expected = _conditioned(module, tokens[image], sparse[image].mean(0), method)
            torch.testing.assert_close(found[image], expected, rtol=0, atol=1e-10)


@CONDITIONED
def test_prompts_reach_the_adapters_and_are_forgotten(method: str) -> None:
    """Prompts condition the adapters while masks are made, and nothing of them is left afterwards."""
    encoder, decoder = parts()
    inject_decoder(decoder, METHODS[method])
    pretend_training(decoder)
    asked, seen = prompts("box"), embeddings()
    with torch.no_grad():
        automatic = predict_all_tokens(encoder, decoder, seen)
        prompted, _ = predict_prompted(encoder, decoder, seen, asked)
        assert torch.equal(predict_all_tokens(encoder, decoder, seen), automatic)
        context = decoder.conditioning_context
        context.set_prompts = lambda _: None
        unconditioned, _ = predict_prompted(encoder, decoder, seen, asked)
    assert not torch.allclose(prompted, unconditioned)


@CONDITIONED
def test_a_deep_copy_reads_its_own_prompts(method: str) -> None:
    """A copied decoder, as an average of weights is, gives the same masks and shares no prompts with the original."""
    encoder, decoder = parts()
    inject_decoder(decoder, METHODS[method])
    pretend_training(decoder)
    masks, _ = predict_prompted(encoder, decoder, embeddings(), prompts("box"))
    twin = copy.deepcopy(decoder)
    assert twin.conditioning_context is not decoder.conditioning_context
    assert torch.equal(predict_prompted(encoder, twin, embeddings(), prompts("box"))[0], masks)
    assert not any("context" in name for name in [*dict(decoder.named_modules()), *decoder.state_dict()])


def test_the_ratio_and_the_rank_are_the_methods() -> None:
    """The sizes of what is injected follow the method's own figures."""
    _, decoder = parts()
    inject_decoder(decoder, DecoderMethod(train="adapters", ratio=0.125))
    assert decoder.transformer.layers[1].norm4.adapter.down.out_features == 32
    _, decoder = parts()
    inject_decoder(decoder, DecoderMethod(train="lora", rank=7))
    assert sum(p.numel() for p in adapter_parameters(decoder).values()) == 5_888 * 7
