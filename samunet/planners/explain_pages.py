"""A plan in words as one Markdown file and as one page that a browser shows without any other file."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from samunet.planners.explain import TABLE_HEAD, ExplainedConfiguration, Explanation, Row, Section, yours

_HEAD = ("decision", "value", "why", "rests on", "what would change it")
_NOTE = (
    "Made by samunet_plan_and_preprocess from plans.json, which is the file to edit. Run the command again after an "
    "edit: it keeps what you decided, plans the rest around it and writes this page anew."
)
_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; --yours: #c60; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 85rem; margin: 2rem auto; padding: 0 1rem; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--line); }
table { border-collapse: collapse; width: 100%; margin: .6rem 0 1.2rem; }
th, td { text-align: left; vertical-align: top; padding: .35rem .6rem; border-bottom: 1px solid var(--line); }
th { background: var(--soft); font-weight: 600; } td:first-child { white-space: nowrap; font-family: monospace; }
td.value { font-weight: 600; min-width: 8rem; } td small { opacity: .75; }
.scroll { overflow-x: auto; } summary { cursor: pointer; font-weight: 600; padding: .3rem 0; }
.yours { color: var(--yours); font-weight: 600; } ul { margin: 0; padding-left: 1.1rem; }
"""


def as_html(explained: Explanation) -> str:
    """One self-contained page."""
    facts = dict(explained.facts)
    body = [f"<h1>{escape(explained.title)}</h1>", *(f"<p>{escape(line)}</p>" for line in explained.lead)]
    body += [
        f"<p><small>{escape(_NOTE)}</small></p>",
        "<h2>Facts</h2>",
        _html_table(("fact", "measured"), _known(facts)),
    ]
    body += ["<h2>Data</h2>", _html_rows(explained.data, facts)]
    for configuration in explained.configurations:
        body += _html_configuration(configuration, facts)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(explained.title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


def as_markdown(explained: Explanation) -> str:
    """One Markdown file; recipes after a configuration's first show only in what they differ from it."""
    lines = [f"# {explained.title}", "", *(f"{line}  " for line in explained.lead), "", _NOTE, "", "## Facts", ""]
    lines += [*_markdown_table(("fact", "measured"), _known(dict(explained.facts))), "", "## Data", ""]
    lines += _markdown_rows(explained.data.rows)
    for configuration in explained.configurations:
        first = next((section.rows for section in configuration.sections if section.recipe), ())
        lines += ["", f"## Configuration {configuration.name}", "", f"{configuration.note}", ""]
        lines += _markdown_table(TABLE_HEAD, configuration.table)
        for section in configuration.sections:
            rows = [row for row in section.rows if section.recipe is None or section.rows is first or row not in first]
            lines += ["", f"### {section.title}", ""]
            if len(rows) < len(section.rows):
                lines += ["All else is as in the configuration's first recipe.", ""]
            lines += _markdown_rows(rows)
    return "\n".join(lines) + "\n"


def _known(facts: dict[str, str]) -> list[tuple[str, str]]:
    """Facts of the dataset and the hardware; weights and device are each recipe's own."""
    return [(name, value) for name, value in facts.items() if name not in ("weights", "device")]


def _html_configuration(configuration: ExplainedConfiguration, facts: dict[str, str]) -> list[str]:
    own, *recipes = configuration.sections
    parts = [f"<h2>Configuration {escape(configuration.name)}</h2>", f"<p>{escape(configuration.note)}</p>"]
    parts += [_html_table(TABLE_HEAD, configuration.table), _html_rows(own, facts)]
    for section in recipes:
        parts.append(f"<details><summary>{escape(section.title)}</summary>\n{_html_rows(section, facts)}\n</details>")
    return parts


def _html_rows(section: Section, facts: dict[str, str]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in _HEAD)
    rows = "\n".join(_html_row(row, facts) for row in section.rows)
    return f'<div class="scroll"><table>\n<tr>{head}</tr>\n{rows}\n</table></div>'


def _html_row(row: Row, facts: dict[str, str]) -> str:
    mark = f'<span class="yours">{escape(yours(row))}</span>' if row.by_user else ""
    rests = "".join(
        f'<li title="{escape(facts[name], quote=True)}">{escape(name)}<br><small>{escape(facts[name])}</small></li>'
        for name in row.rests_on
    )
    changes = "".join(f"<li>{escape(change)}</li>" for change in row.changes)
    cells = [f"<td>{escape(row.name)}</td>", f'<td class="value">{escape(row.value)}</td>']
    cells += [f"<td>{mark}{escape(row.reason)}</td>", f"<td><ul>{rests}</ul></td>", f"<td><ul>{changes}</ul></td>"]
    return f"<tr>{''.join(cells)}</tr>"


def _html_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["<tr>" + "".join(f"<th>{escape(cell)}</th>" for cell in head) + "</tr>"]
    lines += ["<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows]
    return '<div class="scroll"><table>\n' + "\n".join(lines) + "\n</table></div>"


def _markdown_rows(rows: Sequence[Row]) -> list[str]:
    cells = [
        (f"`{row.name}`", row.value, yours(row) + row.reason, ", ".join(row.rests_on) or "-", "; ".join(row.changes))
        for row in rows
    ]
    return _markdown_table(_HEAD, cells)


def _markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *([_cell(cell) for cell in row] for row in rows)]
    return [f"| {' | '.join(line)} |" for line in lines]


def _cell(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")
