"""Any number of input channels into the encoder's three."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from samunet.core.errors import ConfigError

ENCODER_CHANNELS = 3


class ChannelProjection(nn.Module):
    """A learned 1x1 convolution to three channels.

    It starts as an average over neighbouring channels: the weights of each output sum to one, so that whatever all
    channels share passes unchanged, every channel counts, and the three outputs differ where the channels do.

    Args:
        num_channels: Channels of the images.
    """

    def __init__(self, num_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(num_channels, ENCODER_CHANNELS, kernel_size=1)
        average = functional.adaptive_avg_pool1d(torch.eye(num_channels)[None], ENCODER_CHANNELS)[0].T
        with torch.no_grad():
            self.conv.weight.copy_(average[:, :, None, None])
            self.conv.bias.zero_()  # type: ignore[union-attr]

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, S, S) to (B, 3, S, S)."""
        result: Tensor = self.conv(images)
        return result


def build_channel_input(channels: str, num_input_channels: int) -> nn.Module:
    """What stands between the images and the encoder.

    Args:
        channels: The plan's decision; for all but "projection" the loader supplies three channels.
        num_input_channels: Channels of the images given to the model.

    Raises:
        ConfigError: If images of that many channels would reach the encoder unprojected.
    """
    if channels == "projection":
        return ChannelProjection(num_input_channels)
    if num_input_channels != ENCODER_CHANNELS:
        raise ConfigError(
            f"the encoder takes {ENCODER_CHANNELS} channels",
            expected=f"{ENCODER_CHANNELS} channels from the loader, or channels = projection",
            found=f"{num_input_channels} with channels = {channels}",
        )
    return nn.Identity()
