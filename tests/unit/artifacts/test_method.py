"""Methods as data: what goes together, and what the messages say to change."""

from __future__ import annotations

from typing import Any

import pytest

from samunet.artifacts.method import Method, summarise
from samunet.artifacts.method_faults import faults_with_weights
from samunet.core.config import parse_schema
from samunet.core.errors import ConfigError
from samunet.planners.presets import PRESETS

LORA = {"train": "adapters", "adapters": [{"kind": "lora"}]}
AS_IT_IS = {"encoder": {"train": "frozen"}, "decoder": {"train": "none"}}


def method(**parts: Any) -> Method:
    return parse_schema(Method, {"encoder": {"train": "full"}, **parts})


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"encoder": {"train": "frozen", "adapters": [{"kind": "lora"}]}}, "set encoder.train to adapters"),
        ({"encoder": {"train": "frozen"}, "depth": {"kind": "attention"}}, "set encoder.train to adapters or full"),
        ({"encoder": {"train": "adapters"}}, "add to encoder.adapters"),
        ({"encoder": {"train": "adapters", "adapters": [{"kind": "lora"}, {"kind": "lora"}]}}, "two adapters"),
        ({"encoder": {"train": "adapters", "adapters": [{"kind": "lora"}, {"kind": "fact"}]}}, "keep one of them"),
        ({"decoder": {"train": "adapters", "conditioning": "hyper"}}, "set prompts.kind"),
        ({"decoder": {"train": "full", "conditioning": "add"}, "prompts": {"kind": "box"}}, "set decoder.train"),
        ({"decoder": {"upsampler": "progressive"}, "prompts": {"kind": "box"}}, "set decoder.upsampler to sam"),
        ({"decoder": {"train": "none"}}, "set prompts.kind"),
        ({"fusion": {"kind": "unet"}, "prompts": {"kind": "box"}}, "set prompts.kind to none"),
        ({"fusion": {"kind": "unet"}, "decoder": {"train": "lora"}}, "set decoder to {train: none}"),
        ({"prompts": {"kind": "box", "corrections": 1}}, "points or mixed"),
        ({"encoder": {"train": "adapters", "adapters": [{"kind": "lora", "rnk": 3}]}}, "did you mean 'rank'"),
        ({"encoder": {"train": "adapters", "adapters": [{"kind": "lora", "targets": []}]}}, "at least 1 item"),
    ],
)
def test_what_does_not_go_together_is_refused_with_what_to_change(parts: dict[str, Any], words: str) -> None:
    """Each impossible combination is found when the method is read, and the message names the field to change."""
    with pytest.raises(ConfigError) as caught:
        method(**parts)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "parts",
    [
        {"encoder": {"train": "adapters"}, "depth": {"kind": "attention"}},
        {"encoder": {"train": "full", "adapters": [{"kind": "high_frequency"}]}},
        {"encoder": {"train": "adapters", "adapters": [{"kind": "fact"}, {"kind": "bottleneck"}]}},
        {**AS_IT_IS, "prompts": {"kind": "points"}},
        {"encoder": {"train": "full"}, "decoder": {"train": "none"}, "prompts": {"kind": "points", "corrections": 2}},
        {"encoder": {"train": "full"}, "decoder": {"train": "none"}, "fusion": {"kind": "unet"}},
    ],
)
def test_unpublished_combinations_are_allowed(parts: dict[str, Any]) -> None:
    """The choices are composable beyond the published rows, and survive their JSON form."""
    chosen = method(**parts)
    assert Method.model_validate_json(chosen.model_dump_json()) == chosen


def adapter(**values: Any) -> dict[str, Any]:
    return {"train": "adapters", "adapters": [values]}


@pytest.mark.parametrize(
    ("off", "on", "words"),
    [
        ({"decoder": {"rank": 16}}, {"decoder": {"train": "lora", "rank": 16}}, "set decoder.train to lora"),
        (
            {"decoder": {"ratio": 0.5}},
            {"decoder": {"train": "adapters", "ratio": 0.5}},
            "set decoder.train to adapters",
        ),
        (
            {"decoder": {"path_width": 32, "upsampler": "progressive"}},
            {"decoder": {"path_width": 32, "upsampler": "side_path"}},
            "set decoder.upsampler to side_path",
        ),
        (
            {"decoder": {"path_convolutions": 2}},
            {"decoder": {"path_convolutions": 2, "upsampler": "side_path"}},
            "set decoder.upsampler to side_path",
        ),
        (
            {"decoder": {"deep_supervision": True}},
            {"decoder": {"deep_supervision": True, "upsampler": "side_path"}},
            "set decoder.upsampler to side_path",
        ),
        (
            {"prompts": {"kind": "points", "box_shift": 0.5}},
            {"prompts": {"kind": "mixed", "box_shift": 0.5}},
            "set prompts.kind to box or mixed",
        ),
        (
            {"prompts": {"kind": "box", "clicks": 3}},
            {"prompts": {"kind": "mixed", "clicks": 3}},
            "set prompts.kind to points or mixed",
        ),
        ({"prompts": {"clicks": 3}}, {"prompts": {"kind": "points", "clicks": 3}}, "set prompts.kind to points"),
        ({"prompts": {"corrections": 2}}, {"prompts": {"kind": "mixed", "corrections": 2}}, "leave it at 0"),
        (
            {**AS_IT_IS, "prompts": {"kind": "mixed", "corrections": 2}},
            {"encoder": LORA, "decoder": {"train": "none"}, "prompts": {"kind": "mixed", "corrections": 2}},
            "set decoder.train to full",
        ),
        (
            {"fusion": {"width": 64}},
            {"fusion": {"kind": "unet", "width": 64}, "decoder": {"train": "none"}},
            "set fusion.kind to unet",
        ),
        (
            {"encoder": adapter(kind="bottleneck", sites=["attention"], mlp_scale=1.0)},
            {"encoder": adapter(kind="bottleneck", mlp_scale=1.0)},
            "add it to encoder.adapters.0.sites",
        ),
        (
            {"encoder": adapter(kind="high_frequency", inputs="previous", positions="after")},
            {"encoder": adapter(kind="high_frequency", positions="after")},
            "set encoder.adapters.0.inputs to shared",
        ),
    ],
)
def test_a_value_that_nothing_reads_is_refused(off: dict[str, Any], on: dict[str, Any], words: str) -> None:
    """With its switch off only the default is taken, in one fault with what to change; with it on, any value."""
    with pytest.raises(ConfigError) as caught:
        method(**off)
    assert words in str(caught.value)
    assert "1 fault" in str(caught.value)
    assert ";" not in str(caught.value)
    assert isinstance(method(**on), Method)


def test_the_rank_that_ranks_stand_for_may_be_given() -> None:
    """Ranks per block leave the uniform rank a meaning, so it is no value that nothing reads."""
    chosen = method(encoder=adapter(kind="lora", rank=8, ranks=[10, 6], blocks=[0, 1])).adapter("lora")
    assert (chosen.rank, chosen.ranks) == (8, (10, 6))


@pytest.mark.parametrize(
    "parts",
    [
        *({"encoder": adapter(kind=kind, blocks=[])} for kind in ("lora", "bottleneck", "fact", "peft")),
        *({"depth": {"kind": kind, "blocks": []}} for kind in ("attention", "convolution")),
    ],
)
def test_no_blocks_are_not_all_blocks(parts: dict[str, Any]) -> None:
    """An empty list would adapt nothing while the method says it does; null means all."""
    with pytest.raises(ConfigError) as caught:
        method(**parts)
    assert "leave blocks out (null) for all" in str(caught.value)
    assert "1 fault" in str(caught.value)


def test_random_weights_cannot_be_adapted() -> None:
    """Without pretrained weights everything must train; every other choice says so, and with weights nothing does."""
    assert not faults_with_weights(method(), "none")
    assert "needs pretrained weights" in faults_with_weights(method(encoder=LORA), "none")[0]
    assert "stay random" in faults_with_weights(method(decoder={"train": "lora"}), "none")[0]
    assert not faults_with_weights(method(encoder=LORA, decoder={"train": "lora"}), "sam")


def test_only_a_method_that_trains_nothing_says_so() -> None:
    """SAM as it is trains nothing; every other preset trains something."""
    assert [name for name, preset in PRESETS.items() if not preset.method.trains_anything] == ["sam_zero_shot"]


def test_summaries_tell_presets_apart() -> None:
    """Two presets on one backbone never read the same."""
    texts = [(p.backbone, p.own_intensities, summarise(p.method)) for p in PRESETS.values()]
    repeated = {text for text in texts if texts.count(text) > 1}
    names = {p.name for p in PRESETS.values() if (p.backbone, p.own_intensities, summarise(p.method)) in repeated}
    same = {"sam_decoder", "samed", "samed_s", "samed_h"}
    assert names <= same | {n for n in PRESETS if n.startswith("finetune_sam_vit_")}


def test_an_encoder_alone_needs_a_decoder_that_trains_whole() -> None:
    """Any other decoder would keep random parts; a U-Net needs none, and files with a decoder take all."""
    for train in ("lora", "adapters", "heads"):
        chosen = method(encoder=LORA, decoder={"train": train})
        assert faults_with_weights(chosen, "ssl") == []
        assert "set decoder.train to full" in faults_with_weights(chosen, "ssl", has_decoder=False)[0]
    unet = method(encoder={"train": "frozen"}, decoder={"train": "none"}, fusion={"kind": "unet"})
    for allowed in (method(encoder=LORA), method(encoder={"train": "frozen"}), unet):
        assert faults_with_weights(allowed, "ssl", has_decoder=False) == []
