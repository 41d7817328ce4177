"""edit: answers of a model changed by MultEdit, measured, compared with fine-tuning, and exported.

Data flow: model + file of edits -> ``EditStudy`` -> a folder with report.html, causal.json (tables) and edits.json
(every number) -> with --out the edited model as a complete Hugging Face folder.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse import Namespace
from rich.console import Console
from rich.table import Table

from lightning_mm.causal.editing.files import EditFile, read_edits
from lightning_mm.causal.editing.metrics import Scorer
from lightning_mm.causal.editing.multedit import EditOptions
from lightning_mm.causal.editing.study import METHODS, Apply, EditStudy, LayerScore, Outcome, best
from lightning_mm.causal.editing.tables import details, tables
from lightning_mm.causal.editing.weight_edit import Edit, edited
from lightning_mm.causal.questions.question import Asker
from lightning_mm.cli.export import Parser, restored
from lightning_mm.cli.inspect import short
from lightning_mm.cli.model_source import Source
from lightning_mm.core.decisions import decide, log
from lightning_mm.core.errors import UserError
from lightning_mm.core.run_directory import RunDirectory, write_json
from lightning_mm.data.batch import Batch
from lightning_mm.data.datamodule import MMDataModule
from lightning_mm.data.rejected_samples import RejectedSamples
from lightning_mm.models.export.export import Origin, export_full
from lightning_mm.models.export.verify import Claim, prove, take_reference
from lightning_mm.models.handle import MultimodalModel
from lightning_mm.models.loading import Backbone, load_model
from lightning_mm.models.processor import load_processing
from lightning_mm.report.html import write_report

MOST_LAYERS = 12
"""So many are tried where the layer is chosen; of more, every second or third one."""


def edit(arguments: list[str]) -> int:
    """Give questions new answers by a closed-form change of one weight, and measure what else changed."""
    options = _parser().parse_args(arguments[1:])
    decide.clear()
    chosen = EditOptions(**{each.name: getattr(options, each.name) for each in fields(EditOptions)})
    out = _free(options.out)
    source = Source.of(options.model, options.checkpoint)
    file = _limited(read_edits(options.edits, options.image_root), options.limit)
    conversations = _conversations(options)
    run = RunDirectory.create(options.root, options.name or f"edit-{short(options.model)}")
    mm = _open(source)
    asker = Asker(mm.required_processor, options.prompt)
    scorer = Scorer(mm, asker, mm.device, options.max_new_tokens, options.num_unrelated)
    study = EditStudy(scorer, file, _batches(conversations, mm, options.conversations))
    scan, layer = _layer(study, options, chosen)
    outcomes = _outcomes(study, options, layer, chosen)
    made = tables(study, outcomes, scan, layer, chosen)
    _write(run, mm, study, outcomes, scan, layer, chosen, made)
    if out is not None:
        together = next(o for o in outcomes if o.apply == "together" and o.method == "MultEdit")
        _export(mm, together.edits[0], study, out, options.prove)
    write_json(run.decisions, [asdict(decision) for decision in decide])
    write_report(run.path)
    for table in made:
        Console().print(_shown(table))
    log.info("report: %s", run.report)
    return 0


def _parser() -> Parser:
    parser = Parser(prog="lightning-mm edit", description=edit.__doc__)
    parser.add_argument("model", type=str, help="Model folder or hub name, a run's folder, or a checkpoint of a run.")
    parser.add_argument("--edits", type=str, required=True, help="JSON or JSONL: questions with new answers.")
    parser.add_argument("--image_root", type=str | None, default=None, help="Folder of its pictures; its own if unset.")
    parser.add_argument("--limit", type=int | None, default=None, help="Only the first so many edits.")
    parser.add_argument(
        "--layer",
        type=int | Literal["auto"],
        default="auto",
        help="Which block's down projection; auto: the best for the first edits (--scan of them).",
    )
    parser.add_argument("--scan", type=int, default=4, help="Edits that layers are tried with.")
    parser.add_class_arguments(EditOptions)
    parser.add_argument(
        "--apply",
        type=Literal["each", "together", "both"],
        default="both",
        help="Measure each edit alone, all at once in one weight, or both.",
    )
    parser.add_argument("--control", type=bool, default=True, help="Fine-tune the same weight too, to compare.")
    parser.add_argument("--data", type=str | None, default=None, help="Conversations for the general task's loss.")
    parser.add_argument("--conversations", type=int, default=16, help="Most of them.")
    parser.add_argument("--num_unrelated", type=int, default=8, help="Unrelated questions asked after each edit.")
    parser.add_argument("--max_new_tokens", type=int, default=8, help="Longest answer that must stay.")
    parser.add_argument("--prompt", type=str, default="{question}", help="How questions are worded.")
    parser.add_argument("--checkpoint", type=str, default="last", help="Of a run: name in its checkpoints.")
    parser.add_argument("--out", type=str | None, default=None, help="Export the model with all edits to this folder.")
    parser.add_argument("--prove", type=bool, default=True, help="Compare the export's logits in a fresh process.")
    parser.add_argument("--root", type=str, default="runs", help="Folder of all runs.")
    parser.add_argument("--name", type=str | None, default=None, help="Name of the folder to make.")
    return parser


def _open(source: Source) -> MultimodalModel:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if source.run is not None and source.checkpoint is not None:
        module, data = restored(source.run, source.checkpoint, quantized=False)
        mm = replace(module.mm, processor=data.processing)
    else:
        model = load_model(Backbone(path=source.path))
        mm = MultimodalModel.of(model, load_processing(source.path), source.path)
    mm.model.eval().requires_grad_(False).to(device)
    return mm


def _limited(file: EditFile, limit: int | None) -> EditFile:
    if limit is not None and limit < 1:
        raise UserError(f"limit is {limit}.", "At least one edit is made.", "Give --limit 1 or more.")
    return EditFile(file.rewrites[:limit], file.staying, file.rejections, file.num_rows)


def _conversations(options: Namespace) -> MMDataModule | None:
    """Read before the model is loaded, so that a mistake in the file shows."""
    if options.data is None:
        return None
    data = MMDataModule(train=options.data, num_workers=0)
    data.samples("train")
    return data


def _batches(data: MMDataModule | None, mm: MultimodalModel, count: int) -> list[Batch]:
    if data is None:
        return []
    data.processor = mm.source
    return data.sample_batches(count, 1)


def _layer(study: EditStudy, options: Namespace, chosen: EditOptions) -> tuple[list[LayerScore], int]:
    layers = study.layers
    if options.layer != "auto":
        if options.layer not in layers:
            raise UserError(
                f"Layer {options.layer} cannot be edited.",
                "It has no plain MLP, or is the last one, which nothing reads at the constraint, or does not exist.",
                f"Name one of {', '.join(map(str, layers)) or 'none'}.",
            )
        return [], int(options.layer)
    if not layers:
        raise UserError("No layer can be edited.", "None has an MLP that ends in one linear module.", "Choose a model.")
    step = -(-len(layers) // MOST_LAYERS)
    scan = study.scan(layers[::step], chosen, max(1, options.scan))
    winner = best(scan)
    reason = f"best of {len(scan)} layers tried with {min(options.scan, len(study.cases))} edits: {winner.overall:.2f}"
    decide("edit.layer", winner.layer, reason)
    return scan, winner.layer


def _outcomes(study: EditStudy, options: Namespace, layer: int, chosen: EditOptions) -> list[Outcome]:
    ways: tuple[Apply, ...] = ("each", "together") if options.apply == "both" else (options.apply,)
    if options.out is not None and "together" not in ways:
        ways = (*ways, "together")
    if len(study.cases) == 1:
        ways = ("together",) if options.out is not None else ways[:1]
    methods = METHODS if options.control else METHODS[:1]
    return [study.tried(method, way, layer, chosen) for way in ways for method in methods]


def _write(
    run: RunDirectory,
    mm: MultimodalModel,
    study: EditStudy,
    outcomes: Sequence[Outcome],
    scan: Sequence[LayerScore],
    layer: int,
    chosen: EditOptions,
    made: Sequence[dict[str, Any]],
) -> None:
    told = details(study, outcomes, scan, layer, chosen)
    right = [each["right_before"] for each in told["edits"]]
    title = f"{len(study.cases)} edits of layer {layer}"
    kind = type(mm.model).__name__
    write_json(run.path / "edits.json", told)
    causal = {"title": title, "model": kind, "n_questions": len(right), "n_right": sum(map(bool, right))}
    write_json(run.path / "causal.json", {**causal, "tables": list(made)})
    write_json(run.path / "inspection.json", {"title": title, "model": kind, "labels": {}})
    ledger = RejectedSamples(1.0)
    ledger.num_rows = study.file.num_rows
    ledger.add([*study.file.rejections, *study.scorer.rejected])
    ledger.write(run.ledger)
    if len(ledger):
        log.warning("not asked: %s", ", ".join(f"{count} x {reason}" for reason, count in ledger.counts().items()))


def _free(out: str | None) -> Path | None:
    if out is not None and Path(out).exists() and not (Path(out).is_dir() and not any(Path(out).iterdir())):
        raise UserError(f"{out} is taken.", "An export never overwrites.", "Name another --out, or remove the folder.")
    return None if out is None else Path(out)


def _export(mm: MultimodalModel, edit: Edit, study: EditStudy, out: Path, proved: bool) -> None:
    questions = f"{len(study.cases)} questions"
    origin = Origin(mm.source, facts={"Edited": f"MultEdit of {questions} in {edit.module}"})
    out.parent.mkdir(parents=True, exist_ok=True)
    with (
        edited(mm.model, [edit]),
        tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as scratch,
    ):
        staged = Path(scratch) / out.name
        export_full(mm.model, mm.required_processor.processor, staged, origin)
        if proved:
            prove(Claim(staged, take_reference(mm.model, study.cases[0].target.asked.inputs)))
        staged.replace(out)
    log.info("exported: %s", out)


def _shown(table: dict[str, Any]) -> Table:
    shown = Table(title=table["title"], caption=table["note"])
    for column in table["columns"]:
        shown.add_column(column)
    for row in table["rows"]:
        shown.add_row(*(str(cell) for cell in row))
    return shown
