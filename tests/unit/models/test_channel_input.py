"""Channels into the encoder's three."""

from __future__ import annotations

import pytest
import torch

from samunet.core.errors import ConfigError
from samunet.models.channels import ChannelProjection, build_channel_input


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 7])
def test_what_all_channels_share_passes_unchanged(channels: int) -> None:
    """If all channels hold the same image, each of the three outputs is that image."""
    image = torch.randn(1, 1, 5, 5)
    projected = ChannelProjection(channels)(image.expand(1, channels, 5, 5))
    torch.testing.assert_close(projected, image.expand(1, 3, 5, 5))


@pytest.mark.parametrize("channels", [2, 4, 7])
def test_every_channel_reaches_the_encoder_and_outputs_differ(channels: int) -> None:
    """No channel has only zero weights, and no two outputs start equal."""
    weight = ChannelProjection(channels).conv.weight[:, :, 0, 0]
    assert bool((weight.abs().sum(0) > 0).all())
    assert not torch.allclose(weight[0], weight[1])
    assert not torch.allclose(weight[1], weight[2])


def test_three_channels_start_unchanged() -> None:
    """With three channels the projection starts as the identity."""
    image = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(ChannelProjection(3)(image), image)


@pytest.mark.parametrize("channels", ["neighbours", "repeat", "direct"])
def test_without_projection_the_loader_supplies_three(channels: str) -> None:
    """Three channels pass as they are; another number is an error that names both ways out."""
    image = torch.randn(1, 3, 4, 4)
    assert torch.equal(build_channel_input(channels, 3)(image), image)
    with pytest.raises(ConfigError, match="3 channels") as caught:
        build_channel_input(channels, 2)
    assert "projection" in str(caught.value.expected)
