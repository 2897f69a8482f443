"""Our TinyViT encoder is timm's with SAM's neck."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from samunet.artifacts.model_spec import get_spec
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
