"""A base checkpoint for the method benchmarks: SAM of a small backbone, trained to answer prompts on random shapes.

    python -m benchmarks.base_weights --backbone vit_xs --minutes 10 --output FOLDER/vit_xs.pth

Adapting a frozen random encoder shows nothing, and SAM's own weights are not needed to compare methods. On generated
images (`benchmarks.shapes`) the encoder learns to hold what a thrown-away layer needs to draw objects, edges and the
image; then the prompt encoder and the mask decoder learn from boxes, clicks and corrections, as SAM did on photographs.
The result is written in the layout of a SAM checkpoint, which `--weights sam:FILE` reads, and what it is to
benchmarks/results/base_weights.json. It says nothing about real SAM weights.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.cells import RESULTS, stored
from benchmarks.shapes import random_image
from benchmarks.synthetic_weights import SIDE, Image, optimise, random_view, train_encoder
from samunet.artifacts.model_spec import STOCK_TOKENS, get_spec
from samunet.artifacts.plan import IntensityMap
from samunet.core.files import atomic_path, sha256_file, write_json
from samunet.inference.encode import map_intensities
from samunet.inference.simulation import clicks, error_click, jittered_box, largest_object, tight_box
from samunet.models.decoders.promptable import PromptBatch, predict_prompted
from samunet.models.sam.network import SamNetwork, build_network
from samunet.pipeline.provenance import describe
from samunet.training.prompted import actual_iou

NUM_IMAGES, NUM_HELD_OUT = 3000, 128
PROMPTED_BATCH, NUM_OBJECTS = 8, 4
SHARE_DRAWN, SHARE_CORRECTED = 0.45, 0.2
NUM_VIEWS = 2
PROMPTED_RATE = 1e-3
PIXELS = IntensityMap(kind="sam_pixels", lower=(0.0,), upper=(1.0,))


def main() -> None:
    """Train and write the checkpoint and what it is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", required=True)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    generator = np.random.default_rng(options.seed)
    images = [random_image(generator, SIDE) for _ in range(NUM_IMAGES + NUM_HELD_OUT)]
    network, steps, loss = train(options.backbone, images[NUM_HELD_OUT:], minutes=options.minutes, seed=options.seed)
    held_out = images[:NUM_HELD_OUT]
    scores = {kind: held_out_iou(network, held_out, box=kind == "box") for kind in ("box", "click")}
    floors = {"filling the box": filled_box_iou(held_out), "the whole image": whole_image_iou(held_out)}
    save(network, options.output)
    facts = {
        "backbone": options.backbone,
        "minutes": options.minutes,
        "steps": steps,
        "seed": options.seed,
        "last_loss": loss,
        "held_out_iou": scores,
        "floor_iou": floors,
        "sha256": sha256_file(options.output),
        "provenance": {name: value for name, value in describe().items() if name not in ("command", "started")},
    }
    write_json(options.output.with_suffix(".json"), facts)
    table = RESULTS / "base_weights.json"
    write_json(table, {**stored(table), options.backbone: facts})
    print(f"{options.output}: {steps} steps, held-out IoU {scores}, without any model {floors}")


def train(
    backbone: str, images: list[Image], *, minutes: float, seed: int
) -> tuple[SamNetwork, list[int], list[float]]:
    """Train the encoder by drawing, then the rest on its embeddings; returns the network, each one's steps and loss."""
    torch.manual_seed(seed)
    generator = np.random.default_rng(seed + 1)
    network = build_network(get_spec(backbone), image_size=SIDE, num_tokens=STOCK_TOKENS)
    align_attention(network)
    drawing = minutes * SHARE_DRAWN
    first = train_encoder(
        network.image_encoder, images, encode, backbone=backbone, minutes=drawing, generator=generator
    )
    network.eval()
    views = [random_view(image, generator) for _ in range(NUM_VIEWS) for image in images]
    embeddings = embed(network, views)

    def prompted() -> Tensor:
        picked = [int(generator.integers(len(views))) for _ in range(PROMPTED_BATCH)]
        return prompted_loss(network, embeddings[picked], [views[i][1] for i in picked], generator)

    rest = [network.prompt_encoder, network.mask_decoder]
    second = optimise("prompts", prompted, rest, PROMPTED_RATE, minutes * (1 - SHARE_DRAWN))
    return network, [first[0], second[0]], [first[1], second[1]]


@torch.inference_mode()
def embed(network: SamNetwork, images: list[Image]) -> Tensor:
    """Embeddings (N, 256, S/16, S/16) of images."""
    chunks = [images[first : first + 64] for first in range(0, len(images), 64)]
    return torch.cat([network.image_encoder(encode([pixels for pixels, _ in chunk])) for chunk in chunks]).clone()


def align_attention(network: SamNetwork) -> None:
    """Start with queries and keys that meet where positions agree, so that prompts find their place at once."""
    transformer: Any = network.mask_decoder.transformer
    across = [transformer.final_attn_token_to_image]
    for layer in transformer.layers:
        across += [layer.cross_attn_token_to_image, layer.cross_attn_image_to_token]
    for attention in across:
        nn.init.orthogonal_(attention.q_proj.weight, gain=1.5)
        with torch.no_grad():
            attention.k_proj.weight.copy_(attention.q_proj.weight)


def prompted_loss(
    network: SamNetwork, embeddings: Tensor, labels: list[NDArray[np.uint8]], generator: np.random.Generator
) -> Tensor:
    """Several objects per image, prompted by boxes or clicks, now and then corrected by one more click.

    A single click is ambiguous: besides token 0, only the best of the other tokens learns from it, as in SAM.
    """
    masks = np.stack([random_object(one, generator) for one in labels for _ in range(NUM_OBJECTS)])
    repeated = embeddings.repeat_interleave(NUM_OBJECTS, dim=0)
    use_box = bool(generator.random() < 0.5)
    prompts = first_prompts(masks, generator, box=use_box)
    target = torch.from_numpy(masks[:, None].astype(np.int16))
    first, logits = answer_loss(network, repeated, prompts, target, ambiguous=not use_box)
    if generator.random() < SHARE_CORRECTED:
        prompts = corrected(prompts, logits.detach(), masks, generator)
        again, _ = answer_loss(network, repeated, prompts, target, ambiguous=False)
        first = (first + again) / 2
    return first


def answer_loss(
    network: SamNetwork, embeddings: Tensor, prompts: PromptBatch, target: Tensor, *, ambiguous: bool
) -> tuple[Tensor, Tensor]:
    """BCE + Dice, and the squared error of the estimated IoU of all tokens; with token 0's logits (B, 1, S/4, S/4)."""
    logits, quality = predict_prompted(network.prompt_encoder, network.mask_decoder, embeddings, prompts)
    wanted = target.float()
    finer = functional.interpolate(logits, size=wanted.shape[-2:], mode="bilinear", align_corners=False)
    each = mask_losses(finer, wanted)
    loss = each[:, 0].mean()
    if ambiguous:
        loss = loss + each[:, 1:].min(1).values.mean()
    common, either = ((finer > 0) & (wanted > 0.5)).sum((2, 3)), ((finer > 0) | (wanted > 0.5)).sum((2, 3))
    return loss + (quality - common / either.clamp(min=1)).square().mean(), logits[:, :1]


def mask_losses(logits: Tensor, target: Tensor) -> Tensor:
    """20 x focal loss + 1 - Dice of every mask (B, T, h, w) against (B, 1, h, w): (B, T).

    Source: SAM (Kirillov et al. 2023), appendix A.
    """
    target = target.expand_as(logits)
    entropy = functional.binary_cross_entropy_with_logits(logits, target, reduction="none")
    probability = logits.sigmoid()
    focal = (entropy * (target - probability).square()).mean((2, 3))
    overlap = 2 * (probability * target).sum((2, 3)) + 1
    return 20 * focal + 1 - overlap / (probability.sum((2, 3)) + target.sum((2, 3)) + 1)


def random_object(labels: NDArray[np.uint8], generator: np.random.Generator) -> NDArray[np.bool_]:
    """One object of an image."""
    values = [v for v in np.unique(labels) if v and (labels == v).sum() >= 20]
    if not values:
        return np.asarray(labels == labels.max())
    found = largest_object(labels == values[int(generator.integers(len(values)))])
    assert found is not None
    return found


def first_prompts(masks: NDArray[np.bool_], generator: np.random.Generator, *, box: bool) -> PromptBatch:
    """A jittered box or a click per mask; positions are (x, y)."""
    if box:
        found = [jittered_box(tight_box(mask), 0.1, generator, mask.shape) for mask in masks]
        return PromptBatch(boxes=torch.tensor([(b[1], b[0], b[3], b[2]) for b in found], dtype=torch.float32))
    points = [clicks(mask, 1, generator)[0] for mask in masks]
    positions = torch.tensor([[(p[1], p[0])] for p in points], dtype=torch.float32)
    return PromptBatch(points=positions, point_labels=torch.ones(len(masks), 1, dtype=torch.long))


def corrected(
    prompts: PromptBatch, logits: Tensor, masks: NDArray[np.bool_], generator: np.random.Generator
) -> PromptBatch:
    """One more click in the largest error of each answer, which is shown too."""
    full = functional.interpolate(logits, size=masks.shape[-2:], mode="bilinear", align_corners=False)
    points, labels = [], []
    for mask, answer in zip(masks, (full[:, 0] > 0).numpy(), strict=True):
        found = error_click(answer, mask, np.ones_like(mask), generator)
        points.append((0.0, 0.0) if found is None else (found.point[1], found.point[0]))
        labels.append(-1 if found is None else int(found.positive))
    return prompts.with_click(torch.tensor(points), torch.tensor(labels), logits)


@torch.inference_mode()
def held_out_iou(network: SamNetwork, images: list[Image], *, box: bool) -> float:
    """Mean IoU of token 0 on images that were not trained on."""
    generator = np.random.default_rng(7)
    scores: list[float] = []
    for first in range(0, len(images), PROMPTED_BATCH):
        chunk = images[first : first + PROMPTED_BATCH]
        masks = np.stack([random_object(labels, generator) for _, labels in chunk])
        embeddings = network.image_encoder(encode([pixels for pixels, _ in chunk]))
        prompts = first_prompts(masks, generator, box=box)
        logits, _ = predict_prompted(network.prompt_encoder, network.mask_decoder, embeddings, prompts)
        full = functional.interpolate(logits[:, :1], size=SIDE, mode="bilinear", align_corners=False) > 0
        scores += actual_iou(full, torch.from_numpy(masks[:, None].astype(np.int16))).flatten().tolist()
    return float(np.mean(scores))


def held_out_masks(images: list[Image]) -> NDArray[np.bool_]:
    """One object of every image, always the same."""
    generator = np.random.default_rng(7)
    return np.stack([random_object(labels, generator) for _, labels in images])


def filled_box_iou(images: list[Image]) -> float:
    """Mean IoU of an answer that fills the prompted box: what a model must beat."""
    generator = np.random.default_rng(8)
    scores = []
    for mask in held_out_masks(images):
        row0, column0, row1, column1 = (
            round(v + 0.5) for v in jittered_box(tight_box(mask), 0.1, generator, mask.shape)
        )
        filled = np.zeros_like(mask)
        filled[row0:row1, column0:column1] = True
        scores.append((filled & mask).sum() / (filled | mask).sum())
    return float(np.mean(scores))


def whole_image_iou(images: list[Image]) -> float:
    """Mean IoU of an answer that is always everything."""
    return float(held_out_masks(images).mean((1, 2)).mean())


def encode(pixels: list[NDArray[np.float32]]) -> Tensor:
    """Images in [0, 1] to encoder input (B, 3, S, S)."""
    stacked = torch.from_numpy(np.stack(pixels))[:, None].expand(-1, 3, -1, -1)
    return map_intensities(stacked, PIXELS)


def save(network: SamNetwork, path: Path) -> None:
    """Write the state dict in the layout of a SAM checkpoint."""
    with atomic_path(path) as temporary:
        torch.save(network.state_dict(), temporary)


if __name__ == "__main__":
    main()
