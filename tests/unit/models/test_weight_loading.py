"""Strict loading: an exact report, every published layout, and refusal of anything that does not fit."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from samunet.artifacts.model_spec import SamSpec, get_spec
from samunet.core.errors import WeightsError
from samunet.core.files import sha256_file
from samunet.models.formats import mobile_sam_to_timm, read_published
from samunet.models.loading import LoadReport, load_weights
from samunet.models.sam.network import CLASS_SPECIFIC, GAUSSIAN, build_network
from samunet.models.weights import WeightsFile
from tests.unit.models.model_helpers import SMALL_TINY, SMALL_VIT, base_file, images, perturb

ENCODER = "image_encoder."


def _file(path: Path, state: object, kind: str = "sam") -> WeightsFile:
    torch.save(state, path)
    return WeightsFile(path, sha256_file(path), kind)


def to_mobile_sam(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Name a SAM with timm's TinyViT as MobileSAM's authors do, with the classification head they keep."""
    renamed: dict[str, Tensor] = {}
    for key, tensor in state.items():
        if not key.startswith(ENCODER):
            renamed[key] = tensor
            continue
        parts = key.removeprefix(ENCODER).split(".")
        if parts[0] == "patch_embed":
            parts[1:2] = ["seq", {"conv1": "0", "conv2": "2"}[parts[1]]]
        if parts[0] == "stages":
            stage = int(parts[1]) - (parts[2] == "downsample")
            parts[:2] = ["layers", str(stage)]
        parts = ["c" if part == "conv" else part for part in parts]
        renamed[ENCODER + ".".join(parts)] = tensor
    width = state[f"{ENCODER}neck.0.weight"].shape[1]
    renamed[f"{ENCODER}norm_head.weight"] = torch.ones(width)
    renamed[f"{ENCODER}norm_head.bias"] = torch.zeros(width)
    renamed[f"{ENCODER}head.weight"] = torch.zeros(1000, width)
    renamed[f"{ENCODER}head.bias"] = torch.zeros(1000)
    return renamed


@pytest.mark.parametrize("spec", [SMALL_VIT, SMALL_TINY], ids=lambda s: s.family)
@pytest.mark.parametrize("num_tokens", [1, 3, 4, 6])
def test_report_names_every_key(tmp_path: Path, spec: SamSpec, num_tokens: int) -> None:
    """Loaded and class-specific keys are the network's keys, disjoint and complete, also with SAM's 4 tokens."""
    file = base_file(tmp_path, spec, image_size=64)
    network = build_network(spec, image_size=64, num_tokens=num_tokens)
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    report = load_weights(network, file)
    assert report.missing == ()
    assert report.unexpected == ()
    assert report.resized == {}
    named = [*report.loaded, *report.missing, *report.reinitialised]
    assert sorted(named) == sorted(before)
    stored = torch.load(file.path, weights_only=True)
    after = network.state_dict()
    assert all(torch.equal(after[key], stored[key]) for key in report.loaded)
    assert all(torch.equal(after[key], before[key]) for key in report.reinitialised)
    assert all(key.startswith(CLASS_SPECIFIC) for key in report.reinitialised)
    assert GAUSSIAN in report.loaded


def test_report_as_text(tmp_path: Path) -> None:
    """The stored form lists keys and what was done; the summary counts them."""
    network = build_network(SMALL_VIT, image_size=112, num_tokens=2)
    report = load_weights(network, base_file(tmp_path, SMALL_VIT, image_size=64))
    lists = report.as_lists()
    assert "image_encoder.pos_embed: bilinear 4x4 -> 7x7" in lists["resized"]
    assert lists["missing"] == []
    assert f"{len(report.loaded)} tensors loaded, 3 of them resized" in report.summary()
    assert LoadReport("none").summary() == "random weights"


def test_positions_of_another_size_are_resized_once(tmp_path: Path) -> None:
    """Absolute positions are interpolated bilinearly; relative ones as upstream would at run time; all is recorded."""
    file = base_file(tmp_path, SMALL_VIT, image_size=240)
    stored = torch.load(file.path, weights_only=True)
    network = build_network(SMALL_VIT, image_size=112, num_tokens=2)
    report = load_weights(network, file)
    assert set(report.resized) == {
        "image_encoder.pos_embed",
        "image_encoder.blocks.1.attn.rel_pos_h",
        "image_encoder.blocks.1.attn.rel_pos_w",
    }
    absolute = stored["image_encoder.pos_embed"].permute(0, 3, 1, 2)
    expected = nn.functional.interpolate(absolute, size=(7, 7), mode="bilinear", align_corners=False)
    torch.testing.assert_close(network.image_encoder.pos_embed, expected.permute(0, 2, 3, 1), rtol=0, atol=0)
    assert network.image_encoder.blocks[1].attn.rel_pos_h.shape == (13, 16)
    # The same network with the checkpoint's long tables, which upstream interpolates in every forward.
    with torch.no_grad():
        resized = network(images(1))
        for name in ("rel_pos_h", "rel_pos_w"):
            table = nn.Parameter(stored[f"image_encoder.blocks.1.attn.{name}"])
            setattr(network.image_encoder.blocks[1].attn, name, table)
        torch.testing.assert_close(network(images(1)), resized, rtol=0, atol=1e-6)


def test_same_size_changes_no_position(tmp_path: Path) -> None:
    """At the checkpoint's own size positions are its own, bit for bit."""
    file = base_file(tmp_path, SMALL_VIT, image_size=64)
    network = build_network(SMALL_VIT, image_size=64, num_tokens=2)
    assert load_weights(network, file).resized == {}
    stored = torch.load(file.path, weights_only=True)
    assert torch.equal(network.image_encoder.pos_embed, stored["image_encoder.pos_embed"])


def test_tiny_vit_gives_the_loaded_weights_output_after_an_eval_forward(tmp_path: Path) -> None:
    """Loading after an eval forward leaves no stale position bias in TinyViT."""
    file = base_file(tmp_path, SMALL_TINY, image_size=64)
    used, fresh = (build_network(SMALL_TINY, image_size=64, num_tokens=2).eval() for _ in range(2))
    fresh.mask_decoder.load_state_dict(used.mask_decoder.state_dict())
    with torch.no_grad():
        used(images(1, size=64))
        load_weights(used, file)
        load_weights(fresh, file)
        assert torch.equal(used(images(1, size=64)), fresh(images(1, size=64)))


@pytest.mark.parametrize("layout", ["plain", "training", "distributed", "safetensors"])
def test_layouts_of_published_files(tmp_path: Path, layout: str) -> None:
    """A plain state dict, one inside a training checkpoint, one with a wrapper's prefix and safetensors load alike."""
    state = torch.load(base_file(tmp_path, SMALL_VIT, image_size=64).path, weights_only=True)
    path = tmp_path / f"medsam_{layout}.pth"
    if layout == "plain":
        torch.save({**state, "pixel_mean": torch.zeros(3, 1, 1)}, path)
    if layout == "training":
        torch.save({"model": state, "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]}, "epoch": 3}, path)
    if layout == "distributed":
        torch.save(
            {f"module.{key}": tensor for key, tensor in state.items()}, path, _use_new_zipfile_serialization=False
        )
    if layout == "safetensors":
        path = path.with_suffix(".safetensors")
        save_file(state, path)
    assert read_published(path).kind == "medsam"
    network = build_network(SMALL_VIT, image_size=64, num_tokens=3)
    report = load_weights(network, WeightsFile(path, sha256_file(path), "medsam"))
    assert report.missing == ()
    assert torch.equal(network.image_encoder.pos_embed, state["image_encoder.pos_embed"])


def test_mobile_sam_layout(tmp_path: Path) -> None:
    """MobileSAM's names map onto timm's one to one; only its classification head is dropped."""
    spec = get_spec("vit_t")
    state = torch.load(base_file(tmp_path, spec, image_size=64).path, weights_only=True)
    mobile = to_mobile_sam(state)
    assert {mobile_sam_to_timm(key) for key in to_mobile_sam(state)} >= set(state)
    assert f"{ENCODER}layers.0.downsample.conv1.c.weight" in mobile
    assert f"{ENCODER}patch_embed.seq.2.bn.running_mean" in mobile
    file = _file(tmp_path / "mobile_sam.pt", mobile, "mobile_sam")
    assert read_published(file.path).kind == "mobile_sam"
    network = build_network(spec, image_size=64, num_tokens=3)
    report = load_weights(network, file)
    assert report.missing == ()
    assert report.unexpected == ()
    assert set(report.dropped) == {
        f"{ENCODER}{k}" for k in ("norm_head.weight", "norm_head.bias", "head.weight", "head.bias")
    }
    assert all(torch.equal(network.state_dict()[key], state[key]) for key in report.loaded)


@pytest.mark.parametrize("prefixed", [True, False])
def test_encoder_only_files(tmp_path: Path, prefixed: bool) -> None:
    """An encoder-only file fills the encoder; the rest comes from SAM's file, or starts fresh, and a note says so."""
    complete = base_file(tmp_path, SMALL_VIT, image_size=64)
    state = torch.load(complete.path, weights_only=True)
    shift = 0.5
    encoder = {
        (key if prefixed else key.removeprefix(ENCODER)): tensor + shift
        for key, tensor in state.items()
        if key.startswith(ENCODER)
    }
    file = _file(tmp_path / "mri.pth", encoder, "ssl")
    network = build_network(SMALL_VIT, image_size=64, num_tokens=3)
    report = load_weights(network, WeightsFile(file.path, file.sha256, "ssl", rest=complete))
    assert report.missing == ()
    assert complete.sha256 in report.notes[0]
    assert torch.equal(network.image_encoder.pos_embed, state["image_encoder.pos_embed"] + shift)
    assert torch.equal(network.state_dict()[GAUSSIAN], state[GAUSSIAN])
    alone = load_weights(build_network(SMALL_VIT, image_size=64, num_tokens=3), file)
    assert alone.missing
    assert not any(key.startswith(ENCODER) for key in alone.missing)
    assert "random" in alone.notes[0]


@pytest.mark.parametrize("fault", ["missing", "unexpected", "shape", "gaussian"])
def test_anything_that_does_not_fit_is_refused_by_name(tmp_path: Path, fault: str) -> None:
    """A missing key, a key too many or another shape stops the loading, and the message names it."""
    state = torch.load(base_file(tmp_path, SMALL_VIT, image_size=64).path, weights_only=True)
    key = "image_encoder.blocks.0.mlp.lin1.weight"
    if fault == "missing":
        del state[key]
    elif fault == "unexpected":
        key = "image_encoder.blocks.0.adapter.weight"
        state[key] = torch.zeros(3)
    elif fault == "shape":
        state[key] = torch.zeros(7, 7)
    else:
        key = GAUSSIAN
        del state[key]
    with pytest.raises(WeightsError, match="1 keys") as caught:
        load_weights(build_network(SMALL_VIT, image_size=64, num_tokens=3), _file(tmp_path / "bad.pth", state))
    assert key in caught.value.problem


def test_weights_of_another_backbone_are_refused(tmp_path: Path) -> None:
    """The message of a wrong backbone is bounded and says what to do."""
    file = base_file(tmp_path, SMALL_TINY, image_size=64)
    with pytest.raises(WeightsError, match="more") as caught:
        load_weights(build_network(SMALL_VIT, image_size=64, num_tokens=3), file)
    assert len(str(caught.value).splitlines()) < 20
    assert "backbone" in str(caught.value.todo)


class _Trap:
    """Runs code when unpickled."""

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (Path("sprung"),))


@pytest.mark.parametrize("content", ["text", "pickle", "list", "other", "torn"])
def test_files_that_are_no_weights(tmp_path: Path, content: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Text, code, other tensors and torn files are errors that name the file; no code runs."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "weights.pth"
    if content == "text":
        path.write_text("<html>not found</html>")
    elif content == "pickle":
        path.write_bytes(pickle.dumps({"model": _Trap()}))
    elif content == "list":
        torch.save([torch.zeros(1)], path)
    elif content == "other":
        torch.save({"fc.weight": torch.zeros(1)}, path)
    else:
        whole = base_file(tmp_path, SMALL_VIT, image_size=64).path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(WeightsError) as caught:
        read_published(path)
    assert caught.value.file == path
    assert not (tmp_path / "sprung").exists()


def test_damaged_safetensors(tmp_path: Path) -> None:
    """A broken safetensors file is the same kind of error."""
    path = tmp_path / "weights.safetensors"
    path.write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00 broken header")
    with pytest.raises(WeightsError, match="cannot be read"):
        read_published(path)


def test_perturbation_reaches_every_floating_tensor() -> None:
    """The helper behind these tests leaves no tensor at its default."""
    network = build_network(SMALL_TINY, image_size=64, num_tokens=2)
    before = {k: t.clone() for k, t in network.state_dict().items() if t.is_floating_point()}
    perturb(network)
    assert not any(torch.equal(tensor, network.state_dict()[key]) for key, tensor in before.items())
