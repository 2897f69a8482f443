"""A model whose answer is known: it marks what is brighter than a threshold."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from samunet.artifacts.checkpoint import BaseWeights, Manifest
from samunet.artifacts.plan import Plan, resolve_recipe
from samunet.core.log import Reporter
from samunet.inference.loading import Member
from samunet.inference.predictor import Predictor
from samunet.training.checkpointing import recipe_to_json

THRESHOLD = 50.0


class PlantedModel(nn.Module):
    """Logits of two classes from the middle channel, at the resolution of its input."""

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, S, S) to (B, 2, S, S)."""
        middle = images[:, images.shape[1] // 2]
        return torch.stack([THRESHOLD - middle, middle - THRESHOLD], 1)


def planted_predictor(
    plan: Plan, *, mirror: bool = True, model: nn.Module | None = None, reporter: Reporter | None = None
) -> Predictor:
    """A predictor around the planted model, or another one."""
    recipe = resolve_recipe(plan.configuration("2d"), "none", "cpu")
    manifest = Manifest(
        dataset=plan.dataset,
        configuration="2d",
        preset="auto",
        fold="0",
        recipe=recipe_to_json(recipe),
        base=BaseWeights(kind="none"),
        seed=0,
        steps=0,
        epochs=0,
        minutes=0,
    )
    member = Member(model or PlantedModel(), manifest, plan)  # type: ignore[arg-type]
    return Predictor([member], device="cpu", mirror=mirror, reporter=reporter)
