"""Whole-volume Dice while training, through the same sliding prediction and restoration as samunet_predict."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
from numpy.typing import NDArray

from samunet.artifacts.dataset import Case
from samunet.core.geometry import Geometry
from samunet.core.labels import LabelSpec
from samunet.evaluation.case import evaluate_case
from samunet.imageio import read_labels
from samunet.inference.oracle import OracleSettings, case_prompts
from samunet.inference.predictor import Predictor
from samunet.preprocessing.pipeline import PreprocessedCase
from samunet.preprocessing.store import CaseStore


@dataclass(frozen=True)
class _Reference:
    labels: NDArray[Any]
    geometry: Geometry


class VolumeEvaluator:
    """Mean Dice of a model over a few cases, on the grid of their label files.

    Args:
        store_folder: Preprocessed images.
        cases: Raw cases to evaluate, with label files.
        labels: Meaning of the values.
        oracle: How prompts are made from the references, for a model that needs some.

    Attributes:
        limit: How many of the cases are evaluated; None: not limited yet.
    """

    def __init__(
        self, store_folder: Path, cases: Sequence[Case], labels: LabelSpec, *, oracle: OracleSettings | None = None
    ) -> None:
        self._store, self._cases, self._labels = CaseStore(store_folder), list(cases), labels
        self._oracle = oracle
        self._references: dict[str, _Reference] = {}
        self.limit: int | None = None

    def mean_dice(
        self, predictor: Predictor, seconds: float | None = None, *, clock: Callable[[], float] = monotonic
    ) -> float | None:
        """Mean over cases of the mean over structures; None if no case has a score.

        Args:
            predictor: The model to evaluate.
            seconds: About how long it may take; without a limit yet, it becomes the number of cases that allows.
            clock: What tells the seconds.
        """
        began = clock()
        scores = [self._case_dice(predictor, case) for case in self._cases[:1]]
        if seconds is not None and self.limit is None:
            self.limit = max(1, int(seconds / max(clock() - began, 1e-3)))
        scores += [self._case_dice(predictor, case) for case in self._cases[1 : self.limit]]
        known = [score for score in scores if score is not None]
        return float(np.mean(known)) if known else None

    def _case_dice(self, predictor: Predictor, case: Case) -> float | None:
        opened = self._store.open(case.name)
        reference = self._reference(case)
        if self._oracle is None:
            restored = predictor.predict_preprocessed(opened.data[:], opened.record)
        else:
            prompts = case_prompts(reference.labels, reference.geometry, self._oracle, case=case.name)
            prepared = PreprocessedCase(opened.data[:], None, opened.record)
            restored = predictor.predict_prompted_preprocessed(prepared, reference.geometry, prompts, propagate=False)
        metrics = evaluate_case(
            reference.labels, restored.labels, labels=self._labels, geometry=reference.geometry, surface=False
        )
        dice = [m.Dice for m in metrics.values() if m.Dice is not None]
        return float(np.mean(dice)) if dice else None

    def _reference(self, case: Case) -> _Reference:
        if case.name not in self._references:
            assert case.label is not None
            volume = read_labels(case.label, case=case.name)
            self._references[case.name] = _Reference(volume.data[0], volume.geometry)
        return self._references[case.name]
