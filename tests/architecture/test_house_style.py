"""House style that a linter does not hold: sizes, docstrings, one place that prints, no paths of one machine."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.architecture.source_tree import REPOSITORY, Module, functions, modules, repository_files

MAX_FILE_LINES = 450
MAX_FUNCTION_LINES = 70
TEXT = {".py", ".md", ".toml", ".yaml", ".yml", ".json", ".cff", ".cfg", ".txt", ".sh", ""}
# An absolute path below a folder that exists on one machine only. Web addresses are no paths.
MACHINE_PATH = re.compile(r"(?<![\w.\-/~$}*:>])/(?:work|tmp|root|home|Users|mnt)/[\w.]")

TEST_FILES = sorted((REPOSITORY / "tests").rglob("test_*.py"))


@pytest.mark.parametrize("module", modules(), ids=lambda m: m.name)
def test_module_keeps_to_the_limits(module: Module) -> None:
    """A file is read in one sitting and a function on one screen, and the file says what it is for."""
    num_lines = len(module.path.read_text().splitlines())
    assert num_lines <= MAX_FILE_LINES, f"{module.path}: {num_lines} lines, at most {MAX_FILE_LINES}: split it"
    long = [
        f"{module.path}:{f.lineno} {f.name}: {f.end_lineno - f.lineno + 1} lines, at most {MAX_FUNCTION_LINES}"
        for f in functions(module.tree)
        if f.end_lineno is not None and f.end_lineno - f.lineno + 1 > MAX_FUNCTION_LINES
    ]
    assert not long, "\n".join(long)
    assert ast.get_docstring(module.tree), f"{module.path}: the file needs a docstring that says what it is for"


@pytest.mark.parametrize("module", modules(), ids=lambda m: m.name)
def test_only_render_prints(module: Module) -> None:
    """Everything else reports through a Reporter, so that it also works without a terminal."""
    if module.name == "samunet.cli.render":
        pytest.skip("the one place that prints")
    prints = [
        f"{module.path}:{node.lineno}"
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert not prints, "\n".join(prints)


@pytest.mark.parametrize("path", TEST_FILES, ids=lambda p: str(p.relative_to(REPOSITORY)))
def test_every_test_says_what_it_shows(path: Path) -> None:
    """Each test function carries a sentence."""
    silent = [
        f"{path}:{f.lineno} {f.name}"
        for f in functions(ast.parse(path.read_text()))
        if f.name.startswith("test_") and len((ast.get_docstring(f) or "").split()) < 3
    ]
    assert not silent, "\n".join(silent)


def test_no_path_of_one_machine() -> None:
    """No file names a place that exists only where it was written."""
    wrong = []
    for path in repository_files():
        if path.suffix not in TEXT:
            continue
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), start=1):
            if MACHINE_PATH.search(line):
                wrong.append(f"{path.relative_to(REPOSITORY)}:{number}: {line.strip()[:120]}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("text", ["in " + "/tmp" + "/x", '"' + "/home" + '/me"', "(" + "/work" + "/data)"])
def test_the_pattern_finds_machine_paths(text: str) -> None:
    """The pattern itself finds what it must."""
    assert MACHINE_PATH.search(text)


@pytest.mark.parametrize("text", ["https://example.org/home/page", "$HOME/tmp/x", "model/root/x", "either/or"])
def test_the_pattern_leaves_other_text_alone(text: str) -> None:
    """Web addresses, variables and relative paths are no findings."""
    assert not MACHINE_PATH.search(text)
