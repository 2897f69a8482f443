"""Upstream's attention against the folded one: time of a step and bytes that autograd keeps, per backbone and size.

    python -m benchmarks.attention                         every row that is missing
    python -m benchmarks.attention --device cuda
    python -m benchmarks.attention --no-times              only the bytes, in a minute

One image, LoRA of rank 4 on q and v of every block, the rest frozen. Forms: upstream; folded_global (windows as
upstream); folded; checkpointed (folded, and blocks keep only their input).

- Bytes: every tensor that autograd holds after the forward pass under bfloat16 autocast, each storage once, without
  parameters and buffers. On a CPU they are counted with fake tensors, which have shapes but no memory.
- Times: forward and backward of the encoder; the forms take turns, and the least of several passes counts. On a GPU the
  whole encoder in bfloat16 autocast. On a CPU, in processor seconds of one thread and float32, four times a quarter of
  its blocks: the last of 3 (ViT-B), 6 (L) or 8 (H) has global attention, as in the whole, so only patch embedding and
  neck count four times. `--whole` times whole encoders there too, to see what that comes to.
- Layers: one attention layer alone, the least of several forward and backward passes; on a CPU in processor seconds of
  one thread, which others on the machine hardly disturb. The thresholds of samunet/planners/attention.py come from
  these.

Results go to benchmarks/results/attention.json with the machine, versions and command; rows in it are kept.
"""

from __future__ import annotations

import argparse
import sys
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from samunet.artifacts.method import Lora
from samunet.artifacts.model_spec import get_spec
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
QUARTER = 4
# No further turn once the forms of an encoder have taken so long.
ENOUGH_SECONDS = 60
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
    parser.add_argument("--repetitions", type=int, default=3, help="of a step, fewer where it takes minutes")
    parser.add_argument("--whole", action="store_true", help="on a CPU, time whole encoders beside their quarters")
    parser.add_argument("--no-times", action="store_true", help="count bytes only")
    parser.add_argument("--layers-only", action="store_true", help="time single layers only")
    options = parser.parse_args()
    results = read_json(RESULTS) if RESULTS.is_file() else {"encoders": {}, "layers": {}}
    if not options.layers_only:
        for backbone in options.backbones:
            for size in options.sizes:
                fill_encoder_rows(results, backbone, size, options)
    if not options.no_times:
        for backbone, grid, batch in LAYERS:
            fill_layer_row(results, backbone, grid, batch, options.device)
    print(table(results))


def fill_encoder_rows(results: dict[str, Any], backbone: str, size: int, options: argparse.Namespace) -> None:
    """Add what is missing of an encoder's rows, one per form, and write it down."""
    names = {form: f"{backbone} {size} px {form} {options.device}" for form in options.forms}
    rows = {form: dict(results["encoders"].get(name, {})) for form, name in names.items()}
    for form in [form for form, row in rows.items() if not {"saved_mib", "failed"} & row.keys()]:
        write_rows(results, names, {form: guarded(partial(count_row, backbone, size, form, options.device))})
    shares = [1] if options.device == "cuda" else [QUARTER, *([1] if options.whole else [])]
    for share in [] if options.no_times else shares:
        key = "seconds" if share == shares[0] else "whole_seconds"
        missing = [form for form, row in rows.items() if not {key, "failed"} & row.keys()]
        if missing:
            write_rows(results, names, time_rows(backbone, size, missing, key, share, options))


def write_rows(results: dict[str, Any], names: Mapping[str, str], found: Mapping[str, dict[str, Any]]) -> None:
    """Add what was measured to the rows of some forms."""
    for form, measures in found.items():
        row = results["encoders"].get(names[form], {}) | measures | {"provenance": describe(sys.argv[1:])}
        results["encoders"][names[form]] = row
        print(f"{names[form]}: {measures}", flush=True)
    write_json(RESULTS, results)


def guarded(measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What a measurement finds, or that the memory did not suffice."""
    try:
        return measure()
    except torch.OutOfMemoryError:
        return {"failed": "out of memory"}


def count_row(backbone: str, size: int, form: str, device: str) -> dict[str, Any]:
    """Saved bytes of a forward pass in bfloat16: fake on a CPU, real on a GPU."""
    fake = device == "cpu"
    with FakeTensorMode() if fake else nullcontext():
        encoder = build(backbone, size, form).to(device) if not fake else build(backbone, size, form)
        images = torch.randn(1, 3, size, size, device=device)
        saved = saved_bytes(encoder, images)
    return {"saved_mib": round(saved / 2**20, 1), "counted": "fake tensors" if fake else "real tensors"}


def time_rows(
    backbone: str, size: int, forms: Sequence[str], key: str, share: int, options: argparse.Namespace
) -> dict[str, dict[str, Any]]:
    """Least seconds of a step of several forms that take turns, and on a GPU the peak of allocated memory.

    Args:
        backbone: Its registered name.
        size: Input side in pixels.
        forms: Which.
        key: Name of the figure.
        share: A share of the blocks is timed: one of so many.
        options: Device and repetitions.
    """
    device = options.device
    threads = torch.get_num_threads()
    if device == "cpu":
        torch.set_num_threads(1)
    encoders = {form: build(backbone, size, form, share).to(device) for form in forms}
    images = torch.randn(1, 3, size, size, device=device)
    passes: dict[str, list[float]] = {form: [] for form in forms}
    found: dict[str, dict[str, Any]] = {form: {} for form in forms}
    for _ in range(options.repetitions):
        for form in [form for form in forms if "failed" not in found[form]]:
            found[form] |= guarded(partial(time_step, encoders[form], images, passes[form]))
        if sum(map(sum, passes.values())) > ENOUGH_SECONDS:
            break
    torch.set_num_threads(threads)
    for form in [form for form in forms if "failed" not in found[form]]:
        seconds = [round(share * s, 4) for s in passes[form]]
        timed = {key: min(seconds), f"all_{key}": seconds, "timed_in": "fp32" if device == "cpu" else "bf16"}
        found[form] |= timed | ({"blocks": f"1 of {share}, times {share}"} if share > 1 else {})
    return found


def time_step(encoder: VitEncoder, images: Tensor, passes: list[float]) -> dict[str, Any]:
    """Add the seconds of one forward and backward pass; returns what it needed of a GPU's memory on top."""
    device = images.device.type
    clock = time.process_time if device == "cpu" else time.perf_counter
    before = 0
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    synchronise(device)
    began = clock()
    with autocast(device) if device == "cuda" else nullcontext():
        embeddings = encoder(images)
    embeddings.float().square().mean().backward()
    synchronise(device)
    passes.append(clock() - began)
    if device == "cpu":
        return {}
    return {"peak_mib": round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)}


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


def build(backbone: str, size: int, form: str, share: int = 1) -> VitEncoder:
    """An encoder, or a share of its blocks, with random weights and LoRA on q and v of each, which alone trains."""
    spec = get_spec(backbone)
    if share > 1:
        depth = spec.depth // share
        assert spec.global_blocks == tuple(range(depth - 1, spec.depth, depth))
        spec = spec.model_copy(update={"depth": depth, "global_blocks": (depth - 1,)})
    encoder = VitEncoder(spec, image_size=size)
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
        saved, seconds = ([forms.get(form, {}).get(key, "") for form in FORMS] for key in ("saved_mib", "seconds"))
        cells = [*(f"{value}" for value in saved), *(f"{value:.3g}" if value else "" for value in seconds)]
        lines.append("| " + " | ".join([name, *cells]) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
