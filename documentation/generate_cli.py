"""Write reference/cli.md from the commands' own parsers: python documentation/generate_cli.py."""

from __future__ import annotations

import argparse
import tomllib
from collections.abc import Iterator, Set
from importlib import import_module
from pathlib import Path
from unittest.mock import patch

REPOSITORY = Path(__file__).resolve().parent.parent
OUTPUT = REPOSITORY / "documentation" / "reference" / "cli.md"

HEAD = """# Commands

<!-- written by documentation/generate_cli.py; change the parsers, then run `make docs` -->

Every command refuses flags it does not know and names the nearest one; flags are never abbreviated. Exit codes: 0 all
well, 1 some cases failed, 2 wrong usage or input.
"""


def command_parsers() -> dict[str, argparse.ArgumentParser]:
    """Every command of pyproject.toml with its parser, in the order of a user's day."""
    scripts = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["scripts"]
    return {name: import_module(target.split(":")[0]).build_parser() for name, target in scripts.items()}


def render_reference() -> str:
    """The whole page."""
    one, many = (_parsers_on_a_machine_with(cores) for cores in (1, 64))
    pages = []
    for name, parser in one.items():
        defaults = {action.dest: action.default for action in many[name]._actions}
        varying = {action.dest for action in parser._actions if action.default != defaults[action.dest]}
        pages.append(_render_command(name, parser, varying))
    return "\n".join([HEAD, *pages])


def _parsers_on_a_machine_with(cores: int) -> dict[str, argparse.ArgumentParser]:
    """The page must be the same wherever it is written, so defaults that follow the machine are found and named."""
    affinity = set(range(cores))
    with patch("os.cpu_count", return_value=cores), patch("os.sched_getaffinity", return_value=affinity, create=True):
        return command_parsers()


def _render_command(name: str, parser: argparse.ArgumentParser, varying: Set[str] = frozenset()) -> str:
    lines = [f"## {name}", "", _one_line(parser.description or ""), "", "```text", _synopsis(name, parser), "```", ""]
    for group in parser._action_groups:
        rows = [_row(action, varying) for action in group._group_actions if _is_shown(action)]
        if rows:
            lines += [f"### {(group.title or 'options').capitalize()}", ""]
            lines += ["| argument | value | default | meaning |", "|---|---|---|---|", *rows, ""]
    if parser.epilog:
        lines += [_one_line(parser.epilog), ""]
    return "\n".join(lines)


def _synopsis(name: str, parser: argparse.ArgumentParser) -> str:
    if parser.usage:
        return "\n".join(line.strip() for line in (parser.usage % {"prog": name}).splitlines())
    actions = [action for action in parser._actions if _is_shown(action)]
    positional = [_value(action) for action in actions if not action.option_strings]
    flags = [action for action in actions if action.option_strings and action.required]
    required = [f"{action.option_strings[0]} {_value(action)}" for action in flags]
    return " ".join([name, *positional, *required, "[flags]"])


def _row(action: argparse.Action, varying: Set[str]) -> str:
    names = ", ".join(f"`{flag}`" for flag in action.option_strings) or f"`{action.metavar or action.dest}`"
    is_flag = action.nargs == 0  # of two that share a value, as --a and --no-a, the default is the value's
    has_none = is_flag or action.default in (None, False, argparse.SUPPRESS, [], ())
    default = "" if has_none else f"`{_text(action.default)}`"
    if action.dest in varying:
        default = "follows the machine's cores"
    value = _value(action) if action.option_strings else ", ".join(map(str, action.choices or ()))
    meaning = _one_line((action.help or "") % {**vars(action), "prog": ""})
    if action.required and action.option_strings:
        meaning += " (required)"
    cells = [names, f"`{value}`" if value else "", default, meaning]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _value(action: argparse.Action) -> str:
    if action.nargs == 0:
        return ""
    metavar = action.metavar if isinstance(action.metavar, str) else None
    name = metavar or action.dest.upper()
    if action.choices and metavar is None:
        name = "{" + ",".join(map(str, action.choices)) + "}"
    return {"?": f"[{name}]", "*": f"[{name} ...]", "+": f"{name} [...]"}.get(str(action.nargs), name)


def _text(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _is_shown(action: argparse.Action) -> bool:
    return action.help != argparse.SUPPRESS and not isinstance(action, argparse._HelpAction)


def _one_line(text: str) -> str:
    return " ".join(text.split())


def flag_table() -> dict[str, dict[str, list[str]]]:
    """Command to argument to every spelling of it; positional arguments have none. What the golden file freezes."""
    return {name: dict(_spellings(parser)) for name, parser in command_parsers().items()}


def _spellings(parser: argparse.ArgumentParser) -> Iterator[tuple[str, list[str]]]:
    for action in parser._actions:
        if not isinstance(action, argparse._HelpAction):
            yield action.dest, list(action.option_strings)


def main() -> None:
    """Write the page."""
    OUTPUT.parent.mkdir(parents=True, exist_ok=True)
    OUTPUT.write_text(render_reference())


if __name__ == "__main__":
    main()
