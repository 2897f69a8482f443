"""Writes the measured tables into the pages of the documentation.

    python -m benchmarks.pages

A page marks the place of a table with ``<!-- table: NAME -->`` and ``<!-- end -->``. Tables are made of what lies in
benchmarks/results, by the benchmark that measured it; a test holds that the pages are as this writes them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

from benchmarks import (
    ablations,
    accuracy,
    attention,
    depth,
    large_backbones,
    methods,
    nnunet_peer,
    padding,
    prompts,
    rank_probe,
    recipe,
    regret,
    rotation,
    sizes,
)
from benchmarks.cells import RESULTS
from samunet.core.files import read_json, write_text

DOCUMENTATION = Path(__file__).resolve().parents[1] / "documentation"
MARKED = re.compile(r"<!-- table: (\w+) -->\n.*?<!-- end -->", re.DOTALL)
TABLES: Mapping[str, Callable[[], str]] = {
    "methods": lambda: methods.scores_table(read_json(RESULTS / "methods.json")),
    "prompts": lambda: prompts.table(read_json(RESULTS / "prompts.json")),
    "ablations": lambda: ablations.tables(read_json(RESULTS / "ablations.json")),
    "depth": lambda: depth.table(read_json(RESULTS / "depth.json")),
    "attention": lambda: attention.markdown(read_json(RESULTS / "attention.json")),
    "padding": lambda: padding.table(read_json(RESULTS / "padding.json")),
    "few_cases": accuracy.few_cases_table,
    "minutes": accuracy.minutes_table,
    "nnunet_peer": lambda: nnunet_peer.table(read_json(RESULTS / "nnunet_peer.json")),
    "recipe": lambda: recipe.table(read_json(RESULTS / "recipe.json")),
    "rank_probe": lambda: rank_probe.table(read_json(RESULTS / "rank_probe.json")),
    "regret": lambda: regret.table(read_json(RESULTS / "regret.json")),
    "rotation": lambda: rotation.table(read_json(RESULTS / "rotation.json")),
    "sizes": lambda: sizes.table(read_json(RESULTS / "sizes.json")),
    "large_backbones": lambda: large_backbones.table(read_json(RESULTS / "large_backbones.json")),
}


def main() -> None:
    """Rewrite the pages that hold tables."""
    for page, content in pages().items():
        write_text(page, filled(content))
        print(page.relative_to(DOCUMENTATION.parent))


def pages() -> dict[Path, str]:
    """The pages that hold tables, as they are."""
    found = {page: page.read_text(encoding="utf-8") for page in sorted(DOCUMENTATION.rglob("*.md"))}
    return {page: content for page, content in found.items() if MARKED.search(content)}


def filled(content: str) -> str:
    """A page with its tables made anew."""
    return MARKED.sub(lambda found: f"<!-- table: {found[1]} -->\n\n{TABLES[found[1]]()}\n\n<!-- end -->", content)


if __name__ == "__main__":
    main()
