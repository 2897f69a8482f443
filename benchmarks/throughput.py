"""Slices trained per second by each backbone: forward, backward and optimizer step on random input.

    python -m benchmarks.throughput --backbones vit_t_xs vit_xs vit_t --sizes 224 --device cpu

Results go to benchmarks/results/throughput.json with the machine, versions and the command.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.cells import stored
from samunet.artifacts.augmentation import Augmentation
from samunet.artifacts.method import EncoderMethod, Method
from samunet.artifacts.plan import Decay, IntensityMap, LossWeights, ResolvedRecipe
from samunet.core.files import write_json
from samunet.models.build import build_model
from samunet.models.device import place
from samunet.pipeline.provenance import describe
from samunet.training.losses import segmentation_loss

RESULTS = Path(__file__).parent / "results" / "throughput.json"
NUM_TOKENS = 3


def main() -> None:
    """Measure every cell and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbones", nargs="+", default=["vit_t_xs", "vit_xs", "vit_t"])
    parser.add_argument("--sizes", type=int, nargs="+", default=[224])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=20.0, help="per cell")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    results = stored(RESULTS)
    for backbone in options.backbones:
        for size in options.sizes:
            rate = slices_per_second(backbone, size, options.batch, options.seconds, options.device)
            cell = {"slices_per_second": round(rate, 2), "batch": options.batch, "provenance": describe(sys.argv[1:])}
            results[f"{backbone} {size} px {options.device}"] = cell
            print(f"{backbone:10s} {size:5d} px  {rate:8.2f} slices/s", flush=True)
    write_json(RESULTS, dict(sorted(results.items())))


def slices_per_second(backbone: str, size: int, batch: int, seconds: float, device: str) -> float:
    """Train on random slices for a while, after two steps to warm up."""
    model = place(build_model(recipe(backbone, size), **INPUT).model, device).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    images = torch.randn(batch, 3, size, size, device=device)
    target = torch.randint(0, NUM_TOKENS, (batch, 1, size // 4, size // 4), device=device)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        segmentation_loss(model(images), target, has_regions=False).backward()
        optimizer.step()
        if device != "cpu":
            torch.cuda.synchronize()

    step()
    step()
    began, steps = time.monotonic(), 0
    while time.monotonic() - began < seconds:
        step()
        steps += 1
    return steps * batch / (time.monotonic() - began)


INPUT: dict[str, Any] = {
    "num_tokens": NUM_TOKENS,
    "num_input_channels": 3,
    "channels": "repeat",
    "weights": None,
    "seed": 0,
}


def recipe(backbone: str, size: int) -> ResolvedRecipe:
    """A recipe that trains the whole network from random weights."""
    return ResolvedRecipe(
        weights_kind="none",
        device_class="cpu",
        backbone=backbone,
        input_size=size,
        tile_vox=size,
        method=Method(encoder=EncoderMethod(train="full")),
        slab_depth=1,
        attention="upstream",
        loss=LossWeights(),
        decay=Decay(),
        intensity_map=IntensityMap(kind="identity"),
        learning_rate=1e-4,
        weight_decay=0.0,
        warmup_steps=1,
        batch_size=8,
        accumulation_steps=1,
        iterations=1,
        epochs=1,
        minutes=None,
        precision="fp32",
        checkpointing=False,
        ema_decay=0.0,
        augmentation=Augmentation(enabled=False),
        foreground_fraction=0.5,
        memory_gib=0.0,
    )


if __name__ == "__main__":
    main()
