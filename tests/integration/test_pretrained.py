"""Adapting pretrained weights: LoRA from a file, a checkpoint of what differs, and its base found again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from samunet.artifacts.checkpoint import read_checkpoint
from samunet.artifacts.model_spec import get_spec
from samunet.artifacts.plan import IntensityMap
from samunet.artifacts.workspace import Workspace
from samunet.core.errors import UsageError, WeightsError
from samunet.core.files import read_json
from samunet.core.log import SilentReporter
from samunet.inference.predictor import Predictor
from samunet.models.sam.network import build_network
from samunet.models.weights import as_base, locate_weights
from samunet.pipeline.export_weights import export_weights
from samunet.pipeline.pretrained import labels_read, tell_what_was_seen
from samunet.pipeline.train import TrainingResult, train
from samunet.pipeline.training_run import CASES_FILE, RunCases, TrainingRequest
from samunet.training.checkpointing import checkpoint_file
from tests.samples import DATASET, lora_encoder, make_case, make_plan, make_recipe, prepare

BACKBONES = ("vit_xs", "vit_t_xs")


def run(folder: Path, backbone: str) -> TrainingResult:
    """Adapt a small random "pretrained" SAM of another input size and class count to balls and cubes."""
    workspace = Workspace.locate(workspace=folder, environment={})
    recipe = make_recipe(
        backbone=backbone,
        encoder=lora_encoder(),
        intensity_map=IntensityMap(kind="sam_pixels", lower=(-2.0,), upper=(2.0,)),
    )
    prepare(workspace, make_plan(recipes={"ssl": {"cpu": recipe}}))
    torch.manual_seed(0)
    base = build_network(get_spec(backbone), image_size=128, num_tokens=4)
    torch.save(base.state_dict(), folder / "base.pth")
    request = TrainingRequest(
        DATASET, "0", weights=f"ssl:{folder / 'base.pth'}", device="cpu", num_workers=0, iterations=2, epochs=1
    )
    return train(request, workspace, reporter=SilentReporter())


@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_checkpoint_holds_what_was_trained_and_nothing_of_the_base(tmp_path: Path, backbone: str):
    """Adapters and decoder are stored, frozen encoder weights are not, and the base is named by its hash."""
    result = run(tmp_path, backbone)
    checkpoint = read_checkpoint(checkpoint_file(result.folder, "final"))
    assert result.folder.parent.name == "2d__auto__ssl"
    assert any("lora" in name for name in checkpoint.tensors)
    assert any("mask_decoder.mask_tokens" in name for name in checkpoint.tensors)
    assert not any(name.endswith(("qkv.weight", "attn.proj.weight")) for name in checkpoint.tensors)
    assert len(checkpoint.manifest.base.sha256) == 64
    assert any("mask_tokens" in key for key in checkpoint.manifest.load_report["reinitialised"])
    assert checkpoint.manifest.load_report["unexpected"] == []


@pytest.mark.parametrize("backbone", BACKBONES)
def test_the_base_is_found_by_hash_in_the_cache_and_nothing_else_will_do(
    tmp_path: Path, backbone: str, monkeypatch: pytest.MonkeyPatch
):
    """Moved to the cache it is found and gives equal output; a changed file is refused with the hash it should have."""
    result = run(tmp_path, backbone)
    volume, _ = make_case(50)
    model = result.folder.parent
    before = Predictor.from_folder(model, device="cpu").predict(volume, with_probabilities=True)
    cache = tmp_path / "cache"
    cache.mkdir()
    monkeypatch.setenv("SAMUNET_CACHE", str(cache))
    (tmp_path / "base.pth").rename(cache / "base.pth")
    torch.manual_seed(123)
    after = Predictor.from_folder(model, device="cpu").predict(volume, with_probabilities=True)
    assert before.probabilities is not None
    assert after.probabilities is not None
    assert (before.probabilities == after.probabilities).all()
    torch.save({"other": torch.zeros(1)}, cache / "base.pth")
    with pytest.raises(WeightsError) as caught:
        Predictor.from_folder(model, device="cpu")
    assert "base.pth with SHA-256" in str(caught.value)


def test_what_taught_an_exported_model_is_known_when_it_is_trained_from(tmp_path: Path):
    """Its training cases stand beside the file; a fold that validates them says so, and that its weights are others."""
    first = run(tmp_path, "vit_xs")
    exported = export_weights(first.folder.parent, "0", tmp_path / "encoder.pth")
    with pytest.raises(UsageError, match="exists already"):
        export_weights(first.folder.parent, "0", tmp_path / "encoder.pth")
    trained = set(RunCases.read(first.folder / CASES_FILE).trained)
    base = as_base(locate_weights(f"ssl:{exported.file}", get_spec("vit_xs"), offline=True))
    assert labels_read(base, DATASET) == trained
    workspace, told = Workspace.locate(workspace=tmp_path, environment={}), SilentReporter()
    request = TrainingRequest(
        DATASET, "1", weights=f"ssl:{exported.file}", device="cpu", num_workers=0, iterations=1, epochs=1, mirror=False
    )
    second = train(request, workspace, reporter=told)
    validation = RunCases.read(second.folder / CASES_FILE).validation
    assert set(validation) <= trained
    assert read_json(second.folder / CASES_FILE)["labels_seen"] == sorted(validation)
    assert any("taught with the labels of" in text for text in told.warnings)
    assert any("not known which cases" in text and "base.pth" in text for text in told.warnings)
    assert not any("encoder.pth" in text for text in told.warnings)

    told = SilentReporter()
    Predictor.from_folder(first.folder.parent, device="cpu", reporter=told)
    assert ["start from different weights" in text for text in told.warnings] == [True]
    assert f"fold 0 from {tmp_path / 'base.pth'}; fold 1 from {exported.file}" in told.warnings[0]
    with pytest.raises(UsageError, match="there is a run here already") as caught:
        train(replace(request, fold="0"), workspace, reporter=SilentReporter())
    assert "--results FOLDER keeps both" in str(caught.value.todo)
    with pytest.raises(UsageError, match="there is a run here already") as caught:
        train(request, workspace, reporter=SilentReporter())
    assert "--c continues it" in str(caught.value.todo)

    exported.record.unlink()
    told = SilentReporter()
    tell_what_was_seen(base, DATASET, validation, told)
    assert ["not known which cases" in text and "encoder.pth" in text for text in told.warnings] == [True]
