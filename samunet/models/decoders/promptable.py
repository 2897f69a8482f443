"""Masks of what prompts point at: one set of prompts per image.

Shapes: B images, N points, S input side, E = 256 channels, h = w = S / 16, T mask tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from samunet.models.decoders.semantic import decode_tokens, dense_positions

PADDING = -1


@dataclass(frozen=True, eq=False)
class PromptBatch:
    """Prompts of one kind for every image of a batch, in encoder pixels: x counts columns, y rows.

    Pixel centres are at whole numbers.

    Args:
        points: (B, N, 2) as (x, y), or None.
        point_labels: (B, N): 1 inside, 0 outside, -1 no point.
        boxes: (B, 4) as (x0, y0, x1, y1), or None.
        masks: (B, 1, S/4, S/4) logits of an earlier answer, or None.

    Raises:
        ValueError: If points come without labels, or there is nothing at all.
    """

    points: Tensor | None = None
    point_labels: Tensor | None = None
    boxes: Tensor | None = None
    masks: Tensor | None = None

    def __post_init__(self) -> None:
        if (self.points is None) != (self.point_labels is None):
            raise ValueError("points and their labels are given together or not at all")
        if not self._parts():
            raise ValueError("a batch of prompts holds points, boxes or masks")

    def __len__(self) -> int:
        """Number of images."""
        return len(next(part for part in self._parts().values()))

    def to(self, device: torch.device | str) -> PromptBatch:
        """The same on a device."""
        return PromptBatch(**{name: part.to(device) for name, part in self._parts().items()})

    def select(self, indices: Tensor) -> PromptBatch:
        """The prompts of some images."""
        return PromptBatch(**{name: part[indices] for name, part in self._parts().items()})

    def with_click(self, points: Tensor, labels: Tensor, masks: Tensor) -> PromptBatch:
        """One more click per image, and the answer it corrects.

        Args:
            points: (B, 2).
            labels: (B,), -1 where there is nothing to correct.
            masks: (B, 1, S/4, S/4) logits, detached unless the earlier round is to receive a gradient.
        """
        new, signs = points[:, None], labels[:, None]
        if self.points is not None and self.point_labels is not None:
            new = torch.cat([self.points, new.to(self.points)], dim=1)
            signs = torch.cat([self.point_labels, signs.to(self.point_labels)], dim=1)
        return replace(self, points=new, point_labels=signs, masks=masks)

    def _parts(self) -> dict[str, Tensor]:
        parts = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return {name: part for name, part in parts.items() if part is not None}


def predict_prompted(
    prompt_encoder: Any, mask_decoder: nn.Module, embeddings: Tensor, prompts: PromptBatch
) -> tuple[Tensor, Tensor]:
    """Masks of all T tokens, every image with its own prompts.

    Upstream's decoder pairs every image with every prompt; this gives what it gives image by image. Conditioned
    adapters of the decoder read the prompts meanwhile.

    Args:
        prompt_encoder: segment-anything's PromptEncoder.
        mask_decoder: segment-anything's MaskDecoder.
        embeddings: (B, E, h, w).
        prompts: For each of the B images.

    Returns:
        Logits (B, T, 4h, 4w) and estimated IoU (B, T).

    Source: Kirillov et al., Segment Anything, 2023.
    """
    sparse = embed_sparse(prompt_encoder, prompts)
    height, width = embeddings.shape[-2:]
    if prompts.masks is None:
        dense = prompt_encoder.no_mask_embed.weight.reshape(1, -1, 1, 1)
    else:
        dense = prompt_encoder.mask_downscaling(prompts.masks.to(sparse.dtype))
    positions = dense_positions(prompt_encoder.pe_layer, height, width)
    context = getattr(mask_decoder, "conditioning_context", None)
    if context is None:
        return decode_tokens(mask_decoder, embeddings + dense, positions, sparse)
    context.set_prompts(sparse)
    try:
        return decode_tokens(mask_decoder, embeddings + dense, positions, sparse)
    finally:
        context.set_prompts(None)


def embed_sparse(prompt_encoder: Any, prompts: PromptBatch) -> Tensor:
    """Tokens of points and boxes: (B, N + 1, E) for points, (B, 2, E) for boxes, both together where both are given.

    Positions are computed outside autocast in the buffer's own precision, since bfloat16 would round the phases.
    """
    tokens: list[Tensor] = []
    if prompts.points is not None and prompts.point_labels is not None:
        points, labels = prompts.points, prompts.point_labels
        if prompts.boxes is None:
            points = torch.cat([points, points.new_zeros(len(points), 1, 2)], dim=1)
            labels = torch.cat([labels, labels.new_full((len(labels), 1), PADDING)], dim=1)
        tokens.append(_embed_points(prompt_encoder, points, labels))
    if prompts.boxes is not None:
        corners = _encode(prompt_encoder, prompts.boxes.reshape(-1, 2, 2))
        kinds = torch.cat([prompt_encoder.point_embeddings[i].weight for i in (2, 3)])
        tokens.append(corners + kinds)
    if not tokens:
        matrix: Tensor = prompt_encoder.pe_layer.positional_encoding_gaussian_matrix
        return matrix.new_zeros(len(prompts), 0, 2 * matrix.shape[1])
    return torch.cat(tokens, dim=1)


def _embed_points(prompt_encoder: Any, points: Tensor, labels: Tensor) -> Tensor:
    encoded = _encode(prompt_encoder, points)
    kinds = torch.cat(
        [
            prompt_encoder.not_a_point_embed.weight,
            *(prompt_encoder.point_embeddings[i].weight for i in (0, 1)),
        ]
    )
    known = (labels != PADDING)[..., None]
    return torch.where(known, encoded, torch.zeros_like(encoded)) + kinds[labels.long() + 1]


def _encode(prompt_encoder: Any, pixels: Tensor) -> Tensor:
    """Random Fourier features of (B, N, 2) pixel positions (x, y), counted from the first pixel's centre."""
    layer = prompt_encoder.pe_layer
    matrix: Tensor = layer.positional_encoding_gaussian_matrix
    height, width = prompt_encoder.input_image_size
    with torch.autocast(matrix.device.type, enabled=False):
        scale = matrix.new_tensor([width, height])
        encoded: Tensor = layer._pe_encoding((pixels.to(matrix.dtype) + 0.5) / scale)
    return encoded
