"""Plans that refuse nonsense and checkpoints that are one self-contained file."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from samunet.artifacts.checkpoint import (
    BaseWeights,
    Checkpoint,
    Manifest,
    read_checkpoint,
    read_manifest,
    read_plan,
    write_checkpoint,
)
from samunet.artifacts.plan import Plan, load_plan, resolve_recipe, save_plan
from samunet.artifacts.plan_parts import STORED
from samunet.core.config import parse_schema
from samunet.core.errors import CheckpointError, ConfigError
from samunet.training.checkpointing import _run_state, checkpoint_file, load_identity, recipe_to_json
from tests.samples import description_of, make_plan


def edited(*path: str, value: object) -> dict:
    """A plan's JSON with one entry changed."""
    content = make_plan().model_dump(mode="json")
    place = content
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return content


RECIPE = ("configurations", "2d", "recipes", "none", "cpu")


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ((*RECIPE, "lerning_rate"), {"value": 1, "reason": ""}, "did you mean 'learning_rate'"),
        ((*RECIPE, "input_size", "value"), 100, "multiple of 16"),
        ((*RECIPE, "backbone", "value"), "vit_x", "vit_b"),
        ((*RECIPE, "learning_rate", "value"), -1.0, "greater than 0 (found -1.0)"),
        ((*RECIPE, "encoder", "value", "train"), "lora", "'full', 'adapters' or 'frozen'"),
        ((*RECIPE, "encoder", "value", "train"), "frozen", "needs pretrained weights"),
        ((*RECIPE, "encoder", "value", "train"), "adapters", "add to encoder.adapters"),
        (("configurations", "2d", "slab_depth", "value"), 2, "slabs of 2 slices need a depth mechanism"),
        (("recommended", "value"), "3d", "not planned"),
        (("mirror_axes", "value"), ["up-down"], "up-down"),
        (("version",), 99, "plan again"),
        (("frame", "value", "slice_axis"), 3, "slice_axis"),
    ],
)
def test_a_hand_edited_plan_is_checked_when_it_is_read(path: tuple[str, ...], value: object, words: str):
    """Unknown keys and impossible values are refused with a message that says what would be right."""
    with pytest.raises(ConfigError) as caught:
        parse_schema(Plan, edited(*path, value=value))
    assert words in str(caught.value)


def test_a_plan_survives_the_disk(tmp_path: Path):
    """Saving and loading gives an equal plan with the same store key."""
    plan = make_plan()
    save_plan(plan, tmp_path / "plans.json")
    again = load_plan(tmp_path / "plans.json")
    assert again == plan
    assert again.store_key("2d") == plan.store_key("2d")


def test_the_store_depends_on_the_frame_but_not_on_recipes():
    """Another input size keeps the store; another spacing or orientation makes a new one."""
    key = make_plan().store_key("2d")
    recipe_edit = parse_schema(Plan, edited(*RECIPE, "input_size", "value", value=128))
    spacing_edit = parse_schema(Plan, edited("configurations", "2d", "spacing", "value", value=[None, 2.0, 2.0]))
    assert recipe_edit.store_key("2d") == key
    assert spacing_edit.store_key("2d") != key
    assert make_plan(spacing=(2.0, 1.0, 1.0)).store_key("2d").startswith("volumes_")


def test_a_missing_recipe_lists_those_there_are():
    """Asking for weights the plan has no recipe for names the planned ones."""
    with pytest.raises(ConfigError) as caught:
        resolve_recipe(make_plan().configuration("2d"), "sam", "cpu")
    assert "none on cpu" in str(caught.value)


def make_checkpoint() -> Checkpoint:
    """A small checkpoint."""
    plan = make_plan()
    recipe = resolve_recipe(plan.configuration("2d"), "none", "cpu")
    manifest = Manifest(
        dataset="d",
        configuration="2d",
        preset="auto",
        fold="0",
        recipe=recipe_to_json(recipe),
        base=BaseWeights(kind="none"),
        seed=1,
        steps=2,
        epochs=1,
        minutes=0.5,
    )
    tensors = {"a": torch.arange(3.0), "b": torch.tensor(5)}
    return Checkpoint(manifest, plan, description_of(plan), {"dataset": "d"}, tensors)


def test_a_checkpoint_is_complete_in_one_file(tmp_path: Path):
    """Manifest, recipe, plan, dataset.json, fingerprint and tensors come back equal."""
    made = make_checkpoint()
    write_checkpoint(tmp_path / "c.safetensors", made)
    read = read_checkpoint(tmp_path / "c.safetensors")
    assert (read.manifest, read.plan, read.fingerprint) == (made.manifest, made.plan, made.fingerprint)
    assert read.description.labels == made.description.labels
    assert read.manifest.resolved_recipe == resolve_recipe(made.plan.configuration("2d"), "none", "cpu")
    assert all(torch.equal(read.tensors[name], made.tensors[name]) for name in made.tensors)
    assert [p.name for p in tmp_path.iterdir()] == ["c.safetensors"]


def test_planes_come_back_from_a_checkpoint_and_older_ones_have_one(tmp_path: Path):
    """As they were, so that they compare with the plan's; where nothing is said, slices are as they are stored."""
    made = make_checkpoint()
    several = {**made.manifest.recipe, "planes": ["slices", "rows"]}
    older = {name: value for name, value in made.manifest.recipe.items() if name != "planes"}
    for content, planes in ((several, ("slices", "rows")), (older, STORED)):
        manifest = made.manifest.model_copy(update={"recipe": content})
        write_checkpoint(tmp_path / "c.safetensors", replace(made, manifest=manifest))
        assert read_checkpoint(tmp_path / "c.safetensors").manifest.resolved_recipe.planes == planes


@pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "text"])
def test_a_damaged_checkpoint_is_one_message(tmp_path: Path, damage: str):
    """Nothing but CheckpointError, with the file's name."""
    path = tmp_path / "c.safetensors"
    write_checkpoint(path, make_checkpoint())
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes({"empty": b"", "truncated": content[: len(content) - 8], "text": b"hello, world" * 9}[damage])
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(path)
    assert "c.safetensors" in str(caught.value)


def test_a_checkpoint_that_cannot_be_written_names_folder_and_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """On a full disk the one before stays, nothing is left over, and the error is ours."""
    path = tmp_path / "c.safetensors"
    write_checkpoint(path, make_checkpoint())
    before = path.read_bytes()

    def full(*_, **__):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    made = make_checkpoint()
    with pytest.raises(CheckpointError, match="cannot be written") as caught:
        write_checkpoint(path, Checkpoint(made.manifest, made.plan, made.description, {}, {"a": torch.zeros(500_000)}))
    assert f"2.0 MB of room in {tmp_path}" in str(caught.value)
    assert "No space left" in str(caught.value)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def rewritten(path: Path, part: str, **changes: object) -> None:
    """Change entries of a part of a checkpoint's metadata; one that is changed to None goes."""
    with safe_open(path, framework="pt") as stream:
        metadata = stream.metadata()
    content = {**json.loads(metadata[part]), **changes}
    metadata[part] = json.dumps({name: value for name, value in content.items() if value is not None})
    save_file(load_file(path), path, metadata=metadata)


@pytest.mark.parametrize(
    ("part", "changes", "found"),
    [
        ("manifest", {"version": 1}, "checkpoint version 1"),
        ("manifest", {"version": None}, "no version"),
        ("manifest", {"version": 99, "colour": "red"}, "checkpoint version 99"),
        ("manifest", {"colour": "red"}, "colour"),
        ("manifest", {"recipe": {"backbone": "vit_b"}}, "method"),
        ("plan", {"version": 99}, "plan version 99"),
        ("dataset", {"labels": 3}, "labels"),
    ],
)
def test_a_checkpoint_of_another_version_is_refused_by_name(
    tmp_path: Path, part: str, changes: dict[str, object], found: str
):
    """One error says the version that is read, what is there, in which file, and what to do."""
    path = tmp_path / "c.safetensors"
    write_checkpoint(path, make_checkpoint())
    rewritten(path, part, **changes)
    with pytest.raises(CheckpointError, match="another version of samunet") as caught:
        read_checkpoint(path)
    assert found in str(caught.value.found)
    assert "checkpoint version 2" in str(caught.value.expected)
    assert caught.value.file == path
    assert "train again" in str(caught.value.todo)
    reads = read_plan if part == "plan" else read_manifest
    if part != "dataset":
        with pytest.raises(CheckpointError, match="another version"):
            reads(path)


def test_a_state_of_another_version_is_refused_by_name(tmp_path: Path):
    """A run to be continued whose state another version wrote is one message."""
    path = checkpoint_file(tmp_path, "latest")
    write_checkpoint(path, make_checkpoint())
    with pytest.raises(CheckpointError, match="another version of samunet"):
        load_identity(tmp_path, "latest")
    with pytest.raises(CheckpointError, match="another version of samunet") as caught:
        _run_state({"step": 3, "colour": "red"}, path)
    assert "colour" in str(caught.value.found)
