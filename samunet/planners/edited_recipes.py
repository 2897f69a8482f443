"""A recipe in which the user decided something: rules decide the rest around it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from samunet.artifacts.method import DecoderMethod
from samunet.artifacts.plan import METHOD_PARTS
from samunet.core.errors import ConfigError
from samunet.planners.edits import Choices, Reasoned, settled
from samunet.planners.peft import has_place_for_path, without_side_path
from samunet.planners.recipes import Facts, Wish, plan_recipe
from samunet.planners.words import short


def plan_edited_recipe(facts: Facts, wish: Wish, edits: Choices) -> dict[str, Any]:
    """A recipe's content: the user's decisions, and what rules decide around them.

    Args:
        facts: Of the dataset.
        wish: What samunet itself chooses.
        edits: What the user decided, by field.

    Raises:
        ConfigError: If the parts of the method do not go together.
    """
    by_rule = plan_recipe(facts, wish)
    if not edits:
        return by_rule
    chosen: dict[str, Reasoned] = {name: (edit.value, edit.reason) for name, edit in edits.items()}
    if chosen.get("minutes", (None, ""))[0] is not None:
        facts = replace(facts, budget=facts.budget.model_copy(update={"cpu_minutes": chosen["minutes"][0]}))
    parts = {name: chosen.get(name, part) for name, part in wish.parts.items()}
    if "decoder" not in chosen:
        parts["decoder"] = _beside(parts)
    around = replace(
        wish,
        backbone=chosen.get("backbone", wish.backbone),
        parts=parts,
        pinned={name: choice for name, choice in chosen.items() if name not in (*METHOD_PARTS, "backbone")},
    )
    try:
        planned = plan_recipe(facts, around)
    except ConfigError as error:
        raise ConfigError(
            f"the recipe for {wish.weights} on a {wish.device} does not go with what was edited in it: {error.problem}",
            found=", ".join(f"{name} = {short(edit.value)}" for name, edit in edits.items()),
            todo="correct plans.json, or plan without its edits with --overwrite-plan",
        ) from None
    answers = {name: (by_rule[name]["value"], by_rule[name]["reason"]) for name in edits}
    return planned | {name: settled(answers[name], edit) for name, edit in edits.items()}


def _beside(parts: Mapping[str, Reasoned]) -> Reasoned:
    """The planned decoder beside the prompts and the fusion that were asked for."""
    planned, reason = parts["decoder"]
    kinds = {part: parts[part][0].kind for part in ("prompts", "fusion")}
    if planned.upsampler != "side_path" or has_place_for_path(**kinds):
        return planned, reason
    decoder = DecoderMethod(**without_side_path(planned.model_dump()))
    return decoder, "prompts and a U-Net leave no place for a side path"
