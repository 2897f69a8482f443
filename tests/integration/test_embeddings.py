"""Training a decoder on cached embeddings."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from samunet.artifacts.method import EncoderMethod
from samunet.artifacts.model_spec import get_spec
from samunet.artifacts.plan import IntensityMap
from samunet.artifacts.workspace import Workspace
from samunet.core.errors import UsageError
from samunet.core.log import SilentReporter
from samunet.models.sam.network import build_network
from samunet.pipeline.train import train
from samunet.pipeline.training_run import TrainingRequest
from samunet.training.checkpointing import checkpoint_file
from tests.samples import DATASET, lora_encoder, make_plan, make_recipe, prepare


def request(workspace: Workspace, encoder: EncoderMethod, **options: object) -> TrainingRequest:
    """Prepare a dataset whose encoder is as given, and weights for it."""
    pixels = IntensityMap(kind="sam_pixels", lower=(-2.0,), upper=(2.0,))
    recipe = make_recipe(backbone="vit_xs", encoder=encoder, intensity_map=pixels)
    prepare(workspace, make_plan(recipes={"ssl": {"cpu": recipe}}))
    torch.manual_seed(0)
    base = workspace.raw / "base.pth"
    torch.save(build_network(get_spec("vit_xs"), image_size=64, num_tokens=4).state_dict(), base)
    values = {"iterations": 3, "epochs": 1, "num_workers": 0, "mirror": False, **options}
    return TrainingRequest(DATASET, "0", weights=f"ssl:{base}", device="cpu", **values)  # type: ignore[arg-type]


def test_cached_embeddings_train_the_same_decoder(tmp_path: Path) -> None:
    """Three steps from embeddings in half precision move the decoder as three steps from images do."""
    from samunet.artifacts.checkpoint import read_checkpoint

    states = []
    for cached in (False, True):
        workspace = Workspace.locate(workspace=tmp_path / str(cached), environment={})
        asked = request(workspace, EncoderMethod(train="frozen"), augment=False, cache_embeddings=cached)
        result = train(asked, workspace, reporter=SilentReporter())
        states.append(read_checkpoint(checkpoint_file(result.folder, "final")).tensors)
        caches = list(workspace.preprocessed_folder(DATASET).glob("embeddings_*/*.npy"))
        assert bool(caches) == cached
    plain, cached_state = states
    assert set(plain) == set(cached_state)
    for name, tensor in plain.items():
        torch.testing.assert_close(cached_state[name], tensor, rtol=0, atol=2e-3, msg=name)


@pytest.mark.parametrize(
    ("encoder", "options", "words"),
    [
        (lora_encoder(), {"augment": False}, "the encoder trains"),
        (EncoderMethod(train="frozen"), {}, "--no-augmentation"),
    ],
    ids=["adapted", "augmented"],
)
def test_a_cache_that_would_be_wrong_is_refused(
    tmp_path: Path, encoder: EncoderMethod, options: dict[str, bool], words: str
) -> None:
    """Embeddings that change from step to step are not cached, and the message says why."""
    workspace = Workspace.locate(workspace=tmp_path, environment={})
    with pytest.raises(UsageError, match="cannot be cached") as caught:
        train(request(workspace, encoder, cache_embeddings=True, **options), workspace, reporter=SilentReporter())
    assert words in str(caught.value.found)
