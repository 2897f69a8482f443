"""Makes tests/golden/plans: the plans of odd datasets, as readable values.

Run ``python -m tests.golden.edge_plans`` from the repository after a rule was changed on purpose, and read the diff.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from samunet.artifacts.dataset import DatasetDescription
from samunet.artifacts.fingerprint import Fingerprint
from samunet.artifacts.method import summarise
from samunet.artifacts.plan import DEVICE_CLASSES, Configuration, Plan, Recipe
from samunet.core.log import SilentReporter
from samunet.datasets.raw import load_raw_dataset
from samunet.planners import fingerprint as fingerprints
from samunet.planners.planner import make_plan
from tests import planning_facts as facts
from tests.edge_datasets import EDGE_DATASETS

FOLDER = Path(__file__).resolve().parent / "plans"
SCRIPT = "python -m tests.golden.edge_plans"
BUDGET = {"gpu": 8.0, "cpu": 8.0, "minutes": 60.0}
SHOWN_WEIGHTS = ("sam", "none")
LINE = 130
Facts = tuple[Fingerprint, DatasetDescription]


@contextmanager
def few_samples() -> Iterator[None]:
    """Draw thousands of foreground voxels, not a hundred million."""
    with mock.patch.object(fingerprints, "NUM_SAMPLES_DATASET", 12_000):
        yield


def measured(name: str) -> Facts:
    """Facts of a dataset that is written, read and measured."""
    with tempfile.TemporaryDirectory() as temporary, few_samples():
        dataset = load_raw_dataset(EDGE_DATASETS[name]().write(Path(temporary) / "Dataset999_Edge"))
        return fingerprints.extract_fingerprint(dataset, processes=1, reporter=SilentReporter()), dataset.description


def _hundred_labels() -> Facts:
    names = [f"label_{index}" for index in range(1, 101)]
    widths = [8 + index % 7 for index in range(100)]
    held = {
        name: facts.structure(width_mm=width, num_slices=(round(width / 3), width, width), coherence_mm=(9.0, 9.0, 9.0))
        for name, width in zip(names, widths, strict=True)
    }
    cases = [facts.case(shape=(60, 256, 256), spacing=(3, 1, 1), structures=held)] * 20
    labels = {"background": 0, **{name: index for index, name in enumerate(names, 1)}}
    return facts.fingerprint(cases), facts.description(labels=labels)


def _two_thousand_slices() -> Facts:
    held = {"organ": facts.structure(coherence_mm=(12.0, 12.0, 12.0))}
    tall = facts.case(shape=(2000, 320, 320), spacing=(1, 0.9, 0.9), structures=held)
    return facts.fingerprint([tall] * 4), facts.description()


def _tenfold_spacing() -> Facts:
    scale = (0.3, 0.5, 0.8, 1.0, 1.0, 1.2, 3.0)
    cases = [facts.case(shape=(40, round(200 / s), round(200 / s)), spacing=(4 * s, s, s)) for s in scale]
    return facts.fingerprint(cases), facts.description()


def _huge_pictures(number: int = 12) -> Facts:
    spot = facts.structure(
        width_mm=40.0,
        volume_mm3=1256.6 * 999,
        num_slices=(1, 40, 40),
        centroid_mm=(2047.5, 2047.5, 0.0),
        coherence=(0.0, 0.9, 0.9),
    )
    cases = [facts.case(shape=(1, 4096, 4096), spacing=(999, 1, 1), structures={"gland": spot}, tilt=0.0)] * number
    channels = ("rgb_to_0_1",) * 3
    return facts.fingerprint(cases, channels=channels), facts.description(channels=channels)


SYNTHETIC: dict[str, Callable[[], Facts]] = {
    "hundred_labels": _hundred_labels,
    "two_thousand_slices": _two_thousand_slices,
    "tenfold_spacing": _tenfold_spacing,
    "huge_pictures": _huge_pictures,
    "many_huge_pictures": lambda: _huge_pictures(400),
}
NAMES = (*EDGE_DATASETS, *SYNTHETIC)


def facts_of(name: str) -> Facts:
    """Facts of an edge dataset: measured, or made up where images would be huge."""
    return SYNTHETIC[name]() if name in SYNTHETIC else measured(name)


def plan_of(known: Facts) -> Plan:
    """The plan for 8 GiB and an hour."""
    return make_plan(*known, facts.budget(**BUDGET))


def compact(plan: Plan) -> dict[str, Any]:
    """A plan's values without reasons, floats to six digits."""
    frame = plan.frame.value
    return _rounded(
        {
            "slices": f"across {'ZYX'[frame.slice_axis]} of {'-'.join(frame.orientation)}",
            "target_spacing": plan.target_spacing.value,
            "normalization": [n.model_dump(exclude_defaults=True) for n in plan.normalization.value],
            "mirror_axes": plan.mirror_axes.value,
            "recommended": plan.recommended.value,
            "configurations": {name: _configuration(c) for name, c in plan.configurations.items()},
        }
    )


def _configuration(chosen: Configuration) -> dict[str, Any]:
    return {
        "spacing": chosen.spacing.value,
        "context_slices": chosen.context_slices.value,
        "channels": chosen.channels.value,
        "slab_depth": chosen.slab_depth.value,
        "overlaps": {"tile": chosen.tile_overlap.value, "depth": chosen.depth_overlap.value},
        "recipes": {
            f"{weights} {device}": _recipe(chosen.recipes[weights][device])
            for weights in SHOWN_WEIGHTS
            if weights in chosen.recipes
            for device in DEVICE_CLASSES
        },
    }


def _recipe(recipe: Recipe) -> dict[str, Any]:
    intensities = recipe.intensity_map.value
    return {
        "network": {
            "backbone": recipe.backbone.value,
            "method": summarise(recipe.method_parts()),
            "input": recipe.input_size.value,
            "tile": recipe.tile_vox.value,
        },
        "intensities": [intensities.kind, *zip(intensities.lower, intensities.upper, strict=True)],
        "training": {
            "steps": [recipe.iterations.value, recipe.epochs.value],
            "rate": recipe.learning_rate.value,
            "foreground": recipe.foreground_fraction.value,
            "rotation_deg": recipe.augmentation.value.rotation_deg,
            "views": recipe.mirror_views.value,
            "planes": list(recipe.planes.value),
        },
        "memory": {
            "slices": recipe.batch_size.value,
            "parts": recipe.accumulation_steps.value,
            "checkpointing": recipe.checkpointing.value,
            "GiB": recipe.memory_gib.value,
        },
    }


def _rounded(value: Any) -> Any:
    """JSON values with floats to six digits."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(entry) for key, entry in value.items()}
    return [_rounded(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def render(value: Any, indent: int = 0) -> str:
    """JSON in which whatever fits a line stands on one."""
    line = json.dumps(value)
    if indent + len(line) <= LINE or not isinstance(value, (dict, list)) or not value:
        return line
    space = " " * (indent + 1)
    if isinstance(value, dict):
        rows = [f"{space}{json.dumps(key)}: {render(entry, indent + 1)}" for key, entry in value.items()]
        return "{\n" + ",\n".join(rows) + "\n" + " " * indent + "}"
    return "[\n" + ",\n".join(space + render(entry, indent + 1) for entry in value) + "\n" + " " * indent + "]"


def main() -> None:
    """Write every golden plan."""
    FOLDER.mkdir(exist_ok=True)
    for name in NAMES:
        (FOLDER / f"{name}.json").write_text(render(compact(plan_of(facts_of(name)))) + "\n")


if __name__ == "__main__":
    main()
