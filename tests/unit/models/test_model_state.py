"""What a checkpoint stores of a model, and that it gives the model back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from samunet.artifacts.model_spec import get_spec
from samunet.artifacts.plan import ResolvedRecipe
from samunet.core.errors import CheckpointError
from samunet.models.build import needs_base, restore_model
from samunet.models.sam.network import GAUSSIAN
from samunet.models.segmentation import SegmentationModel
from samunet.models.state import load_trained_state, trained_state
from samunet.models.weights import WeightsFile
from tests.unit.models.model_helpers import BOTH_FAMILIES, METHODS, base_file, build, images, recipe

CASES = [
    (backbone, tuning, kind)
    for backbone in BOTH_FAMILIES
    for tuning, kind in (("full", "none"), ("full", "ssl"), ("lora", "ssl"), ("frozen", "ssl"))
]

Trained = tuple[ResolvedRecipe, WeightsFile | None, SegmentationModel]


def _trained(tmp_path: Path, backbone: str, tuning: str, kind: str) -> Trained:
    """A model after a training step, from a base made for another input size."""
    file = None if kind == "none" else base_file(tmp_path, get_spec(backbone), image_size=64)
    chosen = recipe(backbone=backbone, method=METHODS[tuning], weights_kind=kind)
    model = build(chosen, weights=file, seed=11).model
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.01)
    model.train()(images(2)).square().mean().backward()
    optimizer.step()
    return chosen, file, model.eval()


def _restore(chosen: ResolvedRecipe, file: WeightsFile | None, state: dict[str, Tensor]) -> SegmentationModel:
    return restore_model(chosen, num_tokens=3, num_input_channels=3, channels="direct", weights=file, state=state)


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join(case))
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return _trained(tmp_path_factory.mktemp("base"), *request.param)


def test_round_trip_gives_bit_equal_outputs(trained: Trained) -> None:
    """The stored tensors and the base rebuild the model exactly, whatever the global seed."""
    chosen, file, model = trained
    state = {name: tensor.clone() for name, tensor in trained_state(model).items()}
    torch.manual_seed(999)
    restored = _restore(chosen, file, state)
    assert not restored.training
    with torch.no_grad():
        assert torch.equal(restored(images(2, seed=5)), model(images(2, seed=5)))
    assert all(torch.equal(t, restored.state_dict()[name]) for name, t in model.state_dict().items())


def test_nothing_is_stored_that_the_base_supplies(trained: Trained) -> None:
    """With an adapted or frozen encoder, exactly what equals the base is left out; otherwise the state is complete."""
    chosen, file, model = trained
    complete, stored = model.state_dict(), trained_state(model)
    assert needs_base(chosen) == (chosen.method.encoder.train != "full")
    if not needs_base(chosen):
        assert set(stored) == set(complete)
        assert f"network.{GAUSSIAN}" in stored
        return
    assert file is not None
    base = {f"network.{key}": tensor for key, tensor in torch.load(file.path, weights_only=True).items()}
    equal = {
        name for name, t in complete.items() if name in base and t.shape == base[name].shape and t.equal(base[name])
    }
    assert set(complete) - set(stored) == equal
    assert f"network.{GAUSSIAN}" in equal


def test_a_fully_trained_model_needs_no_base_file(tmp_path: Path) -> None:
    """After full fine-tuning the checkpoint rebuilds the model although the base is gone."""
    chosen, file, model = _trained(tmp_path, "vit_t_xs", "full", "ssl")
    assert file is not None
    file.path.unlink()
    restored = _restore(chosen, None, trained_state(model))
    with torch.no_grad():
        assert torch.equal(restored(images(1)), model(images(1)))


def test_an_adapted_model_without_its_base_is_refused(tmp_path: Path) -> None:
    """The missing base shows as missing tensors, never as a random encoder."""
    chosen, _, model = _trained(tmp_path, "vit_xs", "lora", "ssl")
    with pytest.raises(CheckpointError, match=r"missing: network\.image_encoder"):
        _restore(chosen, None, trained_state(model))


@pytest.mark.parametrize("fault", ["missing", "unexpected", "shape"])
def test_a_state_that_does_not_fit_is_refused_and_nothing_loaded(tmp_path: Path, fault: str) -> None:
    """A tensor less, one more or of another shape is named, and the model keeps its weights."""
    _, _, model = _trained(tmp_path, "vit_xs", "lora", "ssl")
    state = {name: torch.zeros_like(tensor) for name, tensor in trained_state(model).items()}
    name = "network.mask_decoder.mask_tokens.weight"
    if fault == "missing":
        del state[name]
    elif fault == "unexpected":
        name = "network.image_encoder.extra"
        state[name] = torch.zeros(1)
    else:
        state[name] = torch.zeros(9, 256)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError, match="1 tensors") as caught:
        load_trained_state(model, state)
    assert name in caught.value.problem
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
