"""Prompting a batch gives what segment-anything gives image by image, from the same perturbed random weights."""

from __future__ import annotations

from types import MethodType
from typing import Any

import pytest
import torch
from segment_anything.modeling import MaskDecoder, PromptEncoder, TwoWayTransformer
from torch import Tensor

from samunet.models.decoders.promptable import PromptBatch, predict_prompted
from samunet.models.decoders.semantic import dense_positions, predict_all_tokens
from tests.unit.models.decoder_helpers import BATCH, EVERY_PROMPT, GRID, SIZE, embeddings, parts, prompts


def _upstream(encoder: Any, decoder: Any) -> tuple[Any, Any]:
    """Upstream's own modules from upstream's own constructors, with our weights, able to work in float64."""
    reference = PromptEncoder(
        embed_dim=256, image_embedding_size=(GRID, GRID), input_image_size=(SIZE, SIZE), mask_in_chans=16
    ).double()
    reference.load_state_dict(encoder.state_dict(), strict=True)
    layer = reference.pe_layer
    plain = layer._pe_encoding
    # It rounds positions to float32; those of these tests are the same in both.
    layer._pe_encoding = MethodType(lambda _, positions: plain(positions.double()), layer)
    masks = MaskDecoder(
        num_multimask_outputs=decoder.num_mask_tokens - 1,
        transformer=TwoWayTransformer(depth=2, embedding_dim=256, mlp_dim=2048, num_heads=8),
        transformer_dim=256,
        iou_head_depth=3,
        iou_head_hidden_dim=256,
    ).double()
    masks.load_state_dict(decoder.state_dict(), strict=True)
    return reference.eval(), masks.eval()


def _one_by_one(encoder: Any, decoder: Any, seen: Tensor, asked: PromptBatch) -> tuple[Tensor, Tensor]:
    """All of upstream's masks and qualities, each image with its own prompts."""
    answers = []
    for index in range(len(seen)):
        one = asked.select(torch.tensor([index]))
        points = None if one.points is None or one.point_labels is None else (one.points, one.point_labels)
        sparse, dense = encoder(points=points, boxes=one.boxes, masks=one.masks)
        answers.append(
            decoder.predict_masks(
                image_embeddings=seen[index : index + 1],
                image_pe=encoder.get_dense_pe(),
                sparse_prompt_embeddings=sparse.to(seen.dtype),
                dense_prompt_embeddings=dense,
            )
        )
    return torch.cat([masks for masks, _ in answers]), torch.cat([quality for _, quality in answers])


def _gradients(answer: tuple[Tensor, Tensor], inputs: list[Tensor]) -> list[Tensor | None]:
    """Of a random weighting of all masks and qualities."""
    generator = torch.Generator().manual_seed(9)
    weights = [torch.randn(part.shape, generator=generator).to(part) for part in answer]
    total = sum((part * weight).sum() for part, weight in zip(answer, weights, strict=True))
    assert isinstance(total, Tensor)
    return list(torch.autograd.grad(total, inputs, allow_unused=True))


@EVERY_PROMPT
def test_a_prompted_batch_is_upstreams_image_by_image(kind: str) -> None:
    """Masks, qualities and all gradients agree to 1e-10 of their size in float64, for every kind of prompt."""
    ours, theirs = parts(), _upstream(*parts())
    asked = prompts(kind)
    results = []
    for (encoder, decoder), predict in ((ours, predict_prompted), (theirs, _one_by_one)):
        seen = embeddings().requires_grad_()
        masks = None if asked.masks is None else asked.masks.clone().requires_grad_()
        given = PromptBatch(asked.points, asked.point_labels, asked.boxes, masks)
        answer = predict(encoder, decoder, seen, given)
        named = [*encoder.named_parameters(), *decoder.named_parameters()]
        inputs = [seen, *([] if masks is None else [masks]), *(parameter for _, parameter in named)]
        results.append((answer, _gradients(answer, inputs)))
    (answer, gradients), (expected, wanted) = results
    assert answer[0].shape == (BATCH, 4, 4 * GRID, 4 * GRID)
    for found, reference in [*zip(answer, expected, strict=True), *zip(gradients, wanted, strict=True)]:
        if reference is None or not reference.any():
            assert found is None or not found.any()
            continue
        assert found is not None
        torch.testing.assert_close(
            found, reference, rtol=0, atol=1e-10 * max(1.0, float(reference.detach().abs().max()))
        )
    assert sum(gradient is not None and bool(gradient.any()) for gradient in gradients) > 100


@pytest.mark.parametrize("kind", ["points", "box and points", "points and mask"])
def test_single_precision_is_unpatched_upstreams(kind: str) -> None:
    """In float32 upstream as it comes gives the same masks, at positions that are no round fractions of the image."""
    encoder, decoder = (part.float() for part in parts())
    asked = prompts(kind)
    shifted = {
        name: None if getattr(asked, name) is None else (getattr(asked, name) * 0.9137).float()
        for name in ("points", "boxes", "masks")
    }
    given = PromptBatch(point_labels=asked.point_labels, **shifted)
    with torch.no_grad():
        found = predict_prompted(encoder, decoder, embeddings().float(), given)
        expected = _one_by_one(encoder, decoder, embeddings().float(), given)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * float(theirs.abs().max()))


def test_one_image_may_meet_many_prompts() -> None:
    """A single embedding with a batch of boxes gives one answer per box, as upstream's own pairing does."""
    (encoder, decoder), (reference, _) = parts(), _upstream(*parts())
    asked, seen = prompts("box"), embeddings(1)
    with torch.no_grad():
        found, _ = predict_prompted(encoder, decoder, seen, asked)
        sparse, dense = reference(points=None, boxes=asked.boxes, masks=None)
        expected, _ = decoder.predict_masks(
            image_embeddings=seen,
            image_pe=dense_positions(encoder.pe_layer, GRID, GRID),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
        )
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("num_tokens", [1, 4])
def test_automatic_masks_and_gradients_are_upstreams(num_tokens: int) -> None:
    """Without a prompt all maps of a batch, and the gradients of what made them, are upstream's in float64."""
    encoder, decoder = parts(num_tokens)
    reference, upstream = _upstream(encoder, decoder)
    seen = embeddings().requires_grad_()
    twin = embeddings().requires_grad_()
    found = predict_all_tokens(encoder, decoder, seen)
    sparse, dense = reference(points=None, boxes=None, masks=None)
    expected = torch.cat(
        [
            upstream.predict_masks(
                image_embeddings=twin[i : i + 1],
                image_pe=reference.get_dense_pe(),
                sparse_prompt_embeddings=sparse.double(),
                dense_prompt_embeddings=dense,
            )[0]
            for i in range(BATCH)
        ]
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    weight = torch.randn(found.shape, generator=torch.Generator().manual_seed(3)).double()
    ours = torch.autograd.grad((found * weight).sum(), [seen, decoder.mask_tokens.weight])
    theirs = torch.autograd.grad((expected * weight).sum(), [twin, upstream.mask_tokens.weight])
    for gradient, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=0, atol=1e-10 * max(1.0, float(wanted.abs().max())))
