"""What the gradient of the loss looks like before anything is adapted: measured once, read by the planner as a fact."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from samunet.artifacts.fingerprint import Fingerprint
from samunet.artifacts.plan import WeightsKind
from samunet.core.config import Schema, load_schema, save_schema
from samunet.core.files import sha256_json

PROBE_VERSION = 1
NUM_SINGULAR_VALUES = 32

Target = Literal["q", "k", "v", "o"]


class ProjectionFacts(Schema):
    """The gradient of one projection of one attention block, averaged over batches.

    Args:
        block: Attention block, counted over the whole encoder.
        target: Projection.
        singular_values: The largest of the mean gradient, falling.
        energy: Share of the mean gradient's squared norm in the first of them, the first two, and so on.
        norm: Frobenius norm of the mean gradient.
        batch_norm: Mean over batches of the Frobenius norm of a batch's gradient.
    """

    block: int = Field(ge=0)
    target: Target
    singular_values: tuple[float, ...] = Field(min_length=1, max_length=NUM_SINGULAR_VALUES)
    energy: tuple[float, ...]
    norm: float = Field(ge=0)
    batch_norm: float = Field(ge=0)

    @model_validator(mode="after")
    def _ordered(self) -> ProjectionFacts:
        values = self.singular_values
        if any(value < 0 for value in values) or list(values) != sorted(values, reverse=True):
            raise ValueError("singular_values must fall and not be negative")
        if len(self.energy) != len(values):
            raise ValueError(f"energy needs as many entries as singular_values, found {len(self.energy)}")
        return self

    @property
    def signal_to_noise(self) -> float:
        """Norm of the mean gradient over the mean norm: 1 where batches agree, about 1 / sqrt(batches) for noise."""
        return self.norm / self.batch_norm if self.batch_norm > 0 else 0.0


class Probe(Schema):
    """Gradients of the pretrained encoder's projections on a dataset.

    Args:
        configuration: Planned configuration whose slices were used.
        weights: Kind of weights.
        weights_sha256: Hash of their file.
        backbone: Image encoder.
        input_size: Encoder input in pixels.
        seed: Of the fresh head and the batches.
        fold: Its training cases were used.
        warmup_steps: Steps in which only the fresh decoder was trained before.
        warmup_loss: Mean loss over the first and over the last tenth of these steps.
        batches: Batches that the gradient is averaged over.
        batch_size: Slices of each.
        projections: One per block and projection.
        dataset: Folder name of the dataset; None in files of before it was written.
        fingerprint_sha256: Hash of the facts that the plan was made from with which it was probed; None as above.
        provenance: When, where and with what.
    """

    configuration: str
    weights: WeightsKind
    weights_sha256: str
    backbone: str
    input_size: int
    seed: int
    fold: str
    warmup_steps: int = Field(ge=0)
    warmup_loss: tuple[float, float]
    batches: int = Field(ge=1)
    batch_size: int = Field(ge=1)
    projections: tuple[ProjectionFacts, ...] = Field(min_length=1)
    dataset: str | None = None
    fingerprint_sha256: str | None = None
    provenance: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _complete(self) -> Probe:
        places = [(p.block, p.target) for p in self.projections]
        blocks, targets = ({place[i] for place in places} for i in range(2))
        if len(set(places)) < len(places) or len(places) != len(blocks) * len(targets):
            raise ValueError("projections must hold every projection of every block once")
        return self

    def answers(self, other: Probe) -> bool:
        """Whether both are about the same configuration, weights and backbone."""
        return self._question() == other._question()

    def fault_with(self, fingerprint: Fingerprint) -> str | None:
        """Why it says nothing of a dataset with these facts, to end a sentence with; None if it was made from them."""
        if self.fingerprint_sha256 is None:
            return "does not say from which facts it was made"
        if self.fingerprint_sha256 == fingerprint.facts_sha256:
            return None
        if self.dataset not in (None, fingerprint.dataset):
            return f"was made on {self.dataset}"
        return "was made from other facts: images, labels or cases have changed since"

    def _question(self) -> tuple[str, str, str]:
        return self.configuration, self.weights, self.backbone


class Probes(Schema):
    """Every probe of a dataset, at most one per configuration, kind of weights and backbone.

    Args:
        version: Schema version.
        probes: In any order.
    """

    version: int = PROBE_VERSION
    probes: tuple[Probe, ...] = ()

    @model_validator(mode="after")
    def _readable(self) -> Probes:
        if self.version != PROBE_VERSION:
            raise ValueError(f"probe version {self.version} cannot be read, expected {PROBE_VERSION}: probe again")
        return self

    def find(self, *, configuration: str, weights: str, backbone: str) -> Probe | None:
        """The probe of a configuration, kind of weights and backbone."""
        wanted = (configuration, weights, backbone)
        return next((p for p in self.probes if (p.configuration, p.weights, p.backbone) == wanted), None)

    def with_probe(self, probe: Probe) -> Probes:
        """These probes and one more, in the place of an earlier one about the same."""
        kept = tuple(p for p in self.probes if not p.answers(probe))
        return Probes(probes=(*kept, probe))

    def carried_over(self, before: Fingerprint, after: Fingerprint) -> Probes:
        """These probes for a dataset as it would be: those that were made from its facts hold for the altered ones.

        Args:
            before: The dataset's facts.
            after: Its facts altered.
        """
        if not self.probes:
            return self
        altered = after.facts_sha256
        return Probes(
            probes=tuple(
                p if p.fault_with(before) else p.model_copy(update={"fingerprint_sha256": altered}) for p in self.probes
            )
        )

    @property
    def facts_sha256(self) -> str | None:
        """Hash of what was measured, wherever and whenever; None of no probe at all."""
        if not self.probes:
            return None
        # without what was not written then, so that an entry added later does not make older plans stale
        found = (p.model_dump(mode="json", exclude={"provenance"}, exclude_none=True) for p in self.probes)
        return sha256_json(sorted(found, key=str))


NO_PROBES = Probes()


def load_probes(path: Path) -> Probes:
    """Read probe.json; no file is no probe.

    Raises:
        ConfigError: If the file is not valid.
    """
    return load_schema(Probes, path) if path.is_file() else NO_PROBES


def save_probes(probes: Probes, path: Path) -> None:
    """Write probe.json."""
    save_schema(probes, path)
