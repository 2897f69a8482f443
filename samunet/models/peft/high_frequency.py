"""Tokens made of the image's high frequencies and its patch embedding, added before every block.

Shapes: B batch, S input side, H x W tokens, D token width, r width of the generator.

Source: Chen et al., SAM-Adapter, 2023.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from samunet.artifacts.method import HighFrequency
from samunet.core.errors import ConfigError
from samunet.models.peft.blocks import match
from samunet.models.sam.encoder import INIT_STD, AddTokens, AttentionStage, SamEncoder


def high_pass(images: Tensor, mask_fraction: float) -> Tensor:
    """The magnitude of what is left of images without the centre of their spectrum.

    Half precision has no transform of any size, so it is computed in at least float32 whatever the autocast.

    Args:
        images: (..., height, width), of any size.
        mask_fraction: Share of the spectrum's area that is removed: a rectangle of the image's proportions around
            zero frequency.

    Returns:
        Not negative, with the shape and type of the images.
    """
    height, width = images.shape[-2:]
    keep = torch.ones(height, width, dtype=torch.bool, device=images.device)
    rows, columns = (math.floor(side * math.sqrt(mask_fraction) / 2) for side in (height, width))
    keep[height // 2 - rows : height // 2 + rows, width // 2 - columns : width // 2 + columns] = False
    with torch.autocast(images.device.type, enabled=False):
        pixels = images if images.dtype == torch.float64 else images.float()
        spectrum = torch.fft.fft2(pixels) * torch.fft.ifftshift(keep)
        magnitude: Tensor = torch.fft.ifft2(spectrum).real.abs()
    return magnitude.to(images.dtype)


class PromptStage(nn.Module):
    """The generator of one width: features of the image, one r x r layer per block, one layer back to D for all.

    Args:
        stage: Width, blocks and stride.
        reduction: D over r.
    """

    def __init__(self, stage: AttentionStage, *, reduction: int) -> None:
        super().__init__()
        width = max(1, stage.width // reduction)
        self.details = nn.Conv2d(3, width, kernel_size=stage.stride, stride=stage.stride)
        self.tokens = nn.Linear(stage.width, width)
        self.per_block = nn.ModuleList([nn.Linear(width, width) for _ in range(stage.num_blocks)])
        self.up = nn.Linear(width, stage.width)
        self._initialise()

    def forward(self, index: int, features: Tensor) -> Tensor:
        """What is added before a block: features (B, H, W, r) to (B, H, W, D)."""
        result: Tensor = self.up(functional.gelu(self.per_block[index](features)))
        return result

    def _initialise(self) -> None:
        nn.init.kaiming_normal_(self.details.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.details.bias)  # type: ignore[arg-type]
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=INIT_STD)
                nn.init.zeros_(layer.bias)
        nn.init.zeros_(self.up.weight)


class HighFrequencyPrompts(nn.Module):
    """The tokens of all stages; zero at the start because ``up`` is, while the published code starts it at random.

    A ViT has one stage. In TinyViT each attention stage has a generator of its own at the stage's stride, fed by the
    tokens that enter the stage.

    Args:
        stages: The encoder's attention stages.
        choice: Widths, the share of the spectrum, and which tokens are seen.
    """

    kind = "high frequency"

    def __init__(self, stages: list[AttentionStage], choice: HighFrequency) -> None:
        super().__init__()
        self.choice = choice
        self.stages = nn.ModuleList([PromptStage(stage, reduction=choice.reduction) for stage in stages])

    def adapter_params(self) -> list[str]:
        """Names of all its parameters."""
        return [name for name, _ in self.named_parameters()]

    def details(self, images: Tensor) -> Tensor:
        """High frequencies of images (B, 3, S, S), of the same shape."""
        return high_pass(images, self.choice.mask_fraction)

    def start(self, stage: int, details: Tensor, before: Tensor, after: Tensor) -> AddTokens:
        """A function of (block within the stage, its incoming tokens) that gives the tokens added for it.

        With ``inputs="previous"`` every block's own incoming tokens are seen, and where positions are taken does not
        matter.

        Args:
            stage: Index of the attention stage.
            details: What :meth:`details` gave.
            before: Tokens that enter the stage (B, H, W, D), before positions are added.
            after: The same with positions.
        """
        generator = self.stages[stage]
        assert isinstance(generator, PromptStage)
        detailed = generator.details(details).permute(0, 2, 3, 1)
        if self.choice.inputs == "previous":
            return lambda index, x: generator(index, detailed + generator.tokens(x))
        shared = detailed + generator.tokens(before if self.choice.positions == "before" else after)
        return lambda index, x: generator(index, shared)  # noqa: ARG005 - all blocks see the same


def inject_high_frequency(encoder: SamEncoder, choice: HighFrequency) -> None:
    """Let an encoder add generated tokens before every attention block.

    Raises:
        ConfigError: If it already does.
    """
    if encoder.token_prompts is not None:
        raise ConfigError("the encoder already adds tokens before its blocks", todo="keep one high_frequency adapter")
    encoder.token_prompts = match(HighFrequencyPrompts(encoder.attention_stages(), choice), encoder)
