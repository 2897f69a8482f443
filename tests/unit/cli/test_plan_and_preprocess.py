"""What the command makes of the memory that it is given, and what it prints of what will be used."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from samunet.artifacts.plan import resolve_recipe
from samunet.cli.plan_and_preprocess import main
from samunet.planners.planner import make_plan
from tests import planning_facts as facts


@pytest.mark.parametrize("given", [3.0, 24.0])
def test_gpu_memory_is_planned_for_and_its_use_is_printed(
    given: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No recipe for a GPU needs more than is given, and every recipe's row ends with what it needs in GiB."""
    data = facts.fingerprint([facts.case(shape=(40, 512, 512))] * 5)
    found: list[Any] = []

    def planned(*_: object, gpu_memory_gib: float | None, **__: object) -> SimpleNamespace:
        assert gpu_memory_gib is not None
        found.append(make_plan(data, facts.description(), facts.budget(gpu=gpu_memory_gib)))
        return SimpleNamespace(plan=found[0], fingerprint=data, failed={}, folder=tmp_path)

    monkeypatch.setattr("samunet.pipeline.plan.plan_and_preprocess", planned)
    (tmp_path / "dataset.json").write_text("{}")
    assert main(["-d", str(tmp_path), "--gpu-memory", f"{given}", "--workspace", str(tmp_path)]) == 0
    written = capsys.readouterr()
    lines = (written.out + written.err).splitlines()
    configuration = found[0].configuration()
    assert any(re.search(r"\brate\s+GiB\b", line) for line in lines)
    for weights, devices in configuration.recipes.items():
        recipe = resolve_recipe(configuration, weights, "gpu")
        assert set(devices) >= {"gpu"}
        assert 0 < recipe.memory_gib <= given
        row = next(line for line in lines if line.split()[:2] == [weights, "gpu"])
        assert re.search(rf"\b{recipe.memory_gib:.1f}( checkpointed)?\s*$", row)
