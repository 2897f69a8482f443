"""The package as syntax trees: what the architecture tests read instead of importing it."""

from __future__ import annotations

import ast
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGE = REPOSITORY / "samunet"


@dataclass(frozen=True, eq=False)
class Module:
    """One file of the package."""

    name: str
    path: Path
    tree: ast.Module

    @property
    def is_package(self) -> bool:
        """Whether the file is a folder's __init__."""
        return self.path.name == "__init__.py"

    @property
    def folder(self) -> str:
        """First folder below samunet, as in "core"; empty for samunet/__init__."""
        parts = self.name.split(".")
        return parts[1] if len(parts) > 1 else ""


@dataclass(frozen=True)
class Import:
    """One imported module."""

    target: str
    line: int
    at_load: bool


@lru_cache
def modules() -> tuple[Module, ...]:
    """Every module of the package, sorted by name."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(REPOSITORY).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found.append(Module(name, path, ast.parse(path.read_text(), filename=str(path))))
    return tuple(found)


@lru_cache
def module_names() -> frozenset[str]:
    """Names of all modules of the package."""
    return frozenset(module.name for module in modules())


def imports(module: Module) -> Iterator[Import]:
    """Every import in a module; those in functions or under TYPE_CHECKING do not run when it is loaded."""
    yield from _imports_below(module, module.tree, at_load=True)


def _imports_below(module: Module, node: ast.AST, *, at_load: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (Import(alias.name, child.lineno, at_load) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            base = _absolute(module, child)
            for alias in child.names:
                target = f"{base}.{alias.name}"
                yield Import(target if target in module_names() else base, child.lineno, at_load)
        else:
            lazy = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) or _is_type_checking(child)
            yield from _imports_below(module, child, at_load=at_load and not lazy)


def _absolute(module: Module, node: ast.ImportFrom) -> str:
    if node.level == 0:
        return node.module or ""
    parts = module.name.split(".")
    kept = parts[: len(parts) - node.level + (1 if module.is_package else 0)]
    return ".".join([*kept, *([node.module] if node.module else [])])


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Every function and method in a tree."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


@lru_cache
def repository_files() -> tuple[Path, ...]:
    """Every file that is committed or about to be; without git, every file outside hidden and built folders."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    answer = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    if answer.returncode == 0 and answer.stdout:
        paths = [REPOSITORY / name for name in answer.stdout.split("\0") if name]
    else:
        skipped = ("build", "dist", "__pycache__", "demo_workspace", "samunet_workspace", "samunet.egg-info")
        paths = [
            path
            for path in REPOSITORY.rglob("*")
            if not any(p in skipped or p.startswith(".") for p in path.relative_to(REPOSITORY).parts)
        ]
    return tuple(sorted({path for path in paths if path.is_file() and not path.is_symlink()}))
