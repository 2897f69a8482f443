"""What of a model goes into a checkpoint: everything that is not exactly its base's."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import Tensor

from samunet.core.errors import CheckpointError
from samunet.models.segmentation import SegmentationModel


def note_base(model: SegmentationModel, names: Collection[str]) -> None:
    """Remember which tensors are the base file's own and stay so.

    A fully trained encoder changes its buffers too, so then nothing is left out and the checkpoint needs no base.

    Args:
        model: With its final ``requires_grad``.
        names: Tensors whose values are exactly the file's.
    """
    if model.method.encoder.train == "full":
        return
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    model.untouched = frozenset(set(names) - trained)


def trained_state(model: SegmentationModel) -> dict[str, Tensor]:
    """Every parameter and buffer that was trained or differs from the base; without a base, all of them."""
    return {name: t.detach() for name, t in model.state_dict().items() if name not in model.untouched}


def load_trained_state(model: SegmentationModel, state: Mapping[str, Tensor]) -> None:
    """Restore what :func:`trained_state` gave; the model keeps its mode.

    Raises:
        CheckpointError: If names or shapes are not exactly those the model stores.
    """
    wanted = trained_state(model)
    faults = [f"missing: {name}" for name in wanted if name not in state]
    faults += [f"unexpected: {name}" for name in state if name not in wanted]
    faults += [
        f"{name}: expected {tuple(wanted[name].shape)}, found {tuple(tensor.shape)}"
        for name, tensor in state.items()
        if name in wanted and wanted[name].shape != tensor.shape
    ]
    if faults:
        raise CheckpointError(
            f"the checkpoint does not fit the model: {len(faults)} tensors\n"
            + "\n".join(f"  - {text}" for text in faults[:12]),
            todo="use the base weights, backbone and classes it was trained with",
        )
    model.load_state_dict(dict(state), strict=False)
