"""Which trained model a prediction uses when the user names only a dataset."""

from __future__ import annotations

from pathlib import Path

from samunet.artifacts.plan import load_plan
from samunet.artifacts.workspace import Workspace
from samunet.core.errors import UsageError
from samunet.inference.loading import finished_folds


def choose_model_folder(
    workspace: Workspace, dataset: str, *, configuration: str | None = None, checkpoint: str = "final"
) -> Path:
    """The folder of the recommended configuration if it is trained, else of the only one trained.

    Args:
        workspace: Where results are.
        dataset: Full dataset name.
        configuration: A configuration to insist on.
        checkpoint: The checkpoint that has to exist.

    Raises:
        UsageError: If nothing fits, or several do; the message lists them.
    """
    below = workspace.results / dataset
    trained = [p for p in sorted(below.glob("*__*__*")) if finished_folds(p, checkpoint)]
    if not trained:
        raise UsageError(
            "nothing is trained for this dataset", file=below, todo=f"samunet_train {dataset} 0, or give -m FOLDER"
        )
    wanted = configuration
    if wanted is None:
        plan_file = workspace.plan_file(dataset)
        recommended = load_plan(plan_file).recommended.value if plan_file.is_file() else None
        present = {_configuration(p) for p in trained}
        wanted = recommended if recommended in present else None
    fitting = trained if wanted is None else [p for p in trained if _configuration(p) == wanted]
    if len(fitting) == 1:
        return fitting[0]
    raise UsageError(
        "several trained models fit" if fitting else f"configuration {wanted} is not trained",
        expected=", ".join(p.name for p in (fitting or trained)),
        found=wanted or "no -c",
        todo="choose with -c CONFIGURATION or -m FOLDER",
    )


def _configuration(folder: Path) -> str:
    return folder.name.split("__", 1)[0]
