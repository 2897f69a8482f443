"""What of a model goes into a checkpoint: everything that is not exactly its base's."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from samunet.core.errors import CheckpointError
from samunet.models.loading import LoadReport
from samunet.models.segmentation import FULL, NETWORK, SegmentationModel


def note_base(model: SegmentationModel, report: LoadReport) -> None:
    """Remember which tensors are the base file's own and stay so.

    A fully trained encoder changes its buffers too, so then nothing is left out and the checkpoint needs no base.
    """
    if model.encoder_tuning == FULL:
        return
    loaded = {NETWORK + key for key in report.loaded if key not in report.resized}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    model.untouched = frozenset(loaded - trained)


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
