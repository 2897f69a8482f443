"""An image encoder from generated images alone, which `samunet_train --weights FILE` starts from.

    python -m benchmarks.synthetic_weights --backbone vit_t_xs --minutes 60 --output FOLDER/vit_t_xs.safetensors

Images are random shapes (`benchmarks.shapes`); nothing in them is anatomy. The encoder learns to hold what a layer that
is thrown away needs to draw, from each embedding on its own, the objects, their edges and the image.
The file is one that `samunet_train --weights` takes, like those of samunet_pretrain.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.shapes import random_image
from samunet.artifacts.checkpoint import BaseWeights
from samunet.artifacts.model_spec import PROMPT_DIM, STOCK_TOKENS, TOKEN_SIZE, get_spec
from samunet.artifacts.plan import Decay
from samunet.artifacts.pretraining import Pretrained, write_pretrained
from samunet.models.formats import ENCODER
from samunet.models.sam.network import build_network
from samunet.models.weights import NONE
from samunet.pipeline.provenance import describe
from samunet.training.optim import MovingAverage, learning_rate_factor, set_learning_rate

SIDE, BATCH, NUM_IMAGES = 112, 8, 4000
COSINE = Decay(kind="cosine")
RATES = {"vit": 1e-3, "tiny_vit": 2e-3}
IMAGE_WEIGHT = 4.0
Image = tuple[NDArray[np.float32], NDArray[np.uint8]]


def main() -> None:
    """Train and write the encoder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", required=True)
    parser.add_argument("--minutes", type=float, default=60.0, help="of this process's own time")
    parser.add_argument("--images", type=int, default=NUM_IMAGES)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    generator = np.random.default_rng(options.seed)
    images = [random_image(generator, SIDE) for _ in range(options.images)]
    torch.manual_seed(options.seed)
    network = build_network(get_spec(options.backbone), image_size=SIDE, num_tokens=STOCK_TOKENS)
    steps, loss = train_encoder(
        network.image_encoder,
        images,
        standardise,
        backbone=options.backbone,
        minutes=options.minutes,
        generator=generator,
    )
    about = Pretrained(
        objective="drawn_shapes",
        kind="ssl",
        backbone=options.backbone,
        input_size=SIDE,
        from_random=True,
        base=BaseWeights(kind=NONE),
        datasets=(),
        steps=steps,
        minutes=options.minutes,
        batch_size=BATCH,
        learning_rate=RATES[get_spec(options.backbone).family],
        loss=loss,
        seed=options.seed,
        provenance={k: v for k, v in describe().items() if k not in ("command", "started")},
    )
    tensors = {name: tensor for name, tensor in network.state_dict().items() if name.startswith(ENCODER)}
    about = write_pretrained(options.output, tensors, about)
    print(f"{options.output}: {steps} steps, loss {loss:.3f}, SHA-256 {about.sha256}")


def train_encoder(
    encoder: nn.Module,
    images: list[Image],
    encode: Callable[[list[NDArray[np.float32]]], Tensor],
    *,
    backbone: str,
    minutes: float,
    generator: np.random.Generator,
) -> tuple[int, float]:
    """Train an encoder in place, which is left in eval mode; returns the steps and the last mean loss.

    Args:
        encoder: Of SAM's shape: (B, 3, S, S) to (B, 256, S / 16, S / 16).
        images: Pixels in [0, 1] and labels, each (S, S).
        encode: Brings pixels to what the encoder expects.
        backbone: Decides the learning rate.
        minutes: Of this process's own time.
        generator: Draws images and views.
    """
    helper = nn.ConvTranspose2d(PROMPT_DIM, 3, TOKEN_SIZE, stride=TOKEN_SIZE)
    encoder.train()

    def loss_of_step() -> Tensor:
        picked = [random_view(images[int(generator.integers(len(images)))], generator) for _ in range(BATCH)]
        return drawing_loss(helper(encoder(encode([pixels for pixels, _ in picked]))), picked)

    found = optimise("drawing", loss_of_step, [encoder, helper], RATES[get_spec(backbone).family], minutes)
    encoder.eval()
    return found


def optimise(
    name: str, loss_of_step: Callable[[], Tensor], modules: list[nn.Module], rate: float, minutes: float
) -> tuple[int, float]:
    """Train modules for some minutes of this process's own time, a step at least; returns steps and last mean loss."""
    trained = nn.ModuleList(modules)
    parameters = list(trained.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.05},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=rate)
    average = MovingAverage(trained, 0.99)
    began, step, recent = time.process_time(), 0, [0.0]
    while (progress := (time.process_time() - began) / (60 * minutes)) < 1 or not step:
        progress = min(1.0, progress)
        set_learning_rate(optimizer, rate * learning_rate_factor(step, progress, warmup_steps=100, decay=COSINE))
        loss = loss_of_step()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        average.update()
        step += 1
        recent = [*recent[-49:], loss.item()]
        if step % 100 == 0:
            print(f"{name} {progress:5.1%} step {step} loss {np.mean(recent):.3f}", flush=True)
    average.swap()
    return step, float(np.mean(recent))


def random_view(image: Image, generator: np.random.Generator) -> Image:
    """Flipped and turned by right angles, contrast inverted at random."""
    pixels, labels = (np.rot90(part, int(generator.integers(4))) for part in image)
    if generator.random() < 0.5:
        pixels, labels = pixels[:, ::-1], labels[:, ::-1]
    pixels = 1 - pixels if generator.random() < 0.5 else pixels
    return np.ascontiguousarray(pixels), np.ascontiguousarray(labels)


def drawing_loss(drawn: Tensor, picked: list[Image]) -> Tensor:
    """Loss of objects, of their edges, and of the image itself, drawn as (B, 3, S, S).

    A layer that is thrown away draws them straight from the embedding, patch by patch: what it needs, the embedding
    must hold. The image keeps detail in it that objects alone would not ask for.
    """
    value = torch.from_numpy(np.stack([labels for _, labels in picked]).astype(np.float32))[:, None]
    edges = functional.max_pool2d(value, 3, 1, 1) != -functional.max_pool2d(-value, 3, 1, 1)
    wanted = torch.cat([(value > 0).float(), edges.float()], dim=1)
    pixels = torch.from_numpy(np.stack([pixels for pixels, _ in picked]))
    entropy = functional.binary_cross_entropy_with_logits(drawn[:, :2], wanted)
    return entropy + 4 * functional.mse_loss(drawn[:, 2], pixels)


def standardise(pixels: list[NDArray[np.float32]]) -> Tensor:
    """Images in [0, 1] to encoder input (B, 3, S, S) of mean 0 and deviation 1, as images of a plan come."""
    stacked = torch.from_numpy(np.stack(pixels))[:, None]
    mean, deviation = stacked.mean((2, 3), keepdim=True), stacked.std((2, 3), keepdim=True)
    return ((stacked - mean) / deviation.clamp(min=1e-3)).expand(-1, 3, -1, -1)


if __name__ == "__main__":
    main()
