"""The commands: frozen flags, a reference page that is true, fast help, documented command lines that parse."""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import shlex
import subprocess
import sys
import tomllib
from functools import lru_cache
from pathlib import Path
from types import ModuleType

import pytest

from samunet.core.errors import UsageError
from tests.architecture.source_tree import REPOSITORY

SCRIPTS: dict[str, str] = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["scripts"]
COMMANDS = sorted(SCRIPTS)
HEAVY = {"torch", "scipy", "nibabel", "SimpleITK", "matplotlib", "sklearn", "skimage", "blosc2", "distributed"}
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "documentation").rglob("*.md"))]
SHELLS = {"", "bash", "sh", "shell", "console"}
SHELL_STARTS_NEXT = {"|", "||", "&&", "&", ";", ">", ">>", "2>&1", "2>"}


@lru_cache
def _generator() -> ModuleType:
    path = REPOSITORY / "documentation" / "generate_cli.py"
    spec = importlib.util.spec_from_file_location("generate_cli", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@lru_cache
def _parsers() -> dict[str, argparse.ArgumentParser]:
    parsers: dict[str, argparse.ArgumentParser] = _generator().command_parsers()
    return parsers


def test_commands_and_flags_are_frozen() -> None:
    """A flag comes, goes or changes only together with the golden file and a changelog entry."""
    golden = json.loads((REPOSITORY / "tests" / "golden" / "cli_flags.json").read_text())
    assert _generator().flag_table() == golden, "if this is meant: make docs, and write it into CHANGELOG.md"


def test_reference_page_is_what_the_parsers_say() -> None:
    """documentation/reference/cli.md was written after the last change of a parser."""
    page = REPOSITORY / "documentation" / "reference" / "cli.md"
    assert page.read_text() == _generator().render_reference(), "run `make docs`"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_flag_is_explained(command: str) -> None:
    """Each argument of each command says what it does."""
    silent = [action.dest for action in _parsers()[command]._actions if not action.help]
    assert not silent


@pytest.mark.parametrize("command", COMMANDS)
def test_help_answers_without_heavy_libraries(command: str) -> None:
    """--help prints the usage and exits with 0, having loaded none of the libraries that take seconds."""
    module, function = SCRIPTS[command].split(":")
    script = (
        "import json, sys\n"
        f"sys.argv = ['{command}', '--help']\n"
        f"from {module} import {function}\n"
        f"try:\n    code = {function}()\n"
        "except SystemExit as stop:\n    code = stop.code\n"
        "print(json.dumps([code or 0, sorted({name.split('.')[0] for name in sys.modules})]))"
    )
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=60)
    assert answer.returncode == 0, answer.stderr
    code, loaded = json.loads(answer.stdout.splitlines()[-1])
    assert code == 0
    assert command in answer.stdout
    assert not set(loaded) & HEAVY, f"{command} --help loads {sorted(set(loaded) & HEAVY)}"


@pytest.mark.parametrize("command", COMMANDS)
def test_unknown_flag_is_refused_with_exit_code_2(command: str) -> None:
    """A flag nobody knows ends the command before it does anything."""
    module, function = SCRIPTS[command].split(":")
    script = (
        "import sys\n"
        f"sys.argv = ['{command}', '--no-such-flag']\n"
        f"from {module} import {function}\nsys.exit({function}())"
    )
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=60)
    assert answer.returncode == 2, answer.stdout + answer.stderr
    assert "--no-such-flag" in answer.stderr
    assert "Traceback" not in answer.stderr


def documented_commands(text: str) -> list[str]:
    """Command lines in the fenced code blocks of a page that call one of our commands, continuations joined."""
    lines: list[str] = []
    language: str | None = None
    for line in text.replace("\\\n", " ").splitlines():
        fence = re.match(r" *```(\w*)", line)
        if fence:
            language = fence[1] if language is None else None
        elif language in SHELLS:
            lines.append(line.strip().removeprefix("$ "))
    return [line for line in lines if re.match(r"(\w+=\S+ +)*samunet_[a-z]", line)]


def _parse(line: str) -> None:
    """Parse one documented command line with the command's own parser; --help counts as parsed."""
    words = shlex.split(line, comments=True)
    while "=" in words[0]:
        words.pop(0)
    stop = next((i for i, word in enumerate(words) if word in SHELL_STARTS_NEXT), len(words))
    name, *arguments = words[:stop]
    assert name in _parsers(), f"no command {name}; there are {', '.join(COMMANDS)}"
    try:
        _parsers()[name].parse_command(arguments)  # type: ignore[attr-defined]
    except SystemExit as end:
        if end.code:
            raise
    except UsageError as error:
        pytest.fail(f"{line}\n{error}")


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(REPOSITORY)))
def test_documented_commands_parse(page: Path) -> None:
    """Every command line in a shell block of the documentation is accepted by its parser."""
    for line in documented_commands(page.read_text() if page.exists() else ""):
        _parse(line)


def test_documented_commands_are_found() -> None:
    """Continuations, prompts, variables and comments do not hide a command, and output is no command."""
    text = "```bash\nA=1 samunet_train 4 \\\n  0\n$ samunet_predict -i a  # why\necho samunet_train\n```\n"
    assert documented_commands(text) == ["A=1 samunet_train 4    0", "samunet_predict -i a  # why"]
    assert documented_commands("```text\nsamunet_train 4 0\n```\n") == []


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(REPOSITORY)))
def test_links_between_pages_resolve(page: Path) -> None:
    """Every relative link of a page points to a file that exists."""
    text = page.read_text() if page.exists() else ""
    targets = [target for target in re.findall(r"\]\(([^)#\s]+)", text) if "://" not in target]
    missing = [target for target in targets if not (page.parent / target).exists()]
    assert not missing
