"""Which runs learn from images without labels."""

from __future__ import annotations

import pytest

from samunet.artifacts.plan import resolve_recipe
from samunet.core.errors import UsageError
from samunet.pipeline.unlabelled import refuse_unlabelled, unlabelled_tag
from tests.samples import make_plan


def test_runs_that_learn_from_other_images_have_other_folders():
    """The order of the folders is of no matter, and images of the dataset itself are named as such."""
    tags = [unlabelled_tag(words) for words in ([], ["imagesTr"], ["imagesTs"], ["imagesTr", "imagesTs"])]
    assert tags[:2] == ["", "unlabelled"]
    assert len(set(tags)) == len(tags)
    assert unlabelled_tag(["imagesTs", "imagesTr"]) == tags[-1]


def test_embeddings_that_are_computed_once_know_no_further_images():
    """Cached embeddings refuse such images; without, and without such images, nothing is refused."""
    recipe = resolve_recipe(make_plan().configuration("2d"), "none", "cpu")
    with pytest.raises(UsageError, match="computed once"):
        refuse_unlabelled(["imagesTr"], recipe, cached=True)
    refuse_unlabelled(["imagesTr"], recipe, cached=False)
    refuse_unlabelled([], recipe, cached=True)
