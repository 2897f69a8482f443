"""An upsampler that joins SAM's mask decoder with a light convolutional path of the image at strides 1 to 8.

Shapes: B images, S input side, E = 256 channels of the embedding, w channels of the path at stride 1.

Source: skips from convolutions of the image into the decoder of a transformer, as in UNETR (Hatamizadeh et al. 2022).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from samunet.models.fusion import ConvPath, ConvStage, initialise

IMAGE_CHANNELS = 3


class SidePathUpsampler(nn.Module):
    """SAM's two doublings, two more to the input's own resolution, and at each what a convolutional path adds.

    A transformer of 16-pixel patches sees what is far apart and loses what is small; the path keeps what is small. The
    encoder's embedding stays what it is, and SAM's own layers keep their names, "0" to "4".

    Args:
        own: SAM's upsampler: two transposed convolutions, a norm and two activations.
        width: Channels w at stride 1; twice as many at stride 2.
        convolutions: Per stage, on either way.
    """

    def __init__(self, own: Iterable[nn.Module], *, width: int, convolutions: int) -> None:
        super().__init__()
        for name, layer in enumerate(own):
            self.add_module(f"{name}", layer)
        coarse, fine = self.get_submodule("0"), self.get_submodule("3")
        assert isinstance(coarse, nn.ConvTranspose2d)
        assert isinstance(fine, nn.ConvTranspose2d)
        widths = [width, 2 * width, fine.out_channels, coarse.out_channels]
        self.path = ConvPath(IMAGE_CHANNELS, widths, number=convolutions)
        self.joins = nn.ModuleList(ConvStage(2 * channels, channels, number=convolutions) for channels in widths)
        self.doublings = nn.ModuleList(
            nn.ConvTranspose2d(widths[stage + 1], widths[stage], kernel_size=2, stride=2) for stage in (0, 1)
        )
        initialise(self.path, self.joins, self.doublings)
        self.images: Tensor | None = None

    def forward(self, embeddings: Tensor) -> Tensor:
        """Features at the input's own resolution.

        Args:
            embeddings: (B, E, S/16, S/16), of the images that :attr:`images` (B, 3, S, S) holds.

        Returns:
            (B, w, S, S).
        """
        assert self.images is not None
        skips = self.path(self.images)
        doubled, norm, activation, doubled_again, last = (self.get_submodule(f"{i}") for i in range(5))
        features = self._join(3, activation(norm(doubled(embeddings))), skips)
        features = self._join(2, last(doubled_again(features)), skips)
        for stage in (1, 0):
            features = self._join(stage, last(self.doublings[stage](features)), skips)
        return features

    def _join(self, stage: int, features: Tensor, skips: list[Tensor]) -> Tensor:
        """The features plus what they and the path's give; a sum, as the norm would forget the slice's own mean."""
        added: Tensor = self.joins[stage](torch.cat([features, skips[stage].to(features.dtype)], dim=1))
        return features + added
