"""Where things are."""

from __future__ import annotations

from pathlib import Path

import pytest

from samunet.artifacts.workspace import Workspace
from samunet.core.errors import UsageError


def test_flags_go_before_the_environment_before_the_default(tmp_path: Path):
    """Each folder is found on its own; nnU-Net's raw folder serves when ours is unset."""
    found = Workspace.locate(results=tmp_path / "r", environment={"nnUNet_raw": "/a", "samunet_preprocessed": "/b"})
    assert found == Workspace(Path("/a"), Path("/b"), tmp_path / "r")
    assert Workspace.locate(environment={"nnUNet_raw": "/a", "samunet_raw": "/c"}).raw == Path("/c")
    assert Workspace.locate(workspace=tmp_path, environment={"samunet_raw": "/c"}).raw == tmp_path / "raw"
    assert Workspace.locate(environment={}).raw == Path("samunet_workspace/raw")


@pytest.mark.parametrize("identifier", ["4", "004", "Dataset004_Hippocampus", "Hippocampus"])
def test_a_dataset_is_found_by_id_or_name(tmp_path: Path, identifier: str):
    """Any of its names gives the full one."""
    (tmp_path / "raw" / "Dataset004_Hippocampus").mkdir(parents=True)
    (tmp_path / "raw" / "Dataset040_Other").mkdir()
    assert Workspace.locate(workspace=tmp_path, environment={}).dataset_name(identifier) == "Dataset004_Hippocampus"


def test_an_unknown_or_ambiguous_dataset_lists_what_there_is(tmp_path: Path):
    """The message names the datasets that exist."""
    for name in ("Dataset004_A", "Dataset004_B"):
        (tmp_path / "raw" / name).mkdir(parents=True)
    workspace = Workspace.locate(workspace=tmp_path, environment={})
    with pytest.raises(UsageError, match="more than one"):
        workspace.dataset_name("4")
    with pytest.raises(UsageError) as caught:
        workspace.dataset_name("7")
    assert "Dataset004_A, Dataset004_B" in str(caught.value)


def test_a_raw_dataset_that_is_not_there_is_said_with_where_to_put_it(tmp_path: Path) -> None:
    """An id, a name or a path that leads to a dataset is taken; else the message names the folder and the flags."""
    workspace = Workspace.locate(workspace=tmp_path, environment={})
    with pytest.raises(UsageError, match="no such raw dataset") as caught:
        workspace.raw_folder("Dataset007_A")
    assert str(tmp_path / "raw" / "Dataset007_A" / "dataset.json") in str(caught.value.expected)
    assert workspace.raw_folder("Dataset007_A", must_exist=False) == tmp_path / "raw" / "Dataset007_A"
    for folder in (tmp_path / "raw" / "Dataset007_A", tmp_path / "elsewhere" / "Dataset008_B"):
        folder.mkdir(parents=True)
        (folder / "dataset.json").write_text("{}")
    assert {workspace.raw_folder(word) for word in ("7", "Dataset007_A")} == {tmp_path / "raw" / "Dataset007_A"}
    elsewhere = tmp_path / "elsewhere" / "Dataset008_B"
    assert workspace.raw_folder(str(elsewhere)) == elsewhere
