"""Predictions to files: masks with the input's own geometry, probabilities, several cases under way at once."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from samunet.artifacts.dataset import Case
from samunet.artifacts.prompts import CasePrompts
from samunet.core.errors import DataError, SamunetError
from samunet.core.files import atomic_path
from samunet.core.geometry import Geometry
from samunet.core.log import Reporter
from samunet.core.volume import Volume
from samunet.imageio import read_volume, write_labels
from samunet.inference.ensemble import EnsemblePredictor
from samunet.inference.predictor import Predictor
from samunet.inference.restore import Restored

Loaded = tuple[Volume, Any]
Finish = Callable[[NDArray[Any], Geometry], NDArray[Any]]
Observe = Callable[[str, Volume, Any, Restored], None]


def predict_cases(
    predictor: Predictor | EnsemblePredictor,
    cases: Sequence[Case],
    output: Path,
    *,
    ending: str,
    reporter: Reporter,
    save_probabilities: bool = False,
    readers: int = 1,
    writers: int = 1,
    prompts: Mapping[str, CasePrompts] | None = None,
    propagate: bool = True,
    finish: Finish | None = None,
    observe: Observe | None = None,
) -> dict[str, SamunetError | None]:
    """Predict cases one after the other; reading ahead and writing behind run in threads.

    Args:
        predictor: Loaded models.
        cases: What to predict.
        output: Folder of ``CASE`` + ending masks, and ``CASE.npz`` probabilities.
        ending: Ending of the masks.
        reporter: Told about progress.
        save_probabilities: Also write float16 probabilities (T, Z, Y, X) under the key "probabilities".
        readers: Cases read and preprocessed ahead.
        writers: Masks written at the same time.
        prompts: Per case what to segment, for a promptable model; a case without any fails.
        propagate: Follow prompted objects to the slices beside the marked ones.
        finish: Changes the labels (Z, Y, X) of a mask before it is written, given its grid.
        observe: Given a case's name, its volume, what preprocessing made of it and the mask that is about to be
            written, with what the models say about it (before ``finish``); called in the threads that write.

    What an earlier run left for these cases is deleted first, so no old mask can pass for a new one; the mask is
    written last.

    Returns:
        Case to None, or to the error that kept it from being predicted. No case stops the others.
    """
    outcomes: dict[str, SamunetError | None] = {}
    written: dict[str, Future[None]] = {}

    def load(case: Case) -> Loaded:
        for stale in (output / f"{case.name}{ending}", output / f"{case.name}.npz"):
            stale.unlink(missing_ok=True)
        if prompts is not None and case.name not in prompts:
            raise DataError("there are no prompts for this case", todo="add it to the prompts' file")
        volume = read_volume(case.images, case=case.name)
        return volume, predictor.preprocess(volume, name=case.name, files=case)

    with ThreadPoolExecutor(readers) as reading, ThreadPoolExecutor(writers) as writing:
        loaded = _ahead(reading, load, cases, lead=readers)
        for case, future in reporter.track(loaded, total=len(cases), what="predicting"):
            try:
                volume, prepared = future.result()
                wanted, signs = None if prompts is None else prompts[case.name], observe is not None
                restored = _segment(predictor, prepared, volume, wanted, save_probabilities, propagate, signs)
            except Exception as error:
                outcomes[case.name] = _as_error(error, case)
                continue
            told = None if observe is None else partial(observe, case.name, volume, prepared)
            files = output / f"{case.name}{ending}", output / f"{case.name}.npz"
            written[case.name] = writing.submit(_save, restored, volume, *files, finish, told)
            outcomes[case.name] = None
            _wait_for_all_but(written, 2 * writers)
    for case in cases:
        failure = written[case.name].exception() if case.name in written else None
        if failure is not None:
            outcomes[case.name] = _as_error(failure, case)
    return outcomes


def _segment(
    predictor: Predictor | EnsemblePredictor,
    prepared: Any,
    volume: Volume,
    prompts: CasePrompts | None,
    with_probabilities: bool,
    propagate: bool,
    with_signs: bool,
) -> Restored:
    """Segment a preprocessed case, with prompts where there are any."""
    if prompts is None:
        return predictor.predict_prepared(prepared, with_probabilities=with_probabilities, with_signs=with_signs)
    assert isinstance(predictor, Predictor)
    return predictor.predict_prompted_preprocessed(
        prepared,
        volume.geometry,
        prompts,
        propagate=propagate,
        with_probabilities=with_probabilities,
        with_signs=with_signs,
    )


def _save(
    restored: Restored,
    volume: Volume,
    mask_file: Path,
    probabilities_file: Path,
    finish: Finish | None,
    told: Callable[[Restored], None] | None,
) -> None:
    if restored.probabilities is not None:
        with atomic_path(probabilities_file) as temporary, temporary.open("wb") as stream:
            np.savez_compressed(stream, probabilities=restored.probabilities)
    labels = restored.labels if finish is None else finish(restored.labels, volume.geometry)
    if told is not None:
        told(replace(restored, labels=labels))
    write_labels(mask_file, labels, like=volume)


def _ahead(
    pool: ThreadPoolExecutor, load: Callable[[Case], Loaded], cases: Sequence[Case], *, lead: int
) -> Iterator[tuple[Case, Future[Loaded]]]:
    """Yield (case, future) in order while at most ``lead`` further cases are being loaded."""
    waiting: deque[tuple[Case, Future[Loaded]]] = deque()
    for case in cases:
        waiting.append((case, pool.submit(load, case)))
        if len(waiting) > lead:
            yield waiting.popleft()
    yield from waiting


def _wait_for_all_but(written: dict[str, Future[None]], most: int) -> None:
    unfinished = [future for future in written.values() if not future.done()]
    if len(unfinished) > most:
        unfinished[0].exception()


def _as_error(error: BaseException, case: Case) -> SamunetError:
    if isinstance(error, SamunetError):
        error.case = error.case or case.name
        return error
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return DataError(
            "memory ran out on this case",
            case=case.name,
            found=str(error).split("\n")[0],
            todo="predict it with --device cpu or on a machine with more memory",
        )
    return DataError("this case failed unexpectedly", case=case.name, found=f"{type(error).__name__}: {error}")
