"""What people write into plans.json: edits that are told from the planner's work, configurations that inherit."""

from __future__ import annotations

import json
from contextlib import suppress
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from samunet.artifacts.plan import Plan, load_plan, save_plan
from samunet.artifacts.plan_document import record_file, reduced, resolved
from samunet.core.config import parse_schema
from samunet.core.errors import ConfigError
from samunet.core.files import read_json, write_json
from tests.samples import make_plan, make_recipe

RECIPE = ("none", "cpu")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A plan as the planner leaves it."""
    path = tmp_path / "plans.json"
    save_plan(make_plan(), path, as_planned=True)
    return path


def edit(file: Path, *place: str, entry: Any) -> None:
    content = read_json(file)
    parent = content
    for key in place[:-1]:
        parent = parent[key]
    parent[place[-1]] = entry
    write_json(file, content)


def child(**changes: Any) -> dict[str, Any]:
    """A configuration that inherits 2d and changes its recipe."""
    return {"inherits_from": "2d", "recipes": {"none": {"cpu": changes}}}


def recipe_of(plan: Plan, configuration: str = "2d") -> Any:
    return plan.configurations[configuration].recipes["none"]["cpu"]


def test_an_untouched_plan_holds_no_edit(file: Path):
    """What the planner wrote is the rules', also in the file, which says nothing of sources."""
    assert load_plan(file) == make_plan()
    assert "source" not in file.read_text()


def test_a_changed_value_is_the_users(file: Path):
    """It is marked with what the rule had in the reason; a changed wording alone is no edit, other entries are not."""
    place = ("configurations", "2d", "recipes", "none", "cpu", "learning_rate")
    edit(file, *place, "value", entry=0.5)
    edit(file, "mirror_axes", "reason", entry="other words")
    plan = load_plan(file)
    assert recipe_of(plan).learning_rate.by_user
    assert "0.001" in recipe_of(plan).learning_rate.reason
    assert not plan.mirror_axes.by_user
    assert not recipe_of(plan).epochs.by_user
    edit(file, *place, entry={"value": 0.5, "reason": "mine"})
    assert recipe_of(load_plan(file)).learning_rate.reason == "mine"
    edit(file, *place, entry={"value": 0.5})
    assert recipe_of(load_plan(file)).learning_rate.reason == "set by hand"


def test_a_value_can_be_pinned(file: Path):
    """The user's source makes the rule's own value the user's."""
    edit(file, "mirror_axes", "source", entry="user")
    plan = load_plan(file)
    assert plan.mirror_axes.by_user
    assert plan.mirror_axes.value == make_plan().mirror_axes.value


def test_marks_survive_the_disk_and_a_checkpoint(file: Path):
    """Written again, an edit keeps its mark and what the rule says; so does a dump of the whole plan."""
    edit(file, "mirror_axes", entry={"value": [], "reason": "mine", "source": "user", "by_rule": ["left-right"]})
    plan = load_plan(file)
    save_plan(plan, file, as_planned=True)
    assert load_plan(file) == plan
    assert plan.mirror_axes.by_rule == ("left-right",)
    assert parse_schema(Plan, json.loads(plan.model_dump_json())) == plan


def test_a_configuration_inherits_what_it_does_not_name(file: Path):
    """The resolved plan holds the child complete, its own entry marked as the user's, the rest its parent's."""
    edit(file, "configurations", "large", entry=child(input_size={"value": 128}))
    plan = load_plan(file)
    assert recipe_of(plan, "large").input_size.value == 128
    assert recipe_of(plan, "large").input_size.by_user
    assert recipe_of(plan, "large").epochs == recipe_of(plan).epochs
    assert plan.configurations["large"].spacing == plan.configurations["2d"].spacing
    assert plan.store_key("large") == plan.store_key("2d")


def test_children_of_children_follow_their_parents(file: Path):
    """An entry comes from the nearest ancestor that names it, as the ancestor is now."""
    edit(file, "configurations", "large", entry=child(input_size={"value": 128}))
    edit(file, "configurations", "larger", entry={**child(epochs={"value": 9}), "inherits_from": "large"})
    edit(file, "configurations", "2d", "recipes", "none", "cpu", "iterations", "value", entry=77)
    plan = load_plan(file)
    found = recipe_of(plan, "larger")
    assert (found.input_size.value, found.epochs.value, found.iterations.value) == (128, 9, 77)


def test_written_children_name_only_what_differs(file: Path):
    """Saving reverses the resolution, so the file stays as short as the user wrote it and follows its parent."""
    edit(file, "configurations", "large", entry=child(input_size={"value": 128, "reason": "sharper"}))
    plan = load_plan(file)
    save_plan(plan, file)
    written = read_json(file)["configurations"]["large"]
    assert written == child(input_size={"value": 128, "reason": "sharper", "source": "user", "by_rule": None})
    assert resolved(reduced(plan.model_dump(mode="json"))) == _without_none(plan.model_dump(mode="json"))
    assert load_plan(file) == plan


def _without_none(content: dict[str, Any]) -> dict[str, Any]:
    """The content as it is after a way through the file: no parent is not written."""
    content = deepcopy(content)
    for configuration in content["configurations"].values():
        if configuration["inherits_from"] is None:
            del configuration["inherits_from"]
    return content


@pytest.mark.parametrize(
    ("added", "words"),
    [
        ({"a": {"inherits_from": "3d_fullres"}}, ("'a' inherits from one that does not exist", "2d", "3d_fullres")),
        ({"a": {"inherits_from": "a"}}, ("circle", "a -> a")),
        ({"a": {"inherits_from": "b"}, "b": {"inherits_from": "a"}}, ("circle", "a -> b -> a")),
        ({"a": {"inherits_from": ["2d"]}}, ("does not exist",)),
        ({"a": child(lerning_rate={"value": 1})}, ("configurations.a.recipes.none.cpu", "'learning_rate'")),
        ({"a": child(input_size=128)}, ("configurations.a.recipes.none.cpu.input_size", "found 128")),
    ],
)
def test_wrong_inheritance_is_one_message(file: Path, added: dict[str, Any], words: tuple[str, ...]):
    """Unknown parents, circles and unknown entries are refused with the file, the place and what would be right."""
    for name, configuration in added.items():
        edit(file, "configurations", name, entry=configuration)
    with pytest.raises(ConfigError) as caught:
        load_plan(file)
    assert all(word in str(caught.value) for word in (*words, "plans.json"))


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("batch_size", 0, "greater than or equal to 1 (found 0)"),
        ("foreground_fraction", 1.5, "less than or equal to 1 (found 1.5)"),
        ("input_size", "big", "valid integer, unable to parse string as an integer (found 'big')"),
        ("precision", "fp8", "'fp32', 'bf16' or 'fp16' (found 'fp8')"),
    ],
)
def test_an_invalid_edit_says_field_expected_and_found(file: Path, name: str, value: Any, words: str):
    """One error with the file, the dotted place, what would be right, and what is there."""
    edit(file, "configurations", "2d", "recipes", "none", "cpu", name, "value", entry=value)
    with pytest.raises(ConfigError) as caught:
        load_plan(file)
    assert f"configurations.2d.recipes.none.cpu.{name}.value" in str(caught.value)
    assert words in str(caught.value)
    assert str(file) in str(caught.value)


def test_edits_whose_dependents_are_planned_anew_can_be_read_before(file: Path):
    """A slab depth that the batch does not fit is refused for training and readable for planning again."""
    edit(file, "configurations", "2d", "slab_depth", "value", entry=3)
    with pytest.raises(ConfigError, match="slabs of 3 slices"):
        load_plan(file)
    assert load_plan(file, edited=True).configurations["2d"].slab_depth.by_user


def test_without_a_record_only_what_says_so_is_the_users(file: Path):
    """A plan that was copied alone is read as it is."""
    record_file(file).unlink()
    edit(file, "mirror_axes", "value", entry=[])
    assert not load_plan(file).mirror_axes.by_user
    save_plan(make_plan(recipes={"none": {"cpu": make_recipe()}}), file)
    assert not record_file(file).exists()


@pytest.mark.parametrize("again", [False, True], ids=["interrupted", "twice"])
@pytest.mark.parametrize("steps", [0, 1, 2, 3])
def test_an_interrupted_planning_makes_no_rule_the_users(
    file: Path, monkeypatch: pytest.MonkeyPatch, steps: int, again: bool
):
    """Wherever writing ends, also a second time, edits of the plan that is there are told, and nothing else is."""
    moves = 0
    original = Path.replace

    def fails(self: Path, target: Path) -> Path:
        nonlocal moves
        moves += 1
        if moves > steps:
            raise OSError(28, "No space left on device")
        return original(self, target)

    for rate in (0.25, 0.125) if again else (0.25,):
        planned = make_plan(recipes={"none": {"cpu": make_recipe(learning_rate=rate, epochs=round(1 / rate))}})
        edit(file, "mirror_axes", "value", entry=[])
        moves = 0
        with monkeypatch.context() as patched:
            patched.setattr(Path, "replace", fails)
            with suppress(OSError):
                save_plan(planned, file, as_planned=True)
        plan = load_plan(file)
        is_new = steps > 1 + (again and rate == 0.125 and steps == 2)
        assert plan.mirror_axes.by_user != is_new
        assert not recipe_of(plan).learning_rate.by_user
        assert not recipe_of(plan).epochs.by_user
    save_plan(planned, file, as_planned=True)
    assert load_plan(file) == planned
    assert {path.name for path in file.parent.iterdir()} == {"plans.json", "plans_as_planned.json"}


def test_a_copy_of_another_plan_is_not_believed(file: Path):
    """What the copy beside says of another plan makes nothing the user's; one that the plan does not name does."""
    other = file.with_name("other.json")
    save_plan(make_plan(recipes={"none": {"cpu": make_recipe(learning_rate=0.25)}}), other, as_planned=True)
    record_file(other).replace(record_file(file))
    assert not recipe_of(load_plan(file)).learning_rate.by_user
    content = read_json(file)
    del content["as_planned"]
    write_json(file, content)
    assert recipe_of(load_plan(file)).learning_rate.by_user
