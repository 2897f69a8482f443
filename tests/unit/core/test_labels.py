"""What label values mean."""

from __future__ import annotations

import numpy as np
import pytest

from samunet.core.errors import ConfigError
from samunet.core.labels import IGNORE_INDEX, LabelSpec


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
    ],
)
def test_contradictory_labels_are_refused(labels: dict, order, words: str):
    """Each fault is named."""
    with pytest.raises(ConfigError, match=words):
        spec(labels, order)


def test_json_round_trip():
    """The spec writes the labels it was read from."""
    labels = {"background": 0, "whole": [1, 2], "core": 2, "ignore": 3}
    assert spec(labels, [1, 2]).to_json() == labels
