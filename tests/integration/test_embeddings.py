"""Training a decoder on cached embeddings."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from samunet.artifacts.method import EncoderMethod
from samunet.artifacts.model_spec import get_spec
from samunet.artifacts.plan import IntensityMap, load_plan
from samunet.artifacts.plan_parts import STORED, Planes
from samunet.artifacts.workspace import Workspace
from samunet.core.errors import UsageError
from samunet.core.log import SilentReporter
from samunet.imageio import read_volume, write_image
from samunet.models.sam.network import build_network
from samunet.pipeline.train import train
from samunet.pipeline.training_run import TrainingRequest
from samunet.training.checkpointing import checkpoint_file
from tests.samples import DATASET, install, lora_encoder, make_plan, make_recipe, prepare


def request(
    workspace: Workspace, encoder: EncoderMethod, *, planes: Planes = STORED, **options: object
) -> TrainingRequest:
    """Prepare a dataset whose encoder is as given, and weights for it."""
    pixels = IntensityMap(kind="sam_pixels", lower=(-2.0,), upper=(2.0,))
    recipe = make_recipe(backbone="vit_xs", encoder=encoder, intensity_map=pixels, planes=planes)
    prepare(workspace, make_plan(recipes={"ssl": {"cpu": recipe}}))
    torch.manual_seed(0)
    base = workspace.raw / "base.pth"
    torch.save(build_network(get_spec("vit_xs"), image_size=64, num_tokens=4).state_dict(), base)
    values = {"iterations": 3, "epochs": 1, "num_workers": 0, "mirror": False, **options}
    return TrainingRequest(DATASET, "0", weights=f"ssl:{base}", device="cpu", **values)  # type: ignore[arg-type]


@pytest.mark.parametrize("planes", [STORED, ("slices", "columns")])
def test_cached_embeddings_train_the_same_decoder(tmp_path: Path, planes: Planes) -> None:
    """Three steps from embeddings in half precision move the decoder as three steps from images do, in any planes."""
    from samunet.artifacts.checkpoint import read_checkpoint

    states = []
    for cached in (False, True):
        workspace = Workspace.locate(workspace=tmp_path / str(cached), environment={})
        frozen = EncoderMethod(train="frozen")
        asked = request(workspace, frozen, planes=planes, augment=False, cache_embeddings=cached)
        result = train(asked, workspace, reporter=SilentReporter())
        states.append(read_checkpoint(checkpoint_file(result.folder, "final")).tensors)
        caches = list(workspace.preprocessed_folder(DATASET).glob("embeddings_*/*/*.npy"))
        assert bool(caches) == cached
    plain, cached_state = states
    assert set(plain) == set(cached_state)
    for name, tensor in plain.items():
        torch.testing.assert_close(cached_state[name], tensor, rtol=0, atol=2e-3, msg=name)


def test_embeddings_of_a_changed_image_are_made_anew(tmp_path: Path) -> None:
    """After one case's image was replaced and preprocessed again, its embeddings alone are computed again."""
    workspace = Workspace.locate(workspace=tmp_path, environment={})
    asked = request(workspace, EncoderMethod(train="frozen"), augment=False, cache_embeddings=True, overwrite=True)

    def trained() -> dict[str, tuple[Path, int]]:
        train(asked, workspace, reporter=SilentReporter())
        files = workspace.preprocessed_folder(DATASET).glob("embeddings_*/*/*.npy")
        return {file.parent.name: (file, file.stat().st_mtime_ns) for file in files}

    first = trained()
    changed = sorted(first)[0]
    image = workspace.raw / DATASET / "imagesTr" / f"{changed}_0000.nii.gz"
    volume = read_volume([image])
    write_image(image, replace(volume, data=volume.data[:, ::-1].copy()))
    install(workspace, load_plan(workspace.plan_file(DATASET)), workspace.raw / DATASET)
    second = trained()
    assert second.keys() == first.keys()
    assert {name for name in first if second[name] != first[name]} == {changed}
    assert not first[changed][0].exists()


def test_a_continued_run_keeps_its_weights_and_its_cache(tmp_path: Path) -> None:
    """Without the flag the cache is used on; other weights of the same kind are refused, the same elsewhere are not."""
    from samunet.artifacts.checkpoint import read_checkpoint

    workspace = Workspace.locate(workspace=tmp_path, environment={})
    asked = request(workspace, EncoderMethod(train="frozen"), augment=False, cache_embeddings=True)
    train(asked, workspace, reporter=SilentReporter())
    caches = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("embeddings_*/*/*.npy")}
    for file in caches:
        file.unlink()
    kind, _, path = asked.weights.partition(":")
    copy = shutil.copy(path, tmp_path / "copy.pth")
    longer = replace(
        asked, resume=True, cache_embeddings=False, augment=True, epochs=2, iterations=None, weights=f"{kind}:{copy}"
    )
    result = train(longer, workspace, reporter=SilentReporter())
    assert read_checkpoint(checkpoint_file(result.folder, "final")).manifest.steps == 6
    assert set(tmp_path.rglob("embeddings_*/*/*.npy")) == set(caches)
    torch.manual_seed(1)
    other = tmp_path / "other.pth"
    torch.save(build_network(get_spec("vit_xs"), image_size=64, num_tokens=4).state_dict(), other)
    for how in ({"resume": True}, {"resume": False, "validate_only": True, "epochs": None}):
        with pytest.raises(UsageError, match="keeps its settings") as caught:
            train(replace(longer, weights=f"{kind}:{other}", **how), workspace, reporter=SilentReporter())
        assert "other.pth (SHA-256" in str(caught.value.found)
    reporter = SilentReporter()
    only = replace(longer, resume=False, validate_only=True, epochs=None, weights="auto", num_workers=3)
    train(only, workspace, reporter=reporter)
    assert any("--workers has no effect" in text for text in reporter.warnings)


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
