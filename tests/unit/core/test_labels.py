"""What label values mean."""

from __future__ import annotations

import numpy as np
import pytest

from samunet.core.errors import ConfigError
from samunet.core.labels import IGNORE_INDEX, LARGEST_VALUE, LabelSpec


def spec(labels: dict, order=None) -> LabelSpec:
    """A spec from dataset.json entries."""
    return LabelSpec.from_dataset_json({"labels": labels, "regions_class_order": order})


def test_plain_labels_have_a_token_per_class_and_background():
    """Values need not be consecutive; targets are."""
    found = spec({"background": 0, "a": 3, "b": 7, "ignore": 9})
    assert (found.num_tokens, found.num_foreground, found.has_regions) == (3, 2, False)
    assert found.values == (0, 3, 7, 9)
    assert found.encode(np.array([0, 3, 7, 9])).tolist() == [0, 1, 2, IGNORE_INDEX]
    assert found.foreground_mask(np.array([0, 3, 9])).tolist() == [False, True, False]


def test_deciding_undoes_encoding():
    """One-hot logits of the targets give the label values back."""
    found = spec({"background": 0, "a": 3, "b": 7})
    labels = np.array([[0, 3], [7, 3]])
    logits = np.eye(3)[found.encode(labels)].transpose(2, 0, 1)
    assert np.array_equal(found.decide(logits), labels)


def test_regions_have_a_token_each_and_no_background():
    """nnU-Net's regions: overlapping targets, painted in regions_class_order."""
    found = spec({"background": 0, "whole": [1, 2, 3], "core": [2, 3], "enhancing": 3}, [1, 2, 3])
    assert (found.num_tokens, found.has_regions) == (3, True)
    labels = np.array([0, 1, 2, 3])
    target = found.encode(labels)
    assert target.tolist() == [[0, 1, 1, 1], [0, 0, 1, 1], [0, 0, 0, 1]]
    assert np.array_equal(found.decide(target * 2.0 - 1), labels)


def test_ignore_hides_all_regions():
    """An ignored voxel is unknown in every region."""
    found = spec({"background": 0, "whole": [1, 2], "core": 2, "ignore": 3}, [1, 2])
    assert found.encode(np.array([3, 2])).tolist() == [[IGNORE_INDEX, 1], [IGNORE_INDEX, 1]]


@pytest.mark.parametrize(
    ("labels", "order", "words"),
    [
        ({"background": 1, "a": 2}, None, "background"),
        ({"background": 0}, None, "no foreground"),
        ({"background": 0, "a": 1, "b": 1}, None, "unique"),
        ({"background": 0, "a": [1, 2], "b": 2}, None, "regions_class_order"),
        ({"background": 0, "a": 1, "ignore": 1}, None, "ignore"),
        ({"background": 0, "a": -1}, None, "non-negative"),
        ({"background": 0, "a": "1"}, None, "non-negative"),
        ({"background": 0, "a": 1, "ignore": [2]}, None, "ignore label must be one"),
        ({"background": 0, "a": 1, "ignore": "2"}, None, "non-negative"),
        ({"background": 0, "a": 1, "ignore": 0}, None, "ignore"),
        ({"background": 0, "whole": [1, 2], "core": 2}, 5, "one entry per region"),
        ({"background": 0, "whole": [1, 2], "core": 2}, ["1", "2"], "non-negative"),
        ({"background": 0, "whole": [0, 1], "core": 1}, [1, 1], "contains the background"),
        ({"background": 0, "whole": [1, 2], "tumour": [2, 1]}, [1, 2], "whole and tumour"),
        ({"background": 0, "whole": [1, 2], "core": 2}, [1, 300], "one of \\[2\\] for core"),
        ({"background": 0, "whole": [1, 2, 3], "core": [1, 3], "edema": 2}, [1, 2, 3], "one of \\[1, 3\\] for core"),
    ],
)
def test_contradictory_labels_are_refused(labels: dict, order, words: str):
    """Each fault is named."""
    with pytest.raises(ConfigError, match=words):
        spec(labels, order)


@pytest.mark.parametrize("name", ["a", "ignore"])
def test_values_beyond_the_store_are_refused(name: str):
    """The message names the structure and the largest value there may be."""
    fits = {"background": 0, "organ": 1, name: LARGEST_VALUE}
    assert LARGEST_VALUE in spec(fits).values
    with pytest.raises(ConfigError, match=f"{name}: {LARGEST_VALUE + 1}") as caught:
        spec({**fits, name: LARGEST_VALUE + 1})
    assert caught.value.expected == f"at most {LARGEST_VALUE}"


@pytest.mark.parametrize(
    ("labels", "order"),
    [
        ({"background": 0, "whole tumor": [1, 2, 3], "tumor core": [2, 3], "enhancing tumor": [3]}, [1, 2, 3]),
        ({"background": 0, "whole": [1, 2, 3], "core": [1, 3], "enhancing": 3}, [2, 1, 3]),
        ({"background": 0, "kidney": [1, 2, 3], "masses": [2, 3], "tumor": 2}, [1, 3, 2]),
        ({"background": 0, "organ": [1, 2], "vessel": 3, "ignore": 4}, [2, 3]),
        ({"background": 0, "left": [1, 2], "right": [2, 3], "both": 2}, [1, 3, 2]),
    ],
    ids=["brats", "brats of the challenge", "kits", "one region of several values", "shared part"],
)
def test_regions_painted_from_perfect_maps_are_the_references(labels: dict, order: list[int]):
    """What nnU-Net documents is accepted, and a mask painted from the targets themselves has every region right."""
    found = spec(labels, order)
    values = np.array([value for value in found.values if value != found.ignore])
    painted = found.decide(found.encode(values) * 2.0 - 1)
    assert np.array_equal(found.encode(painted), found.encode(values))


@pytest.mark.parametrize(
    ("labels", "order", "value"),
    [
        ({"whole": [1, 2], "core": 2}, [2, 2], 1),
        ({"core": 2, "whole": [1, 2]}, [2, 1], 2),
        ({"left": [1, 2], "right": [2, 3]}, [1, 3], 2),
        ({"ncr": 1, "edema": 2, "both": [1, 2]}, [1, 2, 1], 2),
    ],
    ids=["a value of the region inside", "the enclosing region last", "a shared part of its own value", "union last"],
)
def test_orders_that_lose_a_region_are_refused(labels: dict, order: list[int], value: int):
    """Masks of a perfect network would be scored as wrong, so the label value that would be is named."""
    with pytest.raises(ConfigError, match="would not show the regions") as caught:
        spec({"background": 0, **labels}, order)
    assert f"(label value {value})" in str(caught.value.expected)


def test_undeclared_values_are_found():
    """Background and ignore are declared too."""
    found = spec({"background": 0, "a": 1, "ignore": 3})
    assert found.undeclared_in(np.array([0, 1, 3], np.uint8)) == ()
    assert found.undeclared_in(np.array([[4, 1], [2, 4], [-1, 0]], np.int16)) == (-1, 2, 4)


def test_json_round_trip():
    """The spec writes the labels it was read from."""
    labels = {"background": 0, "whole": [1, 2], "core": 2, "ignore": 3}
    assert spec(labels, [1, 2]).to_json() == labels
