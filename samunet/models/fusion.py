"""A convolutional U-Net that takes SAM's embedding in at its coarsest stage.

Shapes: B batch, C input channels, S input side, E = 256 channels of the embedding, T output maps.

Source: Li et al., nnSAM, 2023; the U-Net in the manner of nnU-Net (Isensee et al. 2021).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from samunet.artifacts.model_spec import MOST_UNET_CHANNELS, PROMPT_DIM

NUM_STAGES = 5
SLOPE = 0.01


def stage_widths(width: int) -> list[int]:
    """Channels of the stages at strides 1, 2, 4, 8 and 16."""
    return [min(MOST_UNET_CHANNELS, width * 2**stage) for stage in range(NUM_STAGES)]


class ConvStage(nn.Sequential):
    """3x3 convolutions, each with instance norm and leaky ReLU.

    Args:
        in_channels: Of the input.
        out_channels: Of the output.
        stride: Of the first convolution.
        number: Of convolutions.
    """

    def __init__(self, in_channels: int, out_channels: int, *, stride: int = 1, number: int = 2) -> None:
        layers: list[nn.Module] = []
        for channels, step in ((in_channels, stride), *[(out_channels, 1)] * (number - 1)):
            layers += [
                nn.Conv2d(channels, out_channels, 3, stride=step, padding=1),
                nn.InstanceNorm2d(out_channels, affine=True),
                nn.LeakyReLU(SLOPE, inplace=True),
            ]
        super().__init__(*layers)


class ConvPath(nn.Module):
    """The way down: features at strides 1, 2, 4 and so on.

    Args:
        in_channels: C.
        widths: Channels per stage.
        number: Of convolutions per stage.
    """

    def __init__(self, in_channels: int, widths: Sequence[int], *, number: int = 2) -> None:
        super().__init__()
        channels = [in_channels, *widths]
        self.stages = nn.ModuleList(
            ConvStage(before, after, stride=1 if index == 0 else 2, number=number)
            for index, (before, after) in enumerate(pairwise(channels))
        )

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, C, S, S) to one map per stage, finest first."""
        features: list[Tensor] = []
        for stage in self.stages:
            images = stage(images)
            features.append(images)
        return features


class UpPath(nn.Module):
    """The way up: transposed convolutions, each joined with the features of its stride.

    Args:
        coarsest: Channels that come in at stride 16.
        widths: Channels per stage, finest first.
        num_maps: T.
    """

    def __init__(self, coarsest: int, widths: Sequence[int], num_maps: int) -> None:
        super().__init__()
        rising = list(reversed(widths[:-1]))
        self.ups = nn.ModuleList(
            nn.ConvTranspose2d(before, after, 2, stride=2) for before, after in pairwise([coarsest, *rising])
        )
        self.stages = nn.ModuleList(ConvStage(2 * channels, channels) for channels in rising)
        self.head = nn.Conv2d(widths[0], num_maps, 1)

    def forward(self, coarse: Tensor, features: Sequence[Tensor]) -> Tensor:
        """Stride 16 and the finer features (finest first) to (B, T, S, S)."""
        for up, stage, skip in zip(self.ups, self.stages, reversed(features), strict=True):
            coarse = stage(torch.cat([up(coarse), skip], dim=1))
        result: Tensor = self.head(coarse)
        return result


class FusionUNet(nn.Module):
    """A U-Net whose coarsest features are joined with SAM's embedding of the same stride.

    nnSAM joins it at the fourth of nnU-Net's stages, whatever their stride, resizing it; here it meets the stage of its
    own resolution. Only the U-Net's own layers are initialised (He); nnSAM's code re-initialises part of the frozen
    encoder too.

    Args:
        in_channels: C.
        num_tokens: T.
        embedding_channels: E.
        width: Channels of the finest stage.
    """

    def __init__(
        self, in_channels: int, num_tokens: int, embedding_channels: int = PROMPT_DIM, width: int = 32
    ) -> None:
        super().__init__()
        widths = stage_widths(width)
        self.down = ConvPath(in_channels, widths)
        self.up = UpPath(widths[-1] + embedding_channels, widths, num_tokens)
        initialise(self)

    def forward(self, images: Tensor, embeddings: Tensor) -> Tensor:
        """Logits at the images' resolution.

        Args:
            images: (B, C, S, S), S a multiple of 16, at least 32 (a norm over one pixel cannot train).
            embeddings: (B, E, h, w); resized where h is not S / 16.

        Returns:
            (B, T, S, S).
        """
        *finer, coarse = self.down(images)
        if embeddings.shape[-2:] != coarse.shape[-2:]:
            embeddings = functional.interpolate(
                embeddings, size=coarse.shape[-2:], mode="bilinear", align_corners=False
            )
        result: Tensor = self.up(torch.cat([coarse, embeddings.to(coarse.dtype)], dim=1), finer)
        return result


def initialise(*modules: nn.Module) -> None:
    """He's initialisation for leaky ReLU."""
    for module in modules:
        for part in module.modules():
            if isinstance(part, nn.Conv2d | nn.ConvTranspose2d):
                nn.init.kaiming_normal_(part.weight, a=SLOPE)
                assert part.bias is not None
                nn.init.zeros_(part.bias)
