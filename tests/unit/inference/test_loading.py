"""Which folds of a model folder are averaged."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch

from samunet.artifacts.checkpoint import BaseWeights, Manifest
from samunet.artifacts.method import Bottleneck, DecoderMethod, EncoderMethod, Lora
from samunet.artifacts.plan import strip_reasons
from samunet.artifacts.pretraining import Pretrained, SeenDataset, write_pretrained
from samunet.core.errors import CheckpointError
from samunet.core.log import SilentReporter
from samunet.inference import loading
from samunet.inference.loading import Member, load_members, tell_other_weights
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


def test_folds_that_were_cut_in_other_planes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A network that never saw a plane says nothing of use in it."""
    with pytest.raises(CheckpointError, match="on different input") as caught:
        load(monkeypatch, member("0"), member("1", planes=("slices", "rows")))
    assert "planes ('slices', 'rows')" in str(caught.value.found)


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


def pretrained(
    folder: Path, name: str, *, left_out: str, base: BaseWeights | None = None, **changes: Any
) -> BaseWeights:
    """Weights of a pretraining on a, b and c without one of them."""
    seen = SeenDataset(
        name=PLAN.dataset,
        configuration="2d",
        images={"slices_0": tuple(case for case in "abc" if case != left_out)},
        left_out=(left_out,) if left_out else (),
        tile_vox=32,
    )
    values: dict[str, Any] = {
        "objective": "masked_images",
        "kind": "ssl",
        "backbone": "vit_t_xs",
        "input_size": 64,
        "from_random": True,
        "base": base or BaseWeights(kind="none"),
        "datasets": (seen,),
        "steps": len(name),
        "minutes": 1.0,
        "batch_size": 2,
        "learning_rate": 1e-3,
        "seed": 0,
    }
    file = folder / f"{name}.safetensors"
    about = write_pretrained(file, {"weight": torch.zeros(1)}, Pretrained(**values | changes))
    return BaseWeights(kind="ssl", file=str(file), sha256=about.sha256)


def told_of(*bases: BaseWeights) -> list[str]:
    """What is said of folds that start from these."""
    reporter = SilentReporter()
    manifests = [member(str(n)).manifest.model_copy(update={"base": base}) for n, base in enumerate(bases)]
    tell_other_weights(manifests, Path("results") / "2d__auto__ssl", reporter)
    return reporter.warnings


def test_folds_from_different_weights_are_told_in_one_line(tmp_path: Path) -> None:
    """With the folds of each file; the same file elsewhere is the same, and one that is gone is told from none."""
    first, other = pretrained(tmp_path, "first", left_out=""), pretrained(tmp_path, "other", left_out="", seed=1)
    (line,) = told_of(first, other, first.model_copy(update={"file": "elsewhere"}))
    assert f"fold 0, 2 from {first.file}; fold 1 from {other.file}" in line
    assert told_of(first, BaseWeights(kind="none"))
    assert not told_of(first, first)
    assert not told_of(first)
    assert told_of(pretrained(tmp_path, "a", left_out="a"), BaseWeights(kind="ssl", file="gone", sha256="0"))


def test_one_pretraining_that_left_out_each_folds_cases_is_no_mixture(tmp_path: Path) -> None:
    """Files that differ in what one of them left out go together, also at second hand; all else has to be the same."""
    a, b, c = (pretrained(tmp_path, name, left_out=name) for name in "abc")
    assert not told_of(a, b, c)
    assert told_of(a, pretrained(tmp_path, "seed", left_out="b", seed=1))
    assert told_of(a, pretrained(tmp_path, "rate", left_out="b", learning_rate=1e-4))
    images = SeenDataset(name=PLAN.dataset, configuration="2d", images={"slices_0": ("a", "d")}, tile_vox=32)
    assert told_of(a, pretrained(tmp_path, "others", left_out="b", datasets=(images,)))
    stages = [pretrained(tmp_path, f"second_{n}", left_out=n, base=base) for n, base in (("a", a), ("b", b))]
    assert not told_of(*stages)
    assert told_of(stages[0], pretrained(tmp_path, "second_c", left_out="c", base=stages[0]))
    rest = BaseWeights(kind="sam", file="sam.pth", sha256="1")
    assert told_of(a, b.model_copy(update={"rest": rest}))
