"""Images in, masks out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from samunet.artifacts.dataset import Case
from samunet.artifacts.prediction import CasePrediction, PredictionReport
from samunet.artifacts.prompts import CasePrompts, load_prompts
from samunet.core.config import save_schema
from samunet.core.errors import UsageError
from samunet.core.log import Reporter
from samunet.datasets.raw import list_cases
from samunet.imageio.formats import ending_of
from samunet.inference.export import predict_cases
from samunet.inference.predictor import Predictor


@dataclass(frozen=True)
class PredictionRequest:
    """What to predict with what.

    Args:
        input: Folder of images.
        output: Folder for masks.
        model_folder: ``results/DATASET/CONFIG__PRESET__WEIGHTS``.
        folds: Folds to average; None: all that are finished.
        checkpoint: "final" or "best".
        device: As for training.
        mirror: Average over mirrored views.
        save_probabilities: Write probabilities too.
        resume: Keep masks that exist.
        readers: Cases read ahead.
        writers: Masks written at the same time.
        prompts: prompts.json, for a promptable model.
        propagate: Follow prompted objects to the slices beside the marked ones.
    """

    input: Path
    output: Path
    model_folder: Path
    folds: list[str] | None = None
    checkpoint: str = "final"
    device: str = "auto"
    mirror: bool = True
    save_probabilities: bool = False
    resume: bool = False
    readers: int = 1
    writers: int = 1
    prompts: Path | None = None
    propagate: bool = True


def predict(request: PredictionRequest, *, reporter: Reporter) -> PredictionReport:
    """Predict every case of a folder; bad images are listed and do not stop the others.

    Raises:
        UsageError: If the input folder holds no image, or input and output are the same folder.
    """
    if not request.input.is_dir():
        raise UsageError("the input folder does not exist", file=request.input)
    if request.input.resolve() == request.output.resolve():
        raise UsageError("input and output are the same folder", file=request.input, todo="give another -o")
    prompts = None if request.prompts is None else load_prompts(request.prompts)
    predictor = Predictor.from_folder(
        request.model_folder,
        folds=request.folds,
        checkpoint=request.checkpoint,
        device=request.device,
        mirror=request.mirror,
    )
    predictor.check_prompts(given=prompts is not None)
    reporter.info(f"model {request.model_folder.name}, fold {', '.join(predictor.folds)}")
    plan = predictor.plan
    cases, findings = list_cases(request.input, num_channels=len(plan.channel_names), ending=plan.file_ending)
    if not cases and not findings:
        raise UsageError("the input folder holds no images", expected=f"*{plan.file_ending}", file=request.input)
    problems = {str(f.case or f.file): f.render() for f in findings}
    for name in sorted(set(prompts or ()) - {case.name for case in cases} - set(problems)):
        problems[name] = f"there are prompts for {name} but no image of that name in {request.input}"
    for text in problems.values():
        reporter.warn(text)
    request.output.mkdir(parents=True, exist_ok=True)
    results = _predict_all(predictor, [c for c in cases if c.name not in problems], prompts, request, reporter)
    results += [CasePrediction(case=name, status="failed", problem=text) for name, text in problems.items()]
    report = PredictionReport(
        model=request.model_folder.name,
        folds=tuple(predictor.folds),
        checkpoint=request.checkpoint,
        mirrored=request.mirror and prompts is None,
        dataset=plan.dataset,
        cases=tuple(sorted(results, key=lambda r: r.case)),
    )
    save_schema(report, request.output / "prediction.json")
    return report


def _predict_all(
    predictor: Predictor,
    cases: list[Case],
    prompts: dict[str, CasePrompts] | None,
    request: PredictionRequest,
    reporter: Reporter,
) -> list[CasePrediction]:
    """Predict the cases, grouped by the ending of their masks (that of their images)."""
    results = []
    endings: dict[str, list[Case]] = {}
    for case in cases:
        ending = ending_of(case.images[0])
        wanted = [ending, ".npz"] if request.save_probabilities else [ending]
        if request.resume and all((request.output / f"{case.name}{kind}").is_file() for kind in wanted):
            results.append(CasePrediction(case=case.name, status="kept"))
        else:
            endings.setdefault(ending, []).append(case)
    for ending, group in endings.items():
        outcomes = predict_cases(
            predictor,
            group,
            request.output,
            ending=ending,
            reporter=reporter,
            save_probabilities=request.save_probabilities,
            readers=request.readers,
            writers=request.writers,
            prompts=prompts,
            propagate=request.propagate,
        )
        for name, error in outcomes.items():
            if error is not None:
                reporter.warn(str(error))
            status = "predicted" if error is None else "failed"
            results.append(CasePrediction(case=name, status=status, problem=None if error is None else str(error)))
    return results
