"""Mask decoders with every method, and prompts of every kind, for the tests of samunet.models.decoders."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from samunet.artifacts.method import DecoderMethod
from samunet.models.decoders.promptable import PromptBatch
from samunet.models.peft.state import adapter_parameters
from samunet.models.sam.imports import modeling
from samunet.models.sam.network import build_mask_decoder
from tests.unit.models.model_helpers import perturb

SIZE, GRID, BATCH = 128, 8, 3

METHODS: dict[str, DecoderMethod] = {
    "full": DecoderMethod(train="full"),
    "heads": DecoderMethod(train="heads"),
    "none": DecoderMethod(train="none"),
    "lora": DecoderMethod(train="lora"),
    "adapters": DecoderMethod(train="adapters"),
    "add": DecoderMethod(train="adapters", conditioning="add"),
    "concat": DecoderMethod(train="adapters", conditioning="concat"),
    "hyper": DecoderMethod(train="adapters", ratio=0.0625, conditioning="hyper"),
}
INJECTING = ("lora", "adapters", "add", "concat", "hyper")
PROMPT_KINDS = ("points", "padded", "box", "box and points", "box and mask", "points and mask", "mask")
EVERY_METHOD = pytest.mark.parametrize("method", METHODS)
EVERY_PROMPT = pytest.mark.parametrize("kind", PROMPT_KINDS)


def parts(num_tokens: int = 4, *, upsampler: Any = "sam") -> tuple[Any, Any]:
    """A prompt encoder for images of SIZE and a mask decoder, every tensor perturbed, in eval mode and float64."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        encoder = modeling.PromptEncoder(
            embed_dim=256, image_embedding_size=(GRID, GRID), input_image_size=(SIZE, SIZE), mask_in_chans=16
        )
        decoder = build_mask_decoder(num_tokens, upsampler)
    perturb(encoder)
    perturb(decoder, seed=1)
    return encoder.eval().double(), decoder.eval().double()


def embeddings(batch: int = BATCH, *, seed: int = 0) -> Tensor:
    """Random image embeddings (batch, 256, GRID, GRID)."""
    return torch.randn(batch, 256, GRID, GRID, generator=torch.Generator().manual_seed(seed)).double()


def prompts(kind: str) -> PromptBatch:
    """Prompts of BATCH images, on quarters of pixels, so that they have the same value in any precision."""
    generator = torch.Generator().manual_seed(7)
    points = torch.randint(0, 4 * SIZE, (BATCH, 2, 2), generator=generator).double() / 4
    corners = torch.randint(0, 2 * SIZE, (BATCH, 4), generator=generator).double() / 4
    boxes = corners + torch.tensor([0.0, 0.0, 40.0, 60.0], dtype=torch.float64)
    labels = torch.tensor([[1, -1], [0, 1], [1, 1]]) if kind == "padded" else torch.tensor([[1, 0], [0, 1], [1, 1]])
    masks = torch.randn(BATCH, 1, 4 * GRID, 4 * GRID, generator=generator).double()
    has_points = "points" in kind or kind == "padded"
    return PromptBatch(
        points=points if has_points else None,
        point_labels=labels if has_points else None,
        boxes=boxes if "box" in kind else None,
        masks=masks if "mask" in kind else None,
    )


def pretend_training(module: nn.Module, *, scale: float = 0.1) -> None:
    """Give all adapters random values, as training would."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in adapter_parameters(module).values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * scale)
