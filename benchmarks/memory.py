"""The planner's memory model against counted training steps, over backbones, sizes, slabs, methods and precision.

    python -m benchmarks.memory                        every row that is missing
    python -m benchmarks.memory --only vit_b lora      rows whose name holds all these words
    python -m benchmarks.memory --again                measure rows that exist too
    python -m benchmarks.memory --device cuda          on a GPU: its own peak of allocated memory
    python -m benchmarks.memory --device cpu           real tensors on this processor, where that takes seconds
    python -m benchmarks.memory --table                only print

Measured is the peak of the bytes of all tensors alive during a training step as the trainer takes it: weights, two
moments, moving average, images, saved activations, temporaries, gradients, the update. Without a GPU the tensors are
fake: they have shapes and types, and the operations that would run are followed one by one, so that every size can be
counted. Autocast then keeps in float32 what it keeps on a GPU. What a library takes for itself (a GPU's context, work
space of convolutions) is not counted, nor predicted but for the fixed share that the plan adds. Real steps on a
processor are watched by the profiler; how far the process's resident memory (Linux) grows in a step stands beside, from
a process of its own.

Results go to benchmarks/results/memory.json and as tables to the end of documentation/reference/memory.md; the
prediction is always that of the model as it is.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import sys
from collections.abc import Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.training_step import allocate, count, profile, resident
from samunet.artifacts.method import Bottleneck, DecoderMethod, EncoderMethod, Lora, Method
from samunet.artifacts.model_spec import STOCK_TOKENS, get_spec
from samunet.core.files import read_json, write_json, write_text
from samunet.pipeline.provenance import describe
from samunet.planners.memory import Load, tensor_bytes
from samunet.planners.presets import PRESETS

RESULTS = Path(__file__).parent / "results" / "memory.json"
PAGE = Path(__file__).parents[1] / "documentation" / "reference" / "memory.md"
HEADING = "## Predicted against measured"
GIB = 1 << 30
NUM_TOKENS = 3
LIMIT = 0.15
BACKBONES = ("vit_xs", "vit_t_xs", "vit_t", "vit_b", "vit_l", "vit_h")
LORA = PRESETS["samed"].method
LATE = Method(encoder=EncoderMethod(train="adapters", adapters=(Lora(blocks=(-3, -2, -1)),)))
METHODS: dict[str, Method] = {
    "decoder": Method(encoder=EncoderMethod(train="frozen")),
    "lora": LORA,
    "full": Method(encoder=EncoderMethod(train="full")),
    "lora_late": LATE,
    "adapters": Method(encoder=EncoderMethod(train="adapters", adapters=(Bottleneck(),))),
    "side_path": LORA.model_copy(update={"decoder": DecoderMethod(upsampler="side_path")}),
    "side_path_at_stride_2": LORA.model_copy(update={"decoder": DecoderMethod(upsampler="side_path", path_stride=2)}),
    "side_path_supervised": LORA.model_copy(
        update={"decoder": DecoderMethod(upsampler="side_path", deep_supervision=True)}
    ),
    **{name: PRESETS[name].method for name in ("samed_s", "peft_dora", "sam_adapter", "med_sa", "ma_sam", "nnsam")},
}


def loads() -> dict[str, Load]:
    """All rows by name."""
    rows = [
        *((b, s, m, p, a) for b in BACKBONES for m in ("decoder", "lora", "full") for s, p, a in _FORMS),
        *((b, s, m, p, a) for b in ("vit_b", "vit_h") for m in ("lora", "full") for s, p, a in _OTHER_FORMS),
        *((b, s, m, p, a) for b in ("vit_xs", "vit_t", "vit_b") for m in METHODS for s, p, a in _FORMS[1:3]),
        *(("vit_h", 1024, m, "bf16", "folded") for m in ("sam_adapter", "med_sa", "ma_sam")),
    ]
    found = [load_of(*row) for row in rows]
    slabs = [(b, m, d) for b in ("vit_t", "vit_b") for m in ("med_sa", "ma_sam") for d in (1, 5)]
    for precision in ("fp32", "bf16"):
        found += [load_of(b, 224, m, precision, "upstream", slab_depth=d, slices=d) for b, m, d in slabs]
    for backbone in ("vit_t", "vit_b", "vit_h"):
        for method in ("lora", "full", "med_sa", "sam_adapter"):
            for form in (_FORMS[1], _FORMS[3]):
                size, precision, attention = form
                found.append(load_of(backbone, size, method, precision, attention, checkpointing=True))
    for backbone in ("vit_t", "vit_b"):
        for precision in ("fp32", "bf16"):
            found += [load_of(backbone, 224, "lora", precision, "upstream", slices=n) for n in (1, 8, 16)]
            found.append(load_of(backbone, 448, "lora", precision, "upstream", tile_vox=448))
            found.append(load_of(backbone, 448, "decoder", precision, "upstream", num_tokens=20))
    found += [load_of(*row, **changes) for row, changes in _as_planned()]
    return {name_of(load): load for load in found}


def _as_planned() -> list[tuple[tuple[str, int, str, str, str], dict[str, Any]]]:
    """Rows like those that plans for GPUs come to: large inputs, whole slices, many structures, steps in parts."""
    rows: list[tuple[tuple[str, int, str, str, str], dict[str, Any]]] = []
    for backbone in ("vit_xs", "vit_t", "vit_b"):
        lora = (backbone, 1120, "lora", "bf16", "folded")
        for tokens, tile in ((NUM_TOKENS, 1120), (14, 280), (101, 256)):
            rows.append((lora, {"num_tokens": tokens, "tile_vox": tile, "slices": 8, "checkpointing": True}))
        rows.append((lora, {"accumulates": True}))
    for backbone in ("vit_t", "vit_b", "vit_h"):
        for checkpointing in (False, True):
            full = (backbone, 448, "full", "bf16", "folded")
            rows.append((full, {"checkpointing": checkpointing, "accumulates": True}))
    rows += [(("vit_b", 448, name, "bf16", "folded"), {"accumulates": True}) for name in ("med_sa", "nnsam")]
    rows.append((("vit_h", 1120, "full", "bf16", "folded"), {"slices": 1, "checkpointing": True, "accumulates": True}))
    rows.append((("vit_t_xs", 448, "full", "fp32", "upstream"), {"num_tokens": 101, "tile_vox": 256, "slices": 8}))
    return rows


_FORMS = (
    (224, "fp32", "upstream"),
    (448, "fp32", "folded_global"),
    (448, "bf16", "folded"),
    (1024, "bf16", "folded"),
)
_OTHER_FORMS = (
    (512, "fp32", "upstream"),
    (672, "bf16", "upstream"),
    (1024, "bf16", "upstream"),
    (896, "fp32", "folded"),
)


def load_of(backbone: str, size: int, name: str, precision: str, attention: str, **changes: Any) -> Load:
    """A load: slabs of three where the method has a depth mechanism, else two slices."""
    method = METHODS[name]
    depth = 3 if method.depth.kind != "none" else 1
    load = Load(
        get_spec(backbone),
        size,
        size // 4,
        STOCK_TOKENS if method.promptable else NUM_TOKENS,
        max(2, depth),
        method,
        slab_depth=depth,
        precision=precision,
        attention="upstream" if get_spec(backbone).family == "tiny_vit" else attention,
    )
    return replace(load, **changes)


def name_of(load: Load) -> str:
    """The load in words."""
    words = [load.spec.name, f"{load.input_size}", method_of(load), load.precision, load.attention, f"x{load.slices}"]
    words += [f"slabs of {load.slab_depth}"] * (load.slab_depth > 1) + ["checkpointed"] * load.checkpointing
    words += ["in parts"] * load.accumulates
    words += [f"tile {load.tile_vox}"] * (load.tile_vox != load.input_size // 4)
    return " ".join(words + [f"{load.num_tokens} tokens"] * (load.num_tokens > STOCK_TOKENS))


def method_of(load: Load) -> str:
    """The name of a load's method."""
    return next(name for name, method in METHODS.items() if method == load.method)


def affordable(load: Load) -> bool:
    """Whether a step takes a processor seconds, and keeps there what it keeps on a GPU."""
    small = load.spec.name in ("vit_xs", "vit_t_xs", "vit_t", "vit_b") and load.input_size == 224
    return small and load.slices <= 3 and not load.is_half


def main() -> None:
    """Measure the rows that are missing, print the table and write it to the documentation."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="fake", choices=tuple(MEASURES))
    parser.add_argument("--only", nargs="+", default=[], help="words that the row's name holds")
    parser.add_argument("--again", action="store_true", help="measure rows that exist too")
    parser.add_argument("--table", action="store_true", help="only print the table")
    options = parser.parse_args()
    results: dict[str, Any] = read_json(RESULTS) if RESULTS.is_file() else {"rows": {}}
    for name, load in {} if options.table else loads().items():
        row = results["rows"].setdefault(f"{name} {options.device}", {})
        wanted = all(word in name.split() for word in options.only)
        if (wanted and (options.again or "peaks" not in row)) and (options.device != "cpu" or affordable(load)):
            row |= measure(load, options.device)
            results["provenance"] = describe(sys.argv[1:])
            write_json(RESULTS, predicted(results))
    results = predicted(results)
    if not options.table:
        write_json(RESULTS, results)
        write_text(PAGE, page(results))
    print("\n".join([*summary(results), *furthest(results), *tables(results)]))


def measure(load: Load, device: str) -> dict[str, Any]:
    """A row: peaks of the phases, or that memory ran out."""
    try:
        peaks = MEASURES[device](load)
    except torch.OutOfMemoryError:
        return {"failed": "out of memory"}
    row = {"peaks": peaks, "measured": max(peaks.values())}
    if device != "cpu":
        return row
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as alone:
        return row | {"resident": alone.submit(resident, load).result()}


def predicted(results: dict[str, Any]) -> dict[str, Any]:
    """The results with the model's predictions, without rows that are not measured or not planned any more."""
    known = loads()
    rows = {}
    for name, row in results["rows"].items():
        load = known.get(name.rsplit(" ", 1)[0])
        if load is not None and "measured" in row:
            bytes_ = tensor_bytes(load)
            rows[name] = row | {"predicted": bytes_, "ratio": round(bytes_ / row["measured"], 4)}
    return results | {"rows": rows}


def page(results: Mapping[str, Any]) -> str:
    """The page of the documentation with its tables made anew."""
    text = PAGE.read_text(encoding="utf-8").split(HEADING)[0]
    return text + "\n".join([HEADING, "", *summary(results), *furthest(results), *tables(results), ""])


def summary(results: Mapping[str, Any]) -> list[str]:
    """Lines of a table: the range of ratios per method, backbone, precision and device."""
    known, groups = loads(), dict[str, list[float]]()
    for name, row in results["rows"].items():
        load = known[name.rsplit(" ", 1)[0]]
        words = (method_of(load), load.spec.name, load.precision, "checkpointed" * load.checkpointing)
        for group in filter(None, ("all", *words, DEVICES[name.rsplit(" ", 1)[1]])):
            groups.setdefault(group, []).append(row["ratio"])
    lines = ["| rows | number | predicted / measured |", "| --- | --- | --- |"]
    return [*lines, *(f"| {name} | {len(r)} | {min(r):.3f} to {max(r):.3f} |" for name, r in groups.items())]


def furthest(results: Mapping[str, Any], number: int = 12) -> list[str]:
    """Lines of a table: the rows that are furthest off."""
    rows = results["rows"]
    ordered = sorted(rows, key=lambda name: -abs(math.log(rows[name]["ratio"])))
    beyond = sum(abs(row["ratio"] - 1) > LIMIT for row in rows.values())
    return _rows(f"furthest off; beyond {LIMIT:.0%} are {beyond} of {len(rows)}", ordered[:number], rows)


def tables(results: Mapping[str, Any]) -> list[str]:
    """Lines of a table per device with all its rows."""
    rows, lines = results["rows"], []
    for device, title in DEVICES.items():
        names = [name for name in rows if name.endswith(f" {device}")]
        lines += _rows(f"all {title}", names, rows) if names else []
    return lines


def _rows(title: str, names: Iterable[str], rows: Mapping[str, Any]) -> list[str]:
    names = list(names)
    keys = ["measured", "predicted"] + ["resident"] * all("resident" in rows[name] for name in names)
    lines = [
        "",
        f"| {title} | {' | '.join(f'{key} GiB' for key in keys)} | ratio |",
        f"| --- {'| --- ' * len(keys)}| --- |",
    ]
    for name in names:
        sizes = " | ".join(f"{rows[name][key] / GIB:.2f}" for key in keys)
        lines.append(f"| {name.rsplit(' ', 1)[0]} | {sizes} | {rows[name]['ratio']:.3f} |")
    return lines


DEVICES = {"fake": "counted", "cpu": "real, on a CPU", "cuda": "real, on a GPU"}
MEASURES = {"fake": count, "cpu": profile, "cuda": allocate}

if __name__ == "__main__":
    main()
