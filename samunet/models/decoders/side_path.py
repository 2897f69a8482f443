"""An upsampler that joins SAM's mask decoder with a light convolutional path of the image at strides 1 or 2 to 8.

Shapes: B images, S input side, E = 256 channels of the embedding, p stride of the path's first stage, w its channels
there, T maps.

Source: skips from convolutions of the image into the decoder of a transformer, as in UNETR (Hatamizadeh et al. 2022);
deep supervision as in nnU-Net (Isensee et al. 2021).
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pixel_unshuffle

from samunet.artifacts.method import DecoderMethod
from samunet.artifacts.model_spec import side_path_widths
from samunet.models.fusion import ConvPath, ConvStage, initialise

IMAGE_CHANNELS = 3
SUPERVISED_STAGES = (1, 2)


class SidePath(NamedTuple):
    """What the path is like.

    Args:
        stride: p, 1 or 2.
        width: Channels w of the first stage; twice as many at stride 2 after a stage at 1.
        convolutions: Per stage, on either way.
        deep_supervision: Whether train mode makes maps at the next two stages too, for losses of their own.
    """

    stride: int = 1
    width: int = 16
    convolutions: int = 1
    deep_supervision: bool = False

    @classmethod
    def of(cls, decoder: DecoderMethod) -> SidePath:
        """The path of a method."""
        return cls(decoder.path_stride, decoder.path_width, decoder.path_convolutions, decoder.deep_supervision)


class SidePathUpsampler(nn.Module):
    """SAM's two doublings, one or two more to the path's first stage, and at each what a convolutional path adds.

    A transformer of 16-pixel patches sees what is far apart and loses what is small; the path keeps what is small. The
    encoder's embedding stays what it is, and SAM's own layers keep their names, "0" to "4". A path that begins at
    stride 2 takes the four pixels of a square as channels, so that none is lost, at a third of the cost.

    Args:
        own: SAM's upsampler: two transposed convolutions, a norm and two activations.
        path: The path.
        num_maps: T, of the coarse maps.
    """

    def __init__(self, own: Iterable[nn.Module], path: SidePath, *, num_maps: int) -> None:
        super().__init__()
        for name, layer in enumerate(own):
            self.add_module(f"{name}", layer)
        self.stride, number = path.stride, path.convolutions
        widths = side_path_widths(path.stride, path.width)
        self.path = ConvPath(IMAGE_CHANNELS * self.stride**2, widths, number=number)
        self.joins = nn.ModuleList(ConvStage(2 * channels, channels, number=number) for channels in widths)
        self.doublings = nn.ModuleList(
            nn.ConvTranspose2d(after, before, kernel_size=2, stride=2) for before, after in pairwise(widths[:-1])
        )
        initialise(self.path, self.joins, self.doublings)
        self.coarse_heads = nn.ModuleDict(
            {f"{stage}": nn.Conv2d(widths[stage], num_maps, 1) for stage in SUPERVISED_STAGES if path.deep_supervision}
        )
        self.images: Tensor | None = None
        self._coarse: list[Tensor] = []

    def forward(self, embeddings: Tensor) -> Tensor:
        """Features at the stride of the path's first stage.

        Args:
            embeddings: (B, E, S/16, S/16), of the images that :attr:`images` (B, 3, S, S) holds.

        Returns:
            (B, w, S/p, S/p).
        """
        assert self.images is not None
        self._coarse = []
        skips = self.path(pixel_unshuffle(self.images, self.stride))
        doubled, norm, activation, doubled_again, last = (self.get_submodule(f"{i}") for i in range(5))
        further = len(self.doublings)
        features = self._join(further + 1, activation(norm(doubled(embeddings))), skips)
        features = self._join(further, last(doubled_again(features)), skips)
        for stage in reversed(range(further)):
            features = self._join(stage, last(self.doublings[stage](features)), skips)
        return features

    def take_coarse(self) -> tuple[Tensor, ...]:
        """Logits of the last pass, given away: (B, T, S/2p, S/2p) and (B, T, S/4p, S/4p); none in eval mode."""
        taken, self._coarse = tuple(reversed(self._coarse)), []
        return taken

    def _join(self, stage: int, features: Tensor, skips: list[Tensor]) -> Tensor:
        """The features plus what they and the path's give; a sum, as the norm would forget the slice's own mean."""
        added: Tensor = self.joins[stage](torch.cat([features, skips[stage].to(features.dtype)], dim=1))
        joined = features + added
        if self.training and f"{stage}" in self.coarse_heads:
            self._coarse.append(self.coarse_heads[f"{stage}"](joined))
        return joined
