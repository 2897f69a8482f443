"""Prompts per image: what the batch holds, where a prompt points, and independence of the images of a batch."""

from __future__ import annotations

import pytest
import torch

from samunet.models.decoders.adapters import inject_decoder
from samunet.models.decoders.promptable import PromptBatch, embed_sparse, predict_prompted
from samunet.models.decoders.semantic import dense_positions
from tests.unit.models.decoder_helpers import (
    BATCH,
    EVERY_PROMPT,
    GRID,
    METHODS,
    SIZE,
    embeddings,
    parts,
    pretend_training,
    prompts,
)


@EVERY_PROMPT
@pytest.mark.parametrize("method", ["full", "lora", "hyper"])
def test_a_batch_of_three_equals_three_batches_of_one(kind: str, method: str) -> None:
    """Every image meets its own prompts only, with trained modules in the decoder or without."""
    encoder, decoder = parts()
    inject_decoder(decoder, METHODS[method])
    pretend_training(decoder)
    seen, asked = embeddings(), prompts(kind)
    with torch.no_grad():
        masks, quality = predict_prompted(encoder, decoder, seen, asked)
        apart = [
            predict_prompted(encoder, decoder, seen[i : i + 1], asked.select(torch.tensor([i]))) for i in range(BATCH)
        ]
    assert masks.shape == (BATCH, 4, 4 * GRID, 4 * GRID)
    assert quality.shape == (BATCH, 4)
    torch.testing.assert_close(masks, torch.cat([one for one, _ in apart]), rtol=0, atol=1e-11)
    torch.testing.assert_close(quality, torch.cat([one for _, one in apart]), rtol=0, atol=1e-11)


@EVERY_PROMPT
def test_masks_depend_on_the_prompt(kind: str) -> None:
    """Exchanging the prompts of two images that are the same exchanges their masks."""
    encoder, decoder = parts()
    seen, asked = embeddings(1).expand(BATCH, -1, -1, -1), prompts(kind)
    order = torch.tensor([1, 0, 2])
    with torch.no_grad():
        masks, _ = predict_prompted(encoder, decoder, seen, asked)
        exchanged, _ = predict_prompted(encoder, decoder, seen, asked.select(order))
    torch.testing.assert_close(exchanged, masks[order], rtol=0, atol=1e-11)
    assert not torch.allclose(masks[0], masks[1])


def test_x_is_the_column() -> None:
    """A click on the centre of a cell has the position that the decoder gives to that cell's column and row."""
    encoder, _ = parts()
    row, column, side = 2, 5, SIZE // GRID
    click = torch.tensor([[[column * side + side / 2 - 0.5, row * side + side / 2 - 0.5]]]).double()
    token = embed_sparse(encoder, PromptBatch(points=click, point_labels=torch.ones(1, 1)))[0, 0]
    cell = dense_positions(encoder.pe_layer, GRID, GRID)[0, :, row, column]
    torch.testing.assert_close(token, cell + encoder.point_embeddings[1].weight[0], rtol=0, atol=1e-12)


def test_a_box_is_its_first_and_its_last_corner() -> None:
    """The two tokens of a box are the positions of (x0, y0) and (x1, y1), each with its own embedding."""
    encoder, _ = parts()
    boxes = prompts("box").boxes
    assert boxes is not None
    tokens = embed_sparse(encoder, PromptBatch(boxes=boxes))
    points = embed_sparse(encoder, PromptBatch(points=boxes.view(-1, 2, 2), point_labels=torch.ones(BATCH, 2)))
    for corner in (0, 1):
        moved = points[:, corner] - encoder.point_embeddings[1].weight + encoder.point_embeddings[2 + corner].weight
        torch.testing.assert_close(tokens[:, corner], moved, rtol=0, atol=1e-12)


def test_a_padded_point_says_nothing_about_where_it_is() -> None:
    """A point of label -1 is the learned "not a point", wherever it was put."""
    encoder, _ = parts()
    asked = prompts("padded")
    assert asked.points is not None
    moved = asked.points.clone()
    moved[0, 1] += 17
    tokens = embed_sparse(encoder, asked)
    assert torch.equal(tokens, embed_sparse(encoder, PromptBatch(points=moved, point_labels=asked.point_labels)))
    assert torch.equal(tokens[0, 1], encoder.not_a_point_embed.weight[0])
    assert torch.equal(tokens[:, 2], encoder.not_a_point_embed.weight.expand(BATCH, -1))


def test_positions_keep_full_precision_under_autocast() -> None:
    """Autocast to bfloat16 does not touch the tokens of prompts, and masks stay near those of float32."""
    encoder, decoder = (part.float() for part in parts())
    asked, seen = prompts("box and points"), embeddings().float()
    with torch.no_grad():
        tokens = embed_sparse(encoder, asked)
        masks, _ = predict_prompted(encoder, decoder, seen, asked)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(embed_sparse(encoder, asked), tokens)
            rounded, _ = predict_prompted(encoder, decoder, seen, asked)
    assert tokens.dtype == torch.float32
    assert 0 < float((rounded.float() - masks).abs().max()) < 0.1 * float(masks.abs().max())


@EVERY_PROMPT
def test_one_more_click_is_appended_and_the_answer_replaced(kind: str) -> None:
    """A correction adds one point at the end, keeps the box, and shows the newest mask."""
    asked = prompts(kind)
    clicks, labels = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]), torch.tensor([1, 0, -1])
    answer = torch.ones(BATCH, 1, 4 * GRID, 4 * GRID)
    corrected = asked.with_click(clicks, labels, answer)
    assert corrected.points is not None
    assert corrected.point_labels is not None
    before = 0 if asked.points is None else asked.points.shape[1]
    assert corrected.points.shape == (BATCH, before + 1, 2)
    assert torch.equal(corrected.points[:, -1].float(), clicks)
    assert corrected.point_labels[:, -1].tolist() == [1, 0, -1]
    if asked.points is not None and asked.point_labels is not None:
        assert torch.equal(corrected.points[:, :-1], asked.points)
        assert torch.equal(corrected.point_labels[:, :-1], asked.point_labels)
    assert corrected.boxes is asked.boxes
    assert corrected.masks is answer


@EVERY_PROMPT
def test_select_and_move_keep_what_is_given(kind: str) -> None:
    """Selecting images and moving to a device act on every part that is given, and invent none."""
    asked = prompts(kind)
    chosen, moved = asked.select(torch.tensor([2, 0])), asked.to("meta")
    assert len(asked) == len(moved) == BATCH
    assert len(chosen) == 2
    for name in ("points", "point_labels", "boxes", "masks"):
        part = getattr(asked, name)
        assert (getattr(chosen, name) is None) == (getattr(moved, name) is None) == (part is None)
        if part is not None:
            assert torch.equal(getattr(chosen, name), part[[2, 0]])
            assert getattr(moved, name).is_meta


@pytest.mark.parametrize("given", [{}, {"points": torch.zeros(1, 1, 2)}, {"point_labels": torch.ones(1, 1)}])
def test_prompts_that_would_be_ignored_are_refused(given: dict[str, torch.Tensor]) -> None:
    """Points without labels, labels without points and no prompt at all are mistakes."""
    with pytest.raises(ValueError, match=r"together|holds"):
        PromptBatch(**given)
