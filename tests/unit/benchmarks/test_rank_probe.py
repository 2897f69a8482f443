"""The rank benchmark: what is compared has as many parameters, and a table of some seeds says so."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import rank_probe as module
from benchmarks.cells import Cell
from samunet.artifacts.dataset import DatasetDescription, RawDataset
from samunet.artifacts.plan import save_plan
from samunet.artifacts.probe import Probe, Probes, load_probes, save_probes
from samunet.artifacts.workspace import Workspace
from samunet.core.config import save_schema
from samunet.core.files import sha256_file, write_json
from samunet.planners.planner import make_plan as plan_of
from tests import planning_facts
from tests.planted_probe import make_probe
from tests.samples import make_plan

PROBE = make_probe([[float((b + 1) * (32 - i)) for i in range(32)] for b in range(6)])


def _choices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, rate: float, probe: Probe, minutes: float = 1.0
) -> list[Cell]:
    """The cells where every choice trains at a given rate."""
    monkeypatch.setattr(module, "planned_rank", lambda *_: 4)
    monkeypatch.setattr(module, "planned_rate", lambda *_: rate)
    labels = DatasetDescription(channel_names={"0": "MRI"}, labels={"background": 0, "a": 1}, file_ending=".nii.gz")
    monkeypatch.setattr(module, "load_raw_dataset", lambda _: RawDataset(tmp_path, labels, (), (), None))
    options = argparse.Namespace(workspace=tmp_path, base=tmp_path, minutes=minutes)
    return module.cells(tmp_path / "Dataset001_A", probe, options)


def test_choices_differ_in_the_ranks_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The probe's ranks sum to the planned ones; every choice is there with both seeds and the same other words."""
    made = _choices(tmp_path, monkeypatch, rate=0.002, probe=PROBE)
    assert len(made) == len({cell.name for cell in made}) == 4 * len(module.SEEDS)
    assert {cell.facts["choice"] for cell in made} == {"probe", "rank 4", "rank 1", "rank 16"}
    probed = [cell for cell in made if cell.facts["choice"] == "probe"]
    assert all(sum(cell.facts["ranks"]) == 24 and len(set(cell.facts["ranks"])) > 1 for cell in probed)
    assert f"--set=encoder.adapters.0.ranks={probed[0].facts['ranks']}" in probed[0].words
    assert {cell.words[:6] for cell in made} == {
        ("-c", "2d", "--backbone", "vit_xs", "--weights", f"sam:{tmp_path / 'vit_xs.pth'}")
    }


def test_the_table_pairs_with_the_planned_rank() -> None:
    """Differences are in points over common cases; one seed of two is called partial."""
    results = {}
    for choice, dice in (("probe", 0.65), ("rank 4", 0.6), ("rank 1", 0.4)):
        for seed in (1, 2) if choice != "rank 1" else (1,):
            results[f"{choice} {seed}"] = {
                "dataset": "D",
                "choice": choice,
                "planned_rank": 4,
                "seed": seed,
                "groups": None,
                "ranks": [1, 7],
                "mean_dice": dice,
                "case_dice": {"a": dice, "b": dice, "c": None},
                "parameters": {"encoder": 1000},
            }
    lines = module.table(results).splitlines()
    assert "probe: 1, 7" in lines[2]
    assert "+5.00 (+5.0 to +5.0) |" in lines[2]
    assert "-20.00 (-20.0 to -20.0), partial: 1 of 2 seeds" in lines[3]
    assert lines[4].endswith("| 0.600, 0.600 |  |")


def test_a_row_at_another_rate_is_not_the_same_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every key holds the planned rate; rows of before stay in the file, marked, and the table shows those of now."""
    before, now = (_choices(tmp_path, monkeypatch, rate=rate, probe=PROBE) for rate in (0.002, 0.005))
    other = _choices(tmp_path, monkeypatch, rate=0.002, probe=PROBE, minutes=2.0)
    assert {cell.name for cell in before}.isdisjoint(cell.name for cell in now)
    measured = {"mean_dice": 0.5, "case_dice": {"a": 0.5}, "parameters": {"encoder": 1000}}
    file = tmp_path / "rows.json"
    write_json(file, {cell.name: {**cell.facts, **measured} for cell in (*before, *other)})
    module.mark_outdated(now, "Dataset001_A", 1.0, file)
    rows = module.stored(file)
    assert {name for name, row in rows.items() if module.OUTDATED in row} == {cell.name for cell in before}
    assert len(rows) == len(before) + len(other)
    module.mark_outdated(other, "Dataset001_A", 2.0, file)
    assert module.stored(file) == rows
    former = {name: row for name, row in rows.items() if module.OUTDATED in row}
    assert len(module.table(former).splitlines()) == 2
    assert "Dataset001_A" in module.table(rows)


def test_the_probes_own_time_is_kept_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is measured once and read again by later runs; a probe of other facts, or one without it, is made anew."""
    workspace = Workspace.locate(workspace=tmp_path, environment={})
    plan = make_plan()
    monkeypatch.setattr(module, "load_plan", lambda _: plan)
    (tmp_path / f"{module.RANK_BACKBONE}.pth").write_bytes(b"base")
    options = argparse.Namespace(workspace=tmp_path, base=tmp_path, batches=4)
    file = workspace.probe_file("Dataset001_A")
    configuration, base = plan.recommended.value, sha256_file(tmp_path / f"{module.RANK_BACKBONE}.pth")
    made: list[list[str]] = []

    def measured(words: list[str]) -> tuple[int, dict[str, Any]]:
        made.append(words)
        names = {"configuration": configuration, "weights_sha256": base, "batches": 4}
        fresh = PROBE.model_copy(update={**names, "fingerprint_sha256": plan.fingerprint_sha256})
        save_probes(Probes(probes=(fresh,)), file)
        return 0, {"cpu_minutes": 0.25 * len(made)}

    monkeypatch.setattr(module, "measured", measured)
    data = tmp_path / "Dataset001_A"
    assert [module.cost_of(module.probed(data, options)) for _ in range(2)] == [0.25, 0.25]
    assert len(made) == 1
    (known,) = load_probes(file).probes
    for stale in ({"provenance": {}}, {"fingerprint_sha256": "1" * 64}):
        save_probes(Probes(probes=(known.model_copy(update=stale),)), file)
        found = module.probed(data, options)
        assert module.cost_of(found) == 0.25 * len(made)
    assert len(made) == 3
    probed = [c for c in _choices(tmp_path, monkeypatch, rate=0.005, probe=module.probed(data, options)) if c.facts]
    assert {c.facts["probe_cpu_minutes"] for c in probed if c.facts["choice"] == module.PROBED} == {0.75}


def test_the_rate_of_a_choice_is_the_one_that_training_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Higher ranks get a smaller one; the choice's words and its request are the same."""
    workspace = Workspace.locate(workspace=tmp_path, environment={})
    facts = planning_facts.fingerprint([planning_facts.case()] * 5)
    plan = plan_of(facts, planning_facts.description(), planning_facts.budget())
    save_plan(plan, workspace.plan_file("Dataset001_A"))
    save_schema(facts, workspace.fingerprint_file(plan.dataset))
    monkeypatch.setattr("samunet.pipeline.methods.supplies_decoder", lambda *_: True)
    base = tmp_path / f"{module.RANK_BACKBONE}.pth"
    torch.save({}, base)
    choices = (module.Choice((), rank=4), module.Choice((), rank=16), module.Choice((), {module.RANKS: [1] * 6}))
    four, sixteen, probed = (
        module.planned_rate(tmp_path / "Dataset001_A", PROBE, choice, base, tmp_path) for choice in choices
    )
    assert sixteen < four == probed
