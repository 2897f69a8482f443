"""Oracle prompts: prompts.json made from reference labels, to measure what prompting could reach at best.

Results obtained with these prompts have seen the reference. They are no results of a user's prompts, nor of a model
that works without any, and carry the word oracle.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from samunet.artifacts.prompts import Prompt
from samunet.core.errors import UsageError
from samunet.core.files import write_text
from samunet.core.log import Reporter, SilentReporter
from samunet.distributed.casewise import map_cases
from samunet.imageio import read_labels
from samunet.inference.oracle import OracleSettings, case_prompts

NAME_PART = "oracle"

_Item = tuple[str, Path]


@dataclass(frozen=True)
class OraclePrompts:
    """What came of a folder of references.

    Args:
        cases: Case name to its entries.
        empty: Cases without any structure: they have no entry.
        failed: Case name to why it could not be read.
    """

    cases: Mapping[str, tuple[Prompt, ...]]
    empty: tuple[str, ...]
    failed: Mapping[str, str]


def oracle_prompts(
    references: Mapping[str, Path], settings: OracleSettings, *, reporter: Reporter | None = None
) -> OraclePrompts:
    """Simulate prompts for the structures of reference label maps; a bad file stops no other.

    Args:
        references: Case name to label file.
        settings: How.
        reporter: Told about progress.
    """
    outcomes = map_cases(
        partial(_prompts_of_file, settings=settings),
        sorted(references.items()),
        processes=1,
        reporter=reporter or SilentReporter(),
        what="simulate prompts",
        name_of=_name_of,
    )
    found = {outcome.name: outcome.result for outcome in outcomes if outcome.result is not None}
    return OraclePrompts(
        cases={case: prompts for case, prompts in found.items() if prompts},
        empty=tuple(case for case, prompts in found.items() if not prompts),
        failed={outcome.name: str(outcome.error) for outcome in outcomes if outcome.error is not None},
    )


def oracle_file(output: Path, *, grade: str, seed: int) -> Path:
    """Where oracle prompts are written: a file that says oracle, or one with such a name inside a folder.

    Args:
        output: A folder, or a file ending in .json.
        grade: Goes into the name within a folder.
        seed: Goes into the name within a folder.

    Raises:
        UsageError: If the file's name does not say oracle.
    """
    if output.suffix != ".json":
        return output / f"{NAME_PART}_{grade}_seed{seed}.json"
    if NAME_PART not in output.name:
        raise UsageError(
            "prompts made from the reference must be recognisable",
            expected=f"a file name that contains '{NAME_PART}', or a folder",
            found=output.name,
            todo=f"write to {output.with_name(f'{NAME_PART}_{output.name}')}",
        )
    return output


def save_oracle(prompts: OraclePrompts, file: Path) -> None:
    """Write prompts.json, one entry per line.

    Raises:
        UsageError: If the file's name does not say oracle, or there is no prompt at all.
    """
    if NAME_PART not in file.name:
        raise UsageError("prompts made from the reference must be recognisable", found=file.name)
    if not prompts.cases:
        raise UsageError("no reference shows a structure: there is nothing to prompt", file=file)
    cases = [f"{json.dumps(case)}: [\n  {_lines(entries)}\n ]" for case, entries in prompts.cases.items()]
    write_text(file, "{\n " + ",\n ".join(cases) + "\n}\n")


def _prompts_of_file(item: _Item, *, settings: OracleSettings) -> tuple[Prompt, ...]:
    case, file = item
    volume = read_labels(file, case=case)
    return case_prompts(volume.data[0], volume.geometry, settings, case=case)


def _lines(entries: Sequence[Prompt]) -> str:
    def texts() -> Iterator[str]:
        for entry in entries:
            yield json.dumps(entry.model_dump(mode="json", exclude_none=True), allow_nan=False)

    return ",\n  ".join(texts())


def _name_of(item: _Item) -> str:
    return item[0]
