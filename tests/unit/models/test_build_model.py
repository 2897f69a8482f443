"""A recipe into a model: what trains, what stays fixed, and the seed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from samunet.artifacts.method import DecoderMethod, EncoderMethod, Method, PromptMethod
from samunet.artifacts.model_spec import get_spec
from samunet.core.errors import ConfigError
from samunet.models.build import build_model
from samunet.models.decoders.promptable import PromptBatch
from samunet.models.segmentation import SegmentationModel
from tests.unit.models.model_helpers import (
    BOTH_FAMILIES,
    METHODS,
    base_file,
    build,
    images,
    perturb,
    recipe,
    state_copy,
)

NETWORK = "network."


def _step(model: SegmentationModel, num_steps: int = 2) -> None:
    """Train as the trainer does: AdamW with decay on one group, train mode."""
    model.train()
    groups = model.trainable_parameters()
    optimizer = torch.optim.AdamW(
        [
            {"params": groups["decay"], "weight_decay": 0.1},
            {"params": groups["no_decay"], "weight_decay": 0.0},
        ],
        lr=0.01,
    )
    for step in range(num_steps):
        optimizer.zero_grad()
        model(images(2, seed=step)).square().mean().backward()
        optimizer.step()


def _adapted(
    tmp_path: Path, backbone: str, tuning: str, *, method: Method | None = None, **changes: object
) -> SegmentationModel:
    file = base_file(tmp_path, get_spec(backbone), image_size=112)
    chosen = recipe(backbone=backbone, method=method or METHODS[tuning], weights_kind="ssl", **changes)
    return build(chosen, weights=file).model


@pytest.mark.parametrize("backbone", BOTH_FAMILIES)
@pytest.mark.parametrize("tuning", ["lora", "frozen"])
@pytest.mark.parametrize("decoder", ["full", "lora", "adapters", "heads"])
def test_frozen_parameters_and_all_buffers_stay_bit_identical(
    tmp_path: Path, backbone: str, tuning: str, decoder: str
) -> None:
    """After optimizer steps in train mode only the parameters named trainable moved: no frozen one, no buffer."""
    method = Method(encoder=METHODS[tuning].encoder, decoder=DecoderMethod(train=decoder))
    model = _adapted(tmp_path, backbone, tuning, method=method)
    before = state_copy(model)
    _step(model)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    moved = {name for name, tensor in state_copy(model).items() if not torch.equal(tensor, before[name])}
    assert moved == trained
    encoder = {name for name in trained if name.startswith("network.image_encoder.")}
    assert all(".lora_" in name for name in encoder)
    assert bool(encoder) == (tuning == "lora")


def test_batch_norm_of_a_full_tiny_vit_moves(tmp_path: Path) -> None:
    """When the encoder trains fully its batch statistics follow the data, in train mode only."""
    model = build(recipe()).model
    name = "network.image_encoder.patch_embed.conv1.bn.running_mean"
    before = model.state_dict()[name].clone()
    model.eval()
    model(images(2))
    assert torch.equal(model.state_dict()[name], before)
    _step(model, 1)
    assert not torch.equal(model.state_dict()[name], before)


def test_tiny_vit_in_train_mode_ignores_the_batch_under_an_adapted_encoder(tmp_path: Path) -> None:
    """Under LoRA, train mode gives an image the same logits alone and in a batch."""
    model = _adapted(tmp_path, "vit_t_xs", "lora").train()
    with torch.no_grad():
        together, alone = model(images(3)), model(images(3)[:1])
    torch.testing.assert_close(together[:1], alone, rtol=0, atol=1e-4 * float(alone.abs().max()))
    assert not model.network.image_encoder.training
    assert model.network.mask_decoder.training


@pytest.mark.parametrize("backbone", BOTH_FAMILIES)
def test_adapters_start_as_the_identity_of_the_base(tmp_path: Path, backbone: str) -> None:
    """A LoRA model and a frozen one of the same seed give bit-equal logits before training."""
    lora, frozen = _adapted(tmp_path, backbone, "lora"), _adapted(tmp_path, backbone, "frozen")
    frozen.network.mask_decoder.load_state_dict(lora.network.mask_decoder.state_dict())
    with torch.no_grad():
        assert torch.equal(lora.eval()(images(2)), frozen.eval()(images(2)))


@pytest.mark.parametrize(
    ("backbone", "tuning", "count"),
    [
        ("vit_b", "frozen", 3_777_698 - 131_584 - 2 * 257 + 256),
        ("vit_b", "lora", 147_456 + 3_777_698 - 131_584 - 2 * 257 + 256),
        ("vit_t", "lora", 29_696 + 3_777_698 - 131_584 - 2 * 257 + 256),
    ],
)
def test_trainable_counts(backbone: str, tuning: str, count: int) -> None:
    """Adapters, decoder and "no mask" embedding train; the mask-quality head, which feeds no output, does not."""
    from samunet.models.channels import build_channel_input
    from samunet.models.peft.inject import inject_adapters
    from samunet.models.sam.network import build_network

    network = build_network(get_spec(backbone), image_size=64, num_tokens=2, initialise=backbone == "vit_t")
    inject_adapters(network.image_encoder, METHODS[tuning].encoder.adapters)
    model = SegmentationModel(network, channel_input=build_channel_input("direct", 3), method=METHODS[tuning])
    groups = model.trainable_parameters()
    assert sum(p.numel() for group in groups.values() for p in group) == count


@pytest.mark.parametrize("backbone", BOTH_FAMILIES)
def test_every_trained_parameter_receives_a_gradient(backbone: str) -> None:
    """With full training nothing that is handed to the optimizer is left without a gradient."""
    model = build(recipe(backbone=backbone)).model
    perturb(model)
    model(images(2)).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


@pytest.mark.parametrize("backbone", BOTH_FAMILIES)
def test_norms_biases_tokens_and_positions_are_not_decayed(backbone: str) -> None:
    """The groups are disjoint and complete, and only matrices and kernels are decayed."""
    model = build(recipe(backbone=backbone)).model
    groups = model.trainable_parameters()
    names = {id(p): name for name, p in model.named_parameters()}
    decay, no_decay = ({names[id(p)] for p in group} for group in (groups["decay"], groups["no_decay"]))
    assert not decay & no_decay
    assert decay | no_decay == {name for name, p in model.named_parameters() if p.requires_grad}
    kept = ("norm", "bias", "iou_token", "mask_tokens", "pos_embed", "rel_pos", "no_mask_embed", ".bn.")
    assert not [name for name in decay if any(part in name for part in kept)]
    assert all(name.endswith("weight") for name in decay)
    matrices = {n for n in decay | no_decay if n.endswith(("qkv.weight", "proj.weight", "lin1.weight"))}
    assert len(matrices) > 20
    assert matrices <= decay


def test_networks_of_the_tokens_that_no_loss_reaches_stay_sams(tmp_path: Path) -> None:
    """A promptable model trains token 0; the mask networks of the others get no gradient and are not decayed."""
    method = Method(encoder=EncoderMethod(train="full"), prompts=PromptMethod(kind="box"))
    model = _adapted(tmp_path, "vit_t_xs", "full", method=method)
    before = state_copy(model)
    groups = model.trainable_parameters()
    optimizer = torch.optim.AdamW([{"params": groups["decay"], "weight_decay": 0.1}, {"params": groups["no_decay"]}])
    optimizer.param_groups[1]["weight_decay"] = 0.0
    boxes = PromptBatch(boxes=torch.tensor([[10.0, 20.0, 60.0, 90.0]] * 2))
    for seed in range(2):
        optimizer.zero_grad()
        masks, quality = model.train().prompted(model.encode(images(2, seed=seed)), boxes)
        (masks[:, 0].square().mean() + quality[:, 0].square().mean()).backward()
        optimizer.step()
    networks = f"{NETWORK}mask_decoder.output_hypernetworks_mlps."
    moved = {name for name, tensor in state_copy(model).items() if not torch.equal(tensor, before[name])}
    assert {name for name in moved if name.startswith(networks)} == {
        name for name in before if name.startswith(f"{networks}0.")
    }


def test_lora_factors_are_decayed(tmp_path: Path) -> None:
    """The factors of an adapter are matrices and decay as such."""
    model = _adapted(tmp_path, "vit_xs", "lora")
    decayed = {id(p) for p in model.trainable_parameters()["decay"]}
    factors = [p for name, p in model.named_parameters() if ".lora_" in name]
    assert len(factors) == 6 * 4
    assert all(id(p) in decayed for p in factors)


@pytest.mark.parametrize("backbone", BOTH_FAMILIES)
def test_seed_alone_decides_the_start(backbone: str) -> None:
    """One seed gives the same tensors wherever torch's generator is, which is left alone; another seed differs."""
    torch.manual_seed(1)
    first = build(recipe(backbone=backbone), seed=7).model
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second = build(recipe(backbone=backbone), seed=7).model
    assert torch.equal(torch.get_rng_state(), state)
    other = build(recipe(backbone=backbone), seed=8).model
    assert all(torch.equal(t, second.state_dict()[name]) for name, t in first.state_dict().items())
    assert any(not torch.equal(t, other.state_dict()[name]) for name, t in first.state_dict().items())


def test_new_parameters_depend_on_the_seed_and_loaded_ones_do_not(tmp_path: Path) -> None:
    """With weights, the seed decides the class-specific parts and adapters only."""
    file = base_file(tmp_path, get_spec("vit_xs"), image_size=112)
    chosen = recipe(backbone="vit_xs", method=METHODS["lora"], weights_kind="ssl")
    first, second = (build(chosen, weights=file, seed=seed) for seed in (1, 2))
    report = first.load_report
    differing = {
        name.removeprefix(NETWORK)
        for name, tensor in first.model.state_dict().items()
        if not torch.equal(tensor, second.model.state_dict()[name])
    }
    assert differing
    assert differing <= {*report.missing, *report.reinitialised}


@pytest.mark.parametrize("tuning", ["lora", "frozen"])
def test_a_random_encoder_is_never_frozen(tuning: str) -> None:
    """Without weights there is nothing to preserve: adapting or freezing is refused with what to do."""
    with pytest.raises(ConfigError, match=r"encoder\.train to full"):
        build(recipe(method=METHODS[tuning]))


@pytest.mark.parametrize("planned", ["sam", "none"])
def test_weights_must_be_of_the_recipes_kind(tmp_path: Path, planned: str) -> None:
    """Weights of another kind have another intensity map, and are refused; so are absent ones."""
    file = base_file(tmp_path, get_spec("vit_xs"), image_size=112, kind="ssl")
    with pytest.raises(ConfigError, match="not of the kind") as caught:
        build(recipe(backbone="vit_xs", weights_kind=planned), weights=file)
    assert (caught.value.expected, caught.value.found) == (planned, "ssl")
    if planned == "sam":
        with pytest.raises(ConfigError, match="not of the kind"):
            build(recipe(backbone="vit_xs", weights_kind=planned), weights=None)


def test_projection_trains_even_before_a_frozen_encoder(tmp_path: Path) -> None:
    """Two channels are projected, and the projection receives a gradient through the frozen encoder."""
    file = base_file(tmp_path, get_spec("vit_xs"), image_size=112)
    chosen = recipe(backbone="vit_xs", method=METHODS["frozen"], weights_kind="ssl")
    model = build_model(chosen, num_tokens=2, num_input_channels=2, channels="projection", weights=file, seed=0).model
    model(images(2)[:, :2]).square().mean().backward()
    gradient = model.channel_input.conv.weight.grad
    assert gradient is not None
    assert float(gradient.abs().sum()) > 0
    with pytest.raises(ConfigError, match="3 channels"):
        build_model(chosen, num_tokens=2, num_input_channels=2, channels="direct", weights=file, seed=0)


@pytest.mark.parametrize("backbone", BOTH_FAMILIES)
def test_recipe_switches_checkpointing(tmp_path: Path, backbone: str) -> None:
    """The recipe's checkpointing reaches the encoder, and gradients of the adapters are bit-identical without it."""
    gradients = []
    for checkpointing in (True, False):
        model = _adapted(tmp_path, backbone, "lora", checkpointing=checkpointing)
        assert model.network.image_encoder.checkpointing is checkpointing
        model(images(2)).square().mean().backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    model.set_checkpointing(True)
    assert model.network.image_encoder.checkpointing
