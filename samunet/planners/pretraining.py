"""How an encoder is pretrained on a planned dataset: at the size of the training that follows, its own schedule."""

from __future__ import annotations

from typing import Any

from samunet.artifacts.fingerprint import Fingerprint
from samunet.artifacts.method import EncoderMethod, Method, PromptMethod
from samunet.artifacts.plan import (
    METHOD_PARTS,
    Decay,
    DeviceClass,
    IntensityMap,
    Plan,
    Recipe,
    ResolvedRecipe,
    WeightsKind,
    strip_reasons,
)
from samunet.artifacts.plan_parts import STORED
from samunet.core.config import parse_schema
from samunet.planners.edits import Reasoned
from samunet.planners.planner import facts_of_plan
from samunet.planners.recipes import Wish, automatic, plan_recipe

KIND: WeightsKind = "ssl"
FROM_RANDOM_RATE, CONTINUED_RATE = 1e-3, 1e-4
WEIGHT_DECAY = 0.05
FULL = EncoderMethod(train="full")
MASKED_IMAGES = Method(encoder=FULL)
PROMPTED = Method(encoder=FULL, prompts=PromptMethod(kind="mixed"))
SCALE = ("input_size", "tile_vox")


def pretraining_recipe(
    plan: Plan,
    fingerprint: Fingerprint,
    *,
    configuration: str,
    device: DeviceClass,
    backbone: str,
    supervised: bool,
    from_random: bool,
) -> ResolvedRecipe:
    """The recipe of a pretraining run: all weights train, on single slices at the scale of the training that follows.

    Args:
        plan: The dataset's plan.
        fingerprint: What the plan was made from.
        configuration: Of the plan.
        device: Class of device.
        backbone: Image encoder.
        supervised: Whether structures are prompted for; else masked images are completed.
        from_random: Whether it begins with random weights.
    """
    method = PROMPTED if supervised else MASKED_IMAGES
    parts: dict[str, Reasoned] = {name: (getattr(method, name), "pretraining") for name in METHOD_PARTS}
    rate = FROM_RANDOM_RATE if from_random else CONTINUED_RATE
    fixed: dict[str, Any] = {
        "learning_rate": (rate, "random weights" if from_random else "pretrained weights that all move"),
        "weight_decay": (WEIGHT_DECAY, "the usual value of masked image modelling"),
        "decay": (Decay(kind="cosine"), "the usual schedule of masked image modelling"),
        "planes": (STORED, "pretraining sees stored slices"),
    }
    facts = facts_of_plan(plan, fingerprint, configuration=configuration)
    # what SAM never taught expects no particular intensities, and clips none
    intensities = (IntensityMap(kind="identity"), "random weights") if from_random else None
    pinned: dict[str, Reasoned] = {}
    if from_random:
        depth = plan.configuration(configuration).slab_depth.value
        own = automatic(
            facts,
            KIND,
            device,
            configuration=configuration,
            slab_depth=depth,
            backbone=(backbone, "given"),
            from_random=True,
        )
        following = plan_recipe(facts, own)
        pinned = {name: (following[name]["value"], "as in the training that follows") for name in SCALE}
    wish = Wish(KIND, device, (backbone, "given"), parts, intensity_map=intensities, fixed=fixed, pinned=pinned)
    recipe = parse_schema(Recipe, plan_recipe(facts, wish))
    return strip_reasons(recipe, KIND, device, slab_depth=1)
