"""The labelled cases that a run is limited to, and its recipe for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from samunet.artifacts.fingerprint import Fingerprint
from samunet.artifacts.plan import Plan, ResolvedRecipe
from samunet.artifacts.subset import SUBSET_SEED, Subset
from samunet.artifacts.workspace import Workspace
from samunet.core.config import load_schema
from samunet.core.errors import UsageError
from samunet.core.files import sha256_json
from samunet.core.log import Reporter
from samunet.datasets.splits import Split
from samunet.datasets.subsets import first_cases, load_or_draw_order, named_cases
from samunet.planners.few_labels import labelled, subset_recipe

_NAMES_SHOWN = 10


class SubsetRequest(Protocol):
    """What of a training request says which cases are meant; fields as in TrainingRequest."""

    @property
    def num_cases(self) -> int | None: ...  # noqa: D102

    @property
    def cases(self) -> Sequence[str] | None: ...  # noqa: D102

    @property
    def subset_seed(self) -> int | None: ...  # noqa: D102


def subset_tag(request: SubsetRequest) -> str:
    """What tells the runs of subsets apart in the results folder; empty for all cases.

    Raises:
        UsageError: If cases are both counted and named, or a seed is given for none to draw.
    """
    if request.num_cases is not None and request.cases is not None:
        raise UsageError("--num-cases and --cases both choose the training cases: give one")
    if request.subset_seed is not None and request.num_cases is None:
        raise UsageError("--subset-seed draws the cases of --num-cases", found="no --num-cases")
    if request.cases is not None:
        return f"c{sha256_json(sorted(request.cases))[:6]}"
    if request.num_cases is None:
        return ""
    seed = "" if request.subset_seed in (None, SUBSET_SEED) else f"s{request.subset_seed}"
    return f"n{request.num_cases}{seed}"


def choose_subset(
    request: SubsetRequest,
    fold: str,
    split: Split,
    groups: Mapping[str, str] | None,
    dataset: str,
    workspace: Workspace,
) -> Subset | None:
    """The subset asked for, written down where it is drawn; None for all training cases.

    Args:
        request: What is asked for.
        fold: Name of the fold.
        split: Its cases.
        groups: Case to group.
        dataset: Full name.
        workspace: Where subsets.json is.

    Raises:
        UsageError: If the fold does not have these cases.
        ConfigError: If subsets.json does not fit the fold.
    """
    if request.cases is not None:
        return Subset(cases=named_cases(request.cases, split, fold))
    if request.num_cases is None:
        return None
    seed = SUBSET_SEED if request.subset_seed is None else request.subset_seed
    file = workspace.subsets_file(dataset)
    order = load_or_draw_order(file, fold, split.train, groups, seed=seed)
    return Subset(cases=first_cases(order, request.num_cases), wanted=request.num_cases, seed=seed)


def check_subset(recorded: Subset | None, now: Subset | None, *, file: Path) -> None:
    """A run that is continued trains on the cases it began with.

    Raises:
        UsageError: If the subset asked for now is another one.
    """
    if recorded == now:
        return

    def shown(subset: Subset | None) -> str:
        return "all cases of the fold" if subset is None else ", ".join(subset.cases)

    raise UsageError(
        "the run trains on other cases than are asked for now",
        expected=shown(recorded),
        found=shown(now),
        file=file,
        todo="restore subsets.json, or start again with --overwrite",
    )


def recipe_for_subset(
    recipe: ResolvedRecipe,
    subset: Subset,
    plan: Plan,
    workspace: Workspace,
    *,
    published: bool,
    keep_rank: bool,
    reporter: Reporter | None,
) -> ResolvedRecipe:
    """The recipe with what depends on the number of cases decided for the subset; tells what changed and why."""
    fingerprint = load_schema(Fingerprint, workspace.fingerprint_file(plan.dataset))
    whole, part = labelled(plan, fingerprint), labelled(plan, fingerprint, subset.cases)
    changed, reasons = subset_recipe(recipe, whole, part, published=published, keep_rank=keep_rank)
    if reporter is not None:
        reporter.info(_announcement(subset))
        for name, reason in reasons.items():
            reporter.info(f"  {name}: {reason}")
    return changed


def _announcement(subset: Subset) -> str:
    names = ", ".join(subset.cases[:_NAMES_SHOWN])
    names += f" and {len(subset.cases) - _NAMES_SHOWN} more" if len(subset.cases) > _NAMES_SHOWN else ""
    number = f"{len(subset.cases)} training case{'s' * (len(subset.cases) != 1)}"
    if subset.wanted is None:
        return f"{number}, as named: {names}"
    fewer = f" of {subset.wanted} asked for, in whole groups" if len(subset.cases) < subset.wanted else ""
    return f"{number}{fewer}, drawn with seed {subset.seed}: {names}"
