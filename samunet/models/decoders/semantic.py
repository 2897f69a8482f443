"""Semantic masks without a prompt: every mask token is a class.

Shapes: B batch, E = 256 channels, H W embedding grid, T mask tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def predict_all_tokens(prompt_encoder: nn.Module, mask_decoder: nn.Module, embeddings: Tensor) -> Tensor:
    """Maps of all T mask tokens from the learned "no mask" embedding alone.

    The tokens keep a batch of 1 and meet the images by broadcasting inside the attention; with a larger token batch
    upstream's decoder would pair every image with every prompt.

    Args:
        prompt_encoder: segment-anything's PromptEncoder.
        mask_decoder: segment-anything's MaskDecoder; its own mask prediction gives all maps, its forward drops some.
        embeddings: (B, E, H, W).

    Returns:
        Logits (B, T, 4H, 4W).

    Source: Zhang & Liu, SAMed, 2023 (one mask token per class, default prompt embedding).
    """
    return estimate_all_tokens(prompt_encoder, mask_decoder, embeddings)[0]


def estimate_all_tokens(
    prompt_encoder: nn.Module, mask_decoder: nn.Module, embeddings: Tensor
) -> tuple[Tensor, Tensor]:
    """What :func:`predict_all_tokens` gives, and the decoder's estimate (B, T) of each map's IoU."""
    height, width = embeddings.shape[-2:]
    sparse, dense = prompt_encoder(points=None, boxes=None, masks=None)
    positions = dense_positions(prompt_encoder.pe_layer, height, width)  # type: ignore[arg-type]
    return decode_tokens(mask_decoder, embeddings + dense, positions, sparse.to(dense.dtype))


def decode_tokens(mask_decoder: Any, embeddings: Tensor, positions: Tensor, sparse: Tensor) -> tuple[Tensor, Tensor]:
    """The decoder's own mask prediction, with the prompts paired to the images one to one.

    Upstream repeats every image for every set of prompts and then adds the dense prompts, which it takes as paired
    already. So what it repeats is zero here, and the images go in as dense prompts.

    Args:
        mask_decoder: segment-anything's MaskDecoder.
        embeddings: (B, E, H, W), the dense prompt added.
        positions: (1, E, H, W).
        sparse: (1 or B, N, E) prompt tokens.

    Returns:
        Logits (B, T, 4H, 4W), or finer ones of a progressive upsampler, and estimated IoU (B, T).
    """
    masks, quality = mask_decoder.predict_masks(
        image_embeddings=embeddings.new_zeros(1, embeddings.shape[1], 1, 1),
        image_pe=positions,
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=embeddings,
    )
    return masks, quality


def dense_positions(pe_layer: nn.Module, height: int, width: int) -> Tensor:
    """SAM's random Fourier position of every grid cell.

    Computed outside autocast, since bfloat16 would round the phases; in the buffer's own precision, where upstream's
    is tied to float32.

    Args:
        pe_layer: segment-anything's PositionEmbeddingRandom.
        height: Grid rows H.
        width: Grid columns W.

    Returns:
        Positions (1, E, H, W).
    """
    matrix = pe_layer.positional_encoding_gaussian_matrix
    assert isinstance(matrix, Tensor)
    with torch.autocast(matrix.device.type, enabled=False):
        rows = (torch.arange(height, device=matrix.device, dtype=matrix.dtype) + 0.5) / height
        columns = (torch.arange(width, device=matrix.device, dtype=matrix.dtype) + 0.5) / width
        y, x = torch.meshgrid(rows, columns, indexing="ij")
        encoded: Tensor = pe_layer._pe_encoding(torch.stack([x, y], dim=-1))  # type: ignore[operator]
    return encoded.permute(2, 0, 1).unsqueeze(0)
