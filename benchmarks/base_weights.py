"""A base checkpoint for the method benchmarks: SAM of a small backbone, trained to answer prompts on random shapes.

    python -m benchmarks.base_weights --backbone vit_xs --minutes 10 --output FOLDER/vit_xs.pth

Adapting a frozen random encoder shows nothing, and SAM's own weights are not needed to compare methods. The network
learns from boxes, clicks and corrections on generated images (`benchmarks.shapes`), as SAM did on photographs, and is
written in the layout of a SAM checkpoint, which `--weights sam:FILE` reads. It says nothing about real SAM weights.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.shapes import random_image
from samunet.artifacts.model_spec import PROMPT_DIM, STOCK_TOKENS, TOKEN_SIZE, get_spec
from samunet.artifacts.plan import Decay, IntensityMap
from samunet.core.files import atomic_path, sha256_file, write_json
from samunet.inference.encode import map_intensities
from samunet.inference.simulation import clicks, error_click, jittered_box, largest_object, tight_box
from samunet.models.decoders.promptable import PromptBatch, predict_prompted
from samunet.models.sam.network import SamNetwork, build_network
from samunet.models.sam.positions import fit_positions
from samunet.pipeline.provenance import describe
from samunet.training.optim import MovingAverage, learning_rate_factor, set_learning_rate
from samunet.training.prompted import actual_iou

SIDE, BATCH, NUM_OBJECTS, NUM_IMAGES, NUM_HELD_OUT = 224, 4, 4, 600, 64
SHARE_CORRECTED = 0.25
LOSS_SIDE = 112
PHASES = ((112, 0.6), (224, 0.4))
COSINE = Decay(kind="cosine")
RATES = {"vit": 1e-3, "tiny_vit": 2e-3}
PIXELS = IntensityMap(kind="sam_pixels", lower=(0.0,), upper=(1.0,))
Image = tuple[NDArray[np.float32], NDArray[np.uint8]]


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
    write_json(
        options.output.with_suffix(".json"),
        {
            "backbone": options.backbone,
            "minutes": options.minutes,
            "steps": steps,
            "seed": options.seed,
            "last_loss": loss,
            "held_out_iou": scores,
            "floor_iou": floors,
            "sha256": sha256_file(options.output),
            "provenance": describe(),
        },
    )
    print(f"{options.output}: {steps} steps, held-out IoU {scores}, without any model {floors}")


def train(backbone: str, images: list[Image], *, minutes: float, seed: int) -> tuple[SamNetwork, int, float]:
    """Train first at half the side, where steps are cheap, then at the full; returns the network in eval mode."""
    torch.manual_seed(seed)
    generator = np.random.default_rng(seed + 1)
    network: SamNetwork | None = None
    steps, loss = 0, 0.0
    for side, share in PHASES:
        network = grown(backbone, network, side)
        done, loss = train_phase(network, backbone, [shrunk(i, side) for i in images], minutes * share, generator)
        steps += done
    assert network is not None
    return network.eval(), steps, loss


def grown(backbone: str, former: SamNetwork | None, side: int) -> SamNetwork:
    """A network for a side: from random weights, or from one of another side, its positions resized."""
    network = build_network(get_spec(backbone), image_size=side, num_tokens=STOCK_TOKENS)
    if former is None:
        align_attention(network)
        return network
    state = dict(former.state_dict())
    fit_positions(state, network.state_dict(), "image_encoder.")
    network.load_state_dict(state)
    return network


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


def shrunk(image: Image, side: int) -> Image:
    """An image at a whole fraction of its side."""
    pixels, labels = image
    step = len(pixels) // side
    means = pixels.reshape(side, step, side, step).mean((1, 3))
    return means.astype(np.float32), np.ascontiguousarray(labels[step // 2 :: step, step // 2 :: step])


def train_phase(
    network: SamNetwork, backbone: str, images: list[Image], minutes: float, generator: np.random.Generator
) -> tuple[int, float]:
    """Train for some minutes of this process's own time; returns the steps and the last mean loss."""
    rate = RATES[get_spec(backbone).family]
    helper = nn.ConvTranspose2d(PROMPT_DIM, 2, TOKEN_SIZE, stride=TOKEN_SIZE)
    trained = [*network.train().parameters(), *helper.parameters()]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": 0.05},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=rate)
    average = MovingAverage(network, 0.998)
    began, step, recent = time.process_time(), 0, [0.0]
    while (progress := (time.process_time() - began) / (60 * minutes)) < 1:
        factor = learning_rate_factor(step, progress, warmup_steps=100, decay=COSINE)
        set_learning_rate(optimizer, rate * factor)
        picked = [random_view(images[int(generator.integers(len(images)))], generator) for _ in range(BATCH)]
        loss = batch_loss(network, helper, picked, generator)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        average.update()
        step += 1
        recent = [*recent[-49:], loss.item()]
        if step % 100 == 0:
            print(f"{len(images[0][0])} px {progress:5.1%} step {step} loss {np.mean(recent):.3f}", flush=True)
    average.swap()
    return step, float(np.mean(recent))


def random_view(image: Image, generator: np.random.Generator) -> Image:
    """Flipped and turned by right angles, contrast inverted at random."""
    pixels, labels = (np.rot90(part, int(generator.integers(4))) for part in image)
    if generator.random() < 0.5:
        pixels, labels = pixels[:, ::-1], labels[:, ::-1]
    pixels = 1 - pixels if generator.random() < 0.5 else pixels
    return np.ascontiguousarray(pixels), np.ascontiguousarray(labels)


def batch_loss(network: SamNetwork, helper: nn.Module, picked: list[Image], generator: np.random.Generator) -> Tensor:
    """Several objects per image, prompted by boxes or clicks, now and then corrected by one more click.

    A single click is ambiguous: besides token 0, only the best of the other tokens learns from it, as in SAM. A helper
    that is thrown away draws objects and their edges straight from the embedding, from which the encoder learns faster.
    """
    embeddings = network.image_encoder(encode([pixels for pixels, _ in picked]))
    labels = torch.from_numpy(np.stack([labels for _, labels in picked]).astype(np.int16))
    loss = dense_loss(helper(embeddings), labels)
    masks = np.stack([random_object(one, generator) for _, one in picked for _ in range(NUM_OBJECTS)])
    repeated = embeddings.repeat_interleave(NUM_OBJECTS, dim=0)
    use_box = bool(generator.random() < 0.5)
    prompts = first_prompts(masks, generator, box=use_box)
    target = torch.from_numpy(masks[:, None].astype(np.int16))
    first, logits = answer_loss(network, repeated, prompts, target, ambiguous=not use_box)
    if generator.random() < SHARE_CORRECTED:
        prompts = corrected(prompts, logits.detach(), masks, generator)
        again, _ = answer_loss(network, repeated, prompts, target, ambiguous=False)
        first = (first + again) / 2
    return loss + first


def dense_loss(drawn: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of objects and of their edges, drawn as (B, 2, S, S) logits."""
    value = labels[:, None].float()
    edges = functional.max_pool2d(value, 3, 1, 1) != -functional.max_pool2d(-value, 3, 1, 1)
    wanted = torch.cat([(value > 0).float(), edges.float()], dim=1)
    return functional.binary_cross_entropy_with_logits(drawn, wanted)


def answer_loss(
    network: SamNetwork, embeddings: Tensor, prompts: PromptBatch, target: Tensor, *, ambiguous: bool
) -> tuple[Tensor, Tensor]:
    """BCE + Dice, and the squared error of the estimated IoU of all tokens; with token 0's logits (B, 1, S/4, S/4)."""
    logits, quality = predict_prompted(network.prompt_encoder, network.mask_decoder, embeddings, prompts)
    wanted = functional.avg_pool2d(target.float(), max(1, target.shape[-1] // LOSS_SIDE))
    finer = functional.interpolate(logits, size=wanted.shape[-2:], mode="bilinear", align_corners=False)
    each = mask_losses(finer, wanted)
    loss = each[:, 0].mean()
    if ambiguous:
        loss = loss + each[:, 1:].min(1).values.mean()
    common, either = ((finer > 0) & (wanted > 0.5)).sum((2, 3)), ((finer > 0) | (wanted > 0.5)).sum((2, 3))
    return loss + (quality - common / either.clamp(min=1)).square().mean(), logits[:, :1]


def mask_losses(logits: Tensor, target: Tensor) -> Tensor:
    """Balanced BCE + 1 - Dice of every mask (B, T, h, w) against (B, 1, h, w): (B, T).

    Inside and outside of the object count alike, or small objects would be learned last.
    """
    target = target.expand_as(logits)
    entropy = functional.binary_cross_entropy_with_logits(logits, target, reduction="none")
    inside = (entropy * target).sum((2, 3)) / (target.sum((2, 3)) + 1)
    outside = (entropy * (1 - target)).sum((2, 3)) / ((1 - target).sum((2, 3)) + 1)
    probability = logits.sigmoid()
    overlap = 2 * (probability * target).sum((2, 3)) + 1
    return (inside + outside) / 2 + 1 - overlap / (probability.sum((2, 3)) + target.sum((2, 3)) + 1)


def random_object(labels: NDArray[np.uint8], generator: np.random.Generator) -> NDArray[np.bool_]:
    """One object of an image."""
    values = [v for v in np.unique(labels) if v and (labels == v).sum() >= 20]
    if not values:
        return labels == labels.max()
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
    for first in range(0, len(images), BATCH):
        chunk = images[first : first + BATCH]
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
