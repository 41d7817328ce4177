"""trace: what causes a model's answers, on any model folder, run or checkpoint, without training.

Data flow: model + questions with constraints -> those that it answers right -> ``causal.study`` -> a folder with
report.html, layers.csv, traces.json, pictures.json and causal.json; the headlines are printed too.
"""

import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace
from rich.console import Console
from rich.table import Table

from lightning_mm.analysis.findings import Findings, Recorder
from lightning_mm.causal.effects.activation_patching import Tracing
from lightning_mm.causal.effects.knockout_curves import Knocking
from lightning_mm.causal.effects.layer_transplant import answered as transplanted_answers
from lightning_mm.causal.effects.layer_transplant import from_two, transplant_curve, transplant_rows, windows
from lightning_mm.causal.questions.files import read_questions
from lightning_mm.causal.questions.question import Asker
from lightning_mm.causal.questions.scoring import Answer, answered
from lightning_mm.causal.study import PARTS, Examined, Study, Studying, study
from lightning_mm.cli.export import Parser
from lightning_mm.cli.inspect import short
from lightning_mm.cli.model_source import Source, Subject, check_alike, opened
from lightning_mm.core.decisions import decide, log
from lightning_mm.core.errors import UserError
from lightning_mm.core.run_directory import RunDirectory, write_json
from lightning_mm.data.batch import Batch
from lightning_mm.data.rejected_samples import Ledger
from lightning_mm.data.sample import Rejection
from lightning_mm.layer_selection.select import AutoRange
from lightning_mm.report.html import write_report

HEADLINES = ("trace", "flow", "knockout", "ablation", "transplant")


def trace(arguments: list[str]) -> int:
    """Find what causes a model's answers: causal traces, flow, knockout, ablation, lens, transplantation."""
    options = _parser().parse_args(arguments[1:])
    options.images = None
    decide.clear()
    studying = _studying(options)
    read = read_questions(options.questions, options.image_root)
    sources = [Source.of(path, options.checkpoint) for path in _paths(options)]
    subjects = [opened(source, options, AutoRange()) for source in sources]
    check_alike(subjects)
    subject = subjects[0]
    asker = Asker(subject.data.processing, options.prompt)
    answers, rejected = _answers(subject, asker, read.questions, options)
    # Before the long part, so that a mistake in the file shows at once.
    batches = subject.conversations.sample_batches(options.batches, options.batch_size) if options.against else []
    if options.against and not batches:
        raise UserError(f"Nothing in {options.data} can be asked.", "No answer is left of it.", "Give other --data.")
    run = RunDirectory.create(options.root, options.name or f"trace-{short(options.model)}")
    began = time.perf_counter()
    examined = Examined(subject.model, subject.anatomy, subject.data.processing)
    with torch.autocast(subject.device.type, torch.bfloat16, enabled=options.bf16):
        found = study(examined, answers, studying, _pictures(run, answers))
        if len(subjects) > 1:
            _transplant(subject, subjects[1], found, batches)
    _write(run, found, time.perf_counter() - began, options, answers, subject)
    ledger = Ledger()
    ledger.add([*read.rejected, *rejected, *found.rejected])
    ledger.write(run.ledger)
    write_json(run.decisions, [asdict(decision) for decision in decide])
    write_report(run.path)
    Console().print(headlines(found.findings))
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
    parser.add_class_arguments(Tracing, "tracing")
    parser.add_class_arguments(Knocking, "knocking")
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


def _studying(options: Namespace) -> Studying:
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
    return Studying(
        parts=tuple(options.parts),
        corruption=options.corruption,
        tracing=Tracing(**vars(options.tracing)),
        knocking=Knocking(**vars(options.knocking)),
        shown=options.shown,
        seed=options.seed,
    )


def _paths(options: Namespace) -> list[str]:
    return [options.model, *([options.against] if options.against else [])]


def _answers(
    subject: Subject, asker: Asker, questions: Sequence[Any], options: Namespace
) -> tuple[list[Answer], list[Rejection]]:
    """Ask until enough is answered right.

    Raises:
        UserError: Nothing is.
    """
    wanted = [q for q in questions if not options.kinds or q.kind in options.kinds]
    if not wanted:
        kinds = ", ".join(sorted({q.kind for q in questions if q.kind})) or "none"
        raise UserError(f"No question is of the kinds {options.kinds}.", f"The file has {kinds}.", "Name those.")
    answers: list[Answer] = []
    rejected: list[Rejection] = []
    for question in wanted[: options.ask]:
        asked = asker.ask(question)
        if isinstance(asked, Rejection):
            rejected.append(asked)
            continue
        with torch.autocast(subject.device.type, torch.bfloat16, enabled=options.bf16):
            found, lost = answered(subject.model, subject.anatomy, asker, [asked], subject.device)
        answers, rejected = [*answers, *found], [*rejected, *lost]
        if sum(answer.right for answer in answers) >= options.limit:
            break
    right = sum(answer.right for answer in answers)
    long = sum(answer.right and answer.length > 1 for answer in answers)
    decide("causal.questions", f"{right} of {len(answers)} answered right", "only what a model knows can be traced")
    if long:
        decide("causal.answers", "the first token is followed", f"{long} of the right answers have several")
    if not right:
        first = rejected[0].reason if rejected else "none of the greedy answers is the given one"
        raise UserError(
            "The model answers no question right.",
            f"{len(answers)} were asked; {first}.",
            "Trace a model that knows the answers, or leave the answers out: its own are followed then.",
        )
    return answers, rejected


def _pictures(run: RunDirectory, answers: Sequence[Answer]) -> dict[str, str]:
    """Question id -> its picture's copy under pictures/, of those answered right: any of them may be drawn."""
    folder = run.path / "pictures"
    folder.mkdir(parents=True, exist_ok=True)
    copied: dict[Path, str] = {}
    names = {}
    for answer in answers:
        question = answer.asked.question
        if answer.right and len(question.images) == 1:
            source = question.images[0]
            if source not in copied:
                copied[source] = f"{len(copied):03d}{source.suffix.lower()}"
                shutil.copyfile(source, folder / copied[source])
            names[question.id] = copied[source]
    return names


def _transplant(base: Subject, tuned: Subject, found: Study, batches: Sequence[Batch]) -> None:
    """Curves of hybrids: layers of the tuned model in the first one."""
    hybrid = from_two(base.model, tuned.model, base.anatomy)
    untouched = transplanted_answers(base.model, base.anatomy, batches, base.device)
    for mode in ("cumulative", "sliding"):
        step = max(1, base.anatomy.num_layers // 15)
        chosen = windows(mode, base.anatomy.num_layers, width=2 * step + 1, step=step)
        curve = transplant_curve(base.model, hybrid, base.anatomy, batches, base.device, chosen)
        for site, rows in transplant_rows(mode, curve, untouched):
            for layer, estimate in rows.items():
                found.findings.add("causal", "transplant", site, [estimate], first=layer)


def _write(
    run: RunDirectory, found: Study, seconds: float, options: Namespace, answers: Sequence[Answer], subject: Subject
) -> None:
    from lightning_mm.report.figures.trace_maps import save_trace  # late: altair takes half a second to import

    Recorder(run).write(found.findings, 0.0, seconds)
    write_json(run.path / "traces.json", found.maps)
    write_json(run.path / "pictures.json", found.pictures)
    (run.path / "maps").mkdir(exist_ok=True)
    for number, item in enumerate(found.maps):
        save_trace(item, run.path / "maps" / f"{number:02d}-{item['site']}.png", subject.trained)
    right = sum(answer.right for answer in answers)
    told = {"title": " against ".join(map(short, _paths(options))), "model": subject.kind}
    write_json(
        run.path / "causal.json", {**told, "n_questions": len(answers), "n_right": right, "tables": found.tables}
    )
    write_json(run.path / "inspection.json", {**told, "labels": {"0": short(options.model)}})
    if subject.trained:
        trained = {"expression": "", "trained": list(subject.trained), "total": subject.anatomy.num_layers}
        write_json(run.census, {"layers": trained})


def headlines(found: Findings) -> Table:
    """The layer with the largest effect of every measure and place, as the console shows it."""
    table = Table(title="what causes the answer")
    for column in ("measure", "where", "strongest at layer", "value", "95 % interval", "chance", "n"):
        table.add_column(column, no_wrap=column in ("measure", "where"))
    for measure, site in dict.fromkeys((row.measure, row.site) for row in found.rows if row.measure in HEADLINES):
        rows = [row for row in found.profile(measure, site).values() if row.value is not None]
        if not rows:
            table.add_row(measure, site, "undefined")
            continue
        # Shares and accuracies are strongest where they are largest, effects where they are farthest from none.
        is_level = measure in ("flow", "transplant")
        best = max(
            rows, key=lambda row: (row.value or 0.0) if is_level else abs((row.value or 0.0) - (row.null or 0.0))
        )
        interval = "" if best.low is None or best.high is None else f"{best.low:.3g} to {best.high:.3g}"
        null = "" if best.null is None else f"{best.null:.3g}"
        table.add_row(measure, site, str(best.layer), f"{best.value:.3g}", interval, null, str(best.n))
    return table
