"""Training step of a small encoder with and without the work on windows' padding.

    python -m benchmarks.padding

Upstream pads a map that is smaller than a window and attends to the padding; ours leaves it out, exactly (see
samunet/models/sam/windows.py; parity in tests/parity/test_windows.py). Forward and backward of the whole encoder with
all weights trained, float32, one thread; the two forms take turns, and the least processor time of each is kept.
Results go to benchmarks/results/padding.json.
"""

from __future__ import annotations

import argparse
import sys
import time
from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from benchmarks.cells import RESULTS, stored
from benchmarks.methods import row
from samunet.artifacts.model_spec import get_spec
from samunet.core.files import write_json
from samunet.models.sam.encoder import build_encoder
from samunet.pipeline.provenance import describe

TABLE = "padding"
FORMS = ("upstream", "spared")
BACKBONES, SIZES, SLICES = ("vit_xs", "vit_t_xs", "vit_t"), (64, 112, 160, 224), 4


def main() -> None:
    """Measure the rows that are missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=5, help="of each form, after one to warm up")
    options = parser.parse_args()
    torch.set_num_threads(1)
    file = RESULTS / f"{TABLE}.json"
    results: dict[str, Any] = stored(file)
    for backbone in BACKBONES:
        for size in SIZES:
            name = f"{backbone} {size} px"
            if name not in results:
                results[name] = measure(backbone, size, options.repetitions)
                write_json(file, results)
    print(table(results))


def measure(backbone: str, size: int, repetitions: int) -> dict[str, Any]:
    """Milliseconds of a step in both forms."""
    encoders = {}
    for form in FORMS:
        plain = patch("samunet.models.sam.encoder.spare_padding", lambda _: None)
        with plain if form == "upstream" else nullcontext():
            encoders[form] = build_encoder(get_spec(backbone), image_size=size)
    images = torch.randn(SLICES, 3, size, size)
    times: dict[str, list[float]] = {form: [] for form in FORMS}
    for _ in range(1 + repetitions):
        for form, encoder in encoders.items():
            times[form].append(seconds(encoder, images))
    least = {form: round(1000 * min(found[1:]), 1) for form, found in times.items()}
    return {"milliseconds": least, "slices": SLICES, "provenance": describe(sys.argv[1:])}


def seconds(encoder: nn.Module, images: torch.Tensor) -> float:
    """Processor time of one forward and one backward pass."""
    began = time.process_time()
    encoder(images).square().mean().backward()
    return time.process_time() - began


def table(results: dict[str, Any]) -> str:
    """Markdown: milliseconds of a step and the ratio."""
    lines = [row(["encoder", "upstream, ms", "without padding, ms", "ratio"]), row(["---"] * 4)]
    for name, found in results.items():
        upstream, spared = (found["milliseconds"][form] for form in FORMS)
        lines.append(row([name, upstream, spared, f"{spared / upstream:.2f}"]))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
