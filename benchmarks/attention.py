"""Upstream's attention against the folded one: time of a step and bytes that autograd keeps, per backbone and size.

    python -m benchmarks.attention                         every row that is missing
    python -m benchmarks.attention --device cuda
    python -m benchmarks.attention --no-times              only the bytes, in a minute

One image, LoRA of rank 4 on q and v of every block, the rest frozen. Forms: upstream; folded_global (windows as
upstream); folded; checkpointed (folded, and blocks keep only their input).

- Bytes: every tensor that autograd holds after the forward pass under bfloat16 autocast, each storage once, without
  parameters and buffers. On a CPU they are counted with fake tensors, which have shapes but no memory.
- Times: median of forward and backward of the whole encoder, float32 on a CPU (where a step is affordable), bfloat16
  autocast on a GPU.
- Layers: one attention layer alone, the least of several forward and backward passes; on a CPU in processor seconds of
  one thread, which others on the machine hardly disturb. The thresholds of samunet/planners/attention.py come from
  these.

Results go to benchmarks/results/attention.json with the machine, versions and command; rows in it are kept.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from samunet.artifacts.method import Lora
from samunet.artifacts.model_spec import TOKEN_SIZE, get_spec
from samunet.core.files import read_json, write_json
from samunet.models.peft.lora import inject_lora
from samunet.models.peft.state import adapter_parameters, freeze_all_but
from samunet.models.sam import imports
from samunet.models.sam.attention import FoldedAttention, PositionTables, fold_attention
from samunet.models.sam.encoder import VitEncoder
from samunet.pipeline.provenance import describe

RESULTS = Path(__file__).parent / "results" / "attention.json"
FORMS = ("upstream", "folded_global", "folded", "checkpointed")
LAYER_FORMS = ("upstream", "folded")
LAYER_PASSES = 4
# Tokens times parameters of the largest step that is timed on a CPU: ViT-B at 1024 pixels, ViT-L at 512, ViT-H at 448.
AFFORDABLE = 5e11
# Backbone, tokens per side, images: whole grids and, at 14, also windows.
LAYERS = [
    ("vit_xs", 14, 8), ("vit_xs", 20, 8), ("vit_xs", 28, 8), ("vit_xs", 32, 4), ("vit_xs", 42, 2),
    ("vit_b", 14, 2), ("vit_b", 20, 2), ("vit_b", 28, 2), ("vit_b", 32, 2), ("vit_b", 42, 1),
    ("vit_h", 14, 2), ("vit_h", 20, 1), ("vit_h", 28, 1),
]  # fmt: skip


def main() -> None:
    """Measure the rows that are missing and print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbones", nargs="+", default=["vit_b", "vit_l", "vit_h"])
    parser.add_argument("--sizes", type=int, nargs="+", default=[224, 448, 512, 672, 1024])
    parser.add_argument("--forms", nargs="+", default=list(FORMS), choices=FORMS)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--repetitions", type=int, default=3, help="of a step, after one to warm up")
    parser.add_argument("--no-times", action="store_true", help="count bytes only")
    parser.add_argument("--layers-only", action="store_true", help="time single layers only")
    options = parser.parse_args()
    results = read_json(RESULTS) if RESULTS.is_file() else {"encoders": {}, "layers": {}}
    if not options.layers_only:
        for backbone in options.backbones:
            for size in options.sizes:
                for form in options.forms:
                    fill_encoder_row(results, backbone, size, form, options)
    if not options.no_times:
        for backbone, grid, batch in LAYERS:
            fill_layer_row(results, backbone, grid, batch, options.device)
    print(table(results))


def fill_encoder_row(results: dict[str, Any], backbone: str, size: int, form: str, options: argparse.Namespace) -> None:
    """Add what is missing of one encoder's row and write it down."""
    name = f"{backbone} {size} px {form} {options.device}"
    row = dict(results["encoders"].get(name, {}))
    measures: dict[str, Callable[[], dict[str, Any]]] = {
        "saved_mib": lambda: count_row(backbone, size, form, options.device),
        "seconds": lambda: time_row(backbone, size, form, options.device, options.repetitions),
    }
    if options.no_times or not affordable(backbone, size, options.device):
        del measures["seconds"]
    missing = [] if "failed" in row else [measure for key, measure in measures.items() if key not in row]
    for measure in missing:
        try:
            found = measure()
        except torch.OutOfMemoryError:
            found = {"failed": "out of memory"}
        row |= {**found, "provenance": describe(sys.argv[1:])}
        results["encoders"][name] = row
        write_json(RESULTS, results)
    if missing:
        print(f"{name}: {row.get('saved_mib', '-')} MiB, {row.get('seconds', '-')} s", flush=True)


def count_row(backbone: str, size: int, form: str, device: str) -> dict[str, Any]:
    """Saved bytes of a forward pass in bfloat16: fake on a CPU, real on a GPU."""
    fake = device == "cpu"
    with FakeTensorMode() if fake else nullcontext():
        encoder = build(backbone, size, form).to(device) if not fake else build(backbone, size, form)
        images = torch.randn(1, 3, size, size, device=device)
        saved = saved_bytes(encoder, images)
    return {"saved_mib": round(saved / 2**20, 1), "counted": "fake tensors" if fake else "real tensors"}


def time_row(backbone: str, size: int, form: str, device: str, repetitions: int) -> dict[str, Any]:
    """Median seconds of forward and backward, and on a GPU the peak of allocated memory."""
    encoder = build(backbone, size, form).to(device)
    images = torch.randn(1, 3, size, size, device=device)
    seconds = []
    for _ in range(1 + repetitions):
        began = time.perf_counter()
        with autocast(device) if device == "cuda" else nullcontext():
            embeddings = encoder(images)
        embeddings.float().square().mean().backward()
        synchronise(device)
        seconds.append(time.perf_counter() - began)
    found = {
        "seconds": round(statistics.median(seconds[1:]), 4),
        "all_seconds": [round(s, 4) for s in seconds[1:]],
        "timed_in": "fp32" if device == "cpu" else "bf16",
    }
    return found if device == "cpu" else found | {"peak_mib": round(torch.cuda.max_memory_allocated() / 2**20, 1)}


def fill_layer_row(results: dict[str, Any], backbone: str, grid: int, batch: int, device: str) -> None:
    """Time one attention layer in both forms, taking turns, and write it down."""
    name = f"{backbone} {grid:02d} x {grid:02d} tokens x {batch} {device}"
    if name in results["layers"]:
        return
    spec = get_spec(backbone)
    layer = imports.image_encoder.Attention(
        spec.embed_dim, num_heads=spec.num_heads, use_rel_pos=True, input_size=(grid, grid)
    )
    layer.requires_grad_(False).to(device)
    forms = dict(zip(LAYER_FORMS, (layer, FoldedAttention(layer, PositionTables())), strict=True))
    tokens = torch.randn(batch, grid, grid, spec.embed_dim, device=device, requires_grad=True)
    threads = torch.get_num_threads()
    if device == "cpu":
        torch.set_num_threads(1)
    passes: dict[str, list[tuple[float, float]]] = {form: [] for form in forms}
    for _ in range(1 + LAYER_PASSES):
        for form, module in forms.items():
            passes[form].append(time_layer(module, tokens, device))
    torch.set_num_threads(threads)
    row: dict[str, Any] = {"timed_in": "fp32" if device == "cpu" else "bf16"}
    for form, found in passes.items():
        forward, backward = (round(1000 * min(times), 2) for times in zip(*found[1:], strict=True))
        row[form] = {"forward_ms": forward, "backward_ms": backward}
    results["layers"][name] = row | {"provenance": describe(sys.argv[1:])}
    write_json(RESULTS, results)


def time_layer(layer: nn.Module, tokens: Tensor, device: str) -> tuple[float, float]:
    """Seconds of one forward and one backward pass."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    synchronise(device)
    began = clock()
    with autocast(device) if device == "cuda" else nullcontext():
        out = layer(tokens)
    synchronise(device)
    between = clock()
    out.sum().backward()
    synchronise(device)
    return between - began, clock() - between


def build(backbone: str, size: int, form: str) -> VitEncoder:
    """An encoder with random weights and LoRA on q and v of every block, which alone trains."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    encoder = VitEncoder(get_spec(backbone), image_size=size)
    inject_lora(encoder, Lora(targets=("q", "v"), rank=4))
    freeze_all_but(encoder, adapter_parameters(encoder))
    if form != "upstream":
        fold_attention(encoder, global_only=form == "folded_global")
    encoder.checkpointing = form == "checkpointed"
    return encoder


class Held:
    """What autograd holds instead of a tensor; it is gone when autograd lets go."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def saved_tensors(module: nn.Module, images: Tensor, precision: torch.dtype | None = torch.bfloat16) -> list[Tensor]:
    """The tensors that autograd holds after a forward pass, parameters and buffers among them.

    Args:
        module: Called once.
        images: Its input.
        precision: Of autocast; None for none.
    """
    held: weakref.WeakSet[Held] = weakref.WeakSet()

    def pack(tensor: Tensor) -> Held:
        holder = Held(tensor)
        held.add(holder)
        return holder

    with (
        saved_tensors_hooks(pack, lambda holder: holder.tensor),
        nullcontext() if precision is None else autocast(images.device.type, precision),
    ):
        output = module(images)
    found = [holder.tensor for holder in held]
    assert output is not None
    return found


def saved_bytes(module: nn.Module, images: Tensor, precision: torch.dtype | None = torch.bfloat16) -> int:
    """Bytes of the storages that autograd holds, each once, without those of parameters and buffers."""
    own = {id_of(tensor) for tensor in [*module.parameters(), *module.buffers()]}
    found = saved_tensors(module, images, precision)
    sizes = {id_of(tensor): tensor.untyped_storage().nbytes() for tensor in found}
    return sum(size for storage, size in sizes.items() if storage not in own)


def id_of(tensor: Tensor) -> int:
    """Which storage a tensor looks into."""
    return int(tensor.untyped_storage()._cdata)


def autocast(device: str, precision: torch.dtype = torch.bfloat16) -> torch.autocast:
    return torch.autocast(device, dtype=precision)


def affordable(backbone: str, size: int, device: str) -> bool:
    """Whether a step takes seconds, not minutes."""
    spec = get_spec(backbone)
    parameters = 12 * spec.depth * spec.embed_dim**2
    return device != "cpu" or parameters * (size // TOKEN_SIZE) ** 2 <= AFFORDABLE


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def table(results: dict[str, Any]) -> str:
    """Both tables as text."""
    lines = [f"{'encoder':42s} {'saved MiB':>10s} {'seconds':>9s}"]
    for name, row in results["encoders"].items():
        lines.append(f"{name:42s} {row.get('saved_mib', '-'):>10} {row.get('seconds', '-'):>9}")
    lines.append(f"\n{'layer, ms forward + backward':42s} {'upstream':>18s} {'folded':>18s} {'ratio':>6s}")
    for name, row in results["layers"].items():
        cells = [(row[form]["forward_ms"], row[form]["backward_ms"]) for form in LAYER_FORMS]
        shown = " ".join(f"{forward:8.1f} +{backward:8.1f}" for forward, backward in cells)
        lines.append(f"{name:42s} {shown} {sum(cells[1]) / sum(cells[0]):6.2f}")
    return "\n".join(lines)


def markdown(results: dict[str, Any]) -> str:
    """Saved MiB and seconds of every form side by side, for CPUs and GPUs apart."""
    names = [form.replace("_", " ") for form in FORMS]
    head = ["encoder", *(f"{name}, MiB" for name in names), *(f"{name}, s" for name in names)]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    rows: dict[str, dict[str, dict[str, Any]]] = {}
    for name, found in results["encoders"].items():
        backbone, size, _, form, device = name.split()
        rows.setdefault(f"{backbone} {size} px, {device}", {})[form] = found
    for name, forms in rows.items():
        cells = [f"{forms.get(form, {}).get(key, '')}" for key in ("saved_mib", "seconds") for form in FORMS]
        lines.append("| " + " | ".join([name, *cells]) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
