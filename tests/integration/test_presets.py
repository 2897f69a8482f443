"""Every preset: two steps of training, which move what trains and nothing else, then one volume predicted afresh."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from samunet.artifacts.model_spec import STOCK_TOKENS, get_spec
from samunet.artifacts.prompts import Prompt
from samunet.artifacts.workspace import Workspace
from samunet.core.log import SilentReporter
from samunet.inference.predictor import Predictor
from samunet.models.build import BuiltModel, build_model
from samunet.models.sam.network import build_network
from samunet.models.segmentation import SegmentationModel
from samunet.pipeline import train as training
from samunet.pipeline.plan import plan_and_preprocess
from samunet.pipeline.train import train
from samunet.pipeline.training_run import TrainingRequest
from samunet.planners.presets import PRESETS
from tests.samples import DATASET, make_case, write_dataset

SMALL = {"vit_h": "vit_xs", "vit_b": "vit_xs", "vit_t": "vit_t_xs"}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A planned dataset with all stores, and "pretrained" weights of both small backbones."""
    workspace = Workspace.locate(workspace=tmp_path_factory.mktemp("presets"), environment={})
    folder = write_dataset(workspace, num_train=5, num_test=0)
    names = ("2d", "2.5d", "3d", "2d_medsam")
    result = plan_and_preprocess(folder, workspace, cpu_minutes=1, configurations=names, reporter=SilentReporter())
    assert not result.failed
    torch.manual_seed(0)
    for backbone in ("vit_xs", "vit_t_xs", "vit_t"):
        network = build_network(get_spec(backbone), image_size=112, num_tokens=STOCK_TOKENS)
        torch.save(network.state_dict(), workspace.raw / f"{backbone}.pth")
    return workspace


def request(
    workspace: Workspace, name: str, results: Path, *, backbone: str | None = None, **options: object
) -> tuple[TrainingRequest, Workspace]:
    preset = PRESETS[name]
    backbone = backbone or SMALL[preset.backbone]
    kind = "mobile_sam" if backbone == "vit_t" else preset.weights
    values = {
        "backbone": backbone,
        "weights": f"{kind}:{workspace.raw / f'{backbone}.pth'}",
        "changes": {},
        **options,
    }
    made = TrainingRequest(
        DATASET, "0", preset=name, device="cpu", epochs=1, iterations=2, num_workers=0, mirror=False, **values
    )
    own = Workspace(raw=workspace.raw, preprocessed=workspace.preprocessed, results=results)
    return made, own


@pytest.mark.parametrize("name", [n for n in PRESETS if not n.startswith("peft_")])
def test_every_preset_trains_and_predicts(prepared: Workspace, tmp_path: Path, name: str) -> None:
    """Two steps train, the checkpoint is read back and segments a volume."""
    train_and_predict(prepared, tmp_path, name)


@pytest.mark.parametrize("name", ["samed", "medsam", "sam_adapter", "med_sa", "ma_sam", "nnsam"])
def test_methods_published_on_vit_work_on_tiny_vit(prepared: Workspace, tmp_path: Path, name: str) -> None:
    """One preset per method, on the other family of backbones."""
    train_and_predict(prepared, tmp_path, name, backbone="vit_t_xs")


@pytest.mark.parametrize(
    "name",
    [
        "sam_decoder",
        "sam_zero_shot",
        "medsam",
        "sam_adapter",
        "samed",
        "samed_s",
        "finetune_sam_vit_t_both_adapter",
        "med_sa",
        "ma_sam",
        "nnsam",
    ],
)
def test_methods_work_on_the_whole_tiny_vit(prepared: Workspace, tmp_path: Path, name: str) -> None:
    """MobileSAM's own encoder, not a smaller one."""
    train_and_predict(prepared, tmp_path, name, backbone="vit_t")


@pytest.mark.parametrize("name", ["ma_sam", "med_sa"])
def test_depth_methods_work_on_single_slices(prepared: Workspace, tmp_path: Path, name: str) -> None:
    """In the 2d configuration a depth path sees slabs of one slice."""
    assert train_and_predict(prepared, tmp_path, name, configuration="2d").recipe.slab_depth == 1


@pytest.mark.parametrize("backbone", ["vit_xs", "vit_t_xs"])
def test_slabs_shorter_and_longer_than_the_volume(prepared: Workspace, tmp_path: Path, backbone: str) -> None:
    """The 3d configuration segments volumes of one slice, of fewer slices than its slab and of several slabs."""
    asked = TrainingRequest(
        DATASET,
        "0",
        configuration="3d",
        backbone=backbone,
        weights="none",
        device="cpu",
        epochs=1,
        iterations=2,
        num_workers=0,
        mirror=False,
    )
    workspace = Workspace(raw=prepared.raw, preprocessed=prepared.preprocessed, results=tmp_path)
    result = train(asked, workspace, reporter=SilentReporter())
    assert result.report is not None
    assert result.report.complete
    predictor = Predictor.from_folder(result.folder.parent, device="cpu", mirror=False)
    depth = predictor.recipe.slab_depth
    assert depth > 1
    assert predictor.plan.frame.value.slice_axis == 0
    for number in (1, depth - 1, depth, 2 * depth + 1):
        volume, _ = make_case(50, shape=(number, 30, 26))
        assert predictor.predict(volume).labels.shape == (number, 30, 26)


def train_and_predict(
    prepared: Workspace, tmp_path: Path, name: str, *, backbone: str | None = None, **options: object
) -> Predictor:
    """Train two steps, read the checkpoint back, predict a volume with it."""
    asked, workspace = request(prepared, name, tmp_path, backbone=backbone, **options)
    started: list[SegmentationModel] = []

    def build_and_keep(*args: Any, **values: Any) -> BuiltModel:
        built = build_model(*args, **values)
        started.append(copy.deepcopy(built.model))
        return built

    with mock.patch.object(training, "build_model", build_and_keep):
        result = train(asked, workspace, reporter=SilentReporter())
    assert result.report is not None
    assert result.report.complete
    predictor = Predictor.from_folder(result.folder.parent, device="cpu", mirror=False)
    method = PRESETS[name].method
    assert predictor.recipe.method == method
    check_what_moved(started[0], predictor._models[0])
    volume, reference = make_case(50)
    if method.promptable:
        z, y, x = (int(values.mean()) for values in np.nonzero(reference == 1))
        prompt = Prompt(label="ball", points=((x, y, z),), positive=(True,), space="voxel_ijk")
        labels = predictor.predict_prompted(volume, (prompt,)).labels
    else:
        labels = predictor.predict(volume).labels
    assert labels.shape == reference.shape
    assert set(np.unique(labels)) <= {0, 1, 2}
    return predictor


def check_what_moved(start: SegmentationModel, end: SegmentationModel) -> None:
    """Every part of which something trains has moved, and nothing that is frozen, batch norm included."""
    after = end.state_dict()
    moved = {key for key, tensor in start.state_dict().items() if not torch.equal(tensor, after[key])}
    trained = {key for key, parameter in start.named_parameters() if parameter.requires_grad}
    full = start.method.encoder.train == "full"
    allowed = trained | {key for key, _ in start.named_buffers() if (full and ".bn." in key) or key.startswith("unet.")}
    assert moved <= allowed
    parts = {key: ".".join(key.split(".")[:2]) for key in trained}
    assert {parts[key] for key in moved & trained} == set(parts.values())


@pytest.mark.parametrize("name", ["peft_dora", "peft_rslora"])
def test_variants_of_the_peft_library(prepared: Workspace, tmp_path: Path, name: str) -> None:
    """With the extra installed its variants train and predict like the others."""
    pytest.importorskip("peft", reason="the extra 'peft' is not installed")
    train_and_predict(prepared, tmp_path, name)
