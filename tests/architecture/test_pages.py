"""Measured tables in the documentation are those of the results."""

from __future__ import annotations

from benchmarks.pages import TABLES, filled, pages


def test_pages_hold_the_tables_of_the_results() -> None:
    """What `python -m benchmarks.pages` would write is there, and every table has a place."""
    found = pages()
    for page, content in found.items():
        assert filled(content) == content, f"{page.name}: run python -m benchmarks.pages"
    everything = "".join(found.values())
    assert not [name for name in TABLES if f"<!-- table: {name} -->" not in everything]
