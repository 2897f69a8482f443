"""Which folds of a model folder are averaged."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest

from samunet.artifacts.checkpoint import BaseWeights, Manifest
from samunet.artifacts.method import Bottleneck, DecoderMethod, EncoderMethod, Lora
from samunet.artifacts.plan import strip_reasons
from samunet.core.errors import CheckpointError
from samunet.inference import loading
from samunet.inference.loading import Member, load_members
from samunet.pipeline.methods import run_label
from samunet.pipeline.training_run import TrainingRequest
from samunet.training.checkpointing import recipe_to_json
from tests.samples import lora_encoder, make_plan, make_recipe

PLAN = make_plan()
BLOCKS = (-2, -1)


def member(fold: str, *, label: str = "samed", weights: str = "a", **changes: Any) -> Member:
    """A fold of a model, without the model."""
    values = {"encoder": lora_encoder(), **changes}
    recipe = strip_reasons(make_recipe(**values), "sam", "cpu", slab_depth=1)
    manifest = Manifest(
        dataset=PLAN.dataset,
        configuration="2d",
        preset=label,
        fold=fold,
        recipe=recipe_to_json(recipe),
        base=BaseWeights(kind="sam", file="weights.pth", sha256=weights * 64),
        seed=1,
        steps=1,
        epochs=1,
        minutes=1.0,
    )
    return Member(cast(Any, None), manifest, PLAN)


def load(monkeypatch: pytest.MonkeyPatch, *members: Member) -> list[Member]:
    """Load folds whose checkpoints hold these."""
    found = iter(members)
    monkeypatch.setattr(loading, "load_member", lambda *_, **__: next(found))
    return load_members(Path("results"), [m.manifest.fold for m in members], checkpoint="final", device="cpu")


def ranked(**values: Any) -> EncoderMethod:
    return EncoderMethod(train="adapters", adapters=(Lora(blocks=BLOCKS, **values),))


@pytest.mark.parametrize(
    ("other", "words", "silent"),
    [
        ({"encoder": lora_encoder(rank=16)}, ("encoder.adapters.0.rank 4", "encoder.adapters.0.rank 16"), "decoder"),
        ({"decoder": DecoderMethod(train="lora", rank=8)}, ("decoder.train full", "decoder.train lora"), "encoder"),
        ({"backbone": "vit_t"}, ("backbone vit_t_xs", "fold 1: backbone vit_t"), "encoder"),
        (
            {"encoder": EncoderMethod(train="adapters", adapters=(Bottleneck(),))},
            ("encoder.adapters ['lora']", "encoder.adapters ['bottleneck']"),
            "decoder",
        ),
        (
            {"encoder": EncoderMethod(train="adapters", adapters=(Lora(), Bottleneck()))},
            ("encoder.adapters ['lora']", "encoder.adapters ['lora', 'bottleneck']"),
            "decoder",
        ),
    ],
)
def test_folds_of_different_methods_are_refused(
    monkeypatch: pytest.MonkeyPatch, other: dict[str, Any], words: tuple[str, str], silent: str
) -> None:
    """One message with what was expected and found, and nothing of what is alike."""
    with pytest.raises(CheckpointError, match="with different methods") as caught:
        load(monkeypatch, member("0"), member("1", **other), member("2"))
    expected, found = str(caught.value.expected), str(caught.value.found)
    assert words[0] in expected
    assert words[1] in found
    assert found.startswith("fold 1: ")
    assert silent not in expected + found


def test_folds_of_one_method_are_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Schedules do not belong to the method."""
    assert len(load(monkeypatch, member("0"), member("1", learning_rate=3e-3, batch_size=6))) == 2


def test_input_is_compared_before_the_method(monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be averaged at all is told first."""
    with pytest.raises(CheckpointError, match="on different input") as caught:
        load(monkeypatch, member("0"), member("1", input_size=96, encoder=lora_encoder(rank=16)))
    assert "rank" not in str(caught.value)


@pytest.mark.parametrize("asked", [{"num_cases": 5}, {"num_cases": 5, "subset_seed": 3}, {"cases": ("a", "b")}])
@pytest.mark.parametrize("preset", ["auto", "samed"])
def test_a_subset_decides_the_rank_of_its_fold(
    monkeypatch: pytest.MonkeyPatch, asked: dict[str, Any], preset: str
) -> None:
    """Ranks by each fold's labelled slices go together, and other differences are refused as ever."""
    label = run_label(TrainingRequest(PLAN.dataset, "0", preset=preset, **asked))
    assert len(load(monkeypatch, member("0", label=label), member("1", label=label, encoder=lora_encoder(rank=5)))) == 2
    other = lora_encoder(rank=5, targets=("q",))
    with pytest.raises(CheckpointError, match="different methods") as caught:
        load(monkeypatch, member("0", label=label), member("1", label=label, encoder=other))
    assert "rank" not in str(caught.value)


@pytest.mark.parametrize(
    "asked", [{"rank": 16}, {"changes": {"decoder.train": "lora"}}, {"published": True}, {"backbone": "vit_l"}]
)
def test_other_labels_are_not_taken_for_a_subset(monkeypatch: pytest.MonkeyPatch, asked: dict[str, Any]) -> None:
    """A hash of changes, the paper's schedule or a backbone leave the rank to be compared."""
    label = run_label(TrainingRequest(PLAN.dataset, "0", preset="samed", **asked))
    with pytest.raises(CheckpointError, match="different methods"):
        load(monkeypatch, member("0", label=label), member("1", label=label, encoder=lora_encoder(rank=5)))


def test_ranks_by_block_may_differ_between_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where folds start from different weights the probe fits one of them; on the same weights it fits all."""
    probed, uniform = ranked(ranks=(6, 2)), ranked()
    assert len(load(monkeypatch, member("0", encoder=probed), member("1", weights="b", encoder=uniform))) == 2
    with pytest.raises(CheckpointError, match="different methods") as caught:
        load(monkeypatch, member("0", encoder=probed), member("1", encoder=uniform))
    assert "encoder.adapters.0.ranks [6, 2]" in str(caught.value)
