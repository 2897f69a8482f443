"""Memory, schedule, adaptation and hardware: figures against counts made with the real modules."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.cells import RESULTS
from samunet.artifacts.method import DecoderMethod, EncoderMethod, Lora, Method, NoDepth
from samunet.artifacts.model_spec import get_spec
from samunet.core.errors import UsageError
from samunet.core.files import read_json
from samunet.planners import hardware, memory, peft, schedule, sizes

GIB = 1 << 30
SIZES = RESULTS / "sizes.json"


def lora(rank: int = 4, targets: tuple[str, ...] = ("q", "v")) -> Method:
    return Method(encoder=EncoderMethod(train="adapters", adapters=(Lora(rank=rank, targets=targets),)))


METHODS = {
    "full": Method(encoder=EncoderMethod(train="full")),
    "lora": lora(),
    "frozen": Method(encoder=EncoderMethod(train="frozen")),
}


def load(name: str = "vit_b", size: int = 224, **changes: object) -> memory.Load:
    base = memory.Load(get_spec(name), size, size // 4, 3, 1, METHODS["full"])
    return replace(base, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["vit_t", "vit_xs", "vit_t_xs"])
def test_parameters_and_operations_are_those_of_the_modules(name: str) -> None:
    """The formulas meet what the built network holds and computes, within 15 percent."""
    torch = pytest.importorskip("torch")
    from torch.utils.flop_counter import FlopCounterMode

    from samunet.models.sam.network import build_network

    network = build_network(get_spec(name), image_size=224, num_tokens=3).train()
    parameters = sum(p.numel() for p in network.image_encoder.parameters())
    assert memory.encoder_parameters(get_spec(name), 224) == pytest.approx(parameters, rel=0.15)
    images = torch.randn(1, 3, 224, 224)
    with FlopCounterMode(display=False) as flops:
        network(images)
    predicted = schedule.forward_gflop(get_spec(name), METHODS["full"], 224, 3)
    assert predicted == (pytest.approx(flops.get_total_flops() / 1e9, rel=0.15), 0.0)


@pytest.mark.parametrize("size", [112, 224, 512])
def test_operations_of_windowed_blocks_are_those_of_their_padded_tokens(size: int) -> None:
    """Windows are padded to 14 tokens before their projections; a ViT whose blocks are mostly windowed shows it."""
    torch = pytest.importorskip("torch")
    from torch.utils.flop_counter import FlopCounterMode

    from samunet.models.sam.network import build_network

    size_of_test = {"embed_dim": 384, "depth": 6, "num_heads": 6, "global_blocks": (5,)}
    spec = get_spec("vit_xs").model_copy(update=size_of_test)
    encoder = build_network(spec, image_size=size, num_tokens=3).image_encoder
    with FlopCounterMode(display=False) as flops, torch.no_grad():
        encoder(torch.randn(1, 3, size, size))
    tokens = (size / 16) ** 2
    outside = 2 * tokens * (spec.embed_dim * (3 * 256 + 256) + 9 * 256**2)
    predicted = schedule._vit_flop(spec, tokens) + outside
    assert predicted == pytest.approx(flops.get_total_flops(), rel=0.03)


def test_published_orders_of_memory() -> None:
    """At 1024 px full fine-tuning needs more than LoRA, LoRA more than frozen, checkpointing a fraction."""
    full, lora, frozen = (memory.training_bytes(load(size=1024, method=METHODS[t])) for t in ("full", "lora", "frozen"))
    assert full > lora > 1.5 * frozen
    assert 0.5 * GIB < full - lora < 2.5 * GIB
    kept = memory.training_bytes(load(size=1024, method=METHODS["lora"], checkpointing=True))
    assert kept < 0.6 * lora


def test_largest_batch_fits_and_is_capped() -> None:
    """The batch found fits the budget, one more does not, and the cap holds."""
    found = memory.largest_batch(load(), budget_gib=6.0, cap=1000)
    part = replace(load(), accumulates=True)
    needs = [memory.training_bytes(replace(part, slices=slices)) for slices in (found, found + 1)]
    assert needs[0] <= 6 * GIB < needs[1]
    assert memory.largest_batch(load(), budget_gib=60.0, cap=7) == 7
    assert memory.largest_batch(load(), budget_gib=0.5, cap=7) == 0


def test_cpu_steps_follow_minutes_batch_and_size() -> None:
    """Twice the minutes give twice the steps, twice the batch half, four times the pixels about a quarter."""
    spec, method = get_spec("vit_t"), METHODS["full"]

    def steps(size: int = 224, *, batch: int = 8, tile: int = 0, minutes: float = 60) -> int:
        return schedule.cpu_steps(spec, method, size, 3, batch=batch, tile_vox=tile, minutes=minutes)

    base = steps()
    assert steps(minutes=120) == pytest.approx(2 * base, rel=0.01)
    assert steps(batch=16) == pytest.approx(base / 2, rel=0.05)
    assert steps(448) == pytest.approx(base / 4, rel=0.05)
    assert 0.5 * base < steps(tile=500) < 0.8 * base


def test_speed_on_a_cpu_is_that_of_measured_cells() -> None:
    """From 112 to 448 px, tiles of 36 to 510 voxels, 2 to 38 maps: within a third on one of two threads.

    Up to 1.4 times as fast where tiles are large and the cell was measured since the loss takes fewer passes over them.
    """
    maps = {"Dataset021_SunnybrookLV": 2, "Dataset022_MouseBrain": 38, "Dataset023_CurvasCT2D": 4}
    maps |= {
        name: 2 + name.endswith("AndHead") for name in {c["dataset"] for c in read_json(SIZES).values()} - set(maps)
    }
    off = {}
    for name, cell in read_json(SIZES).items():
        shape = (get_spec(cell["backbone"]), METHODS["full"], cell["input_size"], maps[cell["dataset"]])
        two = schedule.cpu_images_per_second(*shape, batch=cell["batch_size"], tile_vox=cell["tile_vox"])
        off[name] = 2 * cell["images_per_second"] / two
    assert off
    assert {name: ratio for name, ratio in off.items() if not 0.67 < ratio < 1.45} == {}


@pytest.mark.parametrize(("stride", "width", "number"), [(1, 8, 1), (1, 16, 2), (2, 16, 1)])
def test_operations_of_the_side_path_are_counted(stride: int, width: int, number: int) -> None:
    """The formula is what torch counts, beside what SAM's own decoder takes."""
    torch = pytest.importorskip("torch")
    from torch.utils.flop_counter import FlopCounterMode

    from samunet.models.decoders.side_path import SidePath
    from samunet.models.sam.network import build_mask_decoder

    counted = {}
    for upsampler in ("sam", "side_path"):
        decoder = build_mask_decoder(3, upsampler, path=SidePath(stride, width, number))  # type: ignore[arg-type]
        decoder.output_upscaling.images = torch.randn(1, 3, 64, 64)
        with FlopCounterMode(display=False) as flops, torch.no_grad():
            decoder.output_upscaling(torch.randn(1, 256, 4, 4))
        counted[upsampler] = flops.get_total_flops()
    masks = 2 * (64 // stride) ** 2 * width * 3
    method = DecoderMethod(upsampler="side_path", path_stride=stride, path_width=width, path_convolutions=number)
    expected = pytest.approx(counted["side_path"] - counted["sam"] + masks, rel=0.02)
    assert schedule.side_path_flop(method, 64, 3) == expected


def test_operations_of_the_unet_are_counted() -> None:
    """The formula is what torch counts."""
    torch = pytest.importorskip("torch")
    from torch.utils.flop_counter import FlopCounterMode

    from samunet.models.fusion import FusionUNet

    with FlopCounterMode(display=False) as flops, torch.no_grad():
        FusionUNet(3, 3, width=8)(torch.randn(1, 3, 64, 64), torch.randn(1, 256, 4, 4))
    assert schedule.unet_flop(8, 64, 3) == pytest.approx(flops.get_total_flops(), rel=0.02)


def test_steps_of_datasets_stay_within_limits() -> None:
    """A hundred passes, but neither a handful of steps for few slices nor days for many."""
    assert schedule.dataset_steps(96, 8)[0] == 3000
    assert schedule.dataset_steps(4000, 24)[0] == 16667
    assert schedule.dataset_steps(10**6, 24)[0] == 40_000


def test_a_slice_of_many_tiles_is_worth_a_pass_over_each() -> None:
    """A sample sees one tile, so that a hundred passes over a slice are as many over its tiles, and are said so."""
    steps, reason = schedule.dataset_steps(1000, 24, tiles_per_slice=4.5)
    assert steps == 18_750
    assert "1000 labelled slices, of which each takes 4.5 tiles," in reason
    assert schedule.dataset_steps(4000, 24, tiles_per_slice=1.0) == schedule.dataset_steps(4000, 24)
    assert sizes.tiles_per_slice([(20, 100, 50), (1, 300, 450), (7, 90, 30)], 150) == 1.0
    assert sizes.tiles_per_slice([(1, 300, 450)] * 3 + [(1, 100, 100)], 150) == 6.0
    assert sizes.tiles_per_slice([(1, 100, 450)], 150) == 3.0


def test_epochs_hold_all_steps() -> None:
    """Iterations times epochs cover the steps, with about forty epochs on a CPU."""
    for steps in (1, 50, 1066, 20_000):
        for on_cpu in (True, False):
            iterations, epochs = schedule.epochs(steps, on_cpu=on_cpu)
            assert iterations * epochs >= steps
    assert 40 <= schedule.epochs(1066, on_cpu=True)[1] <= 42


def test_warmup_and_average_follow_the_length_of_training() -> None:
    """250 steps of warm-up and a slow average for long trainings, a tenth and a fast average for short ones."""
    assert schedule.warmup_steps(10_000)[0] == 250
    assert schedule.warmup_steps(400)[0] == 40
    assert schedule.warmup_steps(3)[0] == 1
    assert schedule.ema_decay(10)[0] == 0.9
    assert schedule.ema_decay(10**6)[0] == 0.999


@pytest.mark.parametrize(
    ("slices", "classes", "expected"), [(100, 1, 4), (3999, 1, 4), (4000, 1, 5), (100, 16, 5), (10**7, 200, 8)]
)
def test_rank_grows_with_slices_and_classes(slices: int, classes: int, expected: int) -> None:
    """One more per doubling beyond a moderate dataset, from 4 to 8."""
    assert peft.lora_rank(slices, classes)[0] == expected


def test_learning_rates() -> None:
    """2e-3 at SAMed's rank and batch, more beside parts of a decoder; less with rank, small where all weights move."""
    assert peft.learning_rate(METHODS["lora"], weights="sam", batch=24)[0] == 2e-3
    assert peft.learning_rate(METHODS["lora"], weights="sam", batch=96)[0] == 2e-3
    assert peft.learning_rate(lora(8), weights="sam", batch=24)[0] == 1e-3
    assert peft.learning_rate(lora(4, ("q", "k", "v", "o")), weights="sam", batch=24)[0] == 1e-3
    assert peft.learning_rate(lora(8), weights="sam", batch=1)[0] == 5e-4
    in_parts = METHODS["lora"].model_copy(update={"decoder": DecoderMethod(train="lora")})
    assert [peft.learning_rate(in_parts, weights="sam", batch=batch)[0] for batch in (4, 24)] == [5e-3, 5e-3]
    in_parts = lora(8).model_copy(update={"decoder": DecoderMethod(train="lora")})
    assert peft.learning_rate(in_parts, weights="sam", batch=4)[0] == 2.5e-3
    assert peft.learning_rate(METHODS["full"], weights="sam", batch=8)[0] <= 1e-4
    assert peft.learning_rate(METHODS["full"], weights="none", batch=8)[0] == peft.FROM_SCRATCH_RATE


def test_what_trains() -> None:
    """Everything from random weights, adapters otherwise."""
    assert peft.encoder_method("none", 100, 1, depth=NoDepth())[0].train == "full"
    assert peft.encoder_method("sam", 100, 1, depth=NoDepth())[0] == METHODS["lora"].encoder


def test_a_given_budget_is_used_and_says_so() -> None:
    """Flags win over detection, and the reason says that they were given."""
    found = hardware.detect_budget(gpu_memory_gib=24.0, cpu_minutes=5.0)
    assert (found.gpu_memory_gib, found.cpu_minutes) == (24.0, 5.0)
    assert found.reason.count("as given") == 2
    assert found.cpu_memory_gib > 0


@pytest.mark.parametrize(
    ("statistics", "expected"),
    [
        ("", 8.0),
        (f"anon 5\ninactive_file {GIB}\nactive_file {GIB}\n", 8.8),
        (f"inactive_file {GIB // 2}\ntotal_inactive_file {GIB}\n", 8.8),
    ],
)
def test_the_control_group_limits_cpu_memory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, statistics: str, expected: float
) -> None:
    """Where a control group leaves 10 GiB, 8 are planned for; files that are merely cached do not count as used."""
    limit, usage, lines = (tmp_path / name for name in ("max", "current", "stat"))
    limit.write_text(f"{12 * GIB}\n")
    usage.write_text(f"{2 * GIB}\n")
    lines.write_text(statistics)
    available = {Path("/proc/meminfo"): f"MemAvailable: {500 * GIB // 1024} kB\n"}
    monkeypatch.setattr(hardware, "_CGROUPS", ((limit, usage, lines),))
    monkeypatch.setattr(hardware, "_read", lambda path: available.get(path) or path.read_text())
    assert hardware.detect_budget().cpu_memory_gib == pytest.approx(expected)


@pytest.mark.parametrize("given", [0.001, 0.0049, 1e-300, float("nan")])
def test_memory_that_no_gpu_has_is_refused(given: float) -> None:
    """What would be rounded to nothing is one message with what is possible."""
    with pytest.raises(UsageError, match="so little memory") as caught:
        hardware.detect_budget(gpu_memory_gib=given)
    assert f"{hardware.LEAST_GPU_GIB:g}" in str(caught.value.expected)
    assert hardware.detect_budget(gpu_memory_gib=hardware.LEAST_GPU_GIB).gpu_memory_gib == hardware.LEAST_GPU_GIB


def test_gpu_memory_is_assumed_where_no_gpu_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without nvidia-smi a modest GPU is planned for, and the plan says so."""
    monkeypatch.setattr(hardware.shutil, "which", lambda _: None)
    found = hardware.detect_budget()
    assert found.gpu_memory_gib == hardware.ASSUMED_GPU_GIB
    assert "assumed" in found.reason


def test_gpu_memory_is_that_of_the_smallest_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """nvidia-smi's answer in MiB, the smallest of several."""
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 24576\necho 12288\n")
    program.chmod(0o755)
    monkeypatch.setattr(hardware.shutil, "which", lambda _: str(program))
    assert hardware.detect_budget().gpu_memory_gib == 12.0


def test_a_cpu_trains_lora_in_a_pretrained_decoder_and_a_gpu_all_of_it() -> None:
    """By the steps that each takes; random weights train whole."""
    for kind in ("sam", "medsam", "mobile_sam", "ssl"):
        assert [peft.decoder_method(kind, device)[0].train for device in ("cpu", "gpu")] == ["lora", "full"]
    for device in ("cpu", "gpu"):
        assert peft.decoder_method("none", device)[0].train == "full"
