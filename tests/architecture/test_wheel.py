"""The built wheel: each file once, nothing generic at its top level, and the commands' entry points."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.architecture.source_tree import PACKAGE, REPOSITORY

BUILT_FROM = ("pyproject.toml", "setup.py", "README.md", "LICENSE", "samunet", "planners", "preprocessing", "inference")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """A wheel built from a copy of the sources, links included, without network."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in BUILT_FROM:
        path = REPOSITORY / name
        if path.is_symlink():
            (source / name).symlink_to(path.readlink())
        elif path.is_dir():
            shutil.copytree(path, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(path, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-q"]
    answer = subprocess.run(
        [*command, "-w", str(folder), str(source)], capture_output=True, text=True, check=False, timeout=300
    )
    assert answer.returncode == 0, answer.stdout + answer.stderr
    built: Path = next(folder.glob("samunet-*.whl"))
    return zipfile.ZipFile(built)


@pytest.mark.slow
def test_wheel_carries_each_module_once(wheel: zipfile.ZipFile) -> None:
    """Every module of the package is in the wheel exactly once, though three folders are linked at the top level."""
    shipped = sorted(name for name in wheel.namelist() if name.endswith(".py"))
    assert shipped == sorted(str(path.relative_to(REPOSITORY)) for path in PACKAGE.rglob("*.py"))


@pytest.mark.slow
def test_wheel_puts_nothing_generic_into_the_namespace(wheel: zipfile.ZipFile) -> None:
    """Only samunet and its metadata land in site-packages; the types marker and the licence come along."""
    top = {name.split("/")[0] for name in wheel.namelist()}
    assert {name for name in top if not name.endswith(".dist-info")} == {"samunet"}
    assert "samunet/py.typed" in wheel.namelist()
    assert any(name.endswith("/LICENSE") for name in wheel.namelist())


@pytest.mark.slow
def test_wheel_installs_the_commands(wheel: zipfile.ZipFile) -> None:
    """Each command of pyproject.toml is an entry point of the wheel."""
    metadata = next(name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    content = wheel.read(metadata).decode()
    for command in ("plan_and_preprocess", "train", "predict", "evaluate", "demo"):
        assert f"samunet_{command} = samunet.cli.{command}:main" in content
