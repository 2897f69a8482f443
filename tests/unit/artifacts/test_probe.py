"""probe.json: what it refuses, and which probe answers which question."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from samunet.artifacts.method import EncoderMethod, Lora, Method, summarise
from samunet.artifacts.probe import Probe, Probes, load_probes, save_probes
from samunet.core.errors import ConfigError
from samunet.core.files import sha256_json
from tests.planning_facts import case, fingerprint
from tests.planted_probe import make_probe, projection


def test_probes_survive_the_file_and_none_is_no_error(tmp_path: Path) -> None:
    """What is written is read; a folder without a file has no probes and no hash."""
    file = tmp_path / "probe.json"
    assert load_probes(file) == Probes()
    assert Probes().facts_sha256 is None
    probes = Probes(probes=(make_probe([[1.0]] * 6),))
    save_probes(probes, file)
    assert load_probes(file) == probes


def test_a_probe_replaces_only_one_about_the_same() -> None:
    """Configuration, weights and backbone decide; the provenance does not change the hash."""
    first, again = make_probe([[1.0]] * 6), make_probe([[2.0]] * 6)
    other = first.model_copy(update={"configuration": "3d"})
    probes = Probes().with_probe(first).with_probe(other).with_probe(again)
    assert probes.probes == (other, again)
    assert probes.find(configuration="2d", weights="sam", backbone="vit_xs") == again
    assert probes.find(configuration="2d", weights="medsam", backbone="vit_xs") is None
    stamped = again.model_copy(update={"provenance": {"started": "later"}})
    assert Probes(probes=(stamped, other)).facts_sha256 == probes.facts_sha256
    assert Probes(probes=(first, other)).facts_sha256 != probes.facts_sha256


@pytest.mark.parametrize(
    "change",
    [
        {"singular_values": (1.0, 2.0), "energy": (0.5, 1.0)},
        {"singular_values": (1.0, -1.0), "energy": (0.5, 1.0)},
        {"energy": (0.5, 1.0)},
    ],
)
def test_impossible_projections_are_refused(change: dict[str, Any]) -> None:
    """Singular values fall and are not negative, and each has its energy."""
    content = projection(0, "q", [1.0]).model_dump() | change
    with pytest.raises(ValidationError):
        type(projection(0, "q", [1.0])).model_validate(content)


def test_a_probe_with_a_missing_projection_is_refused() -> None:
    """Every projection of every block is there once."""
    whole = make_probe([[1.0]] * 6)
    with pytest.raises(ValidationError, match="every projection"):
        Probe.model_validate(whole.model_dump() | {"projections": whole.projections[1:]})


def test_a_probe_of_another_version_says_probe_again(tmp_path: Path) -> None:
    """A file of another version is not read by guess."""
    file = tmp_path / "probe.json"
    file.write_text('{"version": 99, "probes": []}')
    with pytest.raises(ConfigError, match="probe again"):
        load_probes(file)


def test_ranks_are_one_per_adapted_block() -> None:
    """Where blocks are named their number is checked at once, else when the encoder is known."""
    with pytest.raises(ValidationError, match="one entry per block"):
        Lora(ranks=(1, 2, 3), blocks=(0, 1))
    with pytest.raises(ValidationError):
        Lora(ranks=(0, 2))
    assert Lora(rank=3).ranks_of(2) == (3, 3)
    assert Lora(rank=3, ranks=(1, 5)).ranks_of(2) == (1, 5)
    with pytest.raises(ConfigError, match="6 ranks"):
        Lora(ranks=(1, 5)).ranks_of(6)
    method = Method(encoder=EncoderMethod(train="adapters", adapters=(Lora(ranks=(1, 5)),)))
    assert summarise(method).startswith("lora r1-5 q,v")


def test_a_probe_knows_the_facts_it_was_made_from() -> None:
    """It fits these, wherever the files lie; of other facts, another dataset or none it says which it is."""
    facts = fingerprint([case()] * 3)
    probe = make_probe([[1.0]] * 6, facts=facts)
    assert probe.fault_with(facts.model_copy(update={"inputs_sha256": "moved", "verified": True})) is None
    assert "other facts" in str(probe.fault_with(fingerprint([case()] * 4)))
    assert "made on Dataset999_Test" in str(probe.fault_with(facts.model_copy(update={"dataset": "Dataset001_A"})))
    assert "does not say" in str(make_probe([[1.0]] * 6).fault_with(facts))


def test_an_older_file_keeps_its_hash() -> None:
    """Entries that a file does not have yet are no part of it, so a plan made with it does not become another."""
    content = make_probe([[1.0]] * 6).model_dump(mode="json", exclude={"provenance"})
    older = {name: value for name, value in content.items() if value is not None}
    assert {"dataset", "fingerprint_sha256"}.isdisjoint(older)
    assert Probes(probes=(Probe.model_validate(older),)).facts_sha256 == sha256_json([older])


def test_probes_are_carried_over_to_altered_facts_if_they_fit() -> None:
    """What was made from the dataset holds for it altered; what was not stays unfit."""
    before, after = fingerprint([case()] * 3), fingerprint([case()] * 6)
    own = make_probe([[1.0]] * 6, facts=before)
    foreign = own.model_copy(update={"configuration": "3d", "fingerprint_sha256": "0" * 64})
    carried = Probes(probes=(own, foreign)).carried_over(before, after).probes
    assert [p.fault_with(after) is None for p in carried] == [True, False]
    assert Probes().carried_over(before, after) == Probes()
