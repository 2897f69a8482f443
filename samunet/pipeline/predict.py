"""Images in, masks out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from samunet.artifacts.best import ComponentFilter
from samunet.artifacts.dataset import Case
from samunet.artifacts.plan import Plan
from samunet.artifacts.prediction import CasePrediction, PredictionReport, PromptsUsed
from samunet.artifacts.prompts import CasePrompts, load_prompts
from samunet.core.config import load_schema, save_schema
from samunet.core.errors import UsageError
from samunet.core.files import sha256_file, write_text
from samunet.core.log import Reporter
from samunet.datasets.raw import list_cases
from samunet.imageio.formats import ending_of
from samunet.inference.ensemble import EnsemblePredictor
from samunet.inference.export import Finish, predict_cases
from samunet.inference.postprocess import apply_filters
from samunet.inference.predictor import Predictor
from samunet.pipeline.oracle import NAME_PART
from samunet.pipeline.quality import Judge, MaskWatch, save_quality

REPORT_FILE = "prediction.json"
ORACLE_MARK = "ORACLE.txt"


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
        others: Further model folders; the probabilities of all are averaged.
        filters: Which components of a structure its masks keep.
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
    others: tuple[Path, ...] = ()
    filters: tuple[ComponentFilter, ...] = ()

    @property
    def model(self) -> str:
        """Names of the model folders."""
        return " + ".join(folder.name for folder in (self.model_folder, *self.others))


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
    used = None if request.prompts is None else _prompts_used(request.prompts)
    if request.resume:
        _refuse_other_prompts(request.output, used)
    predictor = _load(request)
    predictor.check_prompts(given=prompts is not None)
    reporter.info(f"model {request.model}, fold {', '.join(predictor.folds)}")
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
    _mark(request.output, used)
    watch = MaskWatch(plan)
    results = _predict_all(predictor, [c for c in cases if c.name not in problems], prompts, request, watch, reporter)
    results += [CasePrediction(case=name, status="failed", problem=text) for name, text in problems.items()]
    report = PredictionReport(
        model=request.model,
        folds=tuple(predictor.folds),
        checkpoint=request.checkpoint,
        mirrored=request.mirror and prompts is None,
        prompts=used,
        filters=request.filters,
        dataset=plan.dataset,
        cases=tuple(sorted(results, key=lambda r: r.case)),
    )
    save_schema(report, request.output / REPORT_FILE)
    folders = (request.model_folder, *request.others)
    judge = Judge.of(predictor, folders, checkpoint=request.checkpoint, prompted=prompts is not None)
    kept = [result.case for result in results if result.status == "kept"]
    save_quality(judge, watch, request.output, model=request.model, kept=kept, reporter=reporter)
    return report


def _load(request: PredictionRequest) -> Predictor | EnsemblePredictor:
    """The models asked for: the average of one folder's folds, or of several folders."""
    members = [
        Predictor.from_folder(
            folder,
            folds=request.folds,
            checkpoint=request.checkpoint,
            device=request.device,
            mirror=request.mirror,
        )
        for folder in (request.model_folder, *request.others)
    ]
    return members[0] if len(members) == 1 else EnsemblePredictor(members)


def _finish(request: PredictionRequest, plan: Plan) -> Finish | None:
    """What is done to masks before they are written."""
    if not request.filters:
        return None
    labels = plan.label_spec
    return lambda mask, grid: apply_filters(mask, request.filters, labels, grid.voxel_volume_mm3)


def _prompts_used(file: Path) -> PromptsUsed:
    return PromptsUsed(file=file.name, sha256=sha256_file(file), oracle=NAME_PART in file.name.lower())


def _mark(output: Path, used: PromptsUsed | None) -> None:
    """Say in the folder itself, before the first mask, whether its masks answer prompts made from the reference."""
    mark = output / ORACLE_MARK
    if used is None or not used.oracle:
        mark.unlink(missing_ok=True)
    else:
        write_text(
            mark,
            f"Oracle: these masks answer {used.file} (SHA-256 {used.sha256}), prompts made from reference labels. They "
            "are no result of a user's prompts, nor of automatic segmentation.\n",
        )


def _refuse_other_prompts(output: Path, used: PromptsUsed | None) -> None:
    """Masks that are kept must answer the prompts given now.

    Raises:
        UsageError: If they answer others, or prompts made from the reference.
    """
    file, mark, wanted = output / REPORT_FILE, output / ORACLE_MARK, "" if used is None else used.sha256
    former = load_schema(PredictionReport, file).prompts if file.is_file() else used
    is_oracle = mark.is_file() and (not wanted or wanted not in mark.read_text())
    if is_oracle or ("" if former is None else former.sha256) != wanted:
        raise UsageError(
            "the masks in this folder answer other prompts, and would be kept",
            expected=f"{used.file}, SHA-256 {used.sha256[:12]}" if used else "no prompts",
            found=f"those in {mark if is_oracle else file}",
            file=output,
            todo="give another -o, or leave --continue_prediction out",
        )


def _predict_all(
    predictor: Predictor | EnsemblePredictor,
    cases: list[Case],
    prompts: dict[str, CasePrompts] | None,
    request: PredictionRequest,
    watch: MaskWatch,
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
            finish=_finish(request, predictor.plan),
            observe=watch,
        )
        for name, error in outcomes.items():
            if error is not None:
                reporter.warn(str(error))
            status = "predicted" if error is None else "failed"
            results.append(CasePrediction(case=name, status=status, problem=None if error is None else str(error)))
    return results
