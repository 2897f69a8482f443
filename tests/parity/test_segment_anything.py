"""Our networks give what segment-anything's own give, from the same perturbed random weights."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from segment_anything import sam_model_registry
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
from torch import Tensor, nn

from samunet.artifacts.method import Lora
from samunet.artifacts.model_spec import SamSpec, get_spec
from samunet.core.files import sha256_file
from samunet.models.decoders.semantic import dense_positions, predict_all_tokens
from samunet.models.loading import load_weights
from samunet.models.peft.lora import inject_lora
from samunet.models.peft.state import adapter_parameters, merge
from samunet.models.sam.network import SamNetwork, build_network
from samunet.models.weights import WeightsFile

SPEC = SamSpec(name="parity", family="vit", embed_dim=32, depth=3, num_heads=2, global_blocks=(1,), pretrained=("sam",))


def _reference(size: int, *, multimasks: int = 3) -> Sam:
    """A small SAM from segment-anything's constructors alone, every tensor perturbed."""
    grid = (size // 16, size // 16)
    encoder = ImageEncoderViT(
        depth=3,
        embed_dim=32,
        img_size=size,
        mlp_ratio=4,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        num_heads=2,
        patch_size=16,
        qkv_bias=True,
        use_rel_pos=True,
        global_attn_indexes=(1,),
        window_size=14,
        out_chans=256,
    )
    prompts = PromptEncoder(embed_dim=256, image_embedding_size=grid, input_image_size=(size, size), mask_in_chans=16)
    decoder = MaskDecoder(
        num_multimask_outputs=multimasks,
        transformer=TwoWayTransformer(depth=2, embedding_dim=256, mlp_dim=2048, num_heads=8),
        transformer_dim=256,
        iou_head_depth=3,
        iou_head_hidden_dim=256,
    )
    sam = Sam(encoder, prompts, decoder)
    _perturb(sam)
    return sam.eval()


def _perturb(module: nn.Module) -> None:
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for tensor in module.state_dict().values():
            tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.05)


def _ours(reference: Sam, size: int, *, num_tokens: int = 4) -> SamNetwork:
    """Our network with the reference's state, loaded strictly under its own keys."""
    network = build_network(SPEC, image_size=size, num_tokens=num_tokens)
    network.load_state_dict(reference.state_dict(), strict=True)
    return network.eval()


def _images(size: int, batch: int = 1) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


def _upstream_masks(sam: Sam, embeddings: Tensor, positions: Tensor, *, multimask: bool) -> Tensor:
    """Masks as segment-anything makes them without a prompt, one image at a time."""
    sparse, dense = sam.prompt_encoder(points=None, boxes=None, masks=None)
    masks = [
        sam.mask_decoder(
            image_embeddings=image.unsqueeze(0),
            image_pe=positions,
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=multimask,
        )[0]
        for image in embeddings
    ]
    return torch.cat(masks)


@pytest.mark.parametrize("size", [512, 448, 112], ids=["512 padded", "448 unpadded", "112 one window"])
def test_double_precision_outputs_are_upstreams(size: int) -> None:
    """Embeddings and all masks agree to 1e-10 in float64, with windows that need padding and that do not."""
    sam = _reference(size).double()
    ours = _ours(sam, size).double()
    pixels = _images(size).double()
    with torch.no_grad():
        embeddings = sam.image_encoder(pixels)
        positions = dense_positions(sam.prompt_encoder.pe_layer, size // 16, size // 16)
        logits = ours(pixels)
        torch.testing.assert_close(ours.image_encoder(pixels), embeddings, rtol=0, atol=1e-10)
        first = _upstream_masks(sam, embeddings, positions, multimask=False)
        others = _upstream_masks(sam, embeddings, positions, multimask=True)
    assert first.shape[1] == 1
    assert others.shape[1] == 3
    tolerance = 1e-10 * float(logits.abs().max())
    torch.testing.assert_close(logits, torch.cat([first, others], dim=1), rtol=0, atol=tolerance)
    assert float(logits.std()) > 0.01


@pytest.mark.parametrize("multimasks", [0, 2, 8])
def test_single_precision_masks_of_a_batch_are_upstreams_one_by_one(multimasks: int) -> None:
    """In float32, with upstream's own positions, a batch gives the masks upstream gives image by image."""
    sam = _reference(224, multimasks=multimasks)
    ours = _ours(sam, 224, num_tokens=multimasks + 1)
    pixels = _images(224, batch=3)
    with torch.no_grad():
        logits = ours(pixels)
        embeddings = torch.cat([sam.image_encoder(pixels[i : i + 1]) for i in range(3)])
        positions = sam.prompt_encoder.get_dense_pe()
        parts = [_upstream_masks(sam, embeddings, positions, multimask=False)]
        if multimasks:
            parts.append(_upstream_masks(sam, embeddings, positions, multimask=True))
    expected = torch.cat(parts, dim=1)
    torch.testing.assert_close(logits, expected, rtol=0, atol=2e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("size", [1024, 896])
def test_adapted_encoder_is_upstreams_at_the_start(size: int) -> None:
    """With adapters on q, k, v and o at their start the encoder is bit-equal to upstream's."""
    sam = _reference(size)
    ours = _ours(sam, size)
    inject_lora(ours.image_encoder, Lora(targets=("q", "k", "v", "o")))
    with torch.no_grad():
        assert torch.equal(ours.image_encoder(_images(size)), sam.image_encoder(_images(size)))


def test_merged_encoder_loads_strictly_into_upstreams(tmp_path: Path) -> None:
    """An encoder adapted at another size than its weights', trained and merged, is a plain one of that size."""
    path = tmp_path / "sam.pth"
    torch.save(_reference(240).state_dict(), path)
    ours = build_network(SPEC, image_size=112, num_tokens=3)
    load_weights(ours, WeightsFile(path, sha256_file(path), "sam"))
    inject_lora(ours.image_encoder, Lora())
    with torch.no_grad():
        for parameter in adapter_parameters(ours).values():
            parameter.normal_(std=0.1)
        adapted = ours.image_encoder(_images(112))
        merge(ours)
        upstream = _reference(112).image_encoder
        upstream.load_state_dict(ours.image_encoder.state_dict(), strict=True)
        merged = upstream(_images(112))
    torch.testing.assert_close(merged, adapted, rtol=0, atol=1e-5 * float(adapted.abs().max()))


@pytest.mark.parametrize(("name", "total"), [("vit_b", 93_735_472), ("vit_l", 312_342_832), ("vit_h", 641_090_608)])
def test_keys_and_counts_are_the_registrys(name: str, total: int) -> None:
    """Each official model has the keys, shapes and number of parameters of segment-anything's registry."""
    with torch.device("meta"):
        reference = sam_model_registry[name]()
        ours = build_network(get_spec(name), image_size=1024, num_tokens=4)
    assert sum(p.numel() for p in ours.parameters()) == total
    shapes = {key: tensor.shape for key, tensor in reference.state_dict().items()}
    assert {key: tensor.shape for key, tensor in ours.state_dict().items()} == shapes


@pytest.mark.slow
def test_vit_b_at_1024_is_the_registrys() -> None:
    """The real ViT-B at 1024 in float32 gives the registry's embeddings and masks to 1e-6 of their size."""
    sam = sam_model_registry["vit_b"]()
    _perturb(sam)
    ours = build_network(get_spec("vit_b"), image_size=1024, num_tokens=4, initialise=False)
    ours.load_state_dict(sam.state_dict(), strict=True)
    pixels = _images(1024)
    with torch.no_grad():
        embeddings = sam.image_encoder(pixels)
        encoded = ours.eval().image_encoder(pixels)
        torch.testing.assert_close(encoded, embeddings, rtol=0, atol=1e-6 * float(embeddings.abs().max()))
        positions = sam.prompt_encoder.get_dense_pe()
        expected = torch.cat(
            [_upstream_masks(sam, embeddings, positions, multimask=multi) for multi in (False, True)], dim=1
        )
        masks = _decode(ours, encoded)
    torch.testing.assert_close(masks, expected, rtol=0, atol=1e-6 * float(expected.abs().max()))


def _decode(network: SamNetwork, embeddings: Tensor) -> Tensor:
    return predict_all_tokens(network.prompt_encoder, network.mask_decoder, embeddings)
