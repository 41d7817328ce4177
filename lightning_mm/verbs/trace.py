"""Finds what causes a model's answers, without training: traces, flow, knockout, ablation, lens, transplantation.

Data flow: model + questions with constraints -> those that it answers correctly -> ``run_study`` -> ``TraceResult``,
and a folder with report.html, layers.csv, traces.json, pictures.json and causal.json where one is wanted.
"""

import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from lightning_mm.analysis.findings import Findings, FindingsWriter
from lightning_mm.causal.effects.layer_transplant import TransplantConfig, add_transplant_curves
from lightning_mm.causal.questions.files import QuestionFile, read_questions
from lightning_mm.causal.questions.question import Question, QuestionEncoder
from lightning_mm.causal.questions.scoring import Answer, answer_until
from lightning_mm.causal.study import StudyConfig, StudyResult, run_study
from lightning_mm.core.decisions import Decision
from lightning_mm.core.errors import UserError
from lightning_mm.core.io import write_json
from lightning_mm.core.layer_table import LayerRow
from lightning_mm.core.run_directory import RunDirectory
from lightning_mm.data.datamodule import MMDataModule
from lightning_mm.data.rejected_samples import RejectedSamples
from lightning_mm.layer_selection.select import AutoRange
from lightning_mm.report.html import write_report
from lightning_mm.verbs.inspected_model import InspectedModel, ReadingOptions, check_same_architecture, open_model
from lightning_mm.verbs.model_source import ModelLike, ModelSource, ProcessorLike
from lightning_mm.verbs.result import PrintedResult, open_decisions
from lightning_mm.verbs.rows import PathLike, Rows, as_file

HEADLINES = ("trace", "trace_effect", "flow", "knockout", "ablation", "transplant")


@dataclass(frozen=True, eq=False, repr=False)
class TraceResult(PrintedResult):
    """What ``trace`` found; ``print`` shows the strongest effects.

    Args:
        study: Averages by layer (``study.findings``), the trace of each question, maps and tables.
        answers: The questions that were asked, and what the model answered.
        rejected: Questions that were not used, with reasons.
        decisions: Automatic choices, with reasons.
        run: The folder that was written; None: none was wanted.
    """

    study: StudyResult
    answers: tuple[Answer, ...]
    rejected: RejectedSamples
    decisions: tuple[Decision, ...]
    run: RunDirectory | None = None

    @property
    def rows(self) -> list[LayerRow]:
        """One row per layer, measure and site, as layers.csv holds them."""
        return self.study.findings.rows

    @property
    def report(self) -> Path | None:
        """The report; None where no folder was wanted."""
        return None if self.run is None else self.run.report

    def profile(self, measure: str, site: str) -> dict[int, LayerRow]:
        """One measure at one site by layer, such as ('trace', 'mlp/constraint'); empty where it was not measured."""
        return self.study.findings.profile(measure, site)

    def tables(self) -> list[Table | str]:
        """The strongest effects."""
        return [strongest_table(self.study.findings)]


def trace(
    model: ModelLike,
    questions: PathLike | Rows | QuestionFile | Iterable[Question],
    *,
    against: ModelLike | None = None,
    data: PathLike | MMDataModule | None = None,
    processor: ProcessorLike | None = None,
    image_root: PathLike | None = None,
    prompt: str = "{question}",
    kinds: Sequence[str] | None = None,
    ask: int = 256,
    limit: int = 48,
    study: StudyConfig = StudyConfig(),  # noqa: B008  (frozen)
    transplant: TransplantConfig = TransplantConfig(),  # noqa: B008  (frozen)
    batches: int = 8,
    batch_size: int = 8,
    max_length: int | None = None,
    bf16: bool = False,
    checkpoint: str = "last",
    out: PathLike | None = None,
) -> TraceResult:
    """Find what causes a model's answers: causal traces, flow, knockout, ablation, lens, transplantation.

    Args:
        model: Model folder, hub name, run or checkpoint by its path; or a loaded model, which is left as it was.
        questions: File of questions with constraints, such rows, or what ``read_questions`` returns.
        against: A tuned model whose layers are transplanted.
        data: Conversations that the hybrids are asked, needed with ``against``.
        processor: Of a loaded model; None: the one beside the weights that it was loaded from.
        image_root: Folder of the pictures; None: that of the file, or the current one for rows.
        prompt: How a question is worded; holds {question} once.
        kinds: Only questions of these kinds; None: all.
        ask: Most questions that are asked.
        limit: Most right answers that are looked into.
        study: Which analyses are run, and how.
        transplant: Which windows of layers are transplanted, with ``against``.
        batches: Batches of conversations.
        batch_size: Conversations per forward pass.
        max_length: Longest conversation, in tokens; None: a run's own, else 2048.
        bf16: Whether to compute forward passes in bfloat16.
        checkpoint: Of a run: name in its checkpoints, 'last' by default.
        out: Folder to write, with report.html, layers.csv and JSON; None (default): nothing is written.

    Raises:
        UserError: There is no such model, no question can be asked, or none is answered correctly.
    """
    _check(prompt, limit, ask, against is not None, data is not None)
    options = ReadingOptions(data=data, image_root=image_root, batch_size=batch_size, max_length=max_length, bf16=bf16)
    with open_decisions() as decisions, ExitStack() as stack:
        file = _questions(questions, image_root, stack)
        named = [model] if against is None else [model, against]
        sources = [ModelSource.of(each, checkpoint, processor) for each in named]
        models = [open_model(source, options, AutoRange(), stack) for source in sources]
        check_same_architecture(models)
        first = models[0]
        mm = replace(first.mm, processor=first.data.processing)
        encoder = QuestionEncoder(first.data.processing, prompt)
        wanted = _of_kinds(file.questions, kinds)[:ask]
        answers, rejected = answer_until(first.mm, encoder, wanted, first.device, limit, bf16)
        # Before the long part, so that a mistake in the file shows at once.
        hybrids = first.conversations.sample_batches(batches, batch_size) if against is not None else []
        if against is not None and not hybrids:
            raise UserError(f"Nothing in {data} can be asked.", "No answer is left of it.", "Give other --data.")
        run = None if out is None else RunDirectory.create(Path(out).absolute().parent, Path(out).name)
        began = time.perf_counter()
        pictures = _pictures(answers)
        with torch.autocast(first.device.type, torch.bfloat16, enabled=bf16):
            found = run_study(mm, answers, study, pictures)
            if len(models) > 1:
                add_transplant_curves(found.findings, mm, models[1].mm.model, hybrids, transplant)
        seconds = time.perf_counter() - began
    ledger = RejectedSamples()
    ledger.add([*file.rejected, *rejected, *found.rejected])
    result = TraceResult(found, tuple(answers), ledger, tuple(decisions), run)
    if run is not None:
        _write(run, result, pictures, sources, first, seconds)
    return result


def _check(prompt: str, limit: int, ask: int, hybrids: bool, conversations: bool) -> None:
    if prompt.count("{question}") != 1 or limit < 1 or ask < 1:
        raise UserError(
            "Nothing would be asked.",
            f"prompt is {prompt!r}, limit {limit}, ask {ask}.",
            "A prompt holds {question} once; limit and ask are 1 or more.",
        )
    if hybrids and not conversations:
        raise UserError(
            "There is nothing to ask the hybrids.", "--against transplants layers.", "Give --data FILE, conversations."
        )


def _questions(
    given: PathLike | Rows | QuestionFile | Iterable[Question], image_root: PathLike | None, stack: ExitStack
) -> QuestionFile:
    """The questions of a file, of rows, or as they are."""
    if isinstance(given, QuestionFile):
        return given
    if not isinstance(given, (str, Path, Mapping)) and isinstance(given, Iterable):
        items: list[Any] = list(given)
        if items and all(isinstance(each, Question) for each in items):
            return QuestionFile(tuple(items), (), dict.fromkeys((each.id for each in items), "spans"))
        given = items
    file, root = as_file(given, image_root, "questions", stack)
    return read_questions(file, root)


def _of_kinds(questions: Sequence[Question], kinds: Sequence[str] | None) -> list[Question]:
    """The questions of the given kinds; None: all."""
    wanted = [question for question in questions if not kinds or question.kind in kinds]
    if not wanted:
        known = ", ".join(sorted({question.kind for question in questions if question.kind})) or "none"
        raise UserError(f"No question is of the kinds {kinds}.", f"The file has {known}.", "Name those.")
    return wanted


def _pictures(answers: Sequence[Answer]) -> dict[str, str]:
    """Question id -> file name of its image under pictures/, of questions with one that are answered correctly."""
    held: dict[Path, str] = {}
    names = {}
    for answer in answers:
        question = answer.encoded.question
        if answer.right and len(question.images) == 1:
            source = question.images[0]
            held.setdefault(source, f"{len(held):03d}{source.suffix.lower()}")
            names[question.id] = held[source]
    return names


def _write(
    run: RunDirectory,
    result: TraceResult,
    pictures: dict[str, str],
    sources: Sequence[ModelSource],
    model: InspectedModel,
    seconds: float,
) -> None:
    """Write all files of the run."""
    from lightning_mm.report.figures.trace_maps import save_trace  # late: altair takes half a second to import

    images = {answer.encoded.question.id: answer.encoded.question.images for answer in result.answers}
    (run.path / "pictures").mkdir(parents=True, exist_ok=True)
    for question, name in pictures.items():
        shutil.copyfile(images[question][0], run.path / "pictures" / name)
    study = result.study
    FindingsWriter(run).write(study.findings, 0.0, seconds)
    write_json(run.path / "traces.json", study.maps)
    write_json(run.path / "pictures.json", study.pictures)
    (run.path / "maps").mkdir(exist_ok=True)
    for number, item in enumerate(study.maps):
        save_trace(item, run.path / "maps" / f"{number:02d}-{item['site']}.png", model.trained)
    title = {"title": " against ".join(source.label for source in sources), "model": model.kind}
    counts = {"n_questions": len(result.answers), "n_right": sum(answer.right for answer in result.answers)}
    write_json(run.path / "causal.json", {**title, **counts, "tables": study.tables})
    if model.trained:
        trained = {"expression": "", "trained": list(model.trained), "total": model.mm.layout.num_layers}
        write_json(run.census, {"layers": trained})
    write_json(run.inspection, {**title, "labels": {"0": sources[0].label}})
    result.rejected.write(run.ledger)
    write_json(run.decisions, [asdict(decision) for decision in result.decisions])
    write_report(run.path)


def strongest_table(found: Findings) -> Table:
    """The layer with the largest effect of every measure and site, for the console."""
    table = Table(title="what causes the answer")
    for column in ("measure", "where", "strongest at layer", "value", "95 % interval", "chance", "n"):
        table.add_column(column, no_wrap=column in ("measure", "where"))
    for measure, site in dict.fromkeys((row.measure, row.site) for row in found.rows if row.measure in HEADLINES):
        rows = [row for row in found.profile(measure, site).values() if row.value is not None]
        if not rows:
            table.add_row(measure, site, "undefined")
            continue
        # Fractions and accuracies are strongest at their maximum, effects at their largest distance from the null.
        is_level = measure in ("flow", "transplant")
        best = max(
            rows, key=lambda row: (row.value or 0.0) if is_level else abs((row.value or 0.0) - (row.null or 0.0))
        )
        interval = "" if best.low is None or best.high is None else f"{best.low:.3g} to {best.high:.3g}"
        null = "" if best.null is None else f"{best.null:.3g}"
        table.add_row(measure, site, str(best.layer), f"{best.value:.3g}", interval, null, str(best.n))
    return table
