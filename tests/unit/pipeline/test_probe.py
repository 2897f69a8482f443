"""samunet_probe from a store to probe.json, and what planning makes of the file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from samunet.artifacts.fingerprint import Fingerprint
from samunet.artifacts.model_spec import get_spec
from samunet.artifacts.plan import IntensityMap, Plan
from samunet.artifacts.probe import Probes, load_probes, save_probes
from samunet.artifacts.workspace import Workspace
from samunet.cli.probe import main
from samunet.core.config import load_schema
from samunet.core.errors import UsageError
from samunet.core.files import sha256_file
from samunet.core.log import SilentReporter
from samunet.datasets.raw import load_raw_dataset
from samunet.models.sam.network import build_network
from samunet.models.weights import WeightsFile
from samunet.pipeline import methods
from samunet.pipeline import plan as planning
from samunet.pipeline import train as running
from samunet.pipeline.probe import ProbeRequest, probe
from samunet.pipeline.probed_ranks import with_probed_ranks
from samunet.pipeline.training_run import TrainingRequest, resolve
from samunet.planners import fingerprint as measuring
from samunet.planners.ranks import choose_ranks
from samunet.training import probe as training
from tests.planted_probe import make_probe
from tests.samples import DATASET, lora_encoder, make_plan, make_recipe, prepare, write_dataset

BLOCKS = 12


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    """An empty workspace."""
    return Workspace.locate(workspace=tmp_path, environment={})


def test_the_command_writes_what_it_measured(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """probe.json names the weights by hash and holds every projection; the same seed gives the same file again."""
    monkeypatch.setattr(training, "WARMUP_STEPS", 2)
    recipe = make_recipe(
        backbone="vit_t_xs",
        encoder=lora_encoder(),
        intensity_map=IntensityMap(kind="sam_pixels", lower=(-2.0,), upper=(2.0,)),
    )
    plan = make_plan(recipes={"ssl": {"cpu": recipe}})
    prepare(workspace, plan)
    base = tmp_path / "base.pth"
    torch.save(build_network(get_spec("vit_t_xs"), image_size=128, num_tokens=4).state_dict(), base)
    words = [DATASET, "--weights", f"ssl:{base}", "--device", "cpu", "--batches", "2", "--workers", "0"]
    folders = ["--workspace", str(tmp_path)]
    assert main([*words, *folders]) == 0
    first = load_probes(workspace.probe_file(DATASET))
    (found,) = first.probes
    assert (found.configuration, found.weights, found.backbone) == ("2d", "ssl", "vit_t_xs")
    assert found.weights_sha256 == sha256_file(base)
    assert (found.dataset, found.fingerprint_sha256) == (plan.dataset, plan.fingerprint_sha256)
    assert (found.batches, found.warmup_steps, len(found.projections)) == (2, 2, 4 * 4)
    assert all(p.norm > 0 for p in found.projections)
    assert "energy in 4" in capsys.readouterr().out
    assert main([*words, *folders]) == 0
    assert load_probes(workspace.probe_file(DATASET)).facts_sha256 == first.facts_sha256


def test_random_weights_are_refused(workspace: Workspace) -> None:
    """There is nothing to adapt, so there are no ranks to choose."""
    with pytest.raises(UsageError, match="no ranks to choose"):
        probe(ProbeRequest(DATASET, weights="none"), workspace, reporter=SilentReporter())


@pytest.fixture
def planned(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    """A workspace with a planned dataset; nothing is preprocessed, as nothing is trained."""
    monkeypatch.setattr(measuring, "NUM_SAMPLES_DATASET", 3000)
    monkeypatch.setattr(planning, "_preprocess", lambda *_: ((), {}))
    write_dataset(workspace)
    return workspace


def plan_again(workspace: Workspace) -> Plan:
    folder = workspace.raw / DATASET
    assert load_raw_dataset(folder).training
    return planning.plan_and_preprocess(folder, workspace, verify=False).plan


def measured(workspace: Workspace) -> Fingerprint:
    return load_schema(Fingerprint, workspace.fingerprint_file(DATASET))


def ranks(plan: Plan, name: str, kind: str = "sam") -> tuple[int, ...] | None:
    """Ranks of a planned encoder."""
    found: tuple[int, ...] | None = plan.configuration(name).recipes[kind]["gpu"].encoder.value.adapters[0].ranks  # type: ignore[index]
    return found


def test_the_plan_follows_the_probe_and_its_removal(planned: Workspace) -> None:
    """Only the recipe that was probed changes; the plan is then kept; without the file it is as before."""
    before = plan_again(planned)
    values = [[float(32 - i) * (1 + block) for i in range(32)] for block in range(BLOCKS)]
    found = make_probe(values, backbone="vit_b", facts=measured(planned))
    save_probes(Probes(probes=(found,)), planned.probe_file(DATASET))
    after = plan_again(planned)
    expected, _ = choose_ranks(found, rank=4, targets=("q", "v"))
    assert ranks(after, "2d") == expected
    assert len(set(expected)) > 1
    assert [ranks(after, name) for name in after.configurations if name != "2d"] == [None] * (
        len(after.configurations) - 1
    )
    assert ranks(after, "2d", "medsam") is None
    reason = after.configuration("2d").recipes["sam"]["gpu"].encoder.reason
    assert "probe" in reason
    assert plan_again(planned) == after
    planned.probe_file(DATASET).unlink()
    again = plan_again(planned)
    assert (ranks(again, "2d"), again.probes_sha256) == (None, None)
    assert ranks(before, "2d") is None


def test_a_rank_given_or_another_backbone_decides_for_itself(
    planned: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """--rank means that rank everywhere; --backbone takes the probe of that backbone, where there is one."""
    plan_again(planned)
    own = measured(planned)
    small = make_probe([[3.0, 2.0, 1.0, 0.5, 0.2, 0.1]] * 5 + [[30.0, 20.0, 10.0, 5.0, 2.0, 1.0]], facts=own)
    large = make_probe([[2.0, 1.0, 0.5, 0.1, 0.1, 0.1]] * 11 + [[20.0] * 6], backbone="vit_b", facts=own)
    save_probes(Probes(probes=(small, large)), planned.probe_file(DATASET))
    plan = plan_again(planned)
    weights = planned.raw / "weights.pth"
    weights.touch()
    monkeypatch.setattr(methods, "supplies_decoder", lambda *_: True)
    request = TrainingRequest(DATASET, "0", configuration="2d", weights=f"sam:{weights}")

    def resolved(**changes: object) -> tuple[int, tuple[int, ...] | None]:
        asked = TrainingRequest(**{**vars(request), **changes})
        lora = resolve(asked, plan, "2d", "cpu", planned).method.adapter("lora")
        return lora.rank, lora.ranks

    assert resolved() == (4, choose_ranks(large, rank=4, targets=("q", "v"))[0])
    assert resolved(backbone="vit_xs") == (4, choose_ranks(small, rank=4, targets=("q", "v"))[0])
    assert resolved(backbone="vit_l") == (4, None)
    assert resolved(rank=2) == (2, None)
    assert resolved(backbone="vit_xs", rank=2) == (2, None)


def test_ranks_of_other_weights_are_not_used(planned: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Probed on the file that training takes they hold; on another of its kind one rank does everywhere, said once."""
    weights = planned.raw / "weights.pth"
    weights.write_bytes(b"never loaded")
    found_file = WeightsFile(weights, sha256_file(weights), "sam", None)
    monkeypatch.setattr(running, "locate_weights", lambda *_, **__: found_file)
    values = [[2.0, 1.0, 0.5, 0.1, 0.1, 0.1]] * 11 + [[20.0] * 6]
    plan_again(planned)
    other = make_probe(values, backbone="vit_b", facts=measured(planned))
    same = other.model_copy(update={"weights_sha256": sha256_file(weights)})
    chosen = choose_ranks(other, rank=4, targets=("q", "v"))[0]
    request = TrainingRequest(DATASET, "0", configuration="2d", weights=f"sam:{weights}", device="cpu")

    def used(plan: Plan) -> tuple[object, list[str], list[str]]:
        reporter = SilentReporter()
        identity = running.identify_run(request, plan, "2d", planned, "cpu", SilentReporter())
        found = with_probed_ranks(identity, planned, reporter)
        return found.recipe.method.adapter("lora").ranks, reporter.warnings, reporter.messages

    save_probes(Probes(probes=(other,)), planned.probe_file(DATASET))
    plan = plan_again(planned)
    assert ranks(plan, "2d") == chosen
    found, warnings, _ = used(plan)
    assert found is None
    assert "0000000000" in warnings[0]
    assert "rank 4 everywhere" in warnings[0]
    save_probes(Probes(), planned.probe_file(DATASET))
    found, warnings, messages = used(plan)
    assert (found, warnings) == (chosen, [])
    assert "not known" in messages[0]
    save_probes(Probes(probes=(same,)), planned.probe_file(DATASET))
    assert used(plan_again(planned)) == (chosen, [], [])


def test_a_probe_of_other_facts_is_left_aside_and_said(planned: Workspace) -> None:
    """One of another dataset, of cases that have changed, or of an older file decides nothing, with one warning."""
    before = plan_again(planned)
    own = measured(planned)
    values = [[2.0, 1.0, 0.5, 0.1, 0.1, 0.1]] * 11 + [[20.0] * 6]
    former = own.model_copy(update={"cases": dict(list(own.cases.items())[:-1])})
    for facts in (None, former, former.model_copy(update={"dataset": "Dataset004_Hippocampus"})):
        found = make_probe(values, backbone="vit_b", facts=facts)
        save_probes(Probes(probes=(found,)), planned.probe_file(DATASET))
        reporter = SilentReporter()
        plan = planning.plan_and_preprocess(planned.raw / DATASET, planned, verify=False, reporter=reporter).plan
        assert ranks(plan, "2d") is None
        said = [text for text in reporter.warnings if "left aside" in text]
        assert len(said) == 1
        assert f"{planned.probe_file(DATASET)}" in said[0]
        assert found.fault_with(own) in plan.configuration("2d").recipes["sam"]["gpu"].encoder.reason
    assert "Dataset004_Hippocampus" in said[0]
    planned.probe_file(DATASET).unlink()
    assert ranks(plan_again(planned), "2d") == ranks(before, "2d")


def test_a_users_ranks_are_not_taken_for_those_of_a_stale_probe(
    planned: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranks of the user's own that a probe of other facts would give too stay, whatever weights that one measured."""
    plan_again(planned)
    weights = planned.raw / "weights.pth"
    weights.write_bytes(b"never loaded")
    found_file = WeightsFile(weights, sha256_file(weights), "sam", None)
    monkeypatch.setattr(running, "locate_weights", lambda *_, **__: found_file)
    own = measured(planned)
    values = [[2.0, 1.0, 0.5, 0.1, 0.1, 0.1]] * 11 + [[20.0] * 6]
    probe_now = make_probe(values, backbone="vit_b", facts=own)
    save_probes(Probes(probes=(probe_now,)), planned.probe_file(DATASET))
    plan = plan_again(planned)
    stale = probe_now.model_copy(update={"fingerprint_sha256": "0" * 64})
    save_probes(Probes(probes=(stale,)), planned.probe_file(DATASET))
    request = TrainingRequest(DATASET, "0", configuration="2d", weights=f"sam:{weights}", device="cpu")
    reporter = SilentReporter()
    identity = running.identify_run(request, plan, "2d", planned, "cpu", SilentReporter())
    found = with_probed_ranks(identity, planned, reporter)
    assert found.recipe.method.adapter("lora").ranks == ranks(plan, "2d")
    assert not reporter.warnings
