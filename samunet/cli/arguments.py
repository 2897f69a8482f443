"""What all commands' parsers share: no abbreviations, no glued single-dash words, the folder flags."""

from __future__ import annotations

import argparse
import difflib
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn, TypeVar

from samunet.artifacts.workspace import DEFAULT_WORKSPACE, Workspace
from samunet.core.errors import UsageError
from samunet.core.log import Reporter

Number = TypeVar("Number", int, float)


class CommandParser(argparse.ArgumentParser):
    """An argument parser that refuses what it does not know and suggests the nearest flag.

    argparse would read ``-device cpu`` as ``-d evice``; here a single-dash word that is no declared flag is refused
    before parsing.
    """

    def __init__(self, prog: str, description: str, **options: object) -> None:
        super().__init__(prog=prog, description=description, allow_abbrev=False, **options)  # type: ignore[arg-type]

    def parse_command(self, arguments: Sequence[str] | None = None) -> argparse.Namespace:
        """Parse a command line.

        Raises:
            UsageError: For anything unknown, missing or malformed.
        """
        import sys

        words = list(sys.argv[1:] if arguments is None else arguments)
        for word in words:
            if word == "--":
                break
            flag = word.split("=", 1)[0]
            is_flag = flag.startswith("-") and len(flag) > 1 and not _is_number(flag)
            if is_flag and flag not in self._option_string_actions:
                self.error(f"unknown flag {flag}{self._suggestion(flag)}")
        return self.parse_args(words)

    def error(self, message: str) -> NoReturn:
        """Turn argparse's exit into our one kind of message."""
        raise UsageError(message, todo=f"see {self.prog} --help")

    def _suggestion(self, flag: str) -> str:
        nearest = difflib.get_close_matches(flag, list(self._option_string_actions), n=1, cutoff=0.5)
        return f", did you mean {nearest[0]}?" if nearest else ""


def announce_workspace(workspace: Workspace, reporter: Reporter) -> None:
    """Say where files go when nobody chose a place."""
    if workspace.is_default:
        reporter.info(f"workspace: {DEFAULT_WORKSPACE.resolve()} (choose another with --workspace)")


def positive_number(text: str) -> float:
    """Parse a finite number above zero."""
    value = _parse(text, float)
    if not (value > 0 and math.isfinite(value)):
        raise argparse.ArgumentTypeError(f"must be a positive number, found {text}")
    return value


def positive_count(text: str) -> int:
    """Parse an integer of at least one."""
    value = _parse(text, int)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, found {text}")
    return value


def natural_number(text: str) -> int:
    """Parse an integer of at least zero."""
    value = _parse(text, int)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must not be negative, found {text}")
    return value


def _parse(text: str, kind: Callable[[str], Number]) -> Number:
    try:
        return kind(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number, found {text}") from None


def add_workspace_flags(parser: argparse.ArgumentParser) -> None:
    """Add --workspace, --raw, --preprocessed and --results."""
    group = parser.add_argument_group("folders")
    group.add_argument("--workspace", type=Path, help="one folder that holds raw/, preprocessed/ and results/")
    group.add_argument("--raw", type=Path, help="raw datasets (else $samunet_raw, else $nnUNet_raw)")
    group.add_argument("--preprocessed", type=Path, help="plans and stores (else $samunet_preprocessed)")
    group.add_argument("--results", type=Path, help="trained models (else $samunet_results)")


def locate_workspace(arguments: argparse.Namespace, dataset: str | None = None) -> Workspace:
    """The workspace of a parsed command line; a dataset given as a path implies the raw folder."""
    raw = arguments.raw
    if raw is None and dataset is not None and (Path(dataset) / "dataset.json").is_file():
        raw = Path(dataset).resolve().parent
    return Workspace.locate(
        workspace=arguments.workspace,
        raw=raw,
        preprocessed=arguments.preprocessed,
        results=arguments.results,
    )


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
