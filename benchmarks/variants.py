"""Settings that a search would try beside the plan's, as configurations of a copied plan.

The copy lies in a folder of its own that links the stores, so that samunet_train runs every variant as it would run a
plan edited by hand, and the dataset's own plan stays as it is.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from samunet.artifacts.fingerprint import Fingerprint
from samunet.artifacts.model_spec import TOKEN_SIZE
from samunet.artifacts.plan import Configuration, Plan, Recipe, load_plan, save_plan
from samunet.artifacts.workspace import Workspace
from samunet.core.config import load_schema, parse_schema
from samunet.core.files import sha256_file, sha256_json
from samunet.pipeline.training_run import TrainingRequest, resolve
from samunet.planners.planner import facts_of_plan
from samunet.planners.recipes import automatic, plan_recipe
from samunet.planners.sizes import Grid, grid_of
from samunet.training.checkpointing import recipe_to_json

MOST_OTHERS = 12
PLANNED = "plan"
RATE_FACTORS = {"lr / 3": 1 / 3, "lr x 3": 3.0}
RANKS = (1, 16)
RANK_BACKBONE = "vit_xs"


@dataclass(frozen=True)
class Variant:
    """One choice of settings; everything else is planned around it.

    Args:
        name: Unique among those of a dataset.
        configuration: Context and depth, by the name of a planned configuration.
        input_size: Encoder input in pixels, of the planned field of view; None: planned.
        rate_factor: On the planned learning rate.
        rank: LoRA rank everywhere; None: planned.
    """

    name: str
    configuration: str
    input_size: int | None = None
    rate_factor: float = 1.0
    rank: int | None = None

    @property
    def trained_configuration(self) -> str:
        """Its name in the copied plan."""
        return self.configuration if self.input_size is None else f"{self.configuration}_at_{self.input_size}"


def scratch_variants(plan: Plan) -> list[Variant]:
    """The plan, then others that differ in one thing, then pairs of input size and learning rate."""
    recommended = plan.recommended.value
    recipe = plan.configuration().recipes["none"]["cpu"]
    planned, grid = recipe.input_size.value, grid_of(recipe.method_parts())
    made = [Variant(PLANNED, recommended)]
    sizes = [size for size in (smaller(planned, grid), larger(planned, grid)) if size <= grid.largest]
    made += [Variant(f"input {size}", recommended, input_size=size) for size in sizes]
    others = [name for name in ("2d", "2.5d", "3d") if name in plan.configurations and name != recommended]
    made += [Variant(name, name) for name in others]
    made += [Variant(name, recommended, rate_factor=factor) for name, factor in RATE_FACTORS.items()]
    made += [
        Variant(f"input {size}, {name}", recommended, input_size=size, rate_factor=RATE_FACTORS[name])
        for size, name in product(sizes, RATE_FACTORS)
    ]
    return made


def rank_variants(plan: Plan) -> list[Variant]:
    """The planned rank, then others."""
    recommended = plan.recommended.value
    return [Variant(PLANNED, recommended), *(Variant(f"rank {r}", recommended, rank=r) for r in RANKS)]


def smaller(size: int, grid: Grid) -> int:
    """The largest planned size below two thirds, or half of what there is."""
    below = [other for other in grid.smaller(size) if 3 * other <= 2 * size]
    return below[0] if below else max(TOKEN_SIZE, size // 2 // TOKEN_SIZE * TOKEN_SIZE)


def larger(size: int, grid: Grid) -> int:
    """The smallest multiple of the grid's step that is half as large again."""
    return math.ceil(1.5 * size / grid.step) * grid.step


def install(variants: Sequence[Variant], dataset: str, source: Workspace, target: Workspace) -> Plan:
    """Write a copy of a dataset's plan with one more configuration per input size, and link what goes with it."""
    plan = load_plan(source.plan_file(dataset))
    fingerprint = load_schema(Fingerprint, source.fingerprint_file(dataset))
    added = {
        v.trained_configuration: at_input_size(plan, fingerprint, v.configuration, v.input_size)
        for v in variants
        if v.input_size is not None
    }
    copied = plan.model_copy(update={"configurations": {**plan.configurations, **added}})
    copy_plan(copied, source, target)
    return copied


def copy_plan(plan: Plan, source: Workspace, target: Workspace) -> None:
    """Write a plan into another workspace, beside all that goes with it."""
    copy_dataset(plan.dataset, source, target)
    save_plan(plan, target.plan_file(plan.dataset))


def copy_dataset(dataset: str, source: Workspace, target: Workspace) -> None:
    """What lies beside a plan, in another workspace: facts and splits as copies, stores as links."""
    folder = target.preprocessed_folder(dataset)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for file in (source.fingerprint_file(dataset), source.description_file(dataset), source.splits_file(dataset)):
        shutil.copy2(file, folder / file.name)
    for store in source.preprocessed_folder(dataset).iterdir():
        if store.is_dir():
            (folder / store.name).symlink_to(store.resolve(), target_is_directory=True)


def at_input_size(plan: Plan, fingerprint: Fingerprint, name: str, size: int, tile: int | None = None) -> Configuration:
    """A planned configuration whose recipe from random weights on a CPU is planned around another input size.

    Args:
        plan: The plan.
        fingerprint: What it was made of.
        name: Of the configuration.
        size: Encoder input in pixels.
        tile: Voxels along a side of what one input covers; None: as planned, zoomed to more or fewer pixels.
    """
    chosen = plan.configuration(name)
    facts = facts_of_plan(plan, fingerprint)
    wish = automatic(facts, "none", "cpu", configuration=name, slab_depth=chosen.slab_depth.value)
    tile = tile or chosen.recipes["none"]["cpu"].tile_vox.value
    fixed = {"input_size": (size, "searched"), "tile_vox": (tile, "searched")}
    content = plan_recipe(facts, replace(wish, fixed=fixed))
    return chosen.model_copy(update={"recipes": {"none": {"cpu": parse_schema(Recipe, content)}}})


@dataclass(frozen=True)
class Settings:
    """What a variant trains with.

    Args:
        words: Words of samunet_train.
        facts: For tables.
        key: Short hash of everything that decides the training but fold, seed and machine.
    """

    words: tuple[str, ...]
    facts: dict[str, Any]
    key: str


def settings(variant: Variant, plan: Plan, workspace: Workspace, *, base: Path | None, minutes: float) -> Settings:
    """The command of a variant, and what it comes to.

    Args:
        variant: Which.
        plan: The copied plan.
        workspace: Where that lies.
        base: Checkpoint to adapt; None: random weights.
        minutes: Time limit.
    """
    configuration = variant.trained_configuration
    weights, backbone = ("none", None) if base is None else (f"sam:{base}", RANK_BACKBONE)
    request = TrainingRequest(
        plan.dataset, "0", configuration, backbone=backbone, weights=weights, minutes=minutes, rank=variant.rank
    )
    recipe = resolve(request, plan, configuration, "cpu", workspace)
    words = ["-c", configuration, "--weights", weights]
    words += [] if backbone is None else ["--backbone", backbone]
    words += [] if variant.rank is None else ["--rank", f"{variant.rank}"]
    if variant.rate_factor != 1:
        recipe = replace(recipe, learning_rate=float(f"{recipe.learning_rate * variant.rate_factor:.3g}"))
        words += ["--lr", f"{recipe.learning_rate:g}"]
    chosen = plan.configuration(configuration)
    decisive = {k: v for k, v in recipe_to_json(recipe).items() if k not in ("memory_gib", "epochs")}
    decisive |= {"context": chosen.context_slices.value, "channels": chosen.channels.value, "minutes": minutes}
    decisive |= {"store": plan.store_key(configuration), "base": base and sha256_file(base)}
    facts = {
        "variant": variant.name,
        "configuration": variant.configuration,
        "input_size": recipe.input_size,
        "learning_rate": recipe.learning_rate,
    }
    return Settings(tuple(words), facts | {"rank": rank_of(recipe.method)}, sha256_json(decisive)[:8])


def rank_of(method: Any) -> int | None:
    """LoRA's rank, if the method has LoRA."""
    lora = method.adapter("lora")
    return None if lora is None else int(lora.rank)
