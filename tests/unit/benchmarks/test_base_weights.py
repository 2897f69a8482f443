"""The benchmarks' base checkpoint: the file that the script writes is a complete SAM that `--weights` takes."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import base_weights, synthetic_weights
from benchmarks.shapes import random_image
from samunet.artifacts.model_spec import STOCK_TOKENS, get_spec
from samunet.artifacts.pretraining import read_pretrained
from samunet.core.files import read_json, sha256_file
from samunet.models.loading import load_weights
from samunet.models.sam.network import build_network
from samunet.models.weights import locate_weights


@pytest.mark.parametrize("backbone", ["vit_xs", "vit_t_xs"])
def test_the_written_file_loads_completely(backbone: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every key of a promptable SAM comes from the file, the tokens and TinyViT's batch statistics among them."""
    path = tmp_path / f"{backbone}.pth"
    for name, value in {"NUM_IMAGES": 2, "NUM_HELD_OUT": 2, "PROMPTED_BATCH": 2}.items():
        monkeypatch.setattr(base_weights, name, value)
    monkeypatch.setattr(synthetic_weights, "BATCH", 2)
    monkeypatch.setattr(base_weights, "RESULTS", tmp_path)
    words = ["--backbone", backbone, "--minutes", "0.0001", "--output", str(path)]
    monkeypatch.setattr(sys, "argv", ["base_weights", *words])
    base_weights.main()
    spec = get_spec(backbone)
    file = locate_weights(f"sam:{path}", spec)
    assert file is not None
    assert file.kind == "sam"
    network = build_network(spec, image_size=base_weights.SIDE, num_tokens=STOCK_TOKENS)
    report = load_weights(network, file, keep_heads=True)
    assert (report.missing, report.unexpected, report.reinitialised, report.dropped) == ((), (), (), ())
    assert set(report.loaded) == set(network.state_dict())
    assert all(bool(tensor.isfinite().all()) for tensor in network.state_dict().values())
    statistics = [t for name, t in network.state_dict().items() if name.endswith("running_mean")]
    assert all(bool(t.any()) for t in statistics)
    assert bool(statistics) == (spec.family == "tiny_vit")
    written = read_json(path.with_suffix(".json"))
    assert written["sha256"] == sha256_file(path)
    assert min(written["steps"]) >= 1
    assert set(written["held_out_iou"]) == {"box", "click"}


def test_an_encoder_alone_is_written_as_pretrained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file of the drawing stage says what it is, and every key of an encoder comes from it."""
    path = tmp_path / "vit_t_xs.safetensors"
    monkeypatch.setattr(synthetic_weights, "BATCH", 2)
    words = ["--backbone", "vit_t_xs", "--minutes", "0.0001", "--images", "2", "--output", str(path)]
    monkeypatch.setattr(sys, "argv", ["synthetic_weights", *words])
    synthetic_weights.main()
    spec = get_spec("vit_t_xs")
    file = locate_weights(str(path), spec)
    assert file is not None
    assert file.kind == "ssl"
    network = build_network(spec, image_size=synthetic_weights.SIDE, num_tokens=STOCK_TOKENS)
    report = load_weights(network, file, keep_heads=True)
    assert not [key for key in report.missing if key.startswith("image_encoder.")]
    assert report.unexpected == ()
    about = read_pretrained(path)
    assert about is not None
    assert (about.objective, about.from_random, about.datasets) == ("drawn_shapes", True, ())


def test_images_are_drawn_from_the_seed_and_hold_objects() -> None:
    """The same seed gives the same image in [0, 1] with labelled objects, another seed another one."""
    (image, labels), (again, same), (other, _) = (random_image(np.random.default_rng(s), 96) for s in (3, 3, 4))
    np.testing.assert_array_equal(image, again)
    np.testing.assert_array_equal(labels, same)
    assert (image != other).any()
    assert image.shape == labels.shape == (96, 96)
    assert image.min() >= 0
    assert image.max() <= 1
    assert len(np.unique(labels)) >= 2


def test_a_prompt_lies_on_its_object_with_x_counting_columns() -> None:
    """The click is inside a low, wide object, and the box holds it, only if x is the column and y the row."""
    mask = np.zeros((1, 64, 64), bool)
    mask[0, 5:9, 30:60] = True
    generator = np.random.default_rng(0)
    clicks = base_weights.first_prompts(mask, generator, box=False)
    assert clicks.points is not None
    x, y = clicks.points[0, 0].int().tolist()
    assert mask[0, y, x]
    boxes = base_weights.first_prompts(mask, generator, box=True).boxes
    assert boxes is not None
    x0, y0, x1, y1 = boxes[0].tolist()
    assert 26 <= x0 <= 29.5
    assert 4 <= y0 <= 4.5
    assert 59.5 <= x1 <= 63
    assert 8.5 <= y1 <= 9


def test_the_loss_prefers_the_object_to_any_constant_answer() -> None:
    """A small object found is far cheaper than an empty or a full mask."""
    target = torch.zeros(1, 1, 32, 32)
    target[..., 4:8, 4:8] = 1
    answers = torch.cat([20 * target - 10, torch.full_like(target, -10), torch.full_like(target, 10)], dim=1)
    found, empty, full = base_weights.mask_losses(answers, target)[0].tolist()
    assert found < 0.1
    assert min(empty, full) > found + 0.8
