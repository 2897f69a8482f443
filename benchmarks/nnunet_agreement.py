"""Does samunet take nnU-Net's decisions? Runs nnU-Net's own code on raw datasets and compares, number by number.

nnU-Net stays in an environment of its own::

    python -m venv nnunet_env && nnunet_env/bin/pip install nnunetv2
    python -m benchmarks.nnunet_agreement --nnunet-python nnunet_env/bin/python --data FOLDER_OF_DATASETS

Compared are the fingerprint (shapes after the crop, spacings, foreground intensities), the target spacing, the
normalization of every channel with its use of the nonzero mask, the cross-validation splits, and every preprocessed
voxel. For the voxels samunet works in nnU-Net's axis order and at samunet's own target spacing and normalization.
Two synthetic datasets exercise what real ones may not: every normalization scheme, the nonzero mask, thick slices
along the last axis, and spacings that differ from case to case.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from samunet.artifacts.dataset import Case, RawDataset
from samunet.artifacts.fingerprint import Fingerprint
from samunet.artifacts.plan import Budget, Decided, Frame, Plan
from samunet.cli.render import TerminalReporter, format_table
from samunet.core.files import read_json, write_json
from samunet.core.geometry import Geometry
from samunet.core.volume import Volume
from samunet.datasets.raw import load_raw_dataset
from samunet.datasets.splits import make_splits
from samunet.imageio import read_labels, read_volume, write_image, write_labels
from samunet.planners.fingerprint import extract_fingerprint
from samunet.planners.planner import make_plan
from samunet.preprocessing.pipeline import preprocess_case

RESULTS = Path(__file__).parent / "results" / "nnunet_agreement.json"
COMMAND = "python -m benchmarks.nnunet_agreement --nnunet-python PYTHON --data FOLDER --datasets"
CONFIGURATIONS = ("2d", "3d_fullres")
BUDGET = Budget(gpu_memory_gib=24, cpu_memory_gib=16, cpu_minutes=60)
SCHEMES = {
    "ZScoreNormalization": "zscore",
    "CTNormalization": "ct",
    "NoNormalization": "none",
    "RescaleTo01Normalization": "rescale_to_01",
    "RGBTo01Normalization": "rgb_to_01",
}
SYNTHETIC = {"Dataset998_SyntheticThick": 5.0, "Dataset999_SyntheticIsotropic": 1.0}
RUN_NNUNET = """
import json, sys
from importlib.metadata import version
from pathlib import Path
import numpy as np
from nnunetv2.experiment_planning import plan_and_preprocess_api as api
from nnunetv2.utilities.crossval_split import generate_crossval_split
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

identifier, raw, preprocessed, processes = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), int(sys.argv[4])
api.extract_fingerprints([identifier], num_processes=processes, verbose=False, show_progress_bar=False)
api.plan_experiments([identifier])
plans = json.loads((preprocessed / "nnUNetPlans.json").read_text())
wanted = [name for name in sys.argv[5:] if name in plans["configurations"]]
api.preprocess([identifier], configurations=wanted, num_processes=[processes] * len(wanted), show_progress_bar=False)
files = get_filenames_of_train_images_and_targets(raw)
cases = list(files)
manager, description = PlansManager(plans), json.loads((preprocessed / "dataset.json").read_text())
for name in wanted:
    (preprocessed / f"unlabelled_{name}").mkdir()
    for case in cases:
        images, configuration = files[case]["images"], manager.get_configuration(name)
        made = DefaultPreprocessor(verbose=False).run_case(images, None, manager, configuration, description)
        np.save(preprocessed / f"unlabelled_{name}" / f"{case}.npy", np.asarray(made[0], np.float32))
splits = generate_crossval_split(sorted(cases)) if len(cases) >= 5 else []
splits = [{name: [str(case) for case in split[name]] for name in ("train", "val")} for split in splits]
extra = {"version": version("nnunetv2"), "cases": cases, "splits": splits, "configurations": wanted}
(preprocessed / "extra.json").write_text(json.dumps(extra))
"""


@dataclass(frozen=True)
class NnunetRun:
    """What nnU-Net made of a dataset.

    Args:
        folder: Its folder of preprocessed files.
        fingerprint: dataset_fingerprint.json.
        plans: nnUNetPlans.json.
        extra: Cases in the fingerprint's order, splits, configurations and version.
        seconds: Wall time.
    """

    folder: Path
    fingerprint: dict[str, Any]
    plans: dict[str, Any]
    extra: dict[str, Any]
    seconds: float

    @property
    def transpose(self) -> tuple[int, int, int]:
        """The axis order nnU-Net works in."""
        a, b, c = self.plans["transpose_forward"]
        return a, b, c


def make_synthetic(folder: Path, thickness_mm: float) -> Path:
    """Write seven small cases, zero outside an ellipsoid, with a channel for every normalization scheme.

    Args:
        folder: ``DatasetXXX_Name`` to create.
        thickness_mm: Spacing of the last axis; the others are about 1 mm.
    """
    generator = np.random.default_rng(0)
    channels = ("CT", "noNorm", "rescale_to_0_1", "rgb_to_0_1", "MRI")
    for index in range(7):
        shape = (int(generator.integers(36, 44)), int(generator.integers(40, 52)), 12 if thickness_mm > 1 else 38)
        spacing = (*generator.uniform(0.8, 1.3, 2), thickness_mm * generator.uniform(0.9, 1.2))
        geometry = Geometry.from_spacing(shape, spacing)
        place = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij"))
        radius = np.sqrt((place**2).sum(axis=0))
        labels = (radius < 0.4).astype(np.uint8) + (np.abs(place[2] - 0.2) + radius < 0.45)
        for channel in range(len(channels)):
            texture = generator.integers(1, 120, shape) + 60 * labels.astype(np.int16)
            image = np.where(radius < 0.7, texture, 0).astype(np.int16)
            file = folder / "imagesTr" / f"case_{index}_{channel:04d}.nii.gz"
            write_image(file, Volume(image[np.newaxis], geometry))
        write_labels(folder / "labelsTr" / f"case_{index}.nii.gz", labels, geometry=geometry)
    description = {
        "channel_names": {str(index): name for index, name in enumerate(channels)},
        "labels": {"background": 0, "outer": 1, "inner": 2},
        "numTraining": 7,
        "file_ending": ".nii.gz",
    }
    write_json(folder / "dataset.json", description)
    return folder


def run_nnunet(python: Path, dataset: Path, work: Path, processes: int) -> NnunetRun:
    """Let nnU-Net extract the fingerprint, plan and preprocess; its output goes to a log in ``work``."""
    folders = {f"nnUNet_{kind}": work / kind for kind in ("raw", "preprocessed", "results")}
    for folder in folders.values():
        folder.mkdir(parents=True)
    raw, preprocessed = folders["nnUNet_raw"] / dataset.name, folders["nnUNet_preprocessed"] / dataset.name
    raw.symlink_to(dataset.resolve(), target_is_directory=True)
    identifier = str(int(dataset.name.removeprefix("Dataset").split("_")[0]))
    command = [python, "-c", RUN_NNUNET, identifier, raw, preprocessed, processes, *CONFIGURATIONS]
    started, log = time.monotonic(), work / "nnunet.log"
    environment = os.environ | {name: str(folder) for name, folder in folders.items()}
    with log.open("w") as stream:
        done = subprocess.run(
            [str(part) for part in command], env=environment, stdout=stream, stderr=subprocess.STDOUT, check=False
        )
    if done.returncode != 0:
        raise SystemExit(f"nnU-Net failed on {dataset.name}:\n{log.read_text()[-2000:]}")
    return NnunetRun(
        preprocessed,
        read_json(preprocessed / "dataset_fingerprint.json"),
        read_json(preprocessed / "nnUNetPlans.json"),
        read_json(preprocessed / "extra.json"),
        time.monotonic() - started,
    )


def relative_difference(first: ArrayLike, second: ArrayLike) -> float:
    """Largest difference relative to the larger magnitude; 0 where both are 0, inf where the shapes differ."""
    a, b = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if a.shape != b.shape:
        return float("inf")
    scale = np.maximum(np.abs(a), np.abs(b))
    ratio = np.divide(np.abs(a - b), scale, out=np.zeros_like(a), where=scale > 0)
    return float(ratio.max(initial=0.0))


def compare_fingerprint(run: NnunetRun, fingerprint: Fingerprint) -> dict[str, Any]:
    """Shapes, spacings and the seven intensity numbers of each channel."""
    cases = [fingerprint.cases[name] for name in run.extra["cases"]]
    ours, theirs = [], []
    for channel, statistics in enumerate(fingerprint.foreground_intensities):
        reference = run.fingerprint["foreground_intensity_properties_per_channel"][str(channel)]
        found = {} if statistics is None else statistics.model_dump()
        ours.append([found.get(name, np.nan) for name in reference])
        theirs.append(list(reference.values()))
    shapes = np.array([case.shape_after_crop for case in cases])
    return {
        "cases": len(cases),
        "different_shapes_after_crop": int((shapes != run.fingerprint["shapes_after_crop"]).any(axis=1).sum()),
        "spacing_relative": relative_difference([case.spacing for case in cases], run.fingerprint["spacings"]),
        "intensities_relative": relative_difference(ours, theirs),
        "relative_size_after_crop": relative_difference(
            np.median([case.relative_size_after_crop for case in cases]),
            run.fingerprint["median_relative_size_after_cropping"],
        ),
    }


def compare_plan(run: NnunetRun, plan: Plan, dataset: RawDataset) -> dict[str, Any]:
    """Target spacing, normalization schemes, use of the nonzero mask, and splits: as used, and without groups."""
    configurations = run.plans["configurations"]
    ours = [plan.target_spacing.value[axis] for axis in run.transpose]
    full = configurations["3d_fullres"]["spacing"] if "3d_fullres" in configurations else None
    theirs = full or [ours[0], *configurations["2d"]["spacing"]]
    normalization = plan.normalization.value
    expected = [(SCHEMES[name], mask) for name, mask in zip(*_normalization(configurations["2d"]), strict=True)]
    names, reference = [case.name for case in dataset.training], run.extra["splits"]
    used, plain = (
        [split.model_dump(mode="json") for split in make_splits(names, groups)] for groups in (dataset.groups, None)
    )
    return {
        "target_spacing_relative": relative_difference(ours, theirs),
        "same_normalization": [(n.scheme, n.use_nonzero_mask) for n in normalization] == expected,
        "groups": None if dataset.groups is None else len(set(dataset.groups.values())),
        "same_splits": used == reference if reference else None,
        "same_splits_without_groups": plain == reference if reference else None,
    }


def _normalization(configuration: dict[str, Any]) -> tuple[list[str], list[bool]]:
    return configuration["normalization_schemes"], configuration["use_mask_for_norm"]


def compare_voxels(run: NnunetRun, plan: Plan, cases: Iterable[Case], configuration: str) -> dict[str, Any]:
    """Every preprocessed voxel of a configuration.

    Images are compared with what nnU-Net makes of them for prediction, labels and images with what it stores for
    training: there nnU-Net counts labelled voxels as nonzero, so that a z-score shows where zeros are labelled.
    """
    rows = [_compare_case(run, plan, case, configuration) for case in cases]
    compared = [row for row in rows if row]
    return {
        "cases": len(rows),
        "different_shapes": len(rows) - len(compared),
        "voxels": sum(row["voxels"] for row in compared),
        "largest_difference": max((row["difference"] for row in compared), default=None),
        "largest_difference_training": max((row["training"] for row in compared), default=None),
        "different_labels": sum(row["labels"] for row in compared),
    }


def _compare_case(run: NnunetRun, plan: Plan, case: Case, configuration: str) -> dict[str, Any]:
    """Largest absolute differences and numbers of voxels of one case; empty if the shapes differ."""
    assert case.label is not None
    folder = run.folder / run.plans["configurations"][configuration]["data_identifier"]
    volume = read_volume(case.images, case=case.name)
    ours = preprocess_case(
        volume,
        read_labels(case.label, case=case.name),
        plan=_in_nnunets_axes(plan, run.transpose, volume.geometry, keep_slices=configuration == "2d"),
        configuration=next(iter(plan.configurations)),
        name=case.name,
    )
    training, labels = _read_b2nd(folder / f"{case.name}.b2nd"), _read_b2nd(folder / f"{case.name}_seg.b2nd")[0]
    unlabelled = np.load(run.folder / f"unlabelled_{configuration}" / f"{case.name}.npy")
    assert ours.labels is not None
    if unlabelled.shape != ours.data.shape or ours.record.permutation != run.transpose:
        return {}
    return {
        "difference": float(np.abs(unlabelled - ours.data).max()),
        "training": float(np.abs(training - ours.data).max()),
        "labels": int((np.maximum(labels, 0) != ours.labels).sum()),
        "voxels": int(labels.size),
    }


def _in_nnunets_axes(plan: Plan, transpose: tuple[int, int, int], geometry: Geometry, *, keep_slices: bool) -> Plan:
    """The plan with the case's own orientation as frame, so that only nnU-Net's transposition remains."""
    frame = Frame(slice_axis=transpose[0], orientation=geometry.codes, spacing=geometry.spacing)
    depth, rows, columns = (plan.target_spacing.value[axis] for axis in transpose)
    name, chosen = next(iter(plan.configurations.items()))
    spacing = chosen.spacing.model_copy(update={"value": (None if keep_slices else depth, rows, columns)})
    changed = chosen.model_copy(update={"spacing": spacing})
    why = "nnU-Net's axes"
    return plan.model_copy(
        update={"frame": Decided[Frame](value=frame, reason=why), "configurations": {name: changed}},
    )


def _read_b2nd(path: Path) -> NDArray[Any]:
    import blosc2

    content: NDArray[Any] = blosc2.open(str(path), mode="r")[...]
    return content


def compare_dataset(name: str, data: Path, python: Path, processes: int, reporter: TerminalReporter) -> dict[str, Any]:
    """Everything about one dataset, found in the data folder or made up."""
    with tempfile.TemporaryDirectory() as work:
        folder = make_synthetic(Path(work) / name, SYNTHETIC[name]) if name in SYNTHETIC else data / name
        dataset = load_raw_dataset(folder)
        reporter.info(f"{dataset.name}: nnU-Net is running")
        run = run_nnunet(python, folder, Path(work), processes)
        started = time.monotonic()
        fingerprint = extract_fingerprint(dataset, processes=processes, reporter=reporter)
        plan = make_plan(fingerprint, dataset.description, BUDGET)
        result: dict[str, Any] = {
            "nnunet_version": run.extra["version"],
            "nnunet_seconds": round(run.seconds, 1),
            "fingerprint": compare_fingerprint(run, fingerprint),
            "plan": compare_plan(run, plan, dataset),
            "voxels": {},
        }
        for configuration in run.extra["configurations"]:
            cases = reporter.track(dataset.training, total=len(dataset.training), what=f"comparing {configuration}")
            result["voxels"][configuration] = compare_voxels(run, plan, cases, configuration)
        result["samunet_seconds"] = round(time.monotonic() - started, 1)
    return result


def splits_in_words(plan: dict[str, Any]) -> str:
    """Equal, or why not: nnU-Net knows no groups, whose cases may not be split between training and validation."""
    if plan["groups"] and plan["same_splits"] is False:
        return f"differ on purpose: {plan['groups']} groups of cases stay together"
    return {True: "equal", False: "DIFFERENT", None: "-"}[plan["same_splits"]]


def table(results: dict[str, dict[str, Any]]) -> str:
    """One row per dataset and fact."""

    def number(value: Any) -> str:
        return f"{value:.1e}" if isinstance(value, float) else {True: "equal", False: "DIFFERENT", None: "-"}[value]

    rows = []
    for name, result in results.items():
        facts, plan = result["fingerprint"], result["plan"]
        rows += [
            (name, "cases whose shape after the crop differs", f"{facts['different_shapes_after_crop']}"),
            (name, "spacing, largest relative difference", number(facts["spacing_relative"])),
            (name, "foreground intensities, largest relative difference", number(facts["intensities_relative"])),
            (name, "relative size after the crop, relative difference", number(facts["relative_size_after_crop"])),
            (name, "target spacing, largest relative difference", number(plan["target_spacing_relative"])),
            (name, "normalization and use of the nonzero mask", number(plan["same_normalization"])),
            (name, "splits", splits_in_words(plan)),
            (name, "splits, were there no groups", number(plan["same_splits_without_groups"])),
        ]
        for configuration, voxels in result["voxels"].items():
            rows += [
                (name, f"{configuration}: cases of different shape", f"{voxels['different_shapes']}"),
                (name, f"{configuration}: largest difference of a voxel", number(voxels["largest_difference"])),
                (name, f"{configuration}: same, from training images", number(voxels["largest_difference_training"])),
                (name, f"{configuration}: voxels of different label", f"{voxels['different_labels']}"),
            ]
    return format_table(("dataset", "fact", "difference"), rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare the chosen datasets, print the table and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nnunet-python", type=Path, required=True, help="Python of an environment with nnunetv2")
    parser.add_argument("--data", type=Path, required=True, help="folder that holds DatasetXXX_Name folders")
    parser.add_argument(
        "--datasets", nargs="+", help="names of the datasets (default: all in the folder, and synthetic)"
    )
    parser.add_argument("-np", "--processes", type=int, default=2, help="processes (default: 2)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="where to write the results")
    options = parser.parse_args(arguments)
    found = sorted(path.parent.name for path in options.data.glob("Dataset*/dataset.json"))
    names = options.datasets or [*found, *SYNTHETIC]
    reporter = TerminalReporter()
    results = {
        name: compare_dataset(name, options.data, options.nnunet_python, options.processes, reporter) for name in names
    }
    write_json(
        options.output,
        {
            "command": " ".join([COMMAND, *names]),
            "machine": {"processor": platform.machine(), "cpus": os.cpu_count(), "python": platform.python_version()},
            "versions": {name: version(name) for name in ("numpy", "scipy", "scikit-image", "batchgenerators")},
            "datasets": results,
        },
    )
    print(table(results))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
