"""How well the estimates of Dice rank the true Dice of masks, on validation cases as they are and degraded.

    python -m benchmarks.quality --data RAW/Dataset004_Hippocampus --run RESULTS/Dataset004_Hippocampus/2d__auto__none

Every validation case of a finished fold is predicted as it is and with four artefacts of random strength (noise, blur,
another contrast, a cut field of view), so that Dice spreads. What the model says about each mask and its true Dice are
written down as they come; a second call goes on where the first stopped. Then half of the cases calibrate, only as they
are, and the other half is judged, and the other way round: no mask is judged by a calibration that has seen its case,
or another of its group.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
from batchgenerators.augmentations.color_augmentations import augment_gamma
from batchgenerators.augmentations.noise_augmentations import augment_gaussian_noise
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter
from scipy.stats import mannwhitneyu, pearsonr, spearmanr

from benchmarks.cells import RESULTS, stored
from samunet.artifacts.checkpoint import ENDING, read_manifest
from samunet.artifacts.dataset import Case
from samunet.artifacts.quality import Observation, StructureSigns
from samunet.artifacts.workspace import fold_folder
from samunet.core.files import write_json
from samunet.core.volume import Volume
from samunet.datasets.raw import load_raw_dataset
from samunet.evaluation.calibration import SIGNS, estimate_dice, fit_calibration
from samunet.imageio import read_labels, read_volume
from samunet.inference.familiarity import intensity_ranges, training_facts, unfamiliar_image
from samunet.inference.predictor import Predictor
from samunet.pipeline.candidate_scores import case_dice
from samunet.pipeline.provenance import describe
from samunet.pipeline.training_run import CASES_FILE, RunCases

TABLE = "quality"
CLEAN = "as it is"
ARTEFACTS = ("noise", "blur", "contrast", "field of view")
BAD_DICE = 0.7
WORST_SHARE = 0.2


@dataclass(frozen=True)
class Judged:
    """A mask with its true and its estimated Dice, and the half of the cases it belongs to."""

    condition: str
    half: int
    dice: float
    estimate: float
    inside: bool | None
    signs: StructureSigns


def main() -> None:
    """Predict what is missing, write the summary, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="raw dataset folder")
    parser.add_argument("--run", type=Path, help="model folder with a finished fold")
    parser.add_argument("--fold", default="0")
    parser.add_argument("--degraded", type=int, metavar="N", help="degrade only so many of the cases, drawn once")
    parser.add_argument("--work", type=Path, default=Path("samunet_workspace") / TABLE, help="for what is predicted")
    parser.add_argument("--table", action="store_true", help="only print the table")
    options = parser.parse_args()
    file = RESULTS / f"{TABLE}.json"
    results = stored(file)
    if not options.table:
        name = f"{options.data.name} {options.run.name} fold {options.fold}"
        rows = predict_rows(options.data, options.run, options.fold, options.work / f"{name}.jsonl", options.degraded)
        provenance = {key: value for key, value in describe().items() if key not in ("command", "started")}
        manifest = read_manifest(fold_folder(options.run, options.fold) / f"checkpoint_final{ENDING}")
        trained = {"training_minutes": round(manifest.minutes, 2), "steps": manifest.steps, "seed": manifest.seed}
        groups = load_raw_dataset(options.data).groups
        results[name] = {**summarise(rows, groups), **trained, "provenance": provenance}
        write_json(file, dict(sorted(results.items())))
    print(table(results))


def predict_rows(data: Path, run: Path, fold: str, file: Path, degraded: int | None) -> list[dict[str, Any]]:
    """One row per case and condition, predicted where the file lacks it.

    Args:
        data: Raw dataset folder.
        run: Model folder.
        fold: Finished fold.
        file: Of the rows.
        degraded: How many cases are degraded too; None for all.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    done = {(row["case"], row["condition"]) for row in rows}
    names = RunCases.read(fold_folder(run, fold) / CASES_FILE)
    cases = {case.name: case for case in load_raw_dataset(data).training}
    drawn = np.random.default_rng(1).permutation(np.array(names.validation))[:degraded].tolist()
    pairs = [(CLEAN, name) for name in names.validation] + [(c, name) for name in drawn for c in ARTEFACTS]
    wanted = [(condition, cases[name]) for condition, name in pairs if (name, condition) not in done]
    if not wanted:
        return rows
    predictor = Predictor.from_folder(run, folds=[fold])
    trained = [cases[name] for name in names.trained]
    records = [predictor.preprocess(read_volume(case.images), name=case.name).record for case in trained]
    ranges = intensity_ranges(records, predictor.plan.channel_names)
    facts = training_facts(predictor.fingerprint, predictor.plan, ranges, cases=names.trained)
    with file.open("a") as stream:
        for condition, case in wanted:
            row = {"case": case.name, "condition": condition, **_row(predictor, facts, case, condition)}
            stream.write(json.dumps(row) + "\n")
            stream.flush()
            rows.append(row)
    return rows


def _row(predictor: Predictor, facts: Any, case: Case, condition: str) -> dict[str, Any]:
    assert case.label is not None
    image, labels = read_volume(case.images), read_labels(case.label)
    image, truth = degrade(image, labels.data[0], condition, seed=crc32(f"{case.name} {condition}".encode()))
    prepared = predictor.preprocess(image, name=case.name)
    restored = predictor.predict_prepared(prepared, with_signs=True)
    flags = unfamiliar_image(facts, image.geometry, prepared.record, predictor.plan)
    assert restored.signs is not None
    return {
        "dice": case_dice(truth, restored.labels, predictor.plan.label_spec, image.geometry),
        "signs": {name: signs.model_dump(mode="json") for name, signs in restored.signs.items()},
        "flags": [str(flag) for flag in flags],
    }


def degrade(image: Volume, labels: NDArray[Any], condition: str, *, seed: int) -> tuple[Volume, NDArray[Any]]:
    """An image with an artefact of random strength, and its reference.

    Args:
        image: (C, Z, Y, X).
        labels: (Z, Y, X).
        condition: One of ARTEFACTS, or CLEAN for none.
        seed: Of strength and noise.
    """
    draw = np.random.default_rng(seed)
    data = image.data.astype(np.float32)
    np.random.seed(seed)  # noqa: NPY002 - batchgenerators draws from the global generator
    if condition == "noise":
        deviation = draw.uniform(0.1, 1.5) * float(data.std())
        return image.with_data(augment_gaussian_noise(data, noise_variance=(deviation, deviation))), labels
    if condition == "blur":
        width = draw.uniform(0.5, 3.0)
        return image.with_data(np.stack([gaussian_filter(channel, width) for channel in data])), labels
    if condition == "contrast":
        return image.with_data(augment_gamma(data, gamma_range=(0.25, 4.0), per_channel=True)), labels
    if condition == "field of view":
        axis, share = int(draw.integers(1, 3)), draw.uniform(0.2, 0.5)
        start, stop = [0, 0, 0], list(labels.shape)
        stop[axis] = max(8, round(labels.shape[axis] * (1 - share)))
        window = tuple(slice(a, b) for a, b in zip(start, stop, strict=True))
        return Volume(data[(slice(None), *window)], image.geometry.crop(start, stop)), labels[window]
    return image, labels


def summarise(rows: Sequence[Mapping[str, Any]], groups: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Scores of the estimates on all masks as they are, on all masks, and per artefact.

    Args:
        rows: As :func:`predict_rows` gives them.
        groups: Case to group.
    """
    judged = judge(rows, groups)
    parts = {CLEAN: [j for j in judged if j.condition == CLEAN], "all": judged}
    parts |= {name: [j for j in judged if j.condition == name] for name in ARTEFACTS}
    flagged = {
        name: float(np.mean([bool(row["flags"]) for row in rows if row["condition"] == name]))
        for name in (CLEAN, *ARTEFACTS)
    }
    return {
        "cases": len({row["case"] for row in rows}),
        "scores": {name: scores(part) for name, part in parts.items()},
        "flagged_images": flagged,
    }


def judge(rows: Sequence[Mapping[str, Any]], groups: Mapping[str, str] | None = None) -> list[Judged]:
    """Every mask with the estimate of a calibration on the clean masks of the other half of the cases.

    Args:
        rows: As :func:`predict_rows` gives them.
        groups: Case to group, which is never divided.
    """
    unit = {row["case"]: (groups or {}).get(row["case"], row["case"]) for row in rows}
    names = sorted(set(unit.values()))
    order = np.random.default_rng(0).permutation(len(names))
    side_of = {names[place]: index % 2 for index, place in enumerate(order)}
    half = {case: side_of[name] for case, name in unit.items()}
    judged = []
    for side in (0, 1):
        seen = [
            Observation(case=row["case"], structure=name, dice=dice, signs=StructureSigns(**row["signs"][name]))
            for row in rows
            for name, dice in row["dice"].items()
            if row["condition"] == CLEAN and half[row["case"]] != side and dice is not None
        ]
        fits = fit_calibration(seen, groups)
        for row in rows:
            for name, dice in row["dice"].items():
                if half[row["case"]] != side or dice is None:
                    continue
                signs = StructureSigns(**row["signs"][name])
                value, low, high = estimate_dice(fits, name, signs)
                inside = None if low is None or high is None else low <= dice <= high
                judged.append(Judged(row["condition"], side, dice, value or 0.0, inside, signs))
    return judged


def scores(masks: Sequence[Judged]) -> dict[str, Any]:
    """How well estimates rank and meet the true Dice, and how well each sign alone ranks it.

    Each half is scored on its own and the mean of both reported: what calibrates one half is the other's level, so a
    half of good masks gets low estimates and the other way round, and pooled they would rank worse than either.
    """
    inside = [mask.inside for mask in masks if mask.inside is not None]
    halves = [[mask for mask in masks if mask.half == side] for side in (0, 1)]
    each = [_scores(half) for half in halves if half]
    result: dict[str, Any] = {"masks": len(masks), "dice": _spread(np.array([mask.dice for mask in masks]))}
    result |= {name: _mean([own[name] for own in each]) for name in each[0]}
    signs = {name: _mean([_rank_of_sign(half, name) for half in halves]) for name in SIGNS}
    return result | {"inside_interval": float(np.mean(inside)) if inside else None, "spearman_of_signs": signs}


def _scores(masks: Sequence[Judged]) -> dict[str, float | None]:
    dice, estimates = (np.array([getattr(mask, name) for mask in masks]) for name in ("dice", "estimate"))
    return {
        "spearman": _rank(estimates, dice),
        "pearson": float(pearsonr(estimates, dice).statistic) if _vary(estimates, dice) else None,
        "mean_absolute_error": float(np.abs(estimates - dice).mean()),
        "auroc_bad": auroc(estimates, dice < BAD_DICE),
        "auroc_worst": auroc(estimates, dice <= np.quantile(dice, WORST_SHARE)),
    }


def _rank_of_sign(masks: Sequence[Judged], name: str) -> float | None:
    known = [mask for mask in masks if getattr(mask.signs, name) is not None]
    return _rank(np.array([getattr(mask.signs, name) for mask in known]), np.array([mask.dice for mask in known]))


def _mean(values: Sequence[float | None]) -> float | None:
    """Of those that exist."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def auroc(estimates: NDArray[Any], bad: NDArray[np.bool_]) -> float | None:
    """Probability that a bad mask has a lower estimate than another; None where all are of one kind."""
    if bad.all() or not bad.any():
        return None
    return float(mannwhitneyu(estimates[~bad], estimates[bad]).statistic / (bad.sum() * (~bad).sum()))


def _rank(first: NDArray[Any], second: NDArray[Any]) -> float | None:
    return float(spearmanr(first, second).statistic) if _vary(first, second) else None


def _vary(*columns: NDArray[Any]) -> bool:
    return all(len(column) > 2 and np.ptp(column) > 0 for column in columns)


def _spread(dice: NDArray[Any]) -> list[float]:
    return [round(float(value), 4) for value in np.quantile(dice, (0, 0.25, 0.5, 0.75, 1))]


def table(results: Mapping[str, Any]) -> str:
    """Markdown: one line per run and condition."""
    head = ["run", "masks of", "number", "median Dice", "Spearman", "Pearson", "mean error", "AUROC < 0.7"]
    head += ["AUROC worst fifth", "inside the interval", "images flagged"]
    lines = [_line(head), _line(["---"] * len(head))]
    for run, content in results.items():
        for condition, own in content["scores"].items():
            names = ("spearman", "pearson", "mean_absolute_error", "auroc_bad", "auroc_worst", "inside_interval")
            numbers = [own[name] for name in names] + [content["flagged_images"].get(condition)]
            cells = ["" if number is None else f"{number:.3f}" for number in numbers]
            lines.append(_line([run, condition, own["masks"], f"{own['dice'][2]:.3f}", *cells]))
    return "\n".join(lines)


def _line(values: Sequence[object]) -> str:
    return "| " + " | ".join(str(value) for value in values) + " |"


if __name__ == "__main__":
    main()
