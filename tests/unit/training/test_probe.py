"""The measured gradient is the loss's, projection by projection, and only the decoder has moved before."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import repeat

import pytest
import torch
from torch import Tensor

from samunet.artifacts.method import EncoderMethod, Lora, Method
from samunet.artifacts.plan import IntensityMap, ResolvedRecipe, strip_reasons
from samunet.core.errors import TrainingError
from samunet.core.log import SilentReporter
from samunet.models.build import build_model
from samunet.models.peft.lora import inject_lora
from samunet.models.segmentation import SegmentationModel
from samunet.training import probe as module
from samunet.training.data import Sample
from samunet.training.objective import SemanticObjective
from samunet.training.probe import Measurement, measure, probe_recipe, projection_facts
from tests.samples import make_recipe


@pytest.fixture(autouse=True)
def short_warmup(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WARMUP_STEPS", 2)


def small_model(backbone: str, parts: int = 1) -> tuple[SegmentationModel, ResolvedRecipe]:
    """A frozen encoder at random values under a decoder that trains."""
    recipe = make_recipe(backbone=backbone, intensity_map=IntensityMap(kind="identity"), accumulation_steps=parts)
    resolved = strip_reasons(recipe, "none", "cpu", slab_depth=1)
    built = build_model(resolved, num_tokens=3, num_input_channels=3, channels="direct", weights=None, seed=1)
    built.model.method = probe_recipe(resolved).method
    for parameter in built.model.network.image_encoder.parameters():
        parameter.requires_grad_(False)
    return built.model, probe_recipe(resolved)


def batch(seed: int) -> Sample:
    """Four random slices of 32 voxels."""
    torch.manual_seed(seed)
    image = torch.randn(4, 1, 3, 32, 32)
    target = torch.randint(0, 3, (4, 1, 1, 32, 32), dtype=torch.int16)
    return image, torch.ones(4, 1, 1, 32, 32), target


def run(
    backbone: str, batches: Iterator[Sample], *, number: int = 2, parts: int = 1
) -> tuple[SegmentationModel, Measurement]:
    """Probe a small model."""
    model, recipe = small_model(backbone, parts)
    found = measure(
        model,
        batches,
        recipe=recipe,
        objective=SemanticObjective(recipe, has_regions=False, device="cpu"),
        device="cpu",
        num_batches=number,
        minutes=None,
        reporter=SilentReporter(),
    )
    return model, found


def gradients_by_adapters(model: SegmentationModel, recipe: ResolvedRecipe, sample: Sample) -> dict[str, list[Tensor]]:
    """Gradients of q and v per block, as those of a low-rank update whose inner factor is the identity."""
    encoder = model.network.image_encoder
    dims = encoder.token_dims()
    inject_lora(encoder, Lora(targets=("q", "v", "o"), ranks=tuple(dims)))
    for layer in (m for m in encoder.modules() if hasattr(m, "lora_a")):
        for factor in layer.lora_a.values():
            torch.nn.init.eye_(factor)
    SemanticObjective(recipe, has_regions=False, device="cpu").loss(model, sample).backward()
    layers = encoder.attention_layers()
    fused = {t: [layer.qkv.lora_b[t].grad for layer in layers] for t in ("q", "v")}
    return fused | {"o": [layer.proj.lora_b["o"].grad for layer in layers]}


@pytest.mark.parametrize("backbone", ["vit_xs", "vit_t_xs"])
def test_the_gradient_is_that_of_the_loss(backbone: str) -> None:
    """Equal to what full-rank adapters of the same model get from the same batch; equal batches agree fully."""
    model, found = run(backbone, repeat(batch(0)))
    recipe = small_model(backbone)[1]
    expected = gradients_by_adapters(model, recipe, batch(0))
    blocks = len(model.network.image_encoder.token_dims())
    assert len(found.projections) == 4 * blocks
    assert found.batches == 2
    for facts in found.projections:
        assert facts.signal_to_noise == pytest.approx(1, rel=1e-5)
        if facts.target == "k":
            continue
        gradient = expected[facts.target][facts.block]
        values = torch.linalg.svdvals(gradient.double())[: len(facts.singular_values)]
        assert torch.allclose(torch.tensor(facts.singular_values).double(), values, rtol=1e-3, atol=1e-8)
        assert facts.norm == pytest.approx(float(gradient.norm()), rel=1e-4)


def test_only_the_decoder_moves() -> None:
    """The encoder keeps its weights and batch statistics; the decoder has been trained; other batches agree less."""
    before, _ = small_model("vit_t_xs")
    model, found = run("vit_t_xs", (batch(seed) for seed in range(9)), number=4, parts=2)
    moved = {name for name, t in model.state_dict().items() if not torch.equal(t, before.state_dict()[name])}
    assert moved
    assert not any(".image_encoder." in name for name in moved)
    assert len(found.warmup_loss) == 2
    assert all(0.2 < facts.signal_to_noise < 0.999 for facts in found.projections)


def test_minutes_end_it_early() -> None:
    """Without time left one decoder step and two batches remain."""
    model, recipe = small_model("vit_xs")
    objective = SemanticObjective(recipe, has_regions=False, device="cpu")
    found = measure(
        model,
        repeat(batch(0)),
        recipe=recipe,
        objective=objective,
        device="cpu",
        num_batches=50,
        minutes=1e-6,
        reporter=SilentReporter(),
    )
    assert (len(found.warmup_loss), found.batches) == (1, 2)


def test_facts_of_a_known_matrix() -> None:
    """Singular values fall, their energy sums to one, and what is not a number is refused."""
    left, right = (torch.linalg.qr(torch.randn(40, 40, dtype=torch.float64))[0] for _ in range(2))
    values = torch.linspace(4, 0.1, 40, dtype=torch.float64)
    facts = projection_facts(left @ values.diag() @ right, 3, "v", batch_norm=100.0)
    assert facts.singular_values == pytest.approx(values[:32].tolist())
    assert facts.energy[0] == pytest.approx(float(values[0] ** 2 / values.square().sum()))
    assert facts.norm == pytest.approx(float(values.norm()))
    assert facts.signal_to_noise == pytest.approx(facts.norm / 100)
    assert projection_facts(torch.zeros(4, 4), 0, "q", batch_norm=0.0).signal_to_noise == 0
    with pytest.raises(TrainingError, match="block 0, q"):
        projection_facts(torch.full((4, 4), torch.nan), 0, "q", batch_norm=1.0)


def test_the_recipe_of_a_probe_injects_nothing() -> None:
    """A frozen encoder, a decoder that trains whole, and no half precision that needs a scaled loss."""
    encoder = EncoderMethod(train="adapters", adapters=(Lora(),))
    recipe = strip_reasons(make_recipe(encoder=encoder, precision="fp16"), "sam", "gpu", slab_depth=1)
    assert probe_recipe(recipe).method == Method(encoder=EncoderMethod(train="frozen"))
    assert probe_recipe(recipe).precision == "fp32"
