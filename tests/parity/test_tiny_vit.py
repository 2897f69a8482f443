"""Our TinyViT encoder is timm's with SAM's neck."""

from __future__ import annotations

import pytest
import timm
import timm.models.tiny_vit
import torch
from torch import nn

from samunet.artifacts.model_spec import get_spec
from samunet.models.peft.blocks import adapt_block
from samunet.models.sam.encoder import build_encoder


@pytest.mark.parametrize("size", [224, 256])
def test_features_are_timms_before_the_neck(size: int) -> None:
    """With the last merging at stride one, embeddings equal the neck on timm's features, in eval and train mode."""
    encoder = build_encoder(get_spec("vit_t"), image_size=size)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in encoder.state_dict().items():
            if tensor.is_floating_point():
                noise = torch.randn(tensor.shape, generator=generator) * 0.05
                tensor.add_(noise.abs() if name.endswith("running_var") else noise)
    reference = timm.create_model("tiny_vit_5m_224", pretrained=False, num_classes=0, drop_path_rate=0.0)
    reference.head = nn.Identity()
    own = {key: tensor for key, tensor in encoder.state_dict().items() if not key.startswith("neck.")}
    reference.load_state_dict(own, strict=True)
    reference.stages[3].downsample.conv2.conv.stride = (1, 1)
    pixels = torch.randn(2, 3, size, size, generator=generator)
    for training in (False, True):
        encoder.train(training)
        reference.train(training)
        with torch.no_grad():
            features = reference.forward_features(pixels)
            assert features.shape == (2, 320, size // 16, size // 16)
            assert torch.equal(encoder(pixels), encoder.neck(features))


@pytest.mark.parametrize(("size", "adapted"), [(64, False), (112, False), (112, True), (160, False)])
def test_attention_without_padding_is_timms(size: int, adapted: bool) -> None:
    """Where maps are smaller than windows, embeddings and all gradients equal timm's in float64, adapted blocks too."""
    encoder = build_encoder(get_spec("vit_t_xs"), image_size=size).double().train()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    spec = get_spec("vit_t_xs")
    reference = timm.models.tiny_vit.TinyVit(
        num_classes=0,
        embed_dims=spec.stage_dims,
        depths=spec.stage_depths,
        num_heads=spec.stage_heads,
        window_sizes=spec.stage_windows,
        drop_path_rate=0.0,
    ).double()
    del reference.head
    reference.stages[3].downsample.conv2.conv.stride = (1, 1)
    own = {key: tensor for key, tensor in encoder.state_dict().items() if not key.startswith("neck.")}
    reference.load_state_dict(own, strict=True)
    if adapted:
        for index in range(len(encoder.attention_blocks())):
            adapt_block(encoder, index)
    pixels = torch.randn(2, 3, size, size, generator=generator, dtype=torch.float64)
    features = reference.train().forward_features(pixels)
    weights = torch.randn(features.shape, generator=generator, dtype=torch.float64)
    (encoder.neck(features) * weights.mean(1, keepdim=True)).sum().backward()
    expected = {name: parameter.grad for name, parameter in reference.named_parameters()}
    embeddings = encoder(pixels)
    assert torch.allclose(embeddings, encoder.neck(features), rtol=1e-10, atol=1e-12)
    (embeddings * weights.mean(1, keepdim=True)).sum().backward()
    found = dict(encoder.named_parameters())
    assert set(expected) <= set(found)
    for name, gradient in expected.items():
        assert torch.allclose(found[name].grad, gradient, rtol=1e-8, atol=1e-10), name
