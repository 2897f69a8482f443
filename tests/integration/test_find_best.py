"""Two trained configurations compared, the best written down, and prediction that follows it."""

from __future__ import annotations

import weakref
from pathlib import Path

import nibabel
import numpy as np
import pytest
from scipy import ndimage

from samunet.artifacts.best import Best
from samunet.artifacts.quality import QualityReport
from samunet.artifacts.workspace import Workspace
from samunet.cli import find_best_configuration, predict
from samunet.core.config import load_schema
from samunet.core.files import read_json, write_json
from samunet.core.labels import LabelSpec
from samunet.core.log import SilentReporter
from samunet.datasets.raw import load_raw_dataset
from samunet.imageio import read_labels, read_volume
from samunet.inference.predictor import Predictor
from samunet.pipeline import candidate_scores
from samunet.pipeline.find_best import NO_FILTER_HELPS, NOT_TRIED, choose_filters
from samunet.pipeline.train import train
from samunet.pipeline.training_run import TrainingRequest
from samunet.preprocessing.runner import preprocess_dataset
from tests.samples import DATASET, install, make_plan, make_recipe, write_dataset

FINE, COARSE = "2d__auto__none", "2.5d__auto__none"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """2d with folds 0 and 1, 2.5d on a coarser grid with fold 0 only; hardly trained, so that masks are busy."""
    workspace = Workspace.locate(workspace=tmp_path_factory.mktemp("workspace"), environment={})
    folder = write_dataset(workspace, num_train=8)
    recipe = make_recipe(iterations=1, epochs=1, warmup_steps=1, learning_rate=1e-6, mirror_views=1)
    plan = make_plan(recipes={"none": {"cpu": recipe}})
    other = make_plan(recipes={"none": {"cpu": recipe}}, spacing=(None, 1.5, 1.5), context=1).configurations["2d"]
    plan = plan.model_copy(update={"configurations": {**plan.configurations, "2.5d": other}})
    install(workspace, plan, folder)
    store = workspace.store_folder(DATASET, plan.store_key("2.5d"))
    preprocess_dataset(load_raw_dataset(folder), plan, "2.5d", store, processes=1, reporter=SilentReporter())
    names = [f"case_{index}" for index in range(8)]
    splits = [{"train": names[:3], "val": names[3:]}, {"train": names[5:], "val": names[:5]}]
    write_json(workspace.splits_file(DATASET), splits)
    for configuration, fold in (("2d", "0"), ("2d", "1"), ("2.5d", "0")):
        train(
            TrainingRequest(DATASET, fold, configuration, weights="none", device="cpu", num_workers=0, seed=3),
            workspace,
            reporter=SilentReporter(),
        )
    return workspace


def command(workspace: Workspace, *flags: str) -> int:
    root = str(workspace.results.parent)
    return find_best_configuration.main([DATASET, "--device", "cpu", "--workspace", root, *flags])


def predicted(workspace: Workspace, output: Path, *flags: str) -> dict[str, np.ndarray]:
    """Masks of the test images by command."""
    source, root = workspace.raw / DATASET / "imagesTs", str(workspace.results.parent)
    words = ["-i", str(source), "-o", str(output), "-d", DATASET, "--device", "cpu", "--workspace", root, *flags]
    assert predict.main(words) == 0
    return {path.name[:6]: read_labels(path).data[0] for path in sorted(output.glob("*.nii.gz"))}


def best_of(workspace: Workspace) -> Best:
    return load_schema(Best, workspace.best_file(DATASET))


def test_candidates_are_compared_on_the_cases_they_share(trained: Workspace, capsys: pytest.CaptureFixture[str]):
    """Singles and their pair on fold 0's five cases; a single's masks are those of its run, scores those of masks."""
    assert command(trained) == 0
    best = best_of(trained)
    assert {candidate.models for candidate in best.candidates} == {(FINE,), (COARSE,), (COARSE, FINE)}
    assert best.folds == ("0",)
    assert best.cases == tuple(f"case_{index}" for index in range(3, 8))
    means = [candidate.dice.value for candidate in best.candidates]
    assert means == sorted(means, reverse=True)
    folder = trained.comparison_folder(DATASET)
    for model in (FINE, COARSE):
        validation = trained.results / DATASET / model / "fold_0" / "validation"
        for case in best.cases:
            ours, run = (nibabel.load(place / f"{case}.nii.gz") for place in (folder / model, validation))
            assert np.array_equal(ours.get_fdata(), run.get_fdata())
            assert np.array_equal(ours.affine, run.affine)
    assert list(folder.rglob("*.npy")) == []
    assert "chosen:" in capsys.readouterr().out


def test_a_pair_averages_probabilities_on_the_images_grid(trained: Workspace):
    """The pair's masks are the argmax of the mean of what both give on the image's own grid."""
    if not trained.best_file(DATASET).is_file():
        command(trained)
    case = best_of(trained).cases[0]
    volume = read_volume([trained.raw / DATASET / "imagesTr" / f"{case}_0000.nii.gz"])
    maps = []
    for model in (FINE, COARSE):
        predictor = Predictor.from_folder(trained.results / DATASET / model, folds=["0"], device="cpu")
        maps.append(predictor.predict(volume, with_probabilities=True).probabilities.astype(np.float32))
    expected = ((maps[0] + maps[1]) / 2).argmax(0)
    found = read_labels(trained.comparison_folder(DATASET) / f"{COARSE}+{FINE}" / f"{case}.nii.gz").data[0]
    assert np.array_equal(found, expected)


def test_a_comparison_continues_per_case(trained: Workspace, monkeypatch: pytest.MonkeyPatch):
    """Only the case whose scores are gone is predicted again; --overwrite predicts all; the choice stays the same."""
    command(trained)
    before = best_of(trained).model_dump(exclude={"provenance"})
    (trained.comparison_folder(DATASET) / "case_4.json").unlink()
    again: list[tuple[str, str]] = []
    original = candidate_scores._predict

    def counted(comparison, predictor, name, work, *folders):
        again.append((name, work.case.name))
        return original(comparison, predictor, name, work, *folders)

    monkeypatch.setattr(candidate_scores, "_predict", counted)
    assert command(trained) == 0
    assert sorted(again) == [(COARSE, "case_4"), (FINE, "case_4")]
    assert best_of(trained).model_dump(exclude={"provenance"}) == before
    assert command(trained, "-c", "2d", "--disable_ensembling", "-f", "1") == 0
    assert [model.folds for model in best_of(trained).models] == [("1",)]
    assert command(trained, "-f", "3") == 2
    assert command(trained, "--preset", "samed") == 2


def test_scores_never_stand_beside_other_masks(trained: Workspace, monkeypatch: pytest.MonkeyPatch):
    """A comparison with other settings that is killed midway leaves no scores of the masks that it has replaced."""
    words = ("-c", "2d", "-f", "0")
    assert command(trained, *words) == 0
    scores = set(trained.comparison_folder(DATASET).glob("case_*.json"))
    original = candidate_scores._predict

    def killed(*arguments, **options):
        original(*arguments, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(candidate_scores, "_predict", killed)
        assert command(trained, *words, "--disable_tta") == 130
    left = set(trained.comparison_folder(DATASET).glob("case_*.json"))
    assert len(left) == len(scores) - 1
    assert command(trained, *words) == 0


def test_one_model_is_loaded_at_a_time(trained: Workspace, monkeypatch: pytest.MonkeyPatch):
    """Each is gone before the next is loaded; in portions of two cases and of one, the scores are the same."""
    command(trained)
    before = best_of(trained).candidates
    loaded: list[weakref.ref[Predictor]] = []
    original = Predictor.from_folder

    def watched(*arguments, **options):
        assert all(one() is None for one in loaded)
        made = original(*arguments, **options)
        loaded.append(weakref.ref(made))
        return made

    monkeypatch.setattr(Predictor, "from_folder", watched)
    for limit, value, portions in (("MOST_CASES", 2, 3), ("MOST_BYTES", 1, 5)):
        loaded.clear()
        with monkeypatch.context() as patch:
            patch.setattr(candidate_scores, limit, value)
            assert command(trained, "--overwrite") == 0
        assert len(loaded) == 2 * portions
        assert best_of(trained).candidates == before
    loaded.clear()
    assert command(trained, "--overwrite", "-c", "2d", "-f", "0") == 0
    assert len(loaded) == 1
    assert list(trained.comparison_folder(DATASET).glob(".prob*")) == []


def test_what_killed_comparisons_left_goes_unless_one_is_running(trained: Workspace):
    """Probabilities without an owner are removed before anything is predicted; beside one that runs they may be its."""
    folder = trained.comparison_folder(DATASET)
    left = folder / ".probabilities-killed"

    def leave() -> None:
        left.mkdir(parents=True)
        (left / "case_3.npy").write_bytes(b"0" * 100)

    leave()
    with candidate_scores.running(folder):
        assert not left.exists()
        leave()
        assert command(trained) == 0
        assert left.exists()
    assert command(trained) == 0
    assert not left.exists()


def test_views_are_mirrored_as_they_were_when_compared(
    trained: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Compared without mirrored views, prediction leaves them out and says so; a flag overrides it in either way."""
    for compared, flags, expected in (
        ("--disable_tta", (), False),
        ("--disable_tta", ("--enable_tta",), True),
        (None, (), True),
        (None, ("--disable_tta",), False),
    ):
        command(trained, "-c", "2d", "-f", "0", *([compared] if compared else []))
        output = tmp_path / f"{compared}{len(flags)}"
        capsys.readouterr()
        predicted(trained, output, *flags)
        (line,) = [line for line in capsys.readouterr().out.splitlines() if "found best" in line]
        assert read_json(output / "prediction.json")["mirrored"] is expected
        assert f"mirrored views {'averaged' if expected else 'not averaged'}" in line
        assert ("though they were" in line) == bool(flags)
    command(trained, "-c", "2d", "-f", "0", "--disable_tta")
    predicted(trained, tmp_path / "named", "-c", "2d")
    assert read_json(tmp_path / "named" / "prediction.json")["mirrored"] is True
    both = ["-i", "a", "-o", "b", "-d", DATASET, "--disable_tta", "--enable_tta"]
    assert predict.main(both) == 2


def test_prediction_follows_a_pair_with_a_filter(
    trained: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Without being told: both models, the fold, the filter, said in one line; every mask on its image's exact grid."""
    command(trained)
    best = best_of(trained).model_dump(mode="json")
    known = {model: trained.results / DATASET / model for model in (FINE, COARSE)}
    best["models"] = [{"model": model, "folds": ["0"], "identities": {}} for model in known]
    best["filters"] = [{"structure": "ball", "kind": "largest", "least_mm3": 0.0, "reason": "planted"}]
    write_json(trained.best_file(DATASET), best)
    capsys.readouterr()
    masks = predicted(trained, tmp_path / "out", "--save_probabilities")
    lines = [line for line in capsys.readouterr().out.splitlines() if "found best" in line]
    assert len(lines) == 1
    assert "ball: largest component" in lines[0]
    plain = predicted(trained, tmp_path / "plain", "--no-postprocessing")
    members = [Predictor.from_folder(folder, folds=["0"], device="cpu") for folder in known.values()]
    changed = False
    for case, mask in masks.items():
        source = trained.raw / DATASET / "imagesTs" / f"{case}_0000.nii.gz"
        image, written = nibabel.load(source), nibabel.load(tmp_path / "out" / f"{case}.nii.gz")
        assert written.shape == image.shape
        assert np.array_equal(written.affine, image.affine)
        maps = [m.predict(read_volume([source]), with_probabilities=True).probabilities for m in members]
        mean = (maps[0].astype(np.float32) + maps[1]) / 2
        assert np.array_equal(plain[case], mean.argmax(0))
        assert np.allclose(np.load(tmp_path / "out" / f"{case}.npz")["probabilities"], mean, atol=1e-3)
        parts, _ = ndimage.label(plain[case] == 1, np.ones((3, 3, 3)))
        sizes = np.bincount(parts.ravel())[1:]
        expected = plain[case].copy()
        if sizes.size:
            expected[(parts > 0) & (parts != 1 + sizes.argmax())] = 0
        changed |= not np.array_equal(expected, plain[case])
        assert np.array_equal(mask, expected)
    report = read_json(tmp_path / "out" / "prediction.json")
    assert report["model"] == f"{FINE} + {COARSE}"
    assert report["filters"][0]["structure"] == "ball"
    assert read_json(tmp_path / "plain" / "prediction.json")["filters"] == []
    quality, unfiltered = (load_schema(QualityReport, tmp_path / name / "quality.json") for name in ("out", "plain"))
    assert quality.model == report["model"]
    assert quality.calibrated
    assert "before component filters" in quality.note
    assert [case.case for case in quality.cases] == list(masks)
    for case, before in zip(quality.cases, unfiltered.cases, strict=True):
        for value, (name, own) in enumerate(case.structures.items(), start=1):
            written, whole = (np.count_nonzero(part[case.case] == value) for part in (masks, plain))
            assert own.volume_ml == pytest.approx(written * 2 / 1000)
            assert own.signs.voxels == whole
            assert own.dice == before.structures[name].dice
            if whole:
                assert own.signs.models_agree is not None
                assert own.dice <= own.signs.models_agree + 1e-4
                assert own.low <= own.dice <= own.high
    assert changed, "the filter removed nothing, so the test shows nothing"


def test_a_filter_for_no_structure_is_refused(trained: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """A name with a typing error in best.json stops the prediction; nothing is written, and the names are said."""
    command(trained)
    best = best_of(trained).model_dump(mode="json")
    best["filters"] = [{"structure": "bal", "kind": "largest", "least_mm3": 0.0, "reason": "planted"}]
    write_json(trained.best_file(DATASET), best)
    source, root = trained.raw / DATASET / "imagesTs", str(trained.results.parent)
    words = ["-i", str(source), "-o", str(tmp_path / "out"), "-d", DATASET, "--device", "cpu", "--workspace", root]
    assert predict.main(words) == 2
    said = capsys.readouterr().err
    assert "a structure that the model does not have" in said
    assert "ball" in said
    assert not list((tmp_path / "out").glob("*.nii.gz"))


def test_explicit_words_override_what_was_found(trained: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """-c and --preset set it aside, -f only its folds; a model that is gone or trained again is said."""
    command(trained, "-c", "2.5d")
    assert best_of(trained).models[0].model == COARSE
    followed = predicted(trained, tmp_path / "a", "--no-postprocessing")
    named = predicted(trained, tmp_path / "b", "-c", "2d", "-f", "1")
    assert "found best" in capsys.readouterr().out
    own = Predictor.from_folder(trained.results / DATASET / FINE, folds=["1"], device="cpu")
    for case, mask in named.items():
        volume = read_volume([trained.raw / DATASET / "imagesTs" / f"{case}_0000.nii.gz"])
        assert np.array_equal(mask, own.predict(volume).labels)
    assert any(not np.array_equal(named[case], followed[case]) for case in named)
    assert read_json(tmp_path / "b" / "prediction.json")["folds"] == ["1"]
    best = best_of(trained).model_dump(mode="json")
    best["models"][0]["identities"] = {"0": "another"}
    write_json(trained.best_file(DATASET), best)
    predicted(trained, tmp_path / "c")
    assert "was trained again" in capsys.readouterr().err
    best["models"][0]["model"] = "3d__auto__none"
    write_json(trained.best_file(DATASET), best)
    source, root = trained.raw / DATASET / "imagesTs", str(trained.results.parent)
    assert predict.main(["-i", str(source), "-o", str(tmp_path / "d"), "-d", DATASET, "--workspace", root]) == 2
    assert "not there any more" in capsys.readouterr().err


def test_a_filter_is_chosen_where_it_helps(trained: Workspace, capsys: pytest.CaptureFixture[str]):
    """Masks with a planted speck in every case bring the ball's filter and no other; clean masks bring none."""
    command(trained, "-c", "2d", "-f", "0")
    folder = trained.comparison_folder(DATASET) / FINE
    for case in best_of(trained).cases:
        truth = nibabel.load(trained.raw / DATASET / "labelsTr" / f"{case}.nii.gz")
        labels = np.asarray(truth.dataobj).copy()
        labels[25, 29, 5] = 1
        nibabel.save(nibabel.Nifti1Image(labels, truth.affine, truth.header), folder / f"{case}.nii.gz")
    assert command(trained, "-c", "2d", "-f", "0") == 0
    assert {rule.structure for rule in best_of(trained).filters} == {"ball"}
    assert best_of(trained).filtered_dice.value == pytest.approx(1.0)
    for case in best_of(trained).cases:
        truth = trained.raw / DATASET / "labelsTr" / f"{case}.nii.gz"
        (folder / f"{case}.nii.gz").write_bytes(truth.read_bytes())
    assert command(trained, "-c", "2d", "-f", "0") == 0
    assert best_of(trained).filters == ()
    assert f"no component filter: {best_of(trained).filters_reason}" in capsys.readouterr().out
    assert best_of(trained).filters_reason == NO_FILTER_HELPS


def test_a_model_that_was_taught_with_validation_labels_is_left_out(
    trained: Workspace, capsys: pytest.CaptureFixture[str]
):
    """Its fold's cases.json says so; other folds of it are compared where only they are asked for."""
    file = trained.results / DATASET / FINE / "fold_0" / "cases.json"
    before = file.read_text()
    write_json(file, {**read_json(file), "labels_seen": ["case_3", "case_4"]})
    try:
        assert command(trained) == 0
        assert f"left out: {FINE}, whose weights were taught with the labels" in capsys.readouterr().err
        assert {candidate.models for candidate in best_of(trained).candidates} == {(COARSE,)}
        assert command(trained, "-c", "2d", "-f", "1") == 0
        assert command(trained, "-c", "2d") == 2
    finally:
        file.write_text(before)


def test_no_filter_is_tried_where_voxels_are_ignored() -> None:
    """What no stroke says is there would go without costing anything; the reason is written down."""
    spec = LabelSpec({"ball": (1,)}, ignore=2)
    assert choose_filters((), spec) == ((), None, NOT_TRIED)
