"""Trained models in segment-anything's own layout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from segment_anything import sam_model_registry
from segment_anything.modeling import MaskDecoder, PromptEncoder, Sam, TwoWayTransformer

from samunet.artifacts.method import (
    Bottleneck,
    DecoderMethod,
    DepthAttention,
    EncoderMethod,
    Fact,
    Lora,
    Method,
    PromptMethod,
)
from samunet.artifacts.model_spec import SAM_SIZE, get_spec
from samunet.core.errors import ConfigError
from samunet.models.decoders.promptable import PromptBatch
from samunet.models.merged import merge_for_sam
from samunet.models.peft.state import adapter_parameters
from samunet.models.segmentation import SegmentationModel
from samunet.pipeline.export_weights import REGISTRY, how_to_load
from tests.unit.models.model_helpers import base_file, build, images, recipe, upstream_vit

LORA = EncoderMethod(train="adapters", adapters=(Lora(),))
FACT = EncoderMethod(train="adapters", adapters=(Fact(rank=4),))


def trained(tmp_path: Path, method: Method, *, backbone: str = "vit_xs", size: int = 112) -> SegmentationModel:
    """A model whose adapters have moved."""
    file = base_file(tmp_path, get_spec(backbone), image_size=64)
    model = build(recipe(backbone=backbone, method=method, weights_kind="ssl", input_size=size), weights=file).model
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            parameter.normal_(std=0.1)
    return model.eval()


@pytest.mark.parametrize("encoder", [LORA, FACT, EncoderMethod(train="full")], ids=["lora", "fact", "full"])
def test_an_encoder_loads_strictly_and_computes_the_same(tmp_path: Path, encoder: EncoderMethod) -> None:
    """Merged adapters vanish into the weights; the model itself is left as it is."""
    chosen = recipe(backbone="vit_xs", method=Method(encoder=encoder), weights_kind="ssl")
    model = trained(tmp_path, chosen.method)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    merged = merge_for_sam(model, chosen)
    assert merged.scope == "encoder"
    plain = upstream_vit(get_spec("vit_xs"), 112).eval()
    plain.load_state_dict(dict(merged.tensors), strict=True)
    with torch.no_grad():
        wanted = model.network.image_encoder(images(2))
        torch.testing.assert_close(plain(images(2)), wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_a_prompted_model_of_sams_size_is_a_whole_sam(tmp_path: Path) -> None:
    """With stock tokens at 1024 pixels the whole model is a SAM with the same masks, also with LoRA in the decoder."""
    method = Method(encoder=LORA, decoder=DecoderMethod(train="lora"), prompts=PromptMethod(kind="box"))
    chosen = recipe(backbone="vit_xs", method=method, weights_kind="ssl", input_size=SAM_SIZE)
    model = trained(tmp_path, method, size=SAM_SIZE)
    merged = merge_for_sam(model, chosen)
    assert merged.scope == "whole"
    transformer = TwoWayTransformer(depth=2, embedding_dim=256, mlp_dim=2048, num_heads=8)
    decoder = MaskDecoder(transformer_dim=256, transformer=transformer)
    prompts = PromptEncoder(
        embed_dim=256, image_embedding_size=(64, 64), input_image_size=(SAM_SIZE, SAM_SIZE), mask_in_chans=16
    )
    sam = Sam(upstream_vit(get_spec("vit_xs"), SAM_SIZE), prompts, decoder)
    sam.load_state_dict(dict(merged.tensors), strict=True)
    pixels, boxes = images(1, size=SAM_SIZE), torch.tensor([[100.0, 200.0, 600.0, 900.0]])
    with torch.no_grad():
        wanted, _ = model.prompted(model.encode(pixels), PromptBatch(boxes=boxes))
        sparse, dense = sam.prompt_encoder(points=None, boxes=boxes, masks=None)
        found = [
            sam.mask_decoder(sam.image_encoder(pixels), sam.prompt_encoder.get_dense_pe(), sparse, dense, multimask)[0]
            for multimask in (False, True)
        ]
    torch.testing.assert_close(torch.cat(found, dim=1), wanted, rtol=0, atol=1e-4 * float(wanted.abs().max()))
    assert float(wanted.std()) > 0


@pytest.mark.parametrize(
    ("method", "backbone", "words"),
    [
        (Method(encoder=EncoderMethod(train="adapters", adapters=(Bottleneck(),))), "vit_xs", "not linear"),
        (Method(encoder=EncoderMethod(train="adapters"), depth=DepthAttention()), "vit_xs", "one by one"),
        (Method(encoder=LORA), "vit_t_xs", "no TinyViT"),
    ],
    ids=["bottleneck", "depth", "tiny"],
)
def test_what_segment_anything_cannot_hold_is_refused(
    tmp_path: Path, method: Method, backbone: str, words: str
) -> None:
    """Adapters that are not linear, depth and TinyViT have no place in it, and the message says so."""
    chosen = recipe(backbone=backbone, method=method, weights_kind="ssl")
    with pytest.raises(ConfigError, match=words):
        merge_for_sam(trained(tmp_path, method, backbone=backbone), chosen)


@pytest.mark.parametrize("backbone", ["vit_b", "vit_l", "vit_h", "vit_xs"])
@pytest.mark.parametrize("scope", ["whole", "encoder"])
def test_the_advice_names_only_entries_that_the_registry_has(backbone: str, scope: str) -> None:
    """A whole SAM is loaded by its registry entry where there is one; else the shape to build is told."""
    chosen = recipe(backbone=backbone, method=Method(encoder=LORA), weights_kind="ssl", input_size=SAM_SIZE)
    advice = how_to_load(scope, chosen, "sam.pth")
    assert set(REGISTRY) == set(sam_model_registry) - {"default"}
    assert (f"sam_model_registry['{backbone}']" in advice) == (scope == "whole" and backbone in sam_model_registry)
    if "sam_model_registry" not in advice:
        spec = get_spec(backbone)
        assert f"img_size=1024, embed_dim={spec.embed_dim}, depth={spec.depth}, num_heads={spec.num_heads}" in advice
        assert str(spec.global_blocks) in advice
