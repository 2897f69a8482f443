"""The table of methods: which presets are the same method, and what is counted."""

from __future__ import annotations

import pytest

from benchmarks import methods
from benchmarks.ablations import GROUPS
from samunet.artifacts.model_spec import get_spec
from samunet.planners.counts import encoder_adapter_parameters
from samunet.planners.presets import PRESETS


@pytest.mark.parametrize("name", PRESETS)
def test_the_same_method_is_one_with_equal_choices(name: str) -> None:
    """A preset stands for another where method and intensities are equal; that only the backbone differs is said."""
    other = PRESETS[methods.representatives()[name]]
    assert (other.method, other.own_intensities) == (PRESETS[name].method, PRESETS[name].own_intensities)
    said = methods.same_method(name)
    assert (said == "") == (other.name == name)
    if said:
        assert ("another backbone" in said) == (other.backbone != PRESETS[name].backbone)


def test_equal_presets_are_found_on_every_backbone() -> None:
    """Study rows on ViT-H and ViT-T are those of ViT-B; DoRA and rsLoRA are two methods."""
    assert methods.same_method("finetune_sam_vit_h_both_adapter") == (
        "finetune_sam_vit_b_both_adapter, on another backbone"
    )
    assert methods.same_method("finetune_sam_vit_t_decoder_lora") == (
        "finetune_sam_vit_b_decoder_lora, on another backbone"
    )
    assert methods.same_method("finetune_sam_vit_b_both_lora") == "samed_s"
    assert methods.same_method("samed_h") == "samed, on another backbone"
    assert methods.same_method("peft_rslora") == methods.same_method("peft_dora") == ""


def test_every_distinct_method_is_trained_by_some_table() -> None:
    """What stands for a method is a row here or in the ablations."""
    ablated = {preset for _, rows in GROUPS.values() for preset, _ in rows.values()}
    assert set(methods.representatives().values()) <= {*methods.AUTOMATIC, *methods.PROMPTED, *ablated}


def test_depth_is_counted_for_whole_slabs() -> None:
    """Med-SA's row holds the positions of five slices, not of one."""
    lines = {line.split(" | ")[0].strip("| "): line for line in methods.counts_table()}
    preset = PRESETS["med_sa"]
    five, one = (encoder_adapter_parameters(preset.method, get_spec("vit_h"), slab_depth=d) for d in (5, 1))
    assert five > one
    assert f"| 5 | {five:,} |" in lines["med_sa"]
    assert "| 1 | 147,456 |" in lines["samed"]
