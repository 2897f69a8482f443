"""What is written beside masks about their quality: a line as each is made, the report and its table at the end."""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Collection, Sequence
from pathlib import Path
from threading import Lock
from typing import Any

from samunet.artifacts.quality import (
    QUALITY_FILE,
    QUALITY_JOURNAL,
    QUALITY_TABLE,
    CaseQuality,
    Flag,
    QualityReport,
)
from samunet.core.config import load_schema, save_schema
from samunet.core.errors import ConfigError
from samunet.core.files import write_text
from samunet.core.log import Reporter
from samunet.core.volume import Volume
from samunet.inference.restore import Restored
from samunet.pipeline.quality import Judge, seen_mask

LOOK_FIRST_SHARE = 0.2
MOST_UNFLAGGED = 20
MOST_PRINTED = 5
CSV_HEADER = ("case", "structure", "dice", "low", "high", "volume_ml", "flags")


class QualityLog:
    """The estimates of a folder's masks, each written down before its mask is; given to ``predict_cases`` to be told.

    What an earlier run wrote about masks that are kept is taken over, all else of it is deleted.

    Args:
        judge: Of the models.
        output: Folder of the masks.
        model: As in prediction.json.
        kept: Cases whose masks an earlier run made.
        reporter: Told of kept cases without an estimate, and the summary.
    """

    def __init__(self, judge: Judge, output: Path, *, model: str, kept: Collection[str], reporter: Reporter) -> None:
        self._judge, self._output, self._model, self._reporter = judge, output, model, reporter
        self._lock = Lock()
        self._journal = output / QUALITY_JOURNAL
        former = {case.case: case for case in (*_reported(output / QUALITY_FILE), *_noted(self._journal))}
        self._cases = {name: former[name] for name in kept if name in former}
        unknown = sorted(set(kept) - set(self._cases))
        if unknown:
            named = f"{', '.join(unknown[:MOST_PRINTED])}{' and more' if len(unknown) > MOST_PRINTED else ''}"
            reporter.warn(f"{len(unknown)} masks are kept that have no estimate of their quality: {named}")
        if self._cases:
            self._save()
        else:
            for name in (QUALITY_FILE, QUALITY_TABLE):
                (output / name).unlink(missing_ok=True)
        self._journal.unlink(missing_ok=True)

    def __call__(self, name: str, volume: Volume, prepared: Any, restored: Restored) -> None:
        """Judge one case and write it down; called in the threads that write masks."""
        case = self._judge.case(name, seen_mask(self._judge.plan.label_spec, volume, prepared, restored))
        with self._lock, self._journal.open("a", encoding="utf-8") as stream:
            stream.write(case.model_dump_json() + "\n")
            stream.flush()
            os.fsync(stream.fileno())
            self._cases[name] = case

    def close(self, masks: Collection[str]) -> QualityReport:
        """Write the report on the cases that have a mask, and say which to look at first."""
        self._cases = {name: case for name, case in self._cases.items() if name in masks}
        report = self._save()
        self._journal.unlink(missing_ok=True)
        if report.cases:
            self._reporter.info(summary(report))
        return report

    def _save(self) -> QualityReport:
        cases = tuple(case for _, case in sorted(self._cases.items()))
        calibrated, note = _calibrated(self._judge, cases)
        report = QualityReport(
            dataset=self._judge.plan.dataset,
            model=self._model,
            calibrated=calibrated,
            note=note,
            look_first=look_first(cases),
            cases=cases,
        )
        save_schema(report, self._output / QUALITY_FILE)
        write_text(self._output / QUALITY_TABLE, csv_text(cases))
        return report


def _calibrated(judge: Judge, cases: Sequence[CaseQuality]) -> tuple[bool, str]:
    """Whether all estimates are calibrated, and how, or why not."""
    estimated = [own.calibrated for case in cases for own in case.structures.values() if own.dice is not None]
    lacking = len(estimated) - sum(estimated)
    if not judge.calibrated or not lacking:
        return judge.calibrated, judge.note
    short = f"{lacking} of {len(estimated)} estimates are not calibrated"
    return False, f"{judge.note}; {short}: not every model has a fit for their signs"


def look_first(cases: Sequence[CaseQuality]) -> tuple[str, ...]:
    """All flagged cases, then those of the fifth with the lowest estimates (at most 20), each lowest estimate first."""
    order = sorted(cases, key=lambda case: math.inf if case.lowest is None else case.lowest)
    flagged = [case.case for case in order if case.flags]
    lowest = [case.case for case in order[: math.ceil(LOOK_FIRST_SHARE * len(order))] if not case.flags]
    return (*flagged, *lowest[:MOST_UNFLAGGED])


def csv_text(cases: Sequence[CaseQuality]) -> str:
    """One line per case and structure; an empty cell where there is no estimate."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(CSV_HEADER)
    for case in cases:
        for name, own in case.structures.items():
            numbers = ["" if value is None else value for value in (own.dice, own.low, own.high, own.volume_ml)]
            writer.writerow([case.case, name, *numbers, "; ".join(map(str, case.flags))])
    return stream.getvalue()


def summary(report: QualityReport) -> str:
    """In a few words: how sure, and which cases to look at."""
    by_name = {case.case: case for case in report.cases}
    shown = [_phrase(by_name[name]) for name in report.look_first[:MOST_PRINTED]]
    more = len(report.look_first) - len(shown)
    rest = f" and {more} more" if more > 0 else ""
    return f"estimated Dice in {QUALITY_FILE} ({report.note}); look first at {'; '.join(shown)}{rest}"


def _phrase(case: CaseQuality) -> str:
    value = "nothing found" if case.lowest is None else f"{case.lowest:.2f}"
    number = len(case.flags)
    if not number:
        return f"{case.case} {value}"
    return f"{case.case} {value}, unfamiliar: {_short(case.flags[0])}{f' and {number - 1} more' if number > 1 else ''}"


def _short(flag: Flag) -> str:
    return f"{flag.fact} {flag.found} (training {flag.training})"


def _reported(file: Path) -> tuple[CaseQuality, ...]:
    """What an earlier run wrote at its end; nothing if it cannot be read."""
    try:
        return load_schema(QualityReport, file).cases if file.is_file() else ()
    except ConfigError:
        return ()


def _noted(file: Path) -> list[CaseQuality]:
    """What a run that was interrupted wrote down; the last line may be cut off."""
    noted = []
    for line in file.read_bytes().splitlines() if file.is_file() else []:
        try:
            noted.append(CaseQuality.model_validate_json(line))
        except ValueError:
            continue
    return noted
