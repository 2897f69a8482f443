"""Methods as data: what goes together, and what the messages say to change."""

from __future__ import annotations

from typing import Any

import pytest

from samunet.artifacts.method import Method, faults_with_weights, summarise
from samunet.core.config import parse_schema
from samunet.core.errors import ConfigError
from samunet.planners.presets import PRESETS

LORA = {"train": "adapters", "adapters": [{"kind": "lora"}]}


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
        {"encoder": {"train": "frozen"}, "decoder": {"train": "none"}, "prompts": {"kind": "points", "corrections": 2}},
        {"encoder": {"train": "full"}, "decoder": {"train": "none"}, "fusion": {"kind": "unet"}},
    ],
)
def test_unpublished_combinations_are_allowed(parts: dict[str, Any]) -> None:
    """The choices are composable beyond the published rows, and survive their JSON form."""
    chosen = method(**parts)
    assert Method.model_validate_json(chosen.model_dump_json()) == chosen


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
