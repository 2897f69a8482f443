"""Images in, masks out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from samunet.artifacts.best import ComponentFilter
from samunet.artifacts.dataset import Case
from samunet.artifacts.plan import Plan
from samunet.artifacts.prediction import CasePrediction, ModelUsed, PredictionReport, PromptsUsed
from samunet.artifacts.prompts import CasePrompts, load_prompts
from samunet.core.config import save_schema
from samunet.core.errors import UsageError
from samunet.core.files import sha256_file, write_text
from samunet.core.log import Reporter
from samunet.datasets.findings import Finding
from samunet.datasets.raw import list_cases
from samunet.imageio.formats import ending_of
from samunet.inference.ensemble import EnsemblePredictor
from samunet.inference.export import Finish, predict_cases
from samunet.inference.postprocess import apply_filters
from samunet.inference.predictor import Predictor
from samunet.pipeline.continuation import REPORT_FILE, files_of, masks_to_keep
from samunet.pipeline.oracle import NAME_PART
from samunet.pipeline.quality import Judge
from samunet.pipeline.quality_files import QualityLog
from samunet.planners.fingerprint import inputs_hash

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
        resume: Keep masks that the same models made in the same way.
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

    What decides the masks stands in the folder before the first of them, and each one's estimate before it does, so
    that a run that is interrupted can be continued.

    Raises:
        UsageError: If the input folder holds no image, input and output are the same folder, or masks would be kept
            that were made in another way.
    """
    if not request.input.is_dir():
        raise UsageError("the input folder does not exist", file=request.input)
    if request.input.resolve() == request.output.resolve():
        raise UsageError("input and output are the same folder", file=request.input, todo="give another -o")
    prompts = None if request.prompts is None else load_prompts(request.prompts)
    predictor = _load(request, reporter)
    predictor.check_prompts(given=prompts is not None)
    reporter.info(f"model {request.model}, fold {', '.join(predictor.folds)}")
    plan = predictor.plan
    _check_filters(request.filters, plan)
    listed, findings = list_cases(request.input, num_channels=len(plan.channel_names), ending=plan.file_ending)
    if not listed and not findings:
        raise UsageError("the input folder holds no images", expected=f"*{plan.file_ending}", file=request.input)
    problems = _problems(findings, reporter)
    for name in sorted(set(prompts or ()) - {case.name for case in listed} - set(problems)):
        problems[name] = f"there are prompts for {name} but no image of that name in {request.input}"
    for text in problems.values():
        reporter.warn(text)
    cases = [case for case in listed if case.name not in problems]
    run = _describe(request, predictor)
    sources = {case.name: inputs_hash([case]) for case in cases}
    kept: frozenset[str] = frozenset()
    if request.resume:
        probabilities = request.save_probabilities
        kept = masks_to_keep(
            run, cases, request.output, sources=sources, with_probabilities=probabilities, reporter=reporter
        )
    results = [CasePrediction(case=name, status="failed", problem=text) for name, text in problems.items()]
    results += [CasePrediction(case=name, status="kept", source=sources[name]) for name in kept]
    judge = Judge.of(
        predictor,
        (request.model_folder, *request.others),
        checkpoint=request.checkpoint,
        prompts=prompts,
        filtered=bool(request.filters),
        reporter=reporter,
    )
    waiting = [case for case in cases if case.name not in kept]
    _prepare(run, results, waiting, request.output, sources)
    log = QualityLog(judge, request.output, model=request.model, kept=kept, reporter=reporter)
    done = _predict_all(predictor, waiting, prompts, request, log, reporter)
    results += [result.model_copy(update={"source": sources[result.case]}) for result in done]
    report = _save(run, results, request.output)
    log.close([result.case for result in results if result.status != "failed"])
    return report


def _problems(findings: Sequence[Finding], reporter: Reporter) -> dict[str, str]:
    """Case to what is wrong with its files; warnings, which concern no case, are passed on."""
    problems: dict[str, list[str]] = {}
    for finding in findings:
        if finding.severity == "warning":
            reporter.warn(finding.render())
        else:
            problems.setdefault(str(finding.case or finding.file), []).append(finding.render())
    return {name: "\n".join(texts) for name, texts in problems.items()}


def _describe(request: PredictionRequest, predictor: Predictor | EnsemblePredictor) -> PredictionReport:
    """What decides the masks of a run, without its cases."""
    members = predictor.predictors if isinstance(predictor, EnsemblePredictor) else [predictor]
    folders = (request.model_folder, *request.others)
    prompted = request.prompts is not None
    return PredictionReport(
        model=request.model,
        models=tuple(
            ModelUsed(model=folder.name, identities=member.identities)
            for folder, member in zip(folders, members, strict=True)
        ),
        folds=tuple(predictor.folds),
        checkpoint=request.checkpoint,
        mirrored=request.mirror and not prompted,
        prompts=None if request.prompts is None else _prompts_used(request.prompts),
        propagated=request.propagate and prompted,
        filters=request.filters,
        dataset=predictor.plan.dataset,
        cases=(),
    )


def _prepare(
    run: PredictionReport,
    results: Sequence[CasePrediction],
    waiting: Sequence[Case],
    output: Path,
    sources: Mapping[str, str],
) -> None:
    """Say in the folder what its masks will be; masks that stand where new ones will are deleted before that."""
    output.mkdir(parents=True, exist_ok=True)
    for case in waiting:
        for file in files_of(case, output, with_probabilities=True):
            file.unlink(missing_ok=True)
    _mark(output, run.prompts)
    pending = [CasePrediction(case=case.name, status="pending", source=sources[case.name]) for case in waiting]
    _save(run, [*results, *pending], output)


def _save(run: PredictionReport, results: Sequence[CasePrediction], output: Path) -> PredictionReport:
    report = run.model_copy(update={"cases": tuple(sorted(results, key=lambda result: result.case))})
    save_schema(report, output / REPORT_FILE)
    return report


def _load(request: PredictionRequest, reporter: Reporter) -> Predictor | EnsemblePredictor:
    """The models asked for: the average of one folder's folds, or of several folders."""
    folders = (request.model_folder, *request.others)
    members = []
    for folder in folders:
        members.append(
            Predictor.from_folder(
                folder,
                folds=request.folds,
                checkpoint=request.checkpoint,
                device=request.device,
                mirror=request.mirror,
                reporter=reporter,
            )
        )
        if len(folders) > 1:
            members[-1].rest()
    return members[0] if len(members) == 1 else EnsemblePredictor(members)


def _check_filters(filters: Sequence[ComponentFilter], plan: Plan) -> None:
    names = plan.label_spec.names
    unknown = [rule.structure for rule in filters if rule.structure not in names]
    if unknown:
        raise UsageError(
            "a component filter is for a structure that the model does not have",
            expected=", ".join(names),
            found=", ".join(unknown),
            todo="correct best.json, or predict with --no-postprocessing",
        )


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


def _predict_all(
    predictor: Predictor | EnsemblePredictor,
    cases: list[Case],
    prompts: dict[str, CasePrompts] | None,
    request: PredictionRequest,
    log: QualityLog,
    reporter: Reporter,
) -> list[CasePrediction]:
    """Predict the cases, grouped by the ending of their masks (that of their images)."""
    results = []
    endings: dict[str, list[Case]] = {}
    for case in cases:
        endings.setdefault(ending_of(case.images[0]), []).append(case)
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
            observe=log,
        )
        for name, error in outcomes.items():
            if error is not None:
                reporter.warn(str(error))
            status = "predicted" if error is None else "failed"
            results.append(CasePrediction(case=name, status=status, problem=None if error is None else str(error)))
    return results
