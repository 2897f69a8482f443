"""Prompted prediction with a model whose answers are known: boxes come back as rectangles, clicks as bright objects."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import permutations, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial.transform import Rotation
from torch import Tensor, nn

from samunet.artifacts.dataset import Case
from samunet.artifacts.method import DecoderMethod, DepthAttention, EncoderMethod, Lora, Method, PromptMethod
from samunet.artifacts.plan import ChannelNormalization, Frame, IntensityMap, Plan, ResolvedRecipe, strip_reasons
from samunet.artifacts.prompts import Prompt
from samunet.core.config import parse_schema
from samunet.core.errors import DataError, UsageError
from samunet.core.geometry import AxisOperation, Geometry
from samunet.core.labels import LabelSpec
from samunet.core.log import SilentReporter
from samunet.core.volume import Volume
from samunet.imageio import read_labels, write_image
from samunet.inference.encode import to_encoder, to_store
from samunet.inference.export import predict_cases
from samunet.inference.predictor import Predictor
from samunet.inference.prompt_geometry import PlacedObject, place_prompts, prompt_within, tile_places, ways_from
from samunet.inference.prompted import UNPROMPTED, PromptedOptions, PromptedPredictor, choose_token, prompt_batch
from samunet.inference.simulation import ObjectPrompt
from samunet.models.decoders.promptable import PromptBatch
from samunet.models.segmentation import SegmentationModel
from samunet.pipeline.predict import PredictionRequest, predict
from tests.planted import planted_predictor
from tests.samples import decided, make_plan, make_recipe
from tests.unit.models.model_helpers import build
from tests.unit.models.model_helpers import recipe as small_recipe

OPERATIONS = [AxisOperation(p, f) for p in permutations(range(3)) for f in product((False, True), repeat=3)]
SPACING = (3.0, 1.0, 1.4)
LABELS: dict[str, Any] = {"background": 0, "ball": 1, "cube": 5}
BRIGHT = 50.0
NOTHING: dict[str, Any] = {"points": None, "point_labels": None, "boxes": None, "masks": None}


class PointedModel(nn.Module):
    """Answers at the resolution of its input: a box by what is bright in it (or all of it), clicks by bright objects.

    Args:
        everything: Fill boxes whatever the image shows.
    """

    def __init__(self, *, everything: bool = False) -> None:
        super().__init__()
        self.everything = everything
        self.encoded: list[tuple[int, int]] = []
        self.asked: list[PromptBatch] = []

    def encode(self, images: Tensor, *, depth: int = 1) -> Tensor:
        """The middle channel, (B, 1, S, S)."""
        self.encoded.append((len(images), depth))
        middle = images.shape[1] // 2
        return images[:, middle : middle + 1]

    def prompted(self, embeddings: Tensor, prompts: PromptBatch) -> tuple[Tensor, Tensor]:
        """(B, 4, S, S) and (B, 4); token 2 is estimated best, tokens 1 to 3 are empty."""
        self.asked.append(prompts)
        found = torch.stack([self._mask(plane[0], prompts, b) for b, plane in enumerate(embeddings)])
        logits = torch.where(found, 8.0, -8.0)[:, None]
        quality = torch.tensor([0.9, 0.1, 0.3, 0.2]).expand(len(found), 4)
        return torch.cat([logits, torch.full_like(logits.expand(-1, 3, -1, -1), -8.0)], 1), quality

    def _mask(self, plane: Tensor, prompts: PromptBatch, number: int) -> Tensor:
        y, x = torch.meshgrid(*[torch.arange(n) for n in plane.shape], indexing="ij")
        bright = plane > BRIGHT
        if prompts.boxes is not None:
            x0, y0, x1, y1 = prompts.boxes[number]
            inside = (x >= x0) & (x <= x1) & (y >= y0) & (y <= y1)
            return inside if self.everything else inside & bright
        objects, _ = ndimage.label(bright.numpy())
        found = torch.zeros_like(bright)
        for (column, row), sign in zip(prompts.points[number], prompts.point_labels[number], strict=True):
            at = objects[round(float(row)), round(float(column))]
            if sign == 1 and at:
                found |= torch.from_numpy(objects == at)
        return found


class WideModel(PointedModel):
    """Fills boxes a little beyond their edges with what is bright, as trained models do."""

    def prompted(self, embeddings: Tensor, prompts: PromptBatch) -> tuple[Tensor, Tensor]:
        """As its parent, with wider boxes."""
        if prompts.boxes is not None:
            prompts = replace(prompts, boxes=prompts.boxes + torch.tensor([-9.0, -9.0, 9.0, 9.0]))
        return super().prompted(embeddings, prompts)


def plan_for(
    *, tile: int = 32, size: int | None = None, labels: dict[str, Any] | None = None, slab: int = 1, **changes: Any
) -> Plan:
    """A plan of a promptable model that keeps intensities and spacing."""
    method: dict[str, Any] = {"prompts": PromptMethod(kind="mixed")} | changes
    order = method.pop("regions_class_order", None)
    plan = make_plan(
        labels=labels or LABELS,
        regions_class_order=order,
        spacing=(None, 1.0, 1.4),
        frame=Frame(slice_axis=0, orientation=("S", "A", "R"), spacing=SPACING),
        recipes={"none": {"cpu": make_recipe(input_size=size or tile, tile_vox=tile, **method)}},
    )
    configuration = plan.configurations["2d"].model_copy(update={"slab_depth": decided(slab)})
    return plan.model_copy(
        update={
            "normalization": decided((ChannelNormalization(scheme="none"),)),
            "configurations": {"2d": configuration},
        }
    )


def resampled(plan: Plan, spacing: tuple[float, float, float]) -> Plan:
    """The same plan with a store of another spacing."""
    configuration = plan.configurations["2d"].model_copy(update={"spacing": decided(spacing)})
    return plan.model_copy(update={"configurations": {"2d": configuration}})


def predictor_for(plan: Plan, model: nn.Module) -> Predictor:
    """A predictor around a model."""
    predictor = planted_predictor(plan)
    predictor._models = [model]
    return predictor


def entry(label: str | int, **values: Any) -> Prompt:
    """An entry in voxels."""
    return parse_schema(Prompt, {"label": label, "space": "voxel_ijk", **values})


def options(**changes: Any) -> PromptedOptions:
    """Slices one by one on the CPU."""
    values = {"context": 0, "batch_size": 4, "device": "cpu", "precision": "fp32"}
    return PromptedOptions(**{**values, **changes})


def recipe_for(plan: Plan) -> ResolvedRecipe:
    """The plan's recipe without reasons."""
    configuration = plan.configuration("2d")
    return strip_reasons(configuration.recipes["none"]["cpu"], "none", "cpu", slab_depth=configuration.slab_depth.value)


def blob(shape: tuple[int, int, int] = (9, 26, 20)) -> NDArray[np.bool_]:
    """An asymmetric object: an ellipsoid off the centre with one half of its lower end cut away."""
    grid = np.stack(np.meshgrid(*[np.arange(n) for n in shape], indexing="ij")).astype(float)
    centre, radii = np.array([4, 10, 11]), np.array([2.9, 7.2, 5.1])
    inside = (((grid - centre[:, None, None, None]) / radii[:, None, None, None]) ** 2).sum(0) < 1
    inside[2:4, :, 12:] = False
    return inside


def volume_of(inside: NDArray[np.bool_], operation: AxisOperation = OPERATIONS[0], seed: int = 0) -> Volume:
    """The object in grey, oblique, anisotropic, with an empty margin of rows, stored along other axes."""
    rng = np.random.default_rng(seed)
    image = np.where(inside, 100.0, 10.0).astype(np.float32)
    image[:, :1] = 0
    tilt = Rotation.from_euler("xyz", rng.uniform(-12, 12, 3), degrees=True).as_matrix()
    geometry = Geometry.from_spacing(
        image.shape, SPACING, directions=np.eye(3)[::-1] @ tilt.T, origin=rng.uniform(-90, 90, 3).tolist()
    )
    stored = np.ascontiguousarray(operation.apply(image))
    return Volume(stored[np.newaxis], operation.apply_geometry(geometry))


def box_around(inside: NDArray[np.bool_], label: str | int, geometry: Geometry | None = None) -> Prompt:
    """A tight box by its edges, in the world if a grid is given."""
    where = np.argwhere(inside)
    corners = np.stack([where.min(0) - 0.5, where.max(0) + 0.5])
    numbers = corners[:, ::-1] if geometry is None else geometry.to_world(corners)
    space = "voxel_ijk" if geometry is None else "world_ras_mm"
    return parse_schema(Prompt, {"label": label, "box": numbers.ravel().tolist(), "space": space})


def rectangle(inside: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The tight box of an object as a mask."""
    where = np.argwhere(inside)
    result = np.zeros_like(inside)
    result[tuple(slice(a, b + 1) for a, b in zip(where.min(0), where.max(0), strict=True))] = True
    return result


@pytest.mark.parametrize(("tile", "size"), [(32, 32), (32, 64), (16, 32)])
@pytest.mark.parametrize("operation", OPERATIONS[::5], ids=str)
def test_a_box_in_the_world_comes_back_as_its_region(operation: AxisOperation, tile: int, size: int):
    """Oblique, anisotropic, stored along any axes, in one tile or several: the mask is exactly the box's voxels."""
    inside = blob()
    volume = volume_of(inside, operation)
    stored = operation.apply(inside)
    predictor = predictor_for(plan_for(tile=tile, size=size), PointedModel(everything=True))
    found = predictor.predict_prompted(volume, [box_around(stored, "cube", volume.geometry)]).labels
    assert np.array_equal(found == 5, rectangle(stored))
    assert set(np.unique(found)) == {0, 5}
    by_voxel = predictor.predict_prompted(volume, [box_around(stored, 5)]).labels
    assert np.array_equal(found, by_voxel)


@pytest.mark.parametrize("operation", OPERATIONS[1::7], ids=str)
def test_a_click_on_one_slice_finds_the_whole_object(operation: AxisOperation):
    """Followed along depth in both directions, an asymmetric object is found entirely, in every orientation."""
    inside = blob()
    volume = volume_of(inside, operation)
    marked = np.zeros_like(inside)
    marked[4, 10, 8] = True
    (point,) = np.argwhere(operation.apply(marked))
    world = volume.geometry.to_world(point).tolist()
    prompt = parse_schema(Prompt, {"label": "ball", "points": [world], "space": "world_ras_mm"})
    predictor = predictor_for(plan_for(), WideModel())
    found = predictor.predict_prompted(volume, [prompt]).labels
    assert np.array_equal(found == 1, operation.apply(inside))
    alone = predictor.predict_prompted(volume, [prompt], propagate=False).labels
    assert np.array_equal(operation.invert(alone) == 1, inside & (np.arange(9) == 4)[:, None, None])


def test_a_box_comes_back_as_its_region_after_resampling():
    """On a finer store in plane and along depth, the region is the box's to within a voxel of the file."""
    inside = blob()
    volume = volume_of(inside)
    predictor = predictor_for(resampled(plan_for(tile=48), (1.7, 0.8, 0.9)), PointedModel(everything=True))
    found = predictor.predict_prompted(volume, [box_around(inside, "ball", volume.geometry)]).labels == 1
    wanted = rectangle(inside)
    assert not (found & ~ndimage.binary_dilation(wanted)).any()
    assert not (ndimage.binary_erosion(wanted) & ~found).any()


@pytest.mark.parametrize("depth_mm", [1.0, 1.5, 1.7, 2.0, 2.4, 4.5])
@pytest.mark.parametrize("off_mm", [-1.3, 0.0, 1.3])
def test_a_mark_on_one_slice_comes_back_on_that_slice_after_resampling(depth_mm: float, off_mm: float):
    """A click and a flat box, anywhere in the thickness of slices of 3 mm, on a store that is finer or coarser."""
    inside = blob()
    volume = volume_of(inside)
    predictor = predictor_for(resampled(plan_for(tile=48), (depth_mm, 1.0, 1.4)), PointedModel())
    coarser = depth_mm > SPACING[0]
    for index in (3, 4, 5):
        z = index + off_mm / SPACING[0]
        rows, columns = (np.flatnonzero(inside[index].any(axis)) for axis in (1, 0))
        box = [columns[0] - 0.5, rows[0] - 0.5, z, columns[-1] + 0.5, rows[-1] + 0.5, z]
        for prompt in (entry("ball", points=[[8, 10, z]]), entry("ball", box=[float(edge) for edge in box])):
            found = predictor.predict_prompted(volume, [prompt], propagate=False).labels == 1
            touched = np.flatnonzero(found.any((1, 2))).tolist()
            assert index in touched
            assert len(touched) <= (2 if coarser else 1)
            overlap = 2 * (found[index] & inside[index]).sum() / (found[index].sum() + inside[index].sum())
            assert overlap >= (0.85 if coarser else 1)


def test_a_box_on_one_slice_is_followed_and_one_with_thickness_is_not():
    """c0 == c1 marks a slice of an object that goes on; a thick box says where it ends."""
    inside = blob()
    volume = volume_of(inside)
    flat = entry("ball", box=[5, 2, 4, 17, 18, 4])
    predictor = predictor_for(plan_for(), WideModel())
    assert np.array_equal(predictor.predict_prompted(volume, [flat]).labels == 1, inside)
    thick = entry("ball", box=[5, 2, 4, 17, 18, 5])
    found = predictor.predict_prompted(volume, [thick]).labels == 1
    assert np.flatnonzero(found.any((1, 2))).tolist() == [4, 5]


def test_what_is_followed_is_prompted_as_the_method_was_trained():
    """The next slice gets the tight box; a click where clicks are known; the former mask where masks are known."""
    volume = volume_of(blob())
    flat = entry("ball", box=[5, 2, 4, 17, 18, 4])
    shown = {}
    for name, prompts in {
        "box": PromptMethod(kind="box"),
        "mixed": PromptMethod(kind="mixed"),
        "corrected": PromptMethod(kind="mixed", corrections=2),
    }.items():
        model = PointedModel()
        predictor_for(plan_for(prompts=prompts), model).predict_prompted(volume, [flat])
        followed = model.asked[1]
        assert followed.boxes is not None
        shown[name] = (followed.points is not None, followed.masks is not None)
        if followed.masks is not None:
            assert followed.masks.shape == (1, 1, 8, 8)
            assert followed.masks.max() > 0
    assert shown == {"box": (False, False), "mixed": (True, False), "corrected": (True, True)}


def test_following_stops_where_the_area_jumps():
    """A slice on which the mask is more than three times as large is dropped, and nothing beyond it is asked."""
    inside = np.zeros((9, 26, 20), bool)
    inside[3:6, 10:14, 8:12] = True
    inside[6:, 4:24, 2:18] = True
    found = predictor_for(plan_for(), WideModel()).predict_prompted(
        volume_of(inside), [entry("ball", points=[[9, 11, 4]])]
    )
    assert np.flatnonzero((found.labels == 1).any((1, 2))).tolist() == [3, 4, 5]


def test_following_stops_where_the_area_collapses():
    """A slice on which less than a third is left is dropped."""
    inside = np.zeros((9, 26, 20), bool)
    inside[3:6, 6:18, 5:15] = True
    inside[6:, 10:14, 8:13] = True
    found = predictor_for(plan_for(), WideModel()).predict_prompted(
        volume_of(inside), [entry("ball", points=[[9, 11, 4]])]
    )
    assert np.flatnonzero((found.labels == 1).any((1, 2))).tolist() == [3, 4, 5]


def test_following_stops_at_a_mask_of_a_few_voxels():
    """Four voxels are no object any more."""
    inside = np.zeros((9, 26, 20), bool)
    inside[3:6, 10:13, 8:12] = True
    inside[6:, 10:12, 8:10] = True
    found = predictor_for(plan_for(), WideModel()).predict_prompted(
        volume_of(inside), [entry("ball", points=[[9, 11, 4]])]
    )
    assert np.flatnonzero((found.labels == 1).any((1, 2))).tolist() == [3, 4, 5]


@pytest.mark.parametrize(
    ("sources", "expected"),
    [
        ((4,), [(4, [3, 2, 1, 0]), (4, [5, 6, 7, 8])]),
        ((2, 6), [(2, [1, 0]), (2, [3, 4]), (6, [5]), (6, [7, 8])]),
        ((0, 1, 8), [(0, []), (0, []), (1, []), (1, [2, 3, 4]), (8, [7, 6, 5]), (8, [])]),
    ],
)
def test_each_slice_is_followed_from_the_nearest_marked_one(sources, expected):
    """Every other slice is visited once, going away from its source; of two equally near, from the first."""
    ways = [(source, list(way)) for source, way in ways_from(sources, 9)]
    assert ways == expected
    assert sorted([*sources, *(index for _, way in ways for index in way)]) == list(range(9))


def test_entries_on_different_slices_mean_one_object_and_on_one_slice_two():
    """Two clicks on slices of one label are followed towards each other; two on a slice give both objects."""
    volume, predictor = volume_of(blob()), predictor_for(plan_for(), PointedModel())
    case = predictor.preprocess(volume)

    def placed(*prompts: Prompt) -> tuple[PlacedObject, ...]:
        spec = predictor.plan.label_spec
        return place_prompts(prompts, geometry=volume.geometry, record=case.record, labels=spec)

    first, second = entry("ball", points=[[8, 10, 4]]), entry("ball", points=[[9, 10, 6]])
    assert [sorted(item.prompts) for item in placed(first, second)] == [[4, 6]]
    assert [sorted(item.prompts) for item in placed(first, entry(1, points=[[3, 3, 4]]))] == [[4], [4]]
    assert [item.label for item in placed(first, entry("cube", points=[[3, 3, 6]]))] == ["ball", "cube"]
    assert [sorted(item.prompts) for item in placed(first, entry("ball", box=[1, 2, 5.5, 4, 8, 7.5]))] == [[4], [6, 7]]


def test_negative_points_alone_mark_no_slice_but_are_told_when_it_is_reached():
    """The object is followed to their slice, where the question holds them beside the click and the box."""
    volume = volume_of(blob())
    prompt = entry("ball", points=[[8, 10, 4], [3, 4, 5]], positive=[True, False])
    model = PointedModel()
    predictor_for(plan_for(), model).predict_prompted(volume, [prompt])
    signs = [asked.point_labels.tolist() for asked in model.asked]
    assert signs.count([[1, 0]]) == 1
    at = signs.index([[1, 0]])
    assert model.asked[at].points[0, 1].tolist() == [3 + 6, 4 - 1 + 3]  # margins of the tile: columns 6, rows 3
    assert signs[0] == [[1]]


def test_two_boxes_on_a_slice_give_two_objects_of_one_label():
    """One label, two rectangles; another label beside them."""
    volume = volume_of(np.zeros((9, 26, 20), bool))
    prompts = [
        entry("ball", box=[1.5, 1.5, 3.5, 4.5, 5.5, 4.5]),
        entry("ball", box=[9.5, 7.5, 3.5, 14.5, 9.5, 4.5]),
        entry("cube", box=[9.5, 13.5, 3.5, 14.5, 20.5, 4.5]),
    ]
    found = predictor_for(plan_for(), PointedModel(everything=True)).predict_prompted(volume, prompts).labels
    expected = np.zeros((9, 26, 20))
    expected[4, 2:6, 2:5] = 1
    expected[4, 8:10, 10:15] = 1
    expected[4, 14:21, 10:15] = 5
    assert np.array_equal(found, expected)


def test_maps_are_background_zero_and_the_largest_logit_of_each_label():
    """Where nothing was asked a label has UNPROMPTED; regions have no background map."""
    prompt = ObjectPrompt(box=(1.5, 1.5, 5.5, 4.5))
    data = np.zeros((1, 3, 16, 12), np.float32)
    plan = plan_for(tile=16)
    predictor = PromptedPredictor([PointedModel(everything=True)], recipe_for(plan), options())
    maps = dict(predictor.slices(data, [PlacedObject("cube", {1: prompt}, extends=False)], plan.label_spec))
    assert list(maps) == [0, 1, 2]
    assert maps[1].shape == (3, 16, 12)
    assert torch.all(maps[1][0] == 0)
    assert torch.all(maps[1][1] == UNPROMPTED)
    assert torch.all(maps[1][2, 2:6, 2:5] == 8)
    assert (maps[1][2] > 0).sum() == 12
    assert torch.all(maps[0][1:] == UNPROMPTED)
    regions = LabelSpec({"whole": (1, 2), "core": (2,)}, regions_class_order=(1, 2))
    maps = dict(predictor.slices(data, [PlacedObject("core", {1: prompt}, extends=False)], regions))
    assert maps[1].shape == (2, 16, 12)
    assert torch.all(maps[1][0] == UNPROMPTED)
    assert torch.all(maps[1][1, 2:6, 2:5] == 8)


def test_prompts_become_encoder_pixels_with_x_first():
    """Rows and columns, tile at (-4, 10), 32 voxels to 64 pixels; edges of voxels stay edges of pixels."""
    prompt = ObjectPrompt(((3.0, 12.0), (0.5, 11.0)), (True, False), (1.5, 12.5, 5.5, 14.5))
    batch = prompt_batch([prompt], [(-4, 10)], recipe=recipe_for(plan_for(tile=32, size=64)), device="cpu")
    assert batch.points is not None
    assert batch.points.tolist() == [[[4.5, 14.5], [2.5, 9.5]]]
    assert batch.point_labels.tolist() == [[1, 0]]
    assert batch.boxes.tolist() == [[5.5, 11.5, 9.5, 19.5]]
    assert batch.masks is None


def test_the_former_mask_is_shown_on_the_tile_of_the_next_slice():
    """A mask in the slice lands at its place in a tile elsewhere; outside the slice nothing was found."""
    former = np.full((40, 36), -8.0, np.float32)
    former[20:28, 16:32] = 8
    prompt = ObjectPrompt(box=(19.5, 15.5, 27.5, 31.5))
    recipe = recipe_for(plan_for(tile=32, size=32))
    batch = prompt_batch([prompt], [(8, 8)], recipe=recipe, device="cpu", former=[former])
    assert batch.masks is not None
    assert torch.equal(batch.masks[0, 0] > 0, torch.nn.functional.pad(torch.ones(2, 4), (2, 2, 3, 3)) > 0)


@pytest.mark.parametrize(
    ("train", "batch", "expected"),
    [
        ("none", {"points": torch.zeros(2, 1, 2)}, [2, 3]),
        ("full", {"points": torch.zeros(2, 1, 2)}, [0, 0]),
        ("encoder", {"points": torch.zeros(2, 1, 2)}, [0, 0]),
        ("none", {"points": torch.zeros(2, 2, 2)}, [0, 0]),
        ("none", {"boxes": torch.zeros(2, 4)}, [0, 0]),
        ("none", {"points": torch.zeros(2, 1, 2), "boxes": torch.zeros(2, 4)}, [0, 0]),
        ("none", {"points": torch.zeros(2, 1, 2), "masks": torch.zeros(2, 1, 8, 8)}, [0, 0]),
    ],
)
def test_one_click_alone_lets_sam_choose_among_its_three_masks(train: str, batch: dict[str, Any], expected: list[int]):
    """Only where nothing was trained; everything else, an adapted encoder too, is answered by token 0."""
    method = Method(
        encoder=EncoderMethod(train="adapters", adapters=(Lora(),))
        if train == "encoder"
        else EncoderMethod(train="frozen"),
        decoder=DecoderMethod(train="full" if train == "full" else "none"),
        prompts=PromptMethod(kind="mixed"),
    )
    quality = torch.tensor([[0.9, 0.1, 0.3, 0.2], [0.9, 0.1, 0.3, 0.4]])
    signs = {"point_labels": torch.ones(batch["points"].shape[:2])} if "points" in batch else {}
    assert choose_token(quality, PromptBatch(**{**NOTHING, **batch, **signs}), method).tolist() == expected


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        ((3, 40), (5, 44), [(0, 26)]),
        ((30, 58), (34, 59), [(16, 28)]),
        ((23, 30), (24, 31), [(8, 15)]),
        ((10, 0), (12, 59), [(0, 0), (0, 14), (0, 28)]),
    ],
)
def test_tiles_lie_around_the_prompt_within_the_slice(low, high, expected):
    """Centred where there is room, at the border otherwise, several where the prompt is larger than a tile."""
    assert tile_places(low, high, 32, (48, 60)) == expected


def test_a_small_slice_is_seen_whole_wherever_the_prompt_is():
    """Both axes shorter than a tile: the one centred tile."""
    assert tile_places((1, 1), (2, 2), 32, (20, 31)) == [(-6, 0)]


def test_a_tile_gets_its_part_of_the_prompt():
    """Points outside are left out, boxes cut at the tile's edge, boxes beyond it dropped."""
    prompt = ObjectPrompt(((1.0, 1.0), (20.0, 20.0)), (True, False), (5.5, 6.5, 30.5, 12.5))
    part = prompt_within(prompt, (0, 0), 16)
    assert part == ObjectPrompt(((1.0, 1.0),), (True,), (5.5, 6.5, 15.5, 12.5))
    assert prompt_within(prompt, (16, 16), 16) == ObjectPrompt(((20.0, 20.0),), (False,))


def test_each_tile_is_encoded_once():
    """Two objects on the same five slices in batches of four: five slices encoded, ten masks asked for."""
    volume, model = volume_of(blob()), PointedModel(everything=True)
    predictor = predictor_for(plan_for(), model)
    predictor._room.most = 4
    boxes = [entry("ball", box=[2, 4, 2, 6, 9, 6]), entry("cube", box=[10, 4, 2, 16, 9, 6])]
    predictor.predict_prompted(volume, boxes)
    assert sum(slices for slices, _ in model.encoded) == 5
    assert sum(len(asked.boxes) for asked in model.asked) == 10
    assert max(len(asked.boxes) for asked in model.asked) <= 4


@pytest.mark.parametrize(("depth", "slabs"), [(4, [[0, 1, 2, 3], [5, 6, 7, 8]]), (16, [[*range(9)]])])
def test_a_model_that_sees_slabs_is_given_whole_slabs(depth: int, slabs: list[list[int]]):
    """Slices 3 and 8 of 9 lie in the first and in the last slab; a short volume is one slab of its own depth."""
    seen: list[tuple[int, list[float]]] = []

    class Watching(PointedModel):
        def encode(self, images: Tensor, *, depth: int = 1) -> Tensor:
            seen.append((depth, images.amax((1, 2, 3)).tolist()))
            return super().encode(images, depth=depth)

    plan = plan_for(slab=depth, depth=DepthAttention(), batch_size=depth)
    predictor = PromptedPredictor([Watching(everything=True)], recipe_for(plan), options())
    data = np.broadcast_to(np.arange(9, dtype=np.float32)[None, :, None, None], (1, 9, 20, 26)).copy()
    box = ObjectPrompt(box=(2.5, 3.5, 8.5, 9.5))
    objects = [PlacedObject("ball", {3: box, 8: box}, extends=False)]
    found = [index for index, maps in predictor.slices(data, objects, plan.label_spec) if (maps[1] > 0).any()]
    assert seen == [(len(slab), slab) for slab in slabs]
    assert found == [3, 8]


def test_several_models_are_averaged():
    """The mean of 8 and -8 - 2 is below zero, of 8 and -8 + 2 above."""

    class Shifted(PointedModel):
        def __init__(self, shift: float) -> None:
            super().__init__(everything=True)
            self.shift = shift

        def prompted(self, embeddings: Tensor, prompts: PromptBatch) -> tuple[Tensor, Tensor]:
            logits, quality = super().prompted(embeddings, prompts)
            return logits.neg() + self.shift, quality

    volume = volume_of(np.zeros((9, 26, 20), bool))
    for shift, expected in ((-2.0, False), (2.0, True)):
        predictor = predictor_for(plan_for(), PointedModel(everything=True))
        predictor._models.append(Shifted(shift))
        found = predictor.predict_prompted(volume, [entry("ball", box=[2, 4, 2.5, 6, 9, 3.5])]).labels
        assert (found[3, 6, 4] == 1) == expected


@pytest.mark.parametrize(
    ("prompts", "says"),
    [
        ([entry("spleen", points=[[5, 5, 4]])], ["entry 0: unknown label", "ball (1), cube (5)"]),
        ([entry("ball", points=[[5, 5, 4]]), entry("ball", points=[[20, 5, 4]])], ["entry 1: a point", "i 0 to 19"]),
        ([entry("ball", points=[[5, 0, 4]])], ["empty (zero) margin", "j 1 to 25"]),
        ([entry("ball", box=[25, 5, 4, 30, 9, 4])], ["the box lies outside"]),
        ([entry("ball", box=[5, 5, 2, 5, 9, 6])], ["no extent within the slices", "file axis k"]),
        ([entry("ball", points=[[5, 5]])], ["two numbers", "k from 0 to 8"]),
    ],
)
def test_prompts_that_cannot_be_placed_are_refused_by_entry(prompts: list[Prompt], says: list[str]):
    """The message names the case, the entry and what would have fitted."""
    predictor = predictor_for(plan_for(), PointedModel())
    with pytest.raises(DataError) as caught:
        predictor.predict_prompted(volume_of(blob()), prompts, name="scan_7")
    for words in ("scan_7", *says):
        assert words in str(caught.value)


def test_all_faults_of_a_case_are_told_at_once():
    """Two bad entries around a good one: both are in the message."""
    prompts = [entry("a", points=[[5, 5, 4]]), entry("ball", points=[[5, 5, 4]]), entry("b", points=[[5, 5, 4]])]
    with pytest.raises(DataError) as caught:
        predictor_for(plan_for(), PointedModel()).predict_prompted(volume_of(blob()), prompts)
    assert [number for number in range(3) if f"entry {number}:" in str(caught.value)] == [0, 2]


def test_regions_are_prompted_by_name():
    """The region's own value is painted; a value is refused."""
    labels = {"background": 0, "whole": [1, 2], "core": 2}
    plan = plan_for(labels=labels, regions_class_order=(1, 2))
    predictor = predictor_for(plan, PointedModel(everything=True))
    volume = volume_of(np.zeros((9, 26, 20), bool))
    boxes = [entry("whole", box=[1.5, 1.5, 3.5, 9.5, 9.5, 4.5]), entry("core", box=[3.5, 3.5, 3.5, 5.5, 5.5, 4.5])]
    found = predictor.predict_prompted(volume, boxes).labels
    assert (found == 2).sum() == 4
    assert (found == 1).sum() == 64 - 4
    with pytest.raises(DataError, match="name of a region"):
        predictor.predict_prompted(volume, [entry(2, box=[1, 1, 3, 9, 9, 4])])


def test_a_picture_is_prompted_with_two_numbers():
    """I is the column and j the row of a non-square 2D image."""
    volume = Volume(np.ones((1, 1, 24, 30), np.float32), Geometry.from_spacing((1, 24, 30), (999.0, 1.0, 1.4)))
    found = predictor_for(plan_for(), PointedModel(everything=True)).predict_prompted(
        volume, [entry("ball", box=[19.5, 3.5, 25.5, 6.5])]
    )
    expected = np.zeros((1, 24, 30))
    expected[0, 4:7, 20:26] = 1
    assert np.array_equal(found.labels, expected)


def test_models_and_prompts_that_do_not_go_together_are_refused():
    """A model of all classes takes no prompts; a promptable one needs them; both messages say what to do."""
    volume = volume_of(blob())
    with pytest.raises(UsageError, match="takes no prompts") as caught:
        predictor_for(plan_for(prompts=PromptMethod()), PointedModel()).predict_prompted(
            volume, [entry("ball", points=[[5, 5, 4]])]
        )
    assert caught.value.todo
    with pytest.raises(UsageError, match="what prompts point at") as caught:
        predictor_for(plan_for(), PointedModel()).predict(volume)
    assert "--prompts" in str(caught.value)


def test_a_prompted_tile_has_the_extremes_of_its_whole_slice():
    """Scaled per slice, the tile around a prompt is the same part of the slice between that slice's extremes."""
    seen: list[Tensor] = []

    class Watched(PointedModel):
        def encode(self, images: Tensor, *, depth: int = 1) -> Tensor:
            seen.append(images)
            return super().encode(images, depth=depth)

    data = np.random.default_rng(0).normal(50, 9, (1, 2, 40, 30)).astype(np.float32)
    data[0, 1, 39, 29] = 700
    recipe = recipe_for(plan_for(tile=16, intensity_map=IntensityMap(kind="unit_per_slice")))
    placed = PlacedObject("ball", {1: ObjectPrompt(box=(2.5, 2.5, 9.5, 9.5))}, extends=False)
    list(PromptedPredictor([Watched()], recipe, options()).slices(data, [placed], LabelSpec({"ball": (1,)})))
    (images,) = seen
    lowest, highest = float(data[0, 1].min()), float(data[0, 1].max())
    stored = images[0, 0].numpy() * (highest - lowest) + lowest
    corners = [(row, column) for row in range(25) for column in range(15)]
    assert any(np.allclose(stored, data[0, 1, r : r + 16, c : c + 16], atol=1e-2) for r, c in corners)


def written_images(folder: Path, names: tuple[str, ...]) -> list[Case]:
    """The same image under several names."""
    files = [folder / f"{name}_0000.nii.gz" for name in names]
    for file in files:
        write_image(file, volume_of(blob(), OPERATIONS[17]))
    return [Case(name, (file,)) for name, file in zip(names, files, strict=True)]


def test_cases_with_bad_or_no_prompts_do_not_stop_the_others(tmp_path: Path):
    """One mask is written, exact on its own grid; a stale mask of a failed case is gone."""
    cases = written_images(tmp_path, ("bad", "good", "none"))
    stored = OPERATIONS[17].apply(blob())
    prompts = {"good": (box_around(stored, "ball"),), "bad": (entry("liver", points=[[5, 5, 4]]),)}
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "none.nii.gz").touch()
    outcomes = predict_cases(
        predictor_for(plan_for(), PointedModel()),
        cases,
        tmp_path / "out",
        ending=".nii.gz",
        reporter=SilentReporter(),
        prompts=prompts,
    )
    assert outcomes["good"] is None
    assert "unknown label" in str(outcomes["bad"])
    assert "no prompts for this case" in str(outcomes["none"])
    assert "none" in str(outcomes["none"])
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["good.nii.gz"]
    assert np.array_equal(read_labels(tmp_path / "out" / "good.nii.gz").data[0] == 1, stored)


def test_a_folder_is_predicted_with_a_prompts_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The report lists what was predicted, cases without prompts, and prompts without an image."""
    (tmp_path / "in").mkdir()
    written_images(tmp_path / "in", ("one", "two"))
    stored = OPERATIONS[17].apply(blob())
    known = box_around(stored, "ball").model_dump(mode="json", exclude_none=True)
    (tmp_path / "prompts.json").write_text(json.dumps({"one": [known], "three": [known]}))
    predictor = predictor_for(plan_for(), PointedModel())
    monkeypatch.setattr(Predictor, "from_folder", lambda *_, **__: predictor)
    request = PredictionRequest(
        tmp_path / "in", tmp_path / "out", tmp_path / "model", prompts=tmp_path / "prompts.json"
    )
    report = predict(request, reporter=SilentReporter())
    assert {case.case: case.status for case in report.cases} == {"one": "predicted", "two": "failed", "three": "failed"}
    assert "no image of that name" in str([case.problem for case in report.cases if case.case == "three"])
    assert not report.mirrored
    assert np.array_equal(read_labels(tmp_path / "out" / "one.nii.gz").data[0] == 1, stored)
    with pytest.raises(UsageError, match="what prompts point at"):
        predict(PredictionRequest(tmp_path / "in", tmp_path / "out", tmp_path / "model"), reporter=SilentReporter())


def real_model(backbone: str, *, tile_vox: int, **method: Any) -> tuple[ResolvedRecipe, SegmentationModel]:
    """A model of random weights with SAM's four tokens, and a recipe under which it is prompted."""
    recipe = small_recipe(backbone=backbone, input_size=96, tile_vox=tile_vox)
    model = build(recipe, num_tokens=4).model.eval()
    return replace(recipe, method=recipe.method.model_copy(update=method)), model


def test_a_real_model_answers_as_when_it_is_asked_by_hand():
    """Boxes on three slices at once give what the tile and the box in pixels give one by one."""
    recipe, model = real_model("vit_xs", tile_vox=48, prompts=PromptMethod(kind="box"))
    data = np.random.default_rng(0).normal(size=(3, 4, 40, 30)).astype(np.float32)
    box = ObjectPrompt(box=(9.5, 4.5, 29.5, 16.5))
    placed = PlacedObject("ball", dict.fromkeys((0, 2, 3), box), extends=False)
    maps = dict(
        PromptedPredictor([model], recipe, options(batch_size=2)).slices(data, [placed], LabelSpec({"ball": (1,)}))
    )
    for index in (0, 2, 3):
        tile = torch.nn.functional.pad(torch.from_numpy(data[:, index]), (9, 9, 4, 4))[None]
        inside = torch.nn.functional.pad(torch.ones(1, 1, 40, 30), (9, 9, 4, 4))
        pixels = torch.tensor([[27.5, 27.5, 51.5, 67.5]])
        with torch.no_grad():
            embeddings = model.encode(to_encoder(tile, inside, recipe))
            logits, _ = model.prompted(embeddings, PromptBatch(boxes=pixels))
        expected = to_store(logits[:, :1], recipe)[0, 0, 4:44, 9:39]
        assert torch.allclose(maps[index][1], expected.half().float(), atol=2e-3)
    assert torch.all(maps[1][1] == UNPROMPTED)


@pytest.mark.parametrize("train", ["full", "none"])
def test_a_real_model_takes_clicks_boxes_and_former_masks(train: str):
    """From a click on one slice through slices that are shown the former mask, every map is finite."""
    prompts, decoder = PromptMethod(kind="mixed", corrections=1), DecoderMethod(train=train)
    recipe, model = real_model("vit_t_xs", tile_vox=32, prompts=prompts, decoder=decoder)
    seen: list[PromptBatch] = []
    asked = model.prompted
    model.prompted = lambda embeddings, prompts: (seen.append(prompts), asked(embeddings, prompts))[1]  # type: ignore[method-assign]
    data = np.random.default_rng(0).normal(size=(3, 3, 40, 30)).astype(np.float32)
    placed = PlacedObject("ball", {1: ObjectPrompt(((20.0, 11.0),), (True,))}, extends=True)
    predictor = PromptedPredictor([model], recipe, options())
    maps = [maps for _, maps in predictor.slices(data, [placed], LabelSpec({"ball": (1,)}))]
    assert all(torch.isfinite(m).all() for m in maps)
    assert len(seen) > 1
    assert seen[0].boxes is None
    assert all(batch.masks is not None and batch.boxes is not None for batch in seen[1:])
