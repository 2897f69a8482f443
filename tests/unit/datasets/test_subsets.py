"""Subsets of training cases: nested, in whole groups, written down once."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from samunet.core.errors import ConfigError, UsageError
from samunet.core.files import read_json, write_json
from samunet.datasets.splits import Split, monitor_size, monitor_subset
from samunet.datasets.subsets import draw_order, first_cases, load_or_draw_order, named_cases, read_case_list

CASES = [f"case_{index:02d}" for index in range(40)]


def test_subsets_of_one_seed_are_nested_and_of_another_differ() -> None:
    """5 of 40 lie within 10 of 40, whatever the order of the names; another seed takes others."""
    order = draw_order(CASES, seed=1)
    subsets = [set(first_cases(order, number)) for number in range(1, 41)]
    assert [len(subset) for subset in subsets] == list(range(1, 41))
    assert all(small < large for small, large in pairwise(subsets))
    assert draw_order(CASES[::-1], seed=1) == order
    assert set(first_cases(draw_order(CASES, seed=2), 5)) != subsets[4]


@given(st.lists(st.integers(0, 8), min_size=2, max_size=40), st.integers(0, 5), st.data())
def test_groups_stay_whole_and_the_number_is_never_exceeded(numbers: list[int], seed: int, data: st.DataObject) -> None:
    """At most one group is cut, and only the very first; smaller subsets lie within larger ones."""
    groups = {f"c{index:02d}": f"g{number}" for index, number in enumerate(numbers)}
    order = draw_order(list(groups), groups, seed=seed)
    number = data.draw(st.integers(1, len(groups)))
    taken = set(first_cases(order, number))
    cut = [group for group in order if 0 < len(taken & set(group)) < len(group)]
    assert 1 <= len(taken) <= number
    assert cut in ([], [order[0]])
    assert number == 1 or set(first_cases(order, number - 1)) <= taken


def test_a_number_that_the_fold_does_not_have_is_refused() -> None:
    """More cases than there are, or none, is an error that says how many there are."""
    order = draw_order(CASES, seed=1)
    for number in (0, 41):
        with pytest.raises(UsageError) as caught:
            first_cases(order, number)
        assert caught.value.expected == "1 to 40"


def test_an_order_is_drawn_once_and_respected_when_edited(tmp_path: Path) -> None:
    """The file keeps every fold and seed; an edited order is taken as it stands."""
    file = tmp_path / "subsets.json"
    first = load_or_draw_order(file, "0", CASES, seed=1)
    load_or_draw_order(file, "1", CASES[:20], seed=1)
    content = read_json(file)
    assert [(entry["fold"], entry["seed"]) for entry in content["orders"]] == [("0", 1), ("1", 1)]
    content["orders"][0]["groups"].reverse()
    write_json(file, content)
    assert load_or_draw_order(file, "0", CASES, seed=1) == first[::-1]


def test_an_order_of_other_cases_is_refused(tmp_path: Path) -> None:
    """After the splits changed, the message names the file and what to do."""
    file = tmp_path / "subsets.json"
    load_or_draw_order(file, "0", CASES, seed=1)
    with pytest.raises(ConfigError, match="other cases") as caught:
        load_or_draw_order(file, "0", CASES[1:], seed=1)
    assert caught.value.file == file


def test_named_cases_are_training_cases_of_the_fold() -> None:
    """Validation cases, unknown ones, repeated ones and none at all are refused."""
    split = Split(train=tuple(CASES[:30]), val=tuple(CASES[30:]))
    assert named_cases(["case_03", "case_01"], split, "0") == ("case_01", "case_03")
    with pytest.raises(UsageError, match="case_35 validate"):
        named_cases(["case_01", "case_35"], split, "0")
    for wrong in (["case_01", "case_01"], ["nobody"], []):
        with pytest.raises(UsageError, match="does not name training cases"):
            named_cases(wrong, split, "0")


def test_a_list_of_cases_is_read_from_words_lines_and_json(tmp_path: Path) -> None:
    """All three give the same names, however many; a file that is neither is refused."""
    lines, array, broken = (tmp_path / name for name in ("lines.txt", "array.json", "broken.json"))
    lines.write_text("a\n\n b \n")
    array.write_text('["a", "b"]')
    broken.write_text('["a", ')
    assert read_case_list("a, b") == read_case_list(str(lines)) == read_case_list(str(array)) == ("a", "b")
    with pytest.raises(UsageError, match="not valid JSON"):
        read_case_list(str(broken))
    lines.write_text("a\nb\n", encoding="utf-8-sig")
    assert read_case_list(str(lines)) == ("a", "b"), "as spreadsheets write UTF-8"
    lines.write_text("a\nb\n", encoding="utf-16")
    with pytest.raises(UsageError, match="no text in UTF-8"):
        read_case_list(str(lines))
    many = tuple(f"patient_{number:04d}" for number in range(500))
    assert read_case_list(",".join(many)) == many


def test_few_cases_all_train_unless_early_stopping_needs_one() -> None:
    """None of 4 is set aside, one of 5 to 9 only for early stopping, a tenth from 10 on; each with its reason."""
    sizes = {
        number: tuple(monitor_size(number, early_stop=stop)[0] for stop in (False, True)) for number in range(1, 13)
    }
    assert [sizes[number] for number in (1, 4, 5, 9, 10)] == [(0, 0), (0, 0), (0, 1), (0, 1), (1, 1)]
    assert "fewer than 5" in monitor_size(3)[1]
    assert monitor_subset(CASES[:6], seed=1, early_stop=False) == ()
    assert len(monitor_subset(CASES[:6], seed=1)) == 1


def test_a_large_group_stands_in_the_way_of_no_smaller_subset() -> None:
    """Beside small groups one of 30 waits, whatever the seed; every number gives at least half of it."""
    sizes = [2, 30, *[2] * 12, 3, 1]
    groups = {f"c{i:02d}_{j:02d}": f"g{i:02d}" for i, size in enumerate(sizes) for j in range(size)}
    for seed in range(10):
        order = draw_order(list(groups), groups, seed=seed)
        assert len(order[0]) <= 2
        assert sorted(case for group in order for case in group) == sorted(groups)
        taken = [set(first_cases(order, number)) for number in range(1, len(groups) + 1)]
        assert all(small <= large for small, large in pairwise(taken))
        assert all(2 * len(subset) >= number for number, subset in enumerate(taken, start=1))
        assert len(taken[24]) >= 23


def test_an_order_that_was_written_before_is_taken_as_it_stands(tmp_path: Path) -> None:
    """A large group in second place stays there, so runs that took its beginning still find the same cases."""
    groups = {f"c{i:02d}": "small" if i < 2 else "large" if i < 32 else f"g{i}" for i in range(36)}
    order = (tuple(sorted(c for c in groups if groups[c] == "small")), tuple(c for c in groups if groups[c] == "large"))
    order += tuple((c,) for c in groups if groups[c].startswith("g"))
    file = tmp_path / "subsets.json"
    write_json(file, {"version": 1, "orders": [{"fold": "0", "seed": 1, "groups": order}]})
    assert load_or_draw_order(file, "0", list(groups), groups, seed=1) == order
    assert first_cases(order, 25) == order[0]
