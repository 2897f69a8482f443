"""Which form of attention a ViT uses: upstream's, or the folded one that never holds the score matrix.

The threshold comes from ``python -m benchmarks.attention --layers-only`` (benchmarks/results/attention.json).
"""

from __future__ import annotations

from samunet.artifacts.model_spec import TOKEN_SIZE, WINDOW_TOKENS, SamSpec
from samunet.artifacts.plan import AttentionKind, DeviceClass

# Tokens per side. On a CPU a folded layer took 1.05 to 1.17 times upstream's time at 14 and 20, 0.81 to 1.00 from here.
LEAST_CPU_GRID = 28
_MIB = 1 << 20


def attention_kind(spec: SamSpec, input_size: int, device_class: DeviceClass) -> tuple[AttentionKind, str]:
    """The form of attention, with its reason.

    "upstream" keeps segment-anything's; "folded_global" folds the blocks that see the whole image and leaves those that
    see windows of 14 x 14 tokens; "folded" folds all.

    Args:
        spec: The backbone.
        input_size: Encoder side S in pixels.
        device_class: "cpu", or "gpu" for everything else.
    """
    if spec.family == "tiny_vit":
        return "upstream", "TinyViT attends inside small windows, with positions of its own kind"
    grid = input_size // TOKEN_SIZE
    if device_class == "gpu":
        return (
            "folded",
            f"no block holds its scores ({_scores_mib(spec, grid, 2)} in a block that sees the whole image)",
        )
    if grid < LEAST_CPU_GRID:
        return "upstream", f"over {grid} x {grid} tokens folding costs a CPU more time than it saves"
    return "folded_global", (
        f"over {grid} x {grid} tokens folding costs a CPU no time and saves {_scores_mib(spec, grid, 4)} of scores "
        f"per block and slice; windows of {WINDOW_TOKENS} x {WINDOW_TOKENS} are faster as upstream"
    )


def _scores_mib(spec: SamSpec, grid: int, bytes_per_score: int) -> str:
    """Size of one score matrix of all heads."""
    return f"{spec.num_heads * grid**4 * bytes_per_score / _MIB:.0f} MiB"
