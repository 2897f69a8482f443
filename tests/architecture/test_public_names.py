"""The names users import: frozen, and resolved only when they are used."""

from __future__ import annotations

import pytest

import samunet

FROZEN = {
    "Geometry",
    "Plan",
    "Predictor",
    "SamunetError",
    "Volume",
    "Workspace",
    "__version__",
    "evaluate",
    "plan_and_preprocess",
    "predict",
    "read_volume",
    "train",
    "write_labels",
}


def test_public_names_are_frozen() -> None:
    """A public name comes or goes only together with this list and a changelog entry."""
    assert set(samunet.__all__) == FROZEN


@pytest.mark.parametrize("name", sorted(FROZEN))
def test_public_name_resolves(name: str) -> None:
    """Every public name can be imported and is documented."""
    value = getattr(samunet, name)
    assert value is not None
    assert name in dir(samunet)
    assert name == "__version__" or value.__doc__


def test_unknown_name_is_an_attribute_error() -> None:
    """The lazy lookup refuses what is not public, as Python does."""
    with pytest.raises(AttributeError, match="no attribute 'nothing_of_this_name'"):
        samunet.nothing_of_this_name  # noqa: B018
