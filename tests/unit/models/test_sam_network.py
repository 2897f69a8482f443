"""The composite: exact decoder sizes, all token maps, and independence of the images of a batch."""

from __future__ import annotations

import pytest
import torch

from samunet.artifacts.model_spec import SamSpec, get_spec
from samunet.models.decoders.semantic import dense_positions
from samunet.models.sam.network import SamNetwork, build_mask_decoder, build_network
from tests.unit.models.model_helpers import SMALL_TINY, SMALL_VIT, images, perturb


@pytest.mark.parametrize("num_tokens", [1, 2, 3, 4, 9, 15])
def test_decoder_size_is_the_published_function_of_its_tokens(num_tokens: int) -> None:
    """The mask decoder holds 3,497,056 parameters and 140,321 for each token."""
    with torch.device("meta"):
        decoder = build_mask_decoder(num_tokens)
    assert sum(p.numel() for p in decoder.parameters()) == 3_497_056 + 140_321 * num_tokens


def test_prompt_encoder_size() -> None:
    """The prompt encoder holds its published 6,220 parameters, and keys carry upstream's prefixes."""
    network = build_network(SMALL_VIT, image_size=64, num_tokens=2)
    assert sum(p.numel() for p in network.prompt_encoder.parameters()) == 6_220
    assert {key.split(".")[0] for key in network.state_dict()} == {"image_encoder", "prompt_encoder", "mask_decoder"}


@pytest.mark.parametrize("num_tokens", [1, 2, 5])
def test_every_token_gives_a_map_that_depends_on_it(num_tokens: int) -> None:
    """T tokens give T maps on a quarter of the input's grid, and changing a token's head changes its map only."""
    network = build_network(SMALL_VIT, image_size=64, num_tokens=num_tokens).eval()
    with torch.no_grad():
        before = network(images(2, size=64))
        assert before.shape == (2, num_tokens, 16, 16)
        network.mask_decoder.output_hypernetworks_mlps[num_tokens - 1].layers[2].bias.add_(1.0)
        after = network(images(2, size=64))
    assert torch.equal(before[:, :-1], after[:, :-1])
    assert not torch.allclose(before[:, -1], after[:, -1])


@pytest.mark.parametrize("spec", [SMALL_VIT, SMALL_TINY], ids=lambda s: s.family)
def test_a_batch_of_three_equals_three_batches_of_one(spec: SamSpec) -> None:
    """Images of a batch do not see each other in eval mode."""
    network = build_network(spec, image_size=112, num_tokens=3).eval().double()
    perturb(network)
    pixels = images(3).double()
    with torch.no_grad():
        together = network(pixels)
        apart = torch.cat([network(pixels[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(together, apart, rtol=0, atol=1e-11)
    assert not torch.allclose(together[0], together[1])


def test_positions_are_upstreams_and_keep_full_precision_under_autocast() -> None:
    """The dense positions equal upstream's in float32, and autocast to bfloat16 does not touch them."""
    layer = build_network(SMALL_VIT, image_size=112, num_tokens=2).prompt_encoder.pe_layer
    ours = dense_positions(layer, 7, 9)
    assert torch.equal(ours[0], layer((7, 9)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(dense_positions(layer, 7, 9), ours)


def test_bfloat16_autocast_stays_near_float32() -> None:
    """Under autocast the logits differ from float32 by little of their spread."""
    network = build_network(SMALL_VIT, image_size=112, num_tokens=3).eval()
    with torch.no_grad():
        exact = network(images(1))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rounded = network(images(1)).float()
    assert 0 < float((rounded - exact).abs().max()) < 0.1 * float(exact.abs().max())


def test_skipping_initialisation_leaves_the_layout_unchanged() -> None:
    """A network whose encoder is left for a checkpoint to fill has the same keys, shapes and buffers."""
    drawn = build_network(SMALL_VIT, image_size=64, num_tokens=2)
    empty = build_network(SMALL_VIT, image_size=64, num_tokens=2, initialise=False)
    assert isinstance(empty, SamNetwork)
    assert {k: t.shape for k, t in drawn.state_dict().items()} == {k: t.shape for k, t in empty.state_dict().items()}
    empty.load_state_dict(drawn.state_dict())
    with torch.no_grad():
        assert torch.equal(drawn.eval()(images(1, size=64)), empty.eval()(images(1, size=64)))


def test_small_specs_are_small() -> None:
    """The two specs for CPU and from-scratch work stay under four million encoder parameters."""
    for name in ("vit_xs", "vit_t_xs"):
        encoder = build_network(get_spec(name), image_size=112, num_tokens=2).image_encoder
        assert sum(p.numel() for p in encoder.parameters()) < 4_000_000
