"""samunet_evaluate on folders: pairing, labels, what is written, and exit codes."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from samunet.artifacts.report import CaseReport, load_report
from samunet.cli.evaluate import build_parser, main
from samunet.core.errors import ConfigError, UsageError
from samunet.core.geometry import Geometry
from samunet.core.labels import LabelSpec
from samunet.core.log import SilentReporter
from samunet.datasets.raw import load_label_spec
from samunet.evaluation.case import DEFAULT_TOLERANCE_MM
from samunet.evaluation.policy import EMPTY_RULE
from samunet.imageio import write_labels
from samunet.pipeline.evaluate import evaluate, labels_from_references, match, suggest_processes

SHAPE, SPACING = (6, 10, 12), (2.0, 1.0, 0.5)


def label_map(shift: int = 0) -> np.ndarray:
    labels = np.zeros(SHAPE, dtype=np.uint8)
    labels[1:4, 2 + shift : 6 + shift, 2:7] = 1
    labels[4:6, 2:5, 8:11] = 2
    return labels


def write(file: Path, labels: np.ndarray, spacing: tuple[float, ...] = SPACING) -> None:
    write_labels(file, labels, geometry=Geometry.from_spacing(labels.shape, spacing))


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """A raw dataset of four cases with predictions one row off beside it."""
    folder = tmp_path / "raw" / "Dataset007_Boxes"
    description = {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0, "liver": 1, "tumour": 2},
        "file_ending": ".nii.gz",
    }
    (folder / "labelsTr").mkdir(parents=True)
    (folder / "dataset.json").write_text(json.dumps(description))
    (tmp_path / "predictions").mkdir()
    for case in ("a", "b", "c", "d"):
        write(folder / "labelsTr" / f"{case}.nii.gz", label_map())
        write(tmp_path / "predictions" / f"{case}.nii.gz", label_map(shift=1))
    return folder


@pytest.fixture
def predictions(dataset: Path) -> Path:
    return dataset.parent.parent / "predictions"


def run(*words: object) -> int:
    return main([*map(str, words), "-np", "1"])


def test_two_folders(dataset: Path, predictions: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Table, interval, rule and paths are printed; summary.json and summary.csv are written; exit code 0."""
    assert run(dataset / "labelsTr", predictions) == 0
    printed = capsys.readouterr().out
    assert EMPTY_RULE in printed
    assert "liver" in printed
    assert "mean Dice: 0.875 [0.875, 0.875]" in printed
    assert str(predictions / "summary.json") in printed
    report = load_report(predictions / "summary.json")
    assert report.mean["1"]["Dice"] == pytest.approx(0.75)
    assert report.mean["1"]["HD"] == pytest.approx(1.0)
    assert report.structures == {"1": "liver", "2": "tumour"}
    assert report.settings is not None
    assert report.settings.tolerance_mm == DEFAULT_TOLERANCE_MM
    with (predictions / "summary.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [(r["case"], r["structure"]) for r in rows[:2]] == [("a", "liver"), ("a", "tumour")]
    assert float(rows[0]["volume_ref_mm3"]) == pytest.approx(60.0)


def test_dataset_form_and_output_folder(dataset: Path, predictions: Path, tmp_path: Path) -> None:
    """-d with an id, a name or a path takes the dataset's labels; -o says where to write."""
    for identifier in ("7", "Boxes", dataset):
        output = tmp_path / f"out_{Path(str(identifier)).name}"
        assert run("-d", identifier, "--raw", dataset.parent, predictions, "-o", output) == 0
        assert len(load_report(output / "summary.json").metric_per_case) == 4
    assert not (predictions / "summary.json").exists()


def test_fold_takes_its_validation_cases(dataset: Path, predictions: Path, tmp_path: Path) -> None:
    """-f restricts the references to a fold, and an absent fold is an error that lists those that exist."""
    splits = tmp_path / "preprocessed" / dataset.name / "splits_final.json"
    splits.parent.mkdir(parents=True)
    splits.write_text(json.dumps([{"train": ["a", "b"], "val": ["c", "d"]}]))
    for case in ("a", "b"):
        (predictions / f"{case}.nii.gz").unlink()
    words = ("-d", dataset, predictions, "--preprocessed", tmp_path / "preprocessed")
    assert run(*words, "-f", 0) == 0
    assert [c.case for c in load_report(predictions / "summary.json").metric_per_case] == ["c", "d"]
    assert run(*words) == 1
    assert run(*words, "-f", 3) == 2


def test_test_labels_are_used_where_they_are_predicted(dataset: Path, predictions: Path) -> None:
    """Predictions of test cases are held against labelsTs only."""
    (dataset / "labelsTs").mkdir()
    write(dataset / "labelsTs" / "t.nii.gz", label_map())
    for file in predictions.iterdir():
        file.unlink()
    write(predictions / "t.nii.gz", label_map())
    assert run("-d", dataset, predictions) == 0
    assert load_report(predictions / "summary.json").foreground_mean["Dice"] == 1.0


def test_missing_and_broken_files_stop_no_other(
    dataset: Path, predictions: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A missing, a truncated and an off-grid prediction are listed, the rest is scored, the exit code is 1."""
    (predictions / "a.nii.gz").unlink()
    (predictions / "b.nii.gz").write_bytes((predictions / "b.nii.gz").read_bytes()[:40])
    write(predictions / "c.nii.gz", label_map(), spacing=(2.0, 1.5, 0.5))
    assert run(dataset / "labelsTr", predictions) == 1
    report = load_report(predictions / "summary.json")
    assert report.missing_predictions == ("a",)
    assert set(report.failed_cases) == {"b", "c"}
    assert str(dataset / "labelsTr" / "c.nii.gz") in report.failed_cases["c"]
    assert str(predictions / "c.nii.gz") in report.failed_cases["c"]
    assert [c.case for c in report.metric_per_case] == ["d"]
    warnings = capsys.readouterr().err
    assert "no prediction for 1 of the references" in warnings
    assert "different grids" in warnings


def test_labels_found_in_the_references(dataset: Path, predictions: Path, tmp_path: Path) -> None:
    """Without any dataset.json the structures are the values, with one it names them."""
    bare = tmp_path / "elsewhere" / "references"
    bare.mkdir(parents=True)
    for file in (dataset / "labelsTr").iterdir():
        (bare / file.name).write_bytes(file.read_bytes())
    assert run(bare, predictions) == 0
    assert load_report(predictions / "summary.json").structures == {"1": "1", "2": "2"}
    assert run(bare, predictions, "--dataset-json", dataset / "dataset.json") == 0
    assert load_report(predictions / "summary.json").structures == {"1": "liver", "2": "tumour"}


def test_several_processes_give_the_same(dataset: Path, predictions: Path) -> None:
    """Two processes give the report that one gives."""
    pairs, _ = match({f.name[:-7]: f for f in (dataset / "labelsTr").iterdir()}, predictions)
    labels = labels_from_references([pairs[0][1]])
    pairs = pairs[:2]
    assert evaluate(pairs, labels=labels, processes=2) == evaluate(pairs, labels=labels, processes=1)


def test_more_processes_only_for_work_that_is_worth_them(dataset: Path, predictions: Path, tmp_path: Path) -> None:
    """Small cases run in this process; many large ones get the processes there are."""
    labels = labels_from_references([dataset / "labelsTr" / "a.nii.gz"])
    write(tmp_path / "large.nii.gz", np.ones((64, 256, 256), dtype=np.uint8))
    small = [("a", dataset / "labelsTr" / "a.nii.gz", None)] * 100
    large = [("large", tmp_path / "large.nii.gz", None)] * 100
    assert suggest_processes(small, labels, limit=6) == 1
    assert suggest_processes(large, labels, limit=6) == 6
    assert suggest_processes([("none", tmp_path / "none.nii.gz", None)], labels, limit=6) == 1


def test_regions_and_ignore_of_dataset_json(dataset: Path, predictions: Path) -> None:
    """Regions have nnU-Net's keys; where the reference says ignore, nothing counts."""
    description = {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0, "whole": [1, 2], "tumour": 2, "ignore": 3},
        "regions_class_order": [1, 2],
        "file_ending": ".nii.gz",
    }
    (dataset / "dataset.json").write_text(json.dumps(description))
    for file in (dataset / "labelsTr").iterdir():
        reference = label_map()
        reference[:, 2] = reference[:, 6] = 3
        write(file, reference)
    assert run(dataset / "labelsTr", predictions) == 0
    report = load_report(predictions / "summary.json")
    assert report.structures == {"(1, 2)": "whole", "2": "tumour"}
    assert report.foreground_mean["Dice"] == 1.0
    assert report.metric_per_case[0].metrics["2"].TN == 6 * 8 * 12 - 2 * 2 * 3


def test_ignored_voxels_are_counted_per_case(tmp_path: Path) -> None:
    """A report says of which cases the scores are those of the voxels that carry a label; nnU-Net's does not know."""
    labels, scribbled = LabelSpec({"liver": (1,), "tumour": (2,)}, ignore=3), label_map()
    scribbled[:, :, 6:] = 3
    for case, reference in (("whole", label_map()), ("scribbled", scribbled)):
        write(tmp_path / f"{case}.nii.gz", reference)
        write(tmp_path / f"{case}_mask.nii.gz", label_map(shift=1))
    pairs = [(case, tmp_path / f"{case}.nii.gz", tmp_path / f"{case}_mask.nii.gz") for case in ("whole", "scribbled")]
    report = evaluate(pairs, labels=labels)
    assert {case.case: case.num_ignored for case in report.metric_per_case} == {"whole": 0, "scribbled": 6 * 10 * 6}
    assert [case.num_ignored for case in evaluate(pairs[:1], labels=LabelSpec({"liver": (1, 2)})).metric_per_case] == [
        0
    ]
    assert CaseReport(reference_file="of_nnunet.nii.gz", metrics={}).num_ignored is None


def test_undeclared_values_and_other_files_are_told(dataset: Path, predictions: Path) -> None:
    """A value that no label declares and a prediction without reference are warned about, not swallowed."""
    strange = label_map()
    strange[0, 0, 0] = 9
    write(predictions / "a.nii.gz", strange)
    write(predictions / "z.nii.gz", strange)
    references = {f.name[:-7]: f for f in (dataset / "labelsTr").iterdir()}
    pairs, unmatched = match(references, predictions)
    reporter = SilentReporter()
    report = evaluate(
        pairs, labels=labels_from_references(list(references.values())), reporter=reporter, unmatched=unmatched
    )
    assert report.metric_per_case[0].undeclared_values == (9,)
    assert report.unmatched_predictions == ("z.nii.gz",)
    assert any("[9] in a" in w for w in reporter.warnings)
    assert any("z.nii.gz" in w for w in reporter.warnings)
    assert report.complete


def test_references_with_undeclared_values_are_not_scored(
    dataset: Path, predictions: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A reference that dataset.json does not fit fails its case, whatever the prediction; the others are scored."""
    strange = label_map()
    strange[strange == 2] = 4
    for file in (dataset / "labelsTr" / "b.nii.gz", predictions / "b.nii.gz"):
        write(file, strange)
    assert run(dataset / "labelsTr", predictions) == 1
    report = load_report(predictions / "summary.json")
    assert [case.case for case in report.metric_per_case] == ["a", "c", "d"]
    message = report.failed_cases["b"]
    for part in (str(dataset / "labelsTr" / "b.nii.gz"), "values 0, 1, 2", "found: 4", "--dataset-json"):
        assert part in message
    for case in ("a", "c", "d"):
        write(dataset / "labelsTr" / f"{case}.nii.gz", strange)
    capsys.readouterr()
    assert run(dataset / "labelsTr", predictions) == 1
    assert "in no reference" not in capsys.readouterr().err


def test_references_without_any_structure_are_an_input_error(
    dataset: Path, predictions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is written and the exit code is 2, as no case could be evaluated."""
    empty = tmp_path / "elsewhere" / "references"
    empty.mkdir(parents=True)
    write(empty / "a.nii.gz", np.zeros(SHAPE, np.uint8))
    assert run(empty, predictions) == 2
    assert "no reference holds a label above 0" in capsys.readouterr().err
    assert not (predictions / "summary.json").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"labels": {"background": 0, "liver": 1, "ignore": [2]}}, "ignore: [2]"),
        ({"labels": {"background": 0, "liver": 1, "tumour": 40_000}}, "at most 32767"),
        ({"dataset": {"a": {"images": ["a.nii.gz"]}}}, "case: a"),
        ({"dataset": ["a"]}, "dataset: "),
    ],
)
def test_malformed_dataset_json_is_one_message(
    dataset: Path, predictions: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, object], words: str
) -> None:
    """The file and the entry are named, and the exit code is 2."""
    file = dataset / "dataset.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    assert run("-d", dataset, predictions) == 2
    message = capsys.readouterr().err
    assert words in message
    assert f"file: {file}" in message
    assert "not foreseen" not in message


def test_malformed_splits_are_one_message(
    dataset: Path, predictions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A fold without validation cases, or with a case that has no label file, is named with the file."""
    splits = tmp_path / "preprocessed" / dataset.name / "splits_final.json"
    splits.parent.mkdir(parents=True)
    words = ("-d", dataset, predictions, "--preprocessed", tmp_path / "preprocessed", "-f", 0)
    for content, part in (([{"train": ["a"]}], "folds.0.val"), ([{"train": ["a"], "val": ["z"]}], "found: z")):
        splits.write_text(json.dumps(content))
        assert run(*words) == 2
        message = capsys.readouterr().err
        assert part in message
        assert f"file: {splits}" in message


def test_tolerance_that_does_not_suit_the_voxels_is_told(dataset: Path, predictions: Path) -> None:
    """A tolerance of many voxels or of less than one draws a warning; one that suits draws none."""
    pairs, _ = match({f.name[:-7]: f for f in (dataset / "labelsTr").iterdir()}, predictions)
    labels = labels_from_references([pairs[0][1]])
    told = {}
    for tolerance in (0.3, 1.0, 10.0):
        reporter = SilentReporter()
        evaluate(pairs, labels=labels, tolerance_mm=tolerance, reporter=reporter)
        told[tolerance] = "".join(reporter.warnings)
    assert "less than a voxel" in told[0.3]
    assert told[1.0] == ""
    assert "more than 4 voxels" in told[10.0]


def test_prediction_of_another_format_and_pictures_beside_it(dataset: Path, predictions: Path, tmp_path: Path) -> None:
    """The reference's ending is preferred; any other readable one will do."""
    write(predictions / "a.nrrd", label_map())
    (predictions / "b.nii.gz").unlink()
    write(predictions / "b.nrrd", label_map())
    references = {f.name[:-7]: f for f in (dataset / "labelsTr").iterdir()}
    chosen = {case: prediction.name for case, _, prediction in match(references, predictions)[0] if prediction}
    assert chosen == {"a": "a.nii.gz", "b": "b.nrrd", "c": "c.nii.gz", "d": "d.nii.gz"}


def test_compare_with_another_summary(
    dataset: Path, predictions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """--compare prints and writes the paired differences."""
    assert run(dataset / "labelsTr", predictions) == 0
    perfect = tmp_path / "perfect"
    assert run(dataset / "labelsTr", dataset / "labelsTr", "-o", perfect) == 0
    words = (dataset / "labelsTr", dataset / "labelsTr", "-o", perfect, "--compare", predictions / "summary.json")
    assert run(*words) == 0
    written = json.loads((perfect / "comparison.json").read_text())
    assert written["structures"]["1"]["Dice"]["mean"] == pytest.approx(0.25)
    assert "Wilcoxon" in capsys.readouterr().out


def test_without_surface(dataset: Path, predictions: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--no-surface leaves distances out of the table and null in the file."""
    assert run(dataset / "labelsTr", predictions, "--no-surface") == 0
    assert "HD95" not in capsys.readouterr().out.split("Empty masks")[0]
    assert load_report(predictions / "summary.json").foreground_mean["HD95"] is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{ref}"], "REFERENCE PREDICTION"),
        (["-d", "{data}", "{ref}", "{pred}"], "-d DATASET PREDICTION"),
        (["{ref}", "{pred}", "-f", "0"], "-f needs -d"),
        (["{ref}", "{pred}/none"], "does not exist"),
        (["{pred}/none", "{pred}"], "does not exist"),
        (["{ref}", "{data}"], "no prediction of any reference"),
        (["{ref}", "{pred}", "--tolerance", "-1"], "positive"),
        (["{ref}", "{pred}", "--tolerence", "1"], "did you mean --tolerance"),
    ],
)
def test_wrong_use_is_one_message_and_exit_code_2(
    dataset: Path, predictions: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each wrong command line says what is wrong."""
    filled = [w.format(ref=dataset / "labelsTr", pred=predictions, data=dataset) for w in words]
    assert main(filled) == 2
    assert message in capsys.readouterr().err


def test_dataset_json_without_labels_is_refused(tmp_path: Path) -> None:
    """A JSON file that declares no labels is named."""
    file = tmp_path / "dataset.json"
    file.write_text("{}")
    with pytest.raises(ConfigError, match="no labels"):
        load_label_spec(file)


def test_two_references_of_one_case_are_refused(dataset: Path, predictions: Path) -> None:
    """An ambiguous reference is an error, not a silent choice."""
    from samunet.pipeline.evaluate import label_files

    write(dataset / "labelsTr" / "a.nrrd", label_map())
    with pytest.raises(UsageError, match="same case"):
        label_files(dataset / "labelsTr")
    assert set(label_files(dataset / "labelsTr", ending=".nii.gz")) == {"a", "b", "c", "d"}


def test_help_imports_nothing_heavy() -> None:
    """--help answers without torch, scipy or nibabel, and the default tolerance is the library's."""
    code = (
        "import sys\nfrom samunet.cli.evaluate import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "sys.exit(','.join({'torch', 'scipy', 'nibabel', 'SimpleITK', 'distributed'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr == "\n"
    assert "--tolerance" in done.stdout
    assert build_parser().get_default("tolerance") == DEFAULT_TOLERANCE_MM


def test_cases_of_a_group_count_once(dataset: Path, predictions: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With case_groups.json beside dataset.json, intervals are over groups; one group alone has none."""
    for groups, shown in ((["p", "p", "q", "q"], "[0.875, 0.875]"), (["p"] * 4, "0.875")):
        (dataset / "case_groups.json").write_text(json.dumps(dict(zip("abcd", groups, strict=True))))
        assert run(dataset / "labelsTr", predictions) == 0
        printed = " ".join(capsys.readouterr().out.split())
        assert "over groups of cases" in printed
        assert shown in printed
        interval = load_report(predictions / "summary.json").foreground_mean_interval["Dice"]
        assert (interval.low is None) == (len(set(groups)) == 1)
