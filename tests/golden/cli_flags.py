"""Derive cli_flags.json, the frozen list of commands and flags: python tests/golden/cli_flags.py.

A flag that disappears or changes its name breaks somebody's script: write it into the changelog when you run this.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

HERE = Path(__file__).resolve().parent
GENERATOR = HERE.parent.parent / "documentation" / "generate_cli.py"


def derive() -> dict[str, dict[str, list[str]]]:
    """Command to argument to spellings, from the parsers as they are now."""
    spec = importlib.util.spec_from_file_location("generate_cli", GENERATOR)
    assert spec is not None
    assert spec.loader is not None
    generator = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generator)
    table: dict[str, dict[str, list[str]]] = generator.flag_table()
    return table


def main() -> None:
    """Write the golden file."""
    (HERE / "cli_flags.json").write_text(json.dumps(derive(), indent=1) + "\n")


if __name__ == "__main__":
    main()
