"""Schemas that name the nearest key, files that are whole or absent, errors that cross processes."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest

from samunet.core.config import Schema, load_schema, parse_schema, save_schema
from samunet.core.errors import ConfigError, DataError
from samunet.core.files import atomic_path, read_json, sha256_file, sha256_json, write_json, write_text
from samunet.core.rng import derive_seed, seed_sample


class Inner(Schema):
    """A nested schema."""

    learning_rate: float


class Outer(Schema):
    """A schema with a nested one."""

    name: str
    inner: Inner
    many: dict[str, Inner] = {}  # noqa: RUF012 - pydantic copies defaults


def test_all_faults_are_reported_at_once_with_the_nearest_key():
    """A misspelt nested key, a wrong type and a missing field stand in one message."""
    with pytest.raises(ConfigError) as caught:
        parse_schema(Outer, {"inner": {"learning_rte": 1}, "many": {"x": {"learning_rate": "fast"}}})
    text = str(caught.value)
    assert "did you mean 'learning_rate'?" in text
    assert "inner.learning_rate" in text
    assert "many.x.learning_rate" in text
    assert "name" in text


def test_schemas_survive_the_disk(tmp_path: Path):
    """What is saved is what is loaded."""
    value = Outer(name="a", inner=Inner(learning_rate=0.1))
    save_schema(value, tmp_path / "a.json")
    assert load_schema(Outer, tmp_path / "a.json") == value


def test_a_failed_write_leaves_the_old_file_and_no_rubbish(tmp_path: Path):
    """An exception inside the block changes nothing on disk."""
    path = tmp_path / "a.txt"
    write_text(path, "old")

    def write_half() -> None:
        with atomic_path(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write_half()
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_a_temporary_keeps_the_ending(tmp_path: Path):
    """Writers choose their format by the name's ending."""
    with atomic_path(tmp_path / "a.nii.gz") as temporary:
        assert temporary.name.endswith(".nii.gz")
        temporary.write_bytes(b"x")


@pytest.mark.parametrize("content", [None, "", "{", "\x00\xff"])
def test_broken_json_is_one_message(tmp_path: Path, content: str | None):
    """Missing, empty and malformed files are configuration errors that name the file."""
    path = tmp_path / "plans.json"
    if content is not None:
        path.write_bytes(content.encode("latin-1"))
    with pytest.raises(ConfigError) as caught:
        read_json(path)
    assert "plans.json" in str(caught.value)


def test_json_refuses_nan(tmp_path: Path):
    """NaN is no JSON; writing it would break other readers."""
    with pytest.raises(ValueError):
        write_json(tmp_path / "a.json", {"x": float("nan")})
    assert not (tmp_path / "a.json").exists()


def test_hashes(tmp_path: Path):
    """A file's hash is SHA-256; a JSON value's does not depend on key order."""
    write_text(tmp_path / "a", "abc")
    assert sha256_file(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256_json({"a": 1, "b": [2]}) == sha256_json(json.loads('{"b": [2], "a": 1}'))


def test_errors_cross_processes_with_their_details():
    """An error raised in a worker says the same in the main process."""
    error = DataError("shape differs", expected="a", found="b", case="c", file="d", todo="e")
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    assert type(pickle.loads(pickle.dumps(error))) is DataError


def test_sample_seeds_depend_on_all_parts():
    """Seed, epoch and index all change what is drawn, and the same parts repeat it."""
    drawn = {parts: float(seed_sample(*parts).random()) for parts in [(1, 0, 0), (2, 0, 0), (1, 1, 0), (1, 0, 1)]}
    assert len(set(drawn.values())) == 4
    assert float(seed_sample(1, 0, 0).random()) == drawn[1, 0, 0]
    assert derive_seed(1, 2) != derive_seed(2, 1)
