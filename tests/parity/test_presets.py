"""Every preset at its start against plain SAM, its counts, its batches, and its checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from samunet.artifacts.model_spec import STOCK_TOKENS, get_spec
from samunet.artifacts.plan import LossWeights, ResolvedRecipe
from samunet.models.build import build_model, restore_model
from samunet.models.decoders.promptable import PromptBatch
from samunet.models.sam.network import SamNetwork, build_network
from samunet.models.segmentation import SegmentationModel
from samunet.models.state import trained_state
from samunet.models.weights import WeightsFile
from samunet.planners.counts import decoder_parameters, encoder_adapter_parameters
from samunet.planners.presets import PRESETS
from tests.unit.models.model_helpers import base_file, images, recipe

BACKBONES = ("vit_xs", "vit_t_xs")
TESTED = [name for name in PRESETS if not name.startswith(("peft_", "finetune_sam_vit_h", "finetune_sam_vit_t"))]
PADDED, EXACT = 112, 224
NUM_TOKENS, DEPTH = 3, 3
QUALITY_HEAD, QUALITY_HEAD_PER_TOKEN = 131_584, 257


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], tuple[WeightsFile, SamNetwork]]:
    """Per backbone and size a perturbed SAM, and its file."""
    found = {}
    for backbone in BACKBONES:
        for size in (PADDED, EXACT):
            folder = tmp_path_factory.mktemp("bases")
            file = base_file(folder, get_spec(backbone), image_size=size, kind="sam")
            network = build_network(get_spec(backbone), image_size=size, num_tokens=STOCK_TOKENS)
            network.load_state_dict(torch.load(file.path, weights_only=True))
            found[backbone, size] = (file, network.eval())
    return found


def built(
    name: str, backbone: str, size: int, file: WeightsFile, **changes: object
) -> tuple[SegmentationModel, ResolvedRecipe]:
    method = PRESETS[name].method
    depth = DEPTH if method.depth.kind != "none" else 1
    values = {"backbone": backbone, "weights_kind": "sam", "input_size": size, "slab_depth": depth, **changes}
    chosen = recipe(method=method, **values)
    model = build_model(chosen, weights=file, seed=3, **INPUT).model
    return model.eval(), chosen


INPUT = {"num_tokens": NUM_TOKENS, "num_input_channels": 3, "channels": "direct"}


def pixels(size: int) -> Tensor:
    return images(DEPTH, size=size)


def answer(model: SegmentationModel, batch: Tensor, depth: int) -> Tensor:
    """Masks of every slice, prompted by a box each where the model needs prompts."""
    if not model.method.promptable:
        return model(batch, depth=depth)
    boxes = torch.tensor([[10.0, 20.0, 60.0, 90.0]]).expand(len(batch), -1)
    return model.prompted(model.encode(batch, depth=depth), PromptBatch(boxes=boxes))[0]


@pytest.mark.parametrize("size", [PADDED, EXACT])
@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("name", TESTED)
@torch.no_grad()
def test_a_preset_starts_as_plain_sam(bases: dict, name: str, backbone: str, size: int) -> None:
    """The adapted encoder is the plain one's, with windows padded and not; so are the masks of a prompted model."""
    file, plain = bases[backbone, size]
    model, chosen = built(name, backbone, size, file)
    embeddings = model.encode(pixels(size), depth=chosen.slab_depth)
    wanted = plain.image_encoder(pixels(size))
    torch.testing.assert_close(embeddings, wanted, rtol=0, atol=2e-6 * float(wanted.abs().max()))
    if not chosen.method.promptable:
        return
    masks = answer(model, pixels(size), chosen.slab_depth)
    box = torch.tensor([[10.0, 20.0, 60.0, 90.0]])
    for index, embedding in enumerate(wanted):
        sparse, dense = plain.prompt_encoder(points=None, boxes=box, masks=None)
        expected, _ = plain.mask_decoder.predict_masks(
            image_embeddings=embedding[None],
            image_pe=plain.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
        )
        torch.testing.assert_close(masks[index], expected[0], rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("name", TESTED)
def test_trained_parameters_are_those_of_the_formula(bases: dict, name: str, backbone: str) -> None:
    """What trains is what the planner counts: all that is new or named, nothing else; no random part is frozen.

    The head that estimates IoU, which planned recipes train, stands apart.
    """
    file, plain = bases[backbone, PADDED]
    model, chosen = built(name, backbone, PADDED, file, loss=LossWeights(estimated_iou=1.0))
    method, counts = chosen.method, model.count_parameters()
    encoder = encoder_adapter_parameters(method, get_spec(backbone), slab_depth=chosen.slab_depth)
    if method.encoder.train == "full":
        encoder += sum(p.numel() for p in plain.image_encoder.parameters())
    assert counts["encoder"] == encoder
    if method.fusion.kind == "sam":
        tokens = STOCK_TOKENS if method.promptable else NUM_TOKENS
        assert counts["decoder"] + counts["other"] == decoder_parameters(method, tokens)
    estimates = method.fusion.kind == "sam" and not method.promptable
    assert counts["estimator"] == (QUALITY_HEAD + QUALITY_HEAD_PER_TOKEN * NUM_TOKENS if estimates else 0)
    assert counts["total"] == counts["encoder"] + counts["decoder"] + counts["other"]
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert counts["total"] + counts["estimator"] == trained


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("name", TESTED)
@torch.no_grad()
def test_a_batch_is_its_parts(bases: dict, name: str, backbone: str) -> None:
    """After training, three slices (or two slabs) at once answer as one after the other."""
    file, _ = bases[backbone, PADDED]
    model, chosen = built(name, backbone, PADDED, file)
    move(model)
    depth = chosen.slab_depth
    batch = images(3 if depth == 1 else 2 * depth, size=PADDED)
    together = answer(model, batch, depth)
    alone = torch.cat([answer(model, part, depth) for part in batch.split(depth)])
    torch.testing.assert_close(together, alone, rtol=0, atol=2e-5 * float(alone.abs().max()))


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("name", TESTED)
@torch.no_grad()
def test_a_checkpoint_gives_the_same_outputs(bases: dict, name: str, backbone: str, tmp_path: Path) -> None:
    """What is stored and the base rebuild the trained model to the bit, whatever the global seed."""
    file, _ = bases[backbone, PADDED]
    model, chosen = built(name, backbone, PADDED, file)
    move(model)
    state = {key: tensor.clone() for key, tensor in trained_state(model).items()}
    torch.manual_seed(77)
    restored = restore_model(chosen, weights=file, state=state, **INPUT)
    batch = images(chosen.slab_depth, size=PADDED)
    assert torch.equal(answer(restored, batch, chosen.slab_depth), answer(model, batch, chosen.slab_depth))


def move(model: SegmentationModel) -> None:
    """As training would: every trained parameter somewhere else."""
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
