"""Who may import whom: an order without circles, and the heavy libraries only where they are used."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter

import pytest

from tests.architecture.source_tree import REPOSITORY, Module, imports, module_names, modules, repository_files

ORDER = (
    {"core"},
    {"artifacts"},
    {"imageio"},
    {"distributed", "models", "datasets", "preprocessing", "evaluation"},
    {"planners"},
    {"inference"},
    {"training"},
    {"pipeline"},
    {"cli"},
)
RANK = {folder: rank for rank, folders in enumerate(ORDER) for folder in folders}
SIBLINGS_ALLOWED = {("datasets", "distributed"), ("preprocessing", "distributed")}
WITHOUT_TORCH = ("core", "artifacts", "imageio", "datasets", "preprocessing", "evaluation", "planners")
LINKED = ("planners", "preprocessing", "inference")


def _may_import(importer: str, imported: str) -> bool:
    if importer == imported or (importer, imported) in SIBLINGS_ALLOWED:
        return True
    return RANK[imported] < RANK[importer]


def test_every_folder_has_a_place_in_the_order() -> None:
    """A new folder below samunet must be given its place before it can be imported."""
    unknown = {module.folder for module in modules()} - set(RANK) - {""}
    assert not unknown, f"add {sorted(unknown)} to ORDER and to the architecture page"


@pytest.mark.parametrize("module", modules(), ids=lambda m: m.name)
def test_imports_follow_the_order(module: Module) -> None:
    """A module imports only folders below its own, also inside functions."""
    wrong = [
        f"{module.name}:{item.line} imports {item.target}"
        for item in imports(module)
        if item.target.startswith("samunet.")
        and module.folder
        and not _may_import(module.folder, item.target.split(".")[1])
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(("importer", "imported"), [("core", "cli"), ("inference", "training"), ("models", "datasets")])
def test_the_order_refuses(importer: str, imported: str) -> None:
    """The rule itself refuses an upward and a sideways import."""
    assert not _may_import(importer, imported)


def test_no_import_cycle() -> None:
    """Loading the modules one after the other is possible in some order."""
    graph: dict[str, set[str]] = {}
    for module in modules():
        own = {module.name, *_ancestors(module.name)}
        direct = {i.target for i in imports(module) if i.at_load and i.target in module_names()}
        folders = {name for target in direct for name in _ancestors(target)} - own
        graph[module.name] = (direct | folders) - {module.name}
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail("import cycle: " + " -> ".join(error.args[1]))


def _ancestors(name: str) -> set[str]:
    parts = name.split(".")
    return {".".join(parts[:n]) for n in range(1, len(parts))} & module_names()


def test_no_torch_where_there_is_no_network() -> None:
    """Planning, reading, preprocessing and evaluation never import torch, not even inside a function."""
    heavy = ("torch", "torchvision", "timm", "segment_anything")
    wrong = [
        f"{module.name}:{item.line} imports {item.target}"
        for module in modules()
        if module.folder in WITHOUT_TORCH
        for item in imports(module)
        if item.target.split(".")[0] in heavy
    ]
    assert not wrong, "\n".join(wrong)


def test_bare_names_of_the_links_are_never_imported() -> None:
    """The links at the top level are for readers: package, tests, benchmarks and examples import only samunet."""
    wrong = [
        f"{path.relative_to(REPOSITORY)}:{node.lineno}"
        for path in repository_files()
        if path.suffix == ".py"
        for node in ast.walk(ast.parse(path.read_text()))
        if _top_names(node) & set(LINKED)
    ]
    assert not wrong, "\n".join(wrong)


def _top_names(node: ast.AST) -> set[str]:
    if isinstance(node, ast.Import):
        return {alias.name.split(".")[0] for alias in node.names}
    if isinstance(node, ast.ImportFrom) and node.level == 0:
        return {(node.module or "").split(".")[0]}
    return set()


@pytest.mark.parametrize("name", LINKED)
def test_links_resolve(name: str) -> None:
    """The three stages people come to change are links to the packages, relative and unbroken."""
    link = REPOSITORY / name
    assert link.is_symlink(), f"{name} must be a link to samunet/{name}"
    assert not link.readlink().is_absolute()
    assert link.resolve() == (REPOSITORY / "samunet" / name).resolve()
    assert (link / "__init__.py").is_file()


def _loaded_after(code: str) -> set[str]:
    """Top-level modules in sys.modules of a fresh interpreter after some code."""
    script = f"{code}\nimport json, sys\nprint(json.dumps(sorted({{name.split('.')[0] for name in sys.modules}})))"
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=120)
    assert answer.returncode == 0, answer.stderr
    return set(json.loads(answer.stdout.splitlines()[-1]))


def test_importing_samunet_loads_nothing_heavy() -> None:
    """`import samunet` costs next to nothing: neither torch nor numpy is loaded."""
    loaded = _loaded_after("import samunet")
    assert not loaded & {"torch", "numpy", "scipy", "nibabel", "SimpleITK", "matplotlib", "pydantic"}


def test_every_module_without_torch_loads_without_torch() -> None:
    """Importing all modules of the torch-free folders leaves torch out, also through what they import."""
    names = [m.name for m in modules() if m.folder in WITHOUT_TORCH]
    loaded = _loaded_after("\n".join(f"import {name}" for name in names))
    assert not loaded & {"torch", "torchvision", "timm", "segment_anything"}
