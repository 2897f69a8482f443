"""Both families of encoders: sizes, exact parameter counts, initialisation and checkpointing."""

from __future__ import annotations

import pytest
import torch

from samunet.artifacts.model_spec import SamSpec, get_spec
from samunet.core.errors import ConfigError
from samunet.models.sam.encoder import TinyVitEncoder, VitEncoder, build_encoder
from tests.unit.models.model_helpers import SMALL_TINY, SMALL_VIT, images, perturb, state_copy


def _count(encoder: torch.nn.Module) -> int:
    return sum(p.numel() for p in encoder.parameters())


@pytest.mark.parametrize(
    ("name", "count"), [("vit_b", 89_670_912), ("vit_l", 308_278_272), ("vit_h", 637_026_048), ("vit_t", 5_743_892)]
)
def test_published_encoders_have_their_exact_number_of_parameters(name: str, count: int) -> None:
    """The encoders at 1024 hold the published numbers of parameters."""
    with torch.device("meta"):
        spec = get_spec(name)
        encoder = TinyVitEncoder(spec) if spec.family == "tiny_vit" else VitEncoder(spec, image_size=1024)
    assert _count(encoder) == count


@pytest.mark.parametrize("spec", [SMALL_VIT, SMALL_TINY], ids=lambda s: s.family)
@pytest.mark.parametrize("size", [64, 112, 224, 240])
def test_embeddings_are_a_sixteenth_of_any_input_size(spec: SamSpec, size: int) -> None:
    """Any multiple of 16 gives 256 channels on a grid of a sixteenth, finite and different for different images."""
    encoder = build_encoder(spec, image_size=size).eval()
    with torch.no_grad():
        first, second = encoder(images(1, size=size)), encoder(images(1, size=size, seed=1))
    assert first.shape == (1, 256, size // 16, size // 16)
    assert torch.isfinite(first).all()
    assert not torch.allclose(first, second)


@pytest.mark.parametrize("size", [0, -16, 100])
def test_other_input_sizes_are_refused(size: int) -> None:
    """A size that is not a positive multiple of 16 is an error that says so."""
    with pytest.raises(ConfigError, match="input size") as caught:
        build_encoder(SMALL_VIT, image_size=size)
    assert caught.value.found == str(size)


def test_tiny_vit_has_no_dead_head_and_no_stochastic_depth() -> None:
    """The classification head is gone, and by default nothing is dropped in train mode."""
    encoder = build_encoder(SMALL_TINY, image_size=64)
    assert not any(name.startswith("head") for name, _ in encoder.named_parameters())
    assert not any(type(module).__name__ == "DropPath" for module in encoder.modules())
    dropping = TinyVitEncoder(SMALL_TINY, drop_path_rate=0.5)
    assert any(type(module).__name__ == "DropPath" for module in dropping.modules())


def test_random_vit_has_positions_and_small_linear_weights() -> None:
    """Positions are drawn, not zero; linear weights are bounded by two standard deviations of 0.02."""
    encoder = build_encoder(SMALL_VIT, image_size=224)
    assert 0.01 < float(encoder.pos_embed.detach().std()) < 0.025
    weights = encoder.blocks[0].attn.qkv.weight.detach()
    assert 0.01 < float(weights.std()) < 0.025
    assert float(weights.abs().max()) <= 0.04


def test_tiny_vit_in_eval_follows_changed_position_biases() -> None:
    """Changing the position biases in place changes an eval forward, although timm caches them."""
    encoder = build_encoder(SMALL_TINY, image_size=112).eval()
    with torch.no_grad():
        before = encoder(images(1))
        for attention in encoder.attention_layers():
            biases = attention.get_parameter("attention_biases")
            biases.add_(torch.linspace(-1, 1, biases.shape[1]))
        after = encoder(images(1))
        fresh = build_encoder(SMALL_TINY, image_size=112).eval()
        fresh.load_state_dict(encoder.state_dict())
        assert torch.equal(fresh(images(1)), after)
    assert not torch.allclose(before, after)


@pytest.mark.parametrize("spec", [SMALL_VIT, SMALL_TINY], ids=lambda s: s.family)
def test_checkpointing_changes_neither_gradients_nor_buffers(spec: SamSpec) -> None:
    """In train mode, gradients, input gradient and batch-norm buffers are bit-identical with and without it."""
    results = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        encoder = build_encoder(spec, image_size=112).train()
        perturb(encoder)
        encoder.checkpointing = checkpointing
        pixels = images(2).requires_grad_()
        encoder(pixels).square().sum().backward()
        gradients = {name: p.grad for name, p in encoder.named_parameters()}
        results.append((gradients | {"input": pixels.grad}, state_copy(encoder)))
    (plain, plain_state), (checkpointed, checkpointed_state) = results
    for name, gradient in plain.items():
        assert torch.equal(gradient, checkpointed[name]), name
        assert gradient is not None, name
    for name, tensor in plain_state.items():
        assert torch.equal(tensor, checkpointed_state[name]), name


def test_checkpointing_saves_activations() -> None:
    """With checkpointing a ViT keeps less than a third of the bytes for the backward pass."""
    saved = []
    for checkpointing in (False, True):
        encoder = build_encoder(get_spec("vit_xs"), image_size=224)
        encoder.checkpointing = checkpointing
        kept: dict[int, int] = {}

        def pack(tensor: torch.Tensor, kept: dict[int, int] = kept) -> torch.Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = encoder(images(1, size=224))
        parameters = {p.untyped_storage().data_ptr() for p in encoder.parameters()}
        saved.append(sum(size for pointer, size in kept.items() if pointer not in parameters))
        assert output.requires_grad
    assert saved[1] < saved[0] / 3


def test_checkpointing_of_a_vit_with_trained_adapters_behind_a_frozen_stem_gives_gradients() -> None:
    """With a frozen stem, as under adapters, the blocks' own parameters still receive gradients."""
    encoder = build_encoder(SMALL_VIT, image_size=64)
    encoder.requires_grad_(False)
    encoder.checkpointing = True
    proj = encoder.blocks[0].attn.proj.weight.requires_grad_()
    encoder(images(1, size=64)).square().sum().backward()
    assert proj.grad is not None
    assert float(proj.grad.abs().sum()) > 0
