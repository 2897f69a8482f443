"""The form of attention on both sides of its threshold, and that the benchmark's rows support it."""

from __future__ import annotations

import pytest

from benchmarks.attention import RESULTS
from samunet.artifacts.model_spec import SPECS, get_spec
from samunet.core.files import read_json
from samunet.planners.attention import LEAST_CPU_GRID, attention_kind

VITS = sorted(name for name, spec in SPECS.items() if spec.family == "vit")


@pytest.mark.parametrize("backbone", VITS)
@pytest.mark.parametrize(
    ("size", "expected"), [(112, "upstream"), (224, "upstream"), (432, "upstream"), (448, "folded_global")]
)
def test_a_cpu_folds_large_grids_and_never_windows(backbone: str, size: int, expected: str) -> None:
    """Global blocks are folded from 28 tokens per side on; windows stay as upstream's."""
    assert attention_kind(get_spec(backbone), size, "cpu")[0] == expected


@pytest.mark.parametrize("backbone", VITS)
@pytest.mark.parametrize("size", [224, 448, 1024])
def test_a_gpu_folds_everything(backbone: str, size: int) -> None:
    """On a GPU scores of windows are kept in float32 too, so that every block is folded."""
    assert attention_kind(get_spec(backbone), size, "gpu")[0] == "folded"


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_tiny_vit_keeps_its_attention(device: str) -> None:
    """TinyViT cannot be folded, whatever the size."""
    assert {attention_kind(get_spec("vit_t"), size, device)[0] for size in (224, 1024)} == {"upstream"}


def test_the_reason_names_what_is_saved() -> None:
    """ViT-B at 1024 pixels has 12 heads x 4096 x 4096 scores per block: 768 MiB in float32, 384 in half precision."""
    assert "768 MiB" in attention_kind(get_spec("vit_b"), 1024, "cpu")[1]
    assert "384 MiB" in attention_kind(get_spec("vit_b"), 1024, "gpu")[1]


def test_measured_layers_support_the_threshold() -> None:
    """In the stored results a folded layer is slower on a CPU below the threshold, and not slower by 3 % from it on."""
    rows = {name: row for name, row in read_json(RESULTS)["layers"].items() if name.endswith("cpu")}
    assert len(rows) >= 10
    for name, row in rows.items():
        grid = int(name.split()[1])
        upstream, folded = (sum(row[form].values()) for form in ("upstream", "folded"))
        assert (folded <= 1.03 * upstream) == (grid >= LEAST_CPU_GRID), name
