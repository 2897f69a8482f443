"""The cross-validated masks and scores of candidates: one model at a time on the device, some cases after the other."""

from __future__ import annotations

import shutil
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from numpy.typing import NDArray

from samunet.artifacts.best import CaseScores
from samunet.artifacts.checkpoint import ENDING, read_plan
from samunet.artifacts.dataset import Case
from samunet.artifacts.workspace import fold_folder
from samunet.core.config import load_schema, save_schema
from samunet.core.errors import ConfigError
from samunet.core.geometry import Geometry
from samunet.core.labels import LabelSpec
from samunet.core.log import Reporter
from samunet.core.volume import Volume
from samunet.evaluation.case import evaluate_case
from samunet.imageio import read_labels, read_volume, write_labels
from samunet.imageio.formats import ending_of
from samunet.inference.ensemble import check_same_task, mean_labels, on_disk
from samunet.inference.predictor import Predictor
from samunet.models.device import release_memory
from samunet.pipeline.candidates import Comparison, TrainedModel

MOST_CASES = 8
MOST_BYTES = 8 << 30
SCRATCH = ".probabilities-"
LOCK_FILE = ".running"


@dataclass
class _Work:
    """A case that is being compared: what its models gave so far.

    Args:
        case: The case.
        dice: Candidate to structure to Dice.
        probabilities: Model to its probabilities (T, Z, Y, X), on disk.
    """

    case: Case
    dice: dict[str, dict[str, float | None]] = field(default_factory=dict)
    probabilities: dict[str, NDArray[Any]] = field(default_factory=dict)


class _OneModel:
    """Loads the models that are asked for; the one before leaves memory first.

    Args:
        mirror: Whether mirrored views are averaged.
        device: Where to.
        reporter: Told where memory runs out.
    """

    def __init__(self, *, mirror: bool, device: str, reporter: Reporter) -> None:
        self._mirror, self._device, self._reporter = mirror, device, reporter
        self._what: tuple[Path, str] | None = None
        self._predictor: Predictor | None = None

    def __call__(self, model: TrainedModel, fold: str) -> Predictor:
        """The model of a fold; not to be kept by who asks."""
        if self._predictor is None or self._what != (model.folder, fold):
            if self._predictor is not None:
                self._predictor = None
                release_memory()
            self._predictor = Predictor.from_folder(
                model.folder, folds=[fold], device=self._device, mirror=self._mirror, reporter=self._reporter
            )
            self._what = (model.folder, fold)
        return self._predictor


def mask_file(folder: Path, candidate: str, case: str, ending: str) -> Path:
    """Where a candidate's cross-validated mask of a case is."""
    return folder / candidate / f"{case}{ending}"


def score_cases(
    comparison: Comparison, cases: Sequence[Case], folder: Path, *, device: str, overwrite: bool, reporter: Reporter
) -> dict[str, CaseScores]:
    """Scores of every case by every candidate, each model predicting with the fold that did not train on it.

    What an earlier comparison of the same models left in the folder is kept.

    Args:
        comparison: What is compared.
        cases: Raw cases of it.
        folder: Where masks and scores are written.
        device: As for training.
        overwrite: Predict anew what is there.
        reporter: Told about progress.

    Returns:
        Case to scores.
    """
    scores: dict[str, CaseScores] = {}
    waiting: dict[tuple[str, ...], list[Case]] = {}
    for case in cases:
        kept = None if overwrite else _kept(folder, comparison, case)
        if kept is None:
            folds = tuple(str(model.fold_of(case.name, comparison.folds)) for model in comparison.models)
            waiting.setdefault(folds, []).append(case)
        else:
            scores[case.name] = kept
    if scores:
        reporter.info(f"{len(scores)} of {len(cases)} cases were compared before and are kept")
    models = _OneModel(mirror=comparison.mirror, device=device, reporter=reporter)
    with running(folder):
        for folds, group in sorted(waiting.items()):
            spec = _check_same_task(comparison, folds)
            rest, what = deque(group), f"comparing on fold {', '.join(sorted(set(folds)))}"
            steps = _score_all(comparison, models, folds, rest, folder, spec, scores)
            for _ in reporter.track(steps, total=len(group) * len(folds), what=what):
                pass
    return scores


@contextmanager
def running(folder: Path) -> Iterator[None]:
    """Hold a comparison's folder, first rid of the probabilities that killed ones left there.

    All that run share a lock, which the system releases however they end: whoever can have it alone is the only one.
    Where the system or the disk has no locks, what was left stays.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK_FILE).open("a") as stream:
        try:
            import fcntl

            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for left in folder.glob(f"{SCRATCH}*"):
                shutil.rmtree(left, ignore_errors=True)
            fcntl.flock(stream, fcntl.LOCK_SH)
        except BlockingIOError:
            fcntl.flock(stream, fcntl.LOCK_SH)
        except (ImportError, OSError):
            pass
        yield


def _kept(folder: Path, comparison: Comparison, case: Case) -> CaseScores | None:
    """Scores of an earlier comparison of the same models, with their masks."""
    file = _scores_file(folder, case)
    if not file.is_file():
        return None
    try:
        scores = load_schema(CaseScores, file)
    except ConfigError:
        return None
    ending = ending_of(case.images[0])
    masks = all(mask_file(folder, candidate, case.name, ending).is_file() for candidate in comparison.candidates)
    return scores if masks and scores.key == comparison.key(case) else None


def _check_same_task(comparison: Comparison, folds: Sequence[str]) -> LabelSpec:
    """The labels of all models; refuses before anything is predicted what could not be averaged or scored together."""
    first, *others = (
        read_plan(fold_folder(model.folder, fold) / f"checkpoint_final{ENDING}")
        for model, fold in zip(comparison.models, folds, strict=True)
    )
    for other in others:
        check_same_task(first, other)
    return first.label_spec


def _score_all(
    comparison: Comparison,
    models: _OneModel,
    folds: Sequence[str],
    rest: deque[Case],
    folder: Path,
    spec: LabelSpec,
    scores: dict[str, CaseScores],
) -> Iterator[None]:
    """Take cases from ``rest`` until none is left, some at a time; scores are written once all models had them.

    Yields:
        After each prediction.
    """
    while rest:
        with TemporaryDirectory(dir=folder, prefix=SCRATCH, ignore_cleanup_errors=True) as scratch:
            portion: list[_Work] = []
            size = 0
            for model, fold in zip(comparison.models, folds, strict=True):
                if not portion:
                    while rest and len(portion) < MOST_CASES and size * len(folds) <= MOST_BYTES:
                        portion.append(_Work(rest.popleft()))
                        # scores of other masks, which the next lines replace one by one
                        _scores_file(folder, portion[-1].case).unlink(missing_ok=True)
                        size += _predict(
                            comparison, models(model, fold), model.name, portion[-1], folder, Path(scratch)
                        )
                        yield
                    continue
                for work in portion:
                    _predict(comparison, models(model, fold), model.name, work, folder, Path(scratch))
                    yield
            for work in portion:
                scores[work.case.name] = _complete(comparison, work, spec, folder)
            del portion


def _predict(comparison: Comparison, predictor: Predictor, name: str, work: _Work, folder: Path, scratch: Path) -> int:
    """Write and score a model's own mask; its probabilities stay on disk. Returns their bytes, 0 without pairs."""
    volume = read_volume(work.case.images, case=work.case.name)
    place = on_disk(scratch / f"{work.case.name}-{name}.npy")
    prepared = predictor.preprocess(volume, name=work.case.name, files=work.case)
    restored = predictor.predict_prepared(prepared, with_probabilities=comparison.pairs, allocate=place)
    _finish(work, name, restored.labels, predictor.plan.label_spec, volume, folder)
    if restored.probabilities is None:
        return 0
    work.probabilities[name] = restored.probabilities
    return restored.probabilities.nbytes


def _complete(comparison: Comparison, work: _Work, spec: LabelSpec, folder: Path) -> CaseScores:
    """Average, write and score the pairs of a case that every model has predicted, and write down all its scores."""
    pairs = {name: members for name, members in comparison.candidates.items() if len(members) > 1}
    if pairs:
        volume = read_volume(work.case.images, case=work.case.name)
        for name, members in pairs.items():
            _finish(work, name, mean_labels([work.probabilities[m] for m in members], spec), spec, volume, folder)
    scores = CaseScores(case=work.case.name, key=comparison.key(work.case), dice=work.dice)
    save_schema(scores, _scores_file(folder, work.case))
    return scores


def _scores_file(folder: Path, case: Case) -> Path:
    return folder / f"{case.name}.json"


def _finish(work: _Work, candidate: str, labels: NDArray[Any], spec: LabelSpec, volume: Volume, folder: Path) -> None:
    case = work.case
    assert case.label is not None
    write_labels(mask_file(folder, candidate, case.name, ending_of(case.images[0])), labels, like=volume)
    reference = read_labels(case.label, case=case.name)
    work.dice[candidate] = case_dice(reference.data[0], labels, spec, volume.geometry)


def case_dice(
    reference: NDArray[Any], prediction: NDArray[Any], spec: LabelSpec, geometry: Geometry
) -> dict[str, float | None]:
    """Dice per structure; None where neither mask holds it."""
    metrics = evaluate_case(reference, prediction, labels=spec, geometry=geometry, surface=False)
    return {name: scores.Dice for name, scores in metrics.items()}
