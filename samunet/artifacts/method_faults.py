"""What a method does not go with: kinds of weights, slabs, encoders."""

from __future__ import annotations

from samunet.artifacts.method import Method
from samunet.artifacts.plan_parts import STORED, Planes


def faults_with_weights(method: Method, weights_kind: str, *, has_decoder: bool = True) -> list[str]:
    """What does not go with a kind of weights, each with what to change.

    Args:
        method: What is adapted and how.
        weights_kind: Kind of weights; "none" is random.
        has_decoder: Whether weights that are not random hold the mask decoder, or another file supplies it.
    """
    faults = []
    if weights_kind == "none" and method.encoder.train != "full":
        faults.append(
            f"an encoder that is {'frozen' if method.encoder.train == 'frozen' else 'adapted'} needs pretrained "
            "weights: give --weights, or set encoder.train to full"
        )
    if method.fusion.kind != "sam" or method.decoder.train == "full":
        return faults
    if weights_kind == "none":
        faults.append("parts of the decoder would stay random: give --weights, or set decoder.train to full")
    elif not has_decoder:
        faults.append(
            "these weights hold an encoder only, and parts of the decoder would stay random: set decoder.train to "
            "full, or give weights with a decoder"
        )
    return faults


def faults_with_slabs(method: Method, slab_depth: int) -> list[str]:
    """What does not go with slabs of so many slices, each with what to change."""
    if slab_depth == 1 or method.depth.kind != "none":
        return []
    return [f"slabs of {slab_depth} slices need a depth mechanism: set depth.kind, or slab_depth to 1"]


def faults_with_planes(method: Method, planes: Planes) -> list[str]:
    """What does not go with the planes in which volumes are cut, each with what to change."""
    if not method.promptable or planes == STORED:
        return []
    return [f"prompts point at stored slices: set prompts.kind to none, or planes to {', '.join(STORED)}"]


def faults_with_blocks(method: Method, num_blocks: int) -> list[str]:
    """What does not go with an encoder of so many attention blocks, each with what to change."""
    faults = []
    places = {f"encoder.adapters.{i}": adapter for i, adapter in enumerate(method.encoder.adapters)}
    for place, part in (places | {"depth": method.depth}).items():
        blocks = getattr(part, "blocks", None)
        unknown = [index for index in blocks or () if not -num_blocks <= index < num_blocks]
        if unknown:
            faults.append(
                f"the encoder has blocks 0 to {num_blocks - 1} (from the end -1 to -{num_blocks}), not "
                f"{', '.join(map(str, unknown))}: set {place}.blocks"
            )
        ranks = getattr(part, "ranks", None)
        if ranks is not None and blocks is None and len(ranks) != num_blocks:
            faults.append(f"{num_blocks} blocks need as many ranks, found {len(ranks)}: set {place}.ranks, or to null")
    return faults
