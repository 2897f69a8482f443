"""Load published weights into a network strictly, with an exact report."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from samunet.core.errors import WeightsError
from samunet.models.formats import ENCODER, PublishedTensors, read_published
from samunet.models.sam.network import CLASS_SPECIFIC, SamNetwork, fresh_keys
from samunet.models.sam.positions import fit_positions
from samunet.models.weights import NONE, WeightsFile


@dataclass(frozen=True)
class LoadReport:
    """What happened to every key. Names are the network's.

    Args:
        kind: Kind of weights, "none" for random ones.
        loaded: Keys whose value is the file's (resized ones too).
        missing: Keys that the file does not hold and that start fresh: adapters, and the decoder of an encoder-only
            file.
        unexpected: Keys of the file that the network has no place for; always empty, or loading fails.
        reinitialised: Keys that depend on the classes and start fresh although SAM has some of them.
        resized: Positions made for another input size, with what was done.
        dropped: Keys of the file that no SAM uses.
        notes: Sentences worth showing.
    """

    kind: str
    loaded: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    reinitialised: tuple[str, ...] = ()
    resized: Mapping[str, str] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def as_lists(self) -> dict[str, list[str]]:
        """The report as it is stored beside a checkpoint; loaded keys are left out."""
        return {
            "missing": list(self.missing),
            "unexpected": list(self.unexpected),
            "reinitialised": list(self.reinitialised),
            "resized": [f"{key}: {what}" for key, what in self.resized.items()],
            "dropped": list(self.dropped),
            "notes": list(self.notes),
        }

    def summary(self) -> str:
        """One line for a log."""
        if self.kind == NONE:
            return "random weights"
        return (
            f"{self.kind} weights: {len(self.loaded)} tensors loaded, {len(self.resized)} of them resized, "
            f"{len(self.reinitialised)} class-specific re-initialised, {len(self.missing)} new"
        )


def load_weights(network: SamNetwork, file: WeightsFile, *, keep_heads: bool = False) -> LoadReport:
    """Fill a network from a file; what depends on the classes keeps its random start, whatever the shapes.

    Args:
        network: Before anything is injected; set to eval mode.
        file: The weights, with those of the decoder beside it if it holds only an encoder.
        keep_heads: Take SAM's own tokens and heads too (a promptable network).

    Raises:
        WeightsError: If keys or shapes do not fit exactly; the message lists them.
    """
    published = read_published(file.path)
    tensors, notes = _with_rest(published, file)
    wanted = network.state_dict()
    resized = fit_positions(tensors, wanted, ENCODER)
    renewed = fresh_keys(network.mask_decoder) + (() if keep_heads else CLASS_SPECIFIC)
    tensors = {key: tensor for key, tensor in tensors.items() if not key.startswith(renewed)}
    fresh = tuple(key for key in wanted if key.startswith(renewed))
    missing = tuple(key for key in wanted if key not in tensors and key not in fresh)
    unexpected = tuple(key for key in tensors if key not in wanted)
    allowed: set[str] = set()
    if published.encoder_only and file.rest is None:
        allowed = {key for key in wanted if not key.startswith(ENCODER)}
    _check(tensors, wanted, [key for key in missing if key not in allowed], unexpected, file.path)
    network.load_state_dict(tensors, strict=False)
    network.eval()
    return LoadReport(file.kind, tuple(tensors), missing, unexpected, fresh, resized, published.dropped, notes)


def _with_rest(published: PublishedTensors, file: WeightsFile) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The file's tensors, completed by those of the file that supplies the decoder."""
    if not published.encoder_only:
        return dict(published.tensors), ()
    if file.rest is None:
        return dict(published.tensors), ("the file holds an encoder only: the decoder starts from random weights",)
    others = {k: t for k, t in read_published(file.rest.path).tensors.items() if not k.startswith(ENCODER)}
    note = f"the file holds an encoder only: the decoder comes from {file.rest.path.name} ({file.rest.sha256})"
    return {**published.tensors, **others}, (note,)


def _check(
    tensors: Mapping[str, Tensor],
    wanted: Mapping[str, Tensor],
    missing: Collection[str],
    unexpected: Collection[str],
    path: Path,
) -> None:
    faults = [f"missing: {key}" for key in missing] + [f"unexpected: {key}" for key in unexpected]
    faults += [
        f"{key}: expected {tuple(wanted[key].shape)}, found {tuple(tensor.shape)}"
        for key, tensor in tensors.items()
        if key in wanted and tensor.shape != wanted[key].shape
    ]
    if faults:
        shown = [*faults[:12], f"... and {len(faults) - 12} more"] if len(faults) > 12 else faults
        raise WeightsError(
            f"the weights do not fit the network: {len(faults)} keys\n" + "\n".join(f"  - {text}" for text in shown),
            file=path,
            todo="give weights of the planned backbone, or plan for the backbone of these weights",
        )
