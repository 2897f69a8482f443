"""Measured tables in the documentation are those of the results, and the list of decision records is whole."""

from __future__ import annotations

from benchmarks.pages import DOCUMENTATION, TABLES, filled, pages


def test_pages_hold_the_tables_of_the_results() -> None:
    """What `python -m benchmarks.pages` would write is there, and every table has a place."""
    found = pages()
    for page, content in found.items():
        assert filled(content) == content, f"{page.name}: run python -m benchmarks.pages"
    everything = "".join(found.values())
    assert not [name for name in TABLES if f"<!-- table: {name} -->" not in everything]


def test_every_decision_is_listed_under_its_title() -> None:
    """The list of decision records names each with its number and the sentence that it is headed with."""
    folder = DOCUMENTATION / "decisions"
    listed = (folder / "README.md").read_text(encoding="utf-8").splitlines()
    for record in sorted(folder.glob("[0-9]*.md")):
        number, _, title = record.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ").partition(" ")
        assert f"| [{number}]({record.name}) | {title} |" in listed
