"""Oracle prompts lie on the reference in the file's own voxels, whatever its axes, and say that they are oracle."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from samunet.artifacts.plan import Frame, save_plan
from samunet.artifacts.prompts import load_prompts
from samunet.cli import oracle as command
from samunet.core.errors import UsageError
from samunet.core.files import write_json
from samunet.core.geometry import Geometry
from samunet.core.labels import LabelSpec
from samunet.core.volume import Volume
from samunet.imageio import write_labels
from samunet.inference import simulation
from samunet.inference.oracle import OracleSettings, case_prompts, slice_order
from samunet.inference.prompt_geometry import place_prompts
from samunet.pipeline.oracle import oracle_file, oracle_prompts, save_oracle
from samunet.preprocessing.pipeline import preprocess_case
from tests.samples import make_case, make_plan

LABELS = LabelSpec({"hook": (1,), "dot": (2,)}, ignore=3)
SHAPE = (7, 20, 33)
SPACING = (1.0, 0.5, 4.0)


def settings(grade: simulation.Grade = "box_tight", **changes: object) -> OracleSettings:
    """Settings with seed 0."""
    return OracleSettings(LABELS, grade, **{"seed": 0, **changes})  # type: ignore[arg-type]


def phantom() -> np.ndarray:
    """Labels (Z, Y, X) whose widest spacing is X: a hook on X 4 to 8, two dots on X 6, some unknown voxels."""
    labels = np.zeros(SHAPE, np.uint8)
    labels[1:5, 2:15, 4:9] = 1
    labels[2:5, 5:15, 4:9] = 0
    labels[0, 18, 6] = labels[6, 19, 6] = 2
    labels[6, 0, :] = 3
    return labels


def geometry() -> Geometry:
    """Anisotropic and not square in any plane."""
    return Geometry.from_spacing(SHAPE, SPACING)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Label files of two cases, one of them empty, beside a dataset.json."""
    write_labels(tmp_path / "labels" / "a.nii.gz", phantom(), geometry=geometry())
    write_labels(tmp_path / "labels" / "b.nii.gz", np.zeros(SHAPE, np.uint8), geometry=geometry())
    write_json(tmp_path / "dataset.json", {"labels": {"background": 0, "hook": 1, "dot": 2, "ignore": 3}})
    return tmp_path


def test_a_tight_box_encloses_the_object_in_the_files_voxels(folder):
    """Read with nibabel, array[i, j, k] inside the box holds the object's slice and nothing outside it does."""
    save_oracle(oracle_prompts({"a": folder / "labels" / "a.nii.gz"}, settings()), folder / "oracle.json")
    entries = load_prompts(folder / "oracle.json")["a"]
    array = np.asarray(nib.load(folder / "labels" / "a.nii.gz").dataobj)
    assert array.shape == SHAPE[::-1]
    hooks = [entry for entry in entries if entry.label == "hook"]
    assert len(hooks) == 5
    for entry, index in zip(hooks, range(4, 9), strict=True):
        i0, j0, k0, i1, j1, k1 = entry.box
        assert (i0, i1) == (index - 0.5, index + 0.5)
        found = np.argwhere(array[index] == 1)
        assert tuple(found.min(0) - 0.5) == (j0, k0)
        assert tuple(found.max(0) + 0.5) == (j1, k1)


def test_every_connected_object_is_prompted_by_itself():
    """Two dots of one slice are two entries; unknown voxels are none."""
    entries = case_prompts(phantom(), geometry(), settings("clicks_1"), case="a")
    dots = [entry for entry in entries if entry.label == "dot"]
    assert {entry.points for entry in dots} == {((6.0, 18.0, 0.0),), ((6.0, 19.0, 6.0),)}
    assert {entry.label for entry in entries} == {"hook", "dot"}


@pytest.mark.parametrize("grade", ["clicks_1", "clicks_3"])
def test_clicks_lie_on_the_structure_in_the_files_voxels(grade):
    """labels[k, j, i] at each click is the entry's structure."""
    labels = phantom()
    for entry in case_prompts(labels, geometry(), settings(grade), case="a"):
        assert entry.positive == (True,) * len(entry.points)
        for i, j, k in entry.points:
            assert labels[int(k), int(j), int(i)] == LABELS.names[entry.label][0]


def test_a_whole_image_box_is_given_once_per_structure_and_slice():
    """It is as large as the slice, and two objects of a slice share it."""
    entries = case_prompts(phantom(), geometry(), settings("whole_image"), case="a")
    assert [entry.label for entry in entries] == ["hook"] * 5 + ["dot"]
    assert entries[0].box == (3.5, -0.5, -0.5, 4.5, 19.5, 6.5)


def test_the_middle_slice_is_flat_and_only_one():
    """For propagation: one slice per structure, a box without thickness."""
    entries = case_prompts(phantom(), geometry(), settings(every_slice=False), case="a")
    assert [(entry.label, entry.box[0], entry.box[3]) for entry in entries] == [
        ("hook", 6, 6),
        ("dot", 6, 6),
        ("dot", 6, 6),
    ]


def test_slices_lie_along_the_plans_axis_or_the_widest_spacing():
    """The plan decides, also for a case stored in other axes; a picture's slices are its only one."""
    assert slice_order(geometry(), None) == (2, 0, 1)
    assert slice_order(Geometry.from_spacing(SHAPE, (1, 1, 1)), None) == (0, 1, 2)
    assert slice_order(Geometry.from_spacing((1, 20, 33), (1, 1, 2)), None) == (0, 1, 2)
    frame = Frame(slice_axis=0, orientation=("S", "A", "R"), spacing=(4.0, 1.0, 1.0))
    turned = Geometry.from_spacing(SHAPE, SPACING, directions=[[0, 1, 0], [1, 0, 0], [0, 0, 1]])
    assert slice_order(turned, frame) == (2, 0, 1)


def test_prompts_depend_on_seed_and_case_alone(folder):
    """The same again in another folder, other ones for another seed or case."""
    several = {
        (seed, case): case_prompts(phantom(), geometry(), settings("box_0.5", seed=seed), case=case)
        for seed in (0, 1)
        for case in ("a", "b")
    }
    assert len({str(prompts) for prompts in several.values()}) == 4
    file = folder / "labels" / "a.nii.gz"
    alone = oracle_prompts({"a": file}, settings("box_0.5"))
    together = oracle_prompts({"Z": file, "a": file}, settings("box_0.5"))
    assert alone.cases["a"] == together.cases["a"] == several[0, "a"]


def test_random_boxes_keep_their_overlap_through_the_file(folder):
    """Rounding to the file's decimals leaves the IoU as the grade says."""
    save_oracle(oracle_prompts({"a": folder / "labels" / "a.nii.gz"}, settings("box_0.75")), folder / "oracle.json")
    entry = load_prompts(folder / "oracle.json")["a"][0]
    box = (entry.box[2], entry.box[1], entry.box[5], entry.box[4])
    assert simulation.box_iou(box, (0.5, 1.5, 4.5, 14.5)) == pytest.approx(0.75, abs=1e-3)


@pytest.mark.parametrize("grade", ["box_tight", "clicks_3"])
def test_prompts_of_a_turned_case_find_the_object_on_the_store_grid(grade):
    """From a file with permuted and flipped axes through prediction's own placing: tight boxes and clicks still fit."""
    volume, values = make_case(3, shape=(9, 30, 22))
    directions = [[0, -1, 0], [1, 0, 0], [0, 0, 1]]
    turned = np.ascontiguousarray(values.transpose(1, 2, 0)[::-1])
    grid = Geometry.from_spacing(turned.shape, (1, 1, 2), directions=directions)
    image = Volume(np.ascontiguousarray(volume.data.transpose(0, 2, 3, 1)[:, ::-1]), grid)
    plan = make_plan()
    case = preprocess_case(image, Volume(turned[None].astype(np.int16), grid), plan=plan, configuration="2d", name="a")
    assert case.record.permutation != (0, 1, 2)
    chosen = OracleSettings(plan.label_spec, grade, 0, frame=plan.frame.value)
    prompts = case_prompts(turned, grid, chosen, case="a")
    placed = place_prompts(prompts, geometry=grid, record=case.record, labels=plan.label_spec)
    assert {one.label for one in placed} == {"ball", "cube"}
    for one in placed:
        for index, prompt in one.prompts.items():
            mask = plan.label_spec.structure_mask(case.labels[index], one.label)
            assert all(mask[round(row), round(column)] for row, column in prompt.points)
            if prompt.box is not None:
                tight = [simulation.tight_box(part) for part in simulation.objects(mask)]
                assert any(np.allclose(prompt.box, box) for box in tight)


def test_the_files_name_says_oracle(tmp_path):
    """A folder gets a telling name, a name without the word is refused with a better one."""
    assert oracle_file(tmp_path, grade="box_0.5", seed=3) == tmp_path / "oracle_box_0.5_seed3.json"
    assert oracle_file(tmp_path / "my_oracle.json", grade="box_0.5", seed=3) == tmp_path / "my_oracle.json"
    with pytest.raises(UsageError) as error:
        oracle_file(tmp_path / "prompts.json", grade="box_0.5", seed=3)
    assert "oracle_prompts.json" in str(error.value)


def test_the_command_writes_prompts_and_names_what_it_left_out(folder, capsys):
    """End to end: labels found nearby, an empty case warned of, an unreadable one reported with exit code 1."""
    arguments = ["-i", str(folder / "labels"), "-o", str(folder / "out"), "--grade", "clicks_3", "--seed", "2"]
    assert command.main(arguments) == 0
    written = folder / "out" / "oracle_clicks_3_seed2.json"
    assert set(load_prompts(written)) == {"a"}
    said = capsys.readouterr()
    assert "oracle prompts (clicks_3) of 1 cases" in said.out
    assert "no structure, hence no prompt, in b" in said.err
    (folder / "labels" / "c.nii.gz").write_bytes(b"no image")
    assert command.main([*arguments, "--middle-slice"]) == 1
    assert {len(entry.points) for entry in load_prompts(written)["a"]} == {3}
    assert len(load_prompts(written)["a"]) == 3


def test_the_command_takes_names_and_axes_from_a_dataset(folder):
    """With -d, dataset.json and the plan of the workspace decide: here slices lie along Z, not the widest spacing."""
    preprocessed = folder / "workspace" / "preprocessed" / "Dataset901_Balls"
    write_json(preprocessed / "dataset.json", {"labels": {"background": 0, "other": 1, "dot": 2, "ignore": 3}})
    frame = Frame(slice_axis=0, orientation=("S", "A", "R"), spacing=SPACING)
    save_plan(make_plan(frame=frame), preprocessed / "plans.json")
    arguments = ["-i", str(folder / "labels"), "-o", str(folder), "-d", "901", "--workspace", str(folder / "workspace")]
    assert command.main(arguments) == 0
    entries = load_prompts(folder / "oracle_box_tight_seed0.json")["a"]
    assert {entry.label for entry in entries} == {"other", "dot"}
    assert [(entry.box[2], entry.box[5]) for entry in entries if entry.label == "other"] == [
        (index - 0.5, index + 0.5) for index in range(1, 5)
    ]


def test_the_command_needs_names_and_labels(tmp_path, capsys):
    """Without a dataset.json, or with an empty folder, it stops with exit code 2."""
    arguments = ["-i", str(tmp_path / "labels"), "-o", str(tmp_path)]
    (tmp_path / "labels").mkdir()
    assert command.main(arguments) == 2
    assert "no label file" in capsys.readouterr().err
    write_labels(tmp_path / "labels" / "a.nii.gz", phantom(), geometry=geometry())
    assert command.main(arguments) == 2
    assert "--dataset-json" in capsys.readouterr().err


def test_the_command_offers_every_grade():
    """The parser's list, which loads nothing, is the simulation's."""
    assert command.GRADES == simulation.GRADES
