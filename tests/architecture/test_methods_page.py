"""documentation/reference/methods.md says what the presets are and what they train."""

from __future__ import annotations

import re

import pytest

from samunet.artifacts.method import faults_of
from samunet.artifacts.model_spec import STOCK_TOKENS, get_spec
from samunet.planners.counts import decoder_parameters, encoder_adapter_parameters
from samunet.planners.presets import PRESETS
from samunet.planners.rules import MOST_SLAB
from tests.architecture.source_tree import REPOSITORY

PAGE = (REPOSITORY / "documentation" / "reference" / "methods.md").read_text()
NUM_TOKENS = 2


def rows(heading: str) -> dict[str, list[str]]:
    """The first table below a heading: first cell to the others, without backticks."""
    section = PAGE.split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]
    table = re.search(r"(?:^\|.*\n)+", section, flags=re.MULTILINE)
    assert table is not None
    lines = [[cell.strip(" `") for cell in line.strip("|\n").split("|")] for line in table[0].splitlines()[2:]]
    return {first: rest for first, *rest in lines}


def test_all_presets_are_listed_and_no_other() -> None:
    """Both tables have a row for every preset."""
    assert set(rows("Presets")) == set(PRESETS)
    assert set(rows("Trained parameters")) == set(PRESETS)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_described_as_it_is(name: str) -> None:
    """Backbone, weights and configuration in the table are the preset's."""
    preset = PRESETS[name]
    assert rows("Presets")[name][:3] == [preset.backbone, preset.weights, preset.configuration or "recommended"]
    assert not faults_of(preset.method)


@pytest.mark.parametrize("name", PRESETS)
def test_counts_are_those_of_the_formulas(name: str) -> None:
    """What the table says is trained for one structure is what the planner counts, and adds up."""
    preset = PRESETS[name]
    encoder, decoder, together = (int(cell.replace(",", "")) for cell in rows("Trained parameters")[name])
    assert encoder + decoder == together
    if preset.method.encoder.train != "full":
        assert encoder == encoder_adapter_parameters(preset.method, get_spec(preset.backbone), slab_depth=MOST_SLAB)
    if preset.method.fusion.kind == "sam":
        assert decoder == decoder_parameters(preset.method, STOCK_TOKENS if preset.method.promptable else NUM_TOKENS)
