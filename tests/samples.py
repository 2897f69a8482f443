"""Small datasets and hand-made plans that tests share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from samunet.artifacts.augmentation import Augmentation
from samunet.artifacts.dataset import DatasetDescription
from samunet.artifacts.method import DecoderMethod, EncoderMethod, Fusion, Lora, NoDepth, PromptMethod
from samunet.artifacts.plan import (
    Budget,
    ChannelNormalization,
    Configuration,
    Decay,
    Decided,
    Frame,
    IntensityMap,
    LossWeights,
    Plan,
    Recipe,
)
from samunet.artifacts.workspace import Workspace
from samunet.core.files import read_json, write_json
from samunet.core.geometry import Geometry
from samunet.core.log import SilentReporter
from samunet.core.volume import Volume
from samunet.datasets.raw import load_raw_dataset
from samunet.imageio import write_image, write_labels
from samunet.preprocessing.runner import preprocess_dataset

DATASET = "Dataset901_Balls"
LABELS: dict[str, Any] = {"background": 0, "ball": 1, "cube": 2}


def decided(value: Any) -> Decided[Any]:
    """A decision whose reason does not matter."""
    return Decided(value=value, reason="chosen for a test")


def lora_encoder(rank: int = 4, targets: tuple[str, ...] = ("q", "v")) -> EncoderMethod:
    """An encoder that trains low-rank adapters only."""
    return EncoderMethod(train="adapters", adapters=(Lora(rank=rank, targets=targets),))


def make_recipe(**changes: Any) -> Recipe:
    """A recipe of a very small model."""
    values: dict[str, Any] = {
        "backbone": "vit_t_xs",
        "input_size": 64,
        "tile_vox": 32,
        "encoder": EncoderMethod(train="full"),
        "depth": NoDepth(),
        "decoder": DecoderMethod(),
        "prompts": PromptMethod(),
        "fusion": Fusion(),
        "attention": "upstream",
        "intensity_map": IntensityMap(kind="identity"),
        "loss": LossWeights(),
        "learning_rate": 1e-3,
        "weight_decay": 0.05,
        "warmup_steps": 2,
        "decay": Decay(),
        "batch_size": 4,
        "accumulation_steps": 1,
        "iterations": 3,
        "epochs": 2,
        "minutes": None,
        "precision": "fp32",
        "checkpointing": False,
        "ema_decay": 0.9,
        "augmentation": Augmentation(),
        "foreground_fraction": 0.5,
        "memory_gib": 1.0,
    }
    return Recipe(**{name: decided(value) for name, value in (values | changes).items()})


def make_plan(
    *,
    labels: dict[str, Any] | None = None,
    regions_class_order: tuple[int, ...] | None = None,
    channel_names: Sequence[str] = ("MRI",),
    spacing: tuple[float | None, float, float] = (None, 1.0, 1.0),
    context: int = 0,
    slab_depth: int = 1,
    mirror: Sequence[str] = ("left-right",),
    frame: Frame | None = None,
    recipes: dict[str, dict[str, Recipe]] | None = None,
    file_ending: str = ".nii.gz",
) -> Plan:
    """A plan without fingerprint and planner, for one configuration "2d"."""
    channels = "neighbours" if context else {1: "repeat", 3: "direct"}.get(len(channel_names), "projection")
    configuration = Configuration(
        spacing=decided(spacing),
        context_slices=decided(context),
        slab_depth=decided(slab_depth),
        channels=decided(channels),
        tile_overlap=decided(0.5),
        recipes=recipes or {"none": {"cpu": make_recipe(), "gpu": make_recipe()}},
    )
    return Plan(
        dataset=DATASET,
        fingerprint_sha256="0" * 64,
        channel_names=tuple(channel_names),
        file_ending=file_ending,
        labels=labels or LABELS,
        regions_class_order=regions_class_order,
        frame=decided(frame or Frame(slice_axis=0, orientation=("S", "A", "R"), spacing=(2.0, 1.0, 1.0))),
        target_spacing=decided((2.0, 1.0, 1.0)),
        normalization=decided(tuple(ChannelNormalization(scheme="zscore") for _ in channel_names)),
        mirror_axes=decided(tuple(mirror)),
        configurations={"2d": configuration},
        recommended=decided("2d"),
        budget=Budget(gpu_memory_gib=8, cpu_memory_gib=8, cpu_minutes=60),
    )


def make_case(seed: int, *, shape: tuple[int, int, int] = (6, 30, 26)) -> tuple[Volume, NDArray[np.uint8]]:
    """A noisy volume with a bright ball and a dark cube at random places, 2 x 1 x 1 mm."""
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*[np.arange(n) for n in shape], indexing="ij"))
    centre = np.array([n / 2 for n in shape]) + rng.uniform(-1, 1, 3) * (0.5, 5, 4)
    ball = (((grid - centre[:, None, None, None]) / np.array([2.0, 6, 6])[:, None, None, None]) ** 2).sum(0) < 1
    labels = np.zeros(shape, np.uint8)
    corner = rng.integers(2, 6, 2)
    labels[1:4, corner[0] : corner[0] + 6, corner[1] : corner[1] + 6] = 2
    labels[ball] = 1
    image = 100 + rng.normal(0, 8, shape) + 60 * (labels == 1) - 50 * (labels == 2)
    return Volume(image[np.newaxis].astype(np.float32), Geometry.from_spacing(shape, (2.0, 1.0, 1.0))), labels


def write_dataset(workspace: Workspace, *, num_train: int = 6, num_test: int = 2) -> Path:
    """Write balls and cubes in nnU-Net's raw format."""
    folder = workspace.raw / DATASET
    for index in range(num_train + num_test):
        volume, labels = make_case(index)
        part = "Tr" if index < num_train else "Ts"
        write_image(folder / f"images{part}" / f"case_{index}_0000.nii.gz", volume)
        write_labels(folder / f"labels{part}" / f"case_{index}.nii.gz", labels, geometry=volume.geometry)
    description = {"channel_names": {"0": "MRI"}, "labels": LABELS, "numTraining": num_train, "file_ending": ".nii.gz"}
    write_json(folder / "dataset.json", description)
    return folder


def prepare(workspace: Workspace, plan: Plan | None = None, *, num_train: int = 6) -> Plan:
    """Write the dataset, a plan, a fingerprint stand-in and the store, as planning would leave them."""
    plan = plan or make_plan()
    install(workspace, plan, write_dataset(workspace, num_train=num_train))
    return plan


def install(workspace: Workspace, plan: Plan, folder: Path) -> None:
    """Write what planning would leave for a raw dataset, and its store."""
    dataset = load_raw_dataset(folder)
    write_json(workspace.plan_file(DATASET), plan.model_dump(mode="json"))
    write_json(workspace.fingerprint_file(DATASET), {"dataset": DATASET})
    write_json(workspace.description_file(DATASET), read_json(folder / "dataset.json"))
    store = workspace.store_folder(DATASET, plan.store_key("2d"))
    outcomes = preprocess_dataset(dataset, plan, "2d", store, processes=1, reporter=SilentReporter())
    assert all(outcome.succeeded for outcome in outcomes)


def description_of(plan: Plan) -> DatasetDescription:
    """The dataset.json that goes with a plan."""
    return DatasetDescription(
        channel_names={str(i): name for i, name in enumerate(plan.channel_names)},
        labels=plan.labels,
        regions_class_order=None if plan.regions_class_order is None else list(plan.regions_class_order),
        file_ending=plan.file_ending,
    )
