"""The verb trace: what causes a model's answers, on any model folder, run or checkpoint, without training.

Data flow: model + questions with constraints -> those that it answers correctly -> ``run_study`` -> a folder with
report.html, layers.csv, traces.json, pictures.json and causal.json; the strongest effects are printed.
"""

import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from jsonargparse import Namespace
from rich.console import Console
from rich.table import Table

from lightning_mm.analysis.findings import Findings, FindingsWriter
from lightning_mm.causal.effects.activation_patching import TraceConfig
from lightning_mm.causal.effects.knockout_curves import KnockoutConfig
from lightning_mm.causal.effects.layer_transplant import (
    add_transplant_curves,
)
from lightning_mm.causal.questions.files import read_questions
from lightning_mm.causal.questions.question import Question, QuestionEncoder
from lightning_mm.causal.questions.scoring import Answer, answer_until
from lightning_mm.causal.study import PARTS, StudyConfig, StudyResult, run_study
from lightning_mm.cli.parser import Parser
from lightning_mm.core.decisions import decision_log, log
from lightning_mm.core.errors import UserError
from lightning_mm.core.io import write_json
from lightning_mm.core.run_directory import RunDirectory
from lightning_mm.data.rejected_samples import RejectedSamples
from lightning_mm.layer_selection.select import AutoRange
from lightning_mm.report.html import write_report
from lightning_mm.verbs.model_source import (
    InspectedModel,
    ModelSource,
    check_same_architecture,
    model_label,
    open_model,
)

HEADLINES = ("trace", "flow", "knockout", "ablation", "transplant")


def trace(arguments: list[str]) -> int:
    """Find what causes a model's answers: causal traces, flow, knockout, ablation, lens, transplantation."""
    options = _parser().parse_args(arguments[1:])
    options.images = None
    config = _study_config(options)
    file = read_questions(options.questions, options.image_root)
    paths = [options.model, *([options.against] if options.against else [])]
    sources = [ModelSource.of(path, options.checkpoint) for path in paths]
    models = [open_model(source, options, AutoRange()) for source in sources]
    check_same_architecture(models)
    model = models[0]
    encoder = QuestionEncoder(model.data.processing, options.prompt)
    questions = _of_kinds(file.questions, options.kinds)[: options.ask]
    answers, rejected = answer_until(model.mm, encoder, questions, model.device, options.limit, options.bf16)
    # Before the long part, so that a mistake in the file shows at once.
    batches = model.conversations.sample_batches(options.batches, options.batch_size) if options.against else []
    if options.against and not batches:
        raise UserError(f"Nothing in {options.data} can be asked.", "No answer is left of it.", "Give other --data.")
    run = RunDirectory.create(options.root, options.name or f"trace-{model_label(options.model)}")
    began = time.perf_counter()
    mm = replace(model.mm, processor=model.data.processing)
    with torch.autocast(model.device.type, torch.bfloat16, enabled=options.bf16):
        result = run_study(mm, answers, config, _copy_images(run, answers))
        if len(models) > 1:
            add_transplant_curves(result.findings, mm, models[1].mm.model, batches)
    FindingsWriter(run).write(result.findings, 0.0, time.perf_counter() - began)
    title = {"title": " against ".join(map(model_label, paths)), "model": model.kind}
    _write(run, result, answers, title, model)
    write_json(run.path / "inspection.json", {**title, "labels": {"0": model_label(options.model)}})
    ledger = RejectedSamples()
    ledger.add([*file.rejected, *rejected, *result.rejected])
    ledger.write(run.ledger)
    write_json(run.decisions, [asdict(decision) for decision in decision_log()])
    write_report(run.path)
    Console().print(strongest_table(result.findings))
    log.info("report: %s", run.report)
    return 0


def _parser() -> Parser:
    parser = Parser(prog="lightning-mm trace", description=trace.__doc__)
    parser.add_argument("model", type=str, help="Model folder or hub name, a run's folder, or a checkpoint of a run.")
    parser.add_argument(
        "--questions",
        type=str,
        required=True,
        help="Questions with constraints: VQA-Constraints' CSV, or rows such as nano/data/constraints.json.",
    )
    parser.add_argument("--image_root", type=str | None, default=None, help="Folder of the pictures; else the file's.")
    parser.add_argument("--prompt", type=str, default="{question}", help="How a question is worded.")
    parser.add_argument("--kinds", type=list[str] | None, default=None, help="Only questions of these kinds.")
    parser.add_argument("--ask", type=int, default=256, help="Most questions that are asked.")
    parser.add_argument("--limit", type=int, default=48, help="Most right answers that are looked into.")
    parser.add_argument("--parts", type=list[str], default=list(PARTS), help="What to find out.")
    parser.add_argument("--corruption", type=str, default="token", help="token, symmetric, image, gaussian or grey.")
    parser.add_class_arguments(TraceConfig, "tracing")
    parser.add_class_arguments(KnockoutConfig, "knocking")
    parser.add_argument("--against", type=str | None, default=None, help="A tuned model whose layers are transplanted.")
    parser.add_argument("--data", type=str | None, default=None, help="Conversations that hybrids are asked.")
    parser.add_argument("--batches", type=int, default=8, help="Batches of them.")
    parser.add_argument("--shown", type=int, default=12, help="Questions whose maps and pictures are drawn.")
    parser.add_argument("--seed", type=int, default=0, help="Of corruptions.")
    parser.add_argument("--bf16", type=bool, default=False, help="Compute the model's forward pass in bfloat16.")
    parser.add_argument("--checkpoint", type=str, default="last", help="Of a run: name in its checkpoints.")
    parser.add_argument("--batch_size", type=int, default=8, help="Conversations per forward pass.")
    parser.add_argument("--max_length", type=int | None, default=None, help="Longest conversation, in tokens.")
    parser.add_argument("--root", type=str, default="runs", help="Folder of all runs.")
    parser.add_argument("--name", type=str | None, default=None, help="Name of the folder to make.")
    return parser


def _study_config(options: Namespace) -> StudyConfig:
    if options.prompt.count("{question}") != 1 or options.limit < 1 or options.ask < 1:
        raise UserError(
            "Nothing would be asked.",
            f"prompt is {options.prompt!r}, limit {options.limit}, ask {options.ask}.",
            "A prompt holds {question} once; limit and ask are 1 or more.",
        )
    if options.against and not options.data:
        raise UserError(
            "There is nothing to ask the hybrids.", "--against transplants layers.", "Give --data FILE, conversations."
        )
    return StudyConfig(
        parts=tuple(options.parts),
        corruption=options.corruption,
        trace=TraceConfig(**vars(options.tracing)),
        knockout=KnockoutConfig(**vars(options.knocking)),
        num_shown=options.shown,
        seed=options.seed,
    )


def _of_kinds(questions: Sequence[Question], kinds: Sequence[str] | None) -> list[Question]:
    """The questions of the given kinds; None: all."""
    wanted = [question for question in questions if not kinds or question.kind in kinds]
    if not wanted:
        known = ", ".join(sorted({question.kind for question in questions if question.kind})) or "none"
        raise UserError(f"No question is of the kinds {kinds}.", f"The file has {known}.", "Name those.")
    return wanted


def _copy_images(run: RunDirectory, answers: Sequence[Answer]) -> dict[str, str]:
    """Copy the images of correct answers under pictures/; returns question id -> file name."""
    folder = run.path / "pictures"
    folder.mkdir(parents=True, exist_ok=True)
    copied: dict[Path, str] = {}
    names = {}
    for answer in answers:
        question = answer.encoded.question
        if answer.right and len(question.images) == 1:
            source = question.images[0]
            if source not in copied:
                copied[source] = f"{len(copied):03d}{source.suffix.lower()}"
                shutil.copyfile(source, folder / copied[source])
            names[question.id] = copied[source]
    return names


def _write(
    run: RunDirectory, result: StudyResult, answers: Sequence[Answer], title: dict[str, str], model: InspectedModel
) -> None:
    """Write traces.json with its maps, pictures.json, causal.json, and which layers were trained."""
    from lightning_mm.report.figures.trace_maps import save_trace  # late: altair takes half a second to import

    write_json(run.path / "traces.json", result.maps)
    write_json(run.path / "pictures.json", result.pictures)
    (run.path / "maps").mkdir(exist_ok=True)
    for number, item in enumerate(result.maps):
        save_trace(item, run.path / "maps" / f"{number:02d}-{item['site']}.png", model.trained)
    num_correct = sum(answer.right for answer in answers)
    counts = {"n_questions": len(answers), "n_right": num_correct}
    write_json(run.path / "causal.json", {**title, **counts, "tables": result.tables})
    if model.trained:
        trained = {"expression": "", "trained": list(model.trained), "total": model.mm.layout.num_layers}
        write_json(run.census, {"layers": trained})


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
