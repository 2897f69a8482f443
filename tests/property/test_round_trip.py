"""Write, predict, read: the mask lies on the object, whatever the orientation and the grid."""

from __future__ import annotations

from itertools import permutations, product
from pathlib import Path
from tempfile import TemporaryDirectory

import nibabel
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import distance_transform_edt
from scipy.spatial.transform import Rotation
from torch import Tensor

from samunet.artifacts.dataset import Case
from samunet.artifacts.plan import ChannelNormalization, Frame, Plan
from samunet.artifacts.plan_parts import STORED, Planes
from samunet.core.geometry import AxisOperation, Geometry
from samunet.core.log import SilentReporter
from samunet.core.volume import Volume
from samunet.imageio import read_labels, write_image
from samunet.inference.export import predict_cases
from samunet.inference.restore import restore
from samunet.inference.sliding import SlidingOptions, SlidingPredictor
from tests.planted import PlantedModel, planted_predictor
from tests.samples import decided, make_plan, make_recipe

OPERATIONS = [AxisOperation(p, f) for p in permutations(range(3)) for f in product((False, True), repeat=3)]
SHAPE = (7, 30, 25)
PLANES: list[Planes] = [STORED, ("columns",), ("slices", "rows", "columns")]


def plan_for(
    spacing: tuple[float, float, float],
    target: tuple[float | None, float, float],
    tile: int,
    planes: Planes = STORED,
) -> Plan:
    """A plan that keeps intensities and zooms nothing, with the given spacing of the reference and of the store."""
    plan = make_plan(
        labels={"background": 0, "object": 1},
        spacing=target,
        context=1,
        mirror=("left-right", "anterior-posterior"),
        frame=Frame(slice_axis=0, orientation=("S", "A", "R"), spacing=spacing),
        recipes={"none": {"cpu": make_recipe(input_size=tile, tile_vox=tile, planes=planes)}},
    )
    return plan.model_copy(update={"normalization": decided((ChannelNormalization(scheme="none"),))})


def make_object(rng: np.random.Generator, operation: AxisOperation, spacing: tuple[float, float, float]) -> Volume:
    """A bright ellipsoid off the centre in a grey body with an empty margin, oblique, stored along other axes."""
    grid = np.stack(np.meshgrid(*[np.arange(n) for n in SHAPE], indexing="ij")).astype(float)
    centre = np.array([3, 13, 11]) + rng.uniform(-1, 1, 3) * (0.5, 4, 3)
    radii = np.array([1.9, 6, 5])
    inside = (((grid - centre[:, None, None, None]) / radii[:, None, None, None]) ** 2).sum(0) < 1
    image = np.full(SHAPE, 10.0, np.float32)
    image[inside] = 100
    image[:, :2], image[:, :, -3:] = 0, 0
    tilt = Rotation.from_euler("xyz", rng.uniform(-12, 12, 3), degrees=True).as_matrix()
    directions = np.eye(3)[::-1] @ tilt.T
    geometry = Geometry.from_spacing(SHAPE, spacing, directions=directions, origin=rng.uniform(-100, 100, 3).tolist())
    stored = np.ascontiguousarray(operation.apply(image))
    return Volume(stored[np.newaxis], operation.apply_geometry(geometry))


class PlantedSlabModel(PlantedModel):
    """The planted model, which counts the slices of the slabs it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.depths: set[int] = set()

    def forward(self, images: Tensor, *, depth: int = 1) -> Tensor:
        """(slabs * depth, C, S, S) to (slabs * depth, 2, S, S)."""
        assert len(images) % depth == 0
        self.depths.add(depth)
        return super().forward(images)


def predict_in_slabs(volume: Volume, plan: Plan, depth: int) -> tuple[np.ndarray, set[int]]:
    """Preprocess, predict in slabs and restore; the mask and the depths of the slabs."""
    predictor, model = planted_predictor(plan), PlantedSlabModel()
    case = predictor.preprocess(volume)
    options = SlidingOptions(
        context=1,
        tile_overlap=0.5,
        mirror_axes=(0, 1),
        batch_size=8,
        device="cpu",
        precision="fp32",
        slab_depth=depth,
    )
    logits = SlidingPredictor([model], predictor.recipe, options).slices(case.data)
    return restore(logits, case.record, plan.label_spec).labels, model.depths


def predict_through_files(volume: Volume, plan: Plan, folder: Path) -> tuple[np.ndarray, nibabel.Nifti1Image]:
    """Write the image, predict the file, read the mask."""
    image_file = folder / "case_0000.nii.gz"
    write_image(image_file, volume)
    outcomes = predict_cases(
        planted_predictor(plan),
        [Case("case", (image_file,))],
        folder / "out",
        ending=".nii.gz",
        reporter=SilentReporter(),
    )
    assert outcomes == {"case": None}
    mask_file = folder / "out" / "case.nii.gz"
    return read_labels(mask_file).data[0], nibabel.load(mask_file)


@settings(max_examples=48, deadline=None)
@given(st.sampled_from(OPERATIONS), st.integers(0, 10_000), st.sampled_from(PLANES))
def test_without_resampling_the_mask_is_exactly_the_object(operation: AxisOperation, seed: int, planes: Planes) -> None:
    """In all 48 orientations, oblique and anisotropic, in any planes, every voxel of the mask is one of the object."""
    volume = make_object(np.random.default_rng(seed), operation, (3.0, 1.0, 1.0))
    with TemporaryDirectory() as folder:
        plan = plan_for((3.0, 1.0, 1.0), (None, 1.0, 1.0), 32, planes)
        mask, written = predict_through_files(volume, plan, Path(folder))
        assert np.array_equal(mask == 1, volume.data[0] == 100)
        assert np.allclose(written.affine, volume.geometry.affine, atol=1e-4)
        source = nibabel.load(Path(folder) / "case_0000.nii.gz")
        assert np.array_equal(written.header["qform_code"], source.header["qform_code"])
        assert np.array_equal(written.header["sform_code"], source.header["sform_code"])
        assert np.array_equal(written.affine, source.affine)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(OPERATIONS),
    st.integers(0, 10_000),
    st.floats(0.7, 1.5),
    st.sampled_from([None, 2.0, 3.7]),
    st.sampled_from([32, 16]),
    st.sampled_from(PLANES),
)
def test_with_resampling_the_mask_stays_within_the_tolerance(
    operation: AxisOperation, seed: int, in_plane: float, across: float | None, tile: int, planes: Planes
) -> None:
    """Centroid within half a voxel and surface within one voxel of the coarser grid, tiled or not, in any planes."""
    volume = make_object(np.random.default_rng(seed), operation, (3.0, 1.0, 1.0))
    with TemporaryDirectory() as folder:
        plan = plan_for((3.0, 1.0, 1.0), (across, in_plane, in_plane), tile, planes)
        mask, _ = predict_through_files(volume, plan, Path(folder))
    check_within_tolerance(volume, mask, operation, (across or 3.0, in_plane, in_plane))


def check_within_tolerance(
    volume: Volume, mask: np.ndarray, operation: AxisOperation, store: tuple[float, float, float]
) -> None:
    """Centroid within half a voxel and surface within one voxel of the coarser grid, along every axis."""
    own = np.array([3.0, 1.0, 1.0])
    coarser = np.maximum(own, store)
    inverse = operation.inverse()
    wanted, found = inverse.apply(volume.data[0] == 100), inverse.apply(mask == 1)
    gap = (np.argwhere(found).mean(0) - np.argwhere(wanted).mean(0)) * own
    assert np.all(np.abs(gap) <= 0.5 * coarser)
    sampling = own / coarser
    far_outside = distance_transform_edt(~wanted, sampling=sampling)[found]
    far_inside = distance_transform_edt(wanted, sampling=sampling)[~found]
    # a voxel centre lies half a voxel inside its surface
    assert far_outside.max(initial=0) <= 1.5
    assert far_inside.max(initial=0) <= 1.5


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(OPERATIONS),
    st.integers(0, 10_000),
    st.floats(0.7, 1.5),
    st.sampled_from([1.0, 1.5, 3.0, 4.1]),
    st.sampled_from([1, 3, 4, 30]),
)
def test_slabs_resampled_along_depth_too_stay_within_the_tolerance(
    operation: AxisOperation, seed: int, in_plane: float, across: float, depth: int
) -> None:
    """Thick slices made thin, kept or made thicker, in slabs shorter and longer than the volume, in any orientation."""
    volume = make_object(np.random.default_rng(seed), operation, (3.0, 1.0, 1.0))
    plan = plan_for((3.0, 1.0, 1.0), (across, in_plane, in_plane), 32)
    mask, depths = predict_in_slabs(volume, plan, depth)
    num_slices = round(SHAPE[0] * 3.0 / across)
    assert depths == {min(depth, num_slices)}
    check_within_tolerance(volume, mask, operation, (across, in_plane, in_plane))


def test_orientation_of_storage_changes_no_prediction_in_world_space() -> None:
    """The same scan stored along other axes gets the same mask, voxel by voxel in the world."""
    plan = plan_for((3.0, 1.0, 1.0), (None, 1.3, 1.3), 32)
    predictor = planted_predictor(plan)
    reference = make_object(np.random.default_rng(5), AxisOperation(), (3.0, 1.0, 1.0))
    expected = predictor.predict(reference).labels
    for operation in OPERATIONS:
        stored = make_object(np.random.default_rng(5), operation, (3.0, 1.0, 1.0))
        found = predictor.predict(stored).labels
        assert np.array_equal(operation.invert(found), expected)
