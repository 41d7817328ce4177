"""The verb edit: answers of a model changed by MultEdit, measured, compared with fine-tuning, and exported.

Data flow: model + file of edits -> ``EditStudy`` -> a folder with report.html, causal.json (tables) and edits.json
(all results) -> with --out the edited model as a complete Hugging Face folder.
"""

from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse import Namespace
from rich.console import Console
from rich.table import Table

from lightning_mm.causal.editing.files import read_edits
from lightning_mm.causal.editing.metrics import EditScorer
from lightning_mm.causal.editing.multedit import EditConfig
from lightning_mm.causal.editing.study import METHODS, Apply, EditStudy, LayerScore
from lightning_mm.causal.editing.tables import details, tables
from lightning_mm.causal.editing.weight_edit import WeightEdit, apply_edits
from lightning_mm.causal.questions.question import QuestionEncoder
from lightning_mm.cli.parser import Parser
from lightning_mm.core.decisions import decision_log, log
from lightning_mm.core.errors import UserError
from lightning_mm.core.io import staged_folder, write_json
from lightning_mm.core.run_directory import RunDirectory
from lightning_mm.data.batch import Batch
from lightning_mm.data.datamodule import MMDataModule
from lightning_mm.data.rejected_samples import RejectedSamples
from lightning_mm.models.export.export import Provenance, export_full, require_empty_output
from lightning_mm.models.export.verify import ExportCheck, take_reference, verify_export
from lightning_mm.models.handle import MultimodalModel
from lightning_mm.models.loading import Backbone, load_model
from lightning_mm.models.processor import load_processor
from lightning_mm.report.html import write_report
from lightning_mm.verbs.model_source import ModelSource, model_label
from lightning_mm.verbs.trained_run import load_run


def edit(arguments: list[str]) -> int:
    """Give questions new answers by a closed-form change of one weight, and measure what else changed."""
    options = _parser().parse_args(arguments[1:])
    config = EditConfig(**{each.name: getattr(options, each.name) for each in fields(EditConfig)})
    out = None if options.out is None else Path(options.out)
    if out is not None:
        require_empty_output(out, "Name another --out, or remove the folder.")
    source = ModelSource.of(options.model, options.checkpoint)
    file = read_edits(options.edits, options.image_root)
    if options.limit is not None:
        if options.limit < 1:
            raise UserError(f"limit is {options.limit}.", "At least one edit is made.", "Give --limit 1 or more.")
        file = replace(file, requests=file.requests[: options.limit])
    conversations = _conversations(options)
    run = RunDirectory.create(options.root, options.name or f"edit-{model_label(options.model)}")
    mm = _open_model(source)
    encoder = QuestionEncoder(mm.required_processor, options.prompt)
    scorer = EditScorer(mm, encoder, mm.device, options.max_new_tokens, options.num_unrelated)
    study = EditStudy(scorer, file, _batches(conversations, mm, options.conversations))
    scan: list[LayerScore] = []
    if options.layer == "auto":
        layer, scan = study.choose_layer(config, options.scan)
    else:
        layer = options.layer
        study.check_layer(layer)
    methods = METHODS if options.control else METHODS[:1]
    outcomes = [study.run(method, apply, layer, config) for apply in _ways(options, study) for method in methods]
    results = tables(study, outcomes, scan, layer, config)
    _write(run, study, details(study, outcomes, scan, layer, config), results)
    if out is not None:
        together = next(o for o in outcomes if o.apply == "together" and o.method == "MultEdit")
        _export(mm, together.edits[0], study, out, options.prove)
    write_json(run.decisions, [asdict(decision) for decision in decision_log()])
    write_report(run.path)
    for table in results:
        Console().print(_rich_table(table))
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
    parser.add_class_arguments(EditConfig)
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


def _open_model(source: ModelSource) -> MultimodalModel:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if source.run is not None and source.checkpoint is not None:
        module, data = load_run(source.run, source.checkpoint, quantized=False)
        mm = replace(module.mm, processor=data.processing)
    else:
        model = load_model(Backbone(path=source.path))
        mm = MultimodalModel.of(model, load_processor(source.path), source.path)
    mm.model.eval().requires_grad_(False).to(device)
    return mm


def _conversations(options: Namespace) -> MMDataModule | None:
    """Conversations for the general task's loss, read before the model is loaded: mistakes in the file show early."""
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


def _ways(options: Namespace, study: EditStudy) -> tuple[Apply, ...]:
    """How to apply the edits: ``each``, ``together`` or both; an export needs ``together``."""
    ways: tuple[Apply, ...] = ("each", "together") if options.apply == "both" else (options.apply,)
    if options.out is not None and "together" not in ways:
        ways = (*ways, "together")
    if len(study.cases) == 1:
        ways = ("together",) if options.out is not None else ways[:1]
    return ways


def _write(run: RunDirectory, study: EditStudy, results: dict[str, Any], shown: Sequence[dict[str, Any]]) -> None:
    """Write edits.json, causal.json, inspection.json and the ledger of what was not asked."""
    right = [each["right_before"] for each in results["edits"]]
    title = f"{len(study.cases)} edits of layer {results['layer']}"
    kind = type(study.mm.model).__name__
    write_json(run.path / "edits.json", results)
    causal = {"title": title, "model": kind, "n_questions": len(right), "n_right": sum(map(bool, right))}
    write_json(run.path / "causal.json", {**causal, "tables": list(shown)})
    write_json(run.path / "inspection.json", {"title": title, "model": kind, "labels": {}})
    ledger = RejectedSamples(1.0)
    ledger.num_rows = study.file.num_rows
    ledger.add([*study.file.rejections, *study.scorer.rejected])
    ledger.write(run.ledger)
    if len(ledger):
        log.warning("not asked: %s", ", ".join(f"{count} x {reason}" for reason, count in ledger.counts().items()))


def _export(mm: MultimodalModel, edit: WeightEdit, study: EditStudy, out: Path, verify: bool) -> None:
    """Export the edited model, verified in a fresh process before the folder appears."""
    origin = Provenance(mm.source, facts={"Edited": f"MultEdit of {len(study.cases)} questions in {edit.module}"})
    with apply_edits(mm.model, [edit]), staged_folder(out) as staged:
        export_full(mm.model, mm.required_processor.processor, staged, origin)
        if verify:
            verify_export(ExportCheck(staged, take_reference(mm.model, study.cases[0].target.encoded.inputs)))
    log.info("exported: %s", out)


def _rich_table(table: dict[str, Any]) -> Table:
    printed = Table(title=table["title"], caption=table["note"])
    for column in table["columns"]:
        printed.add_column(column)
    for row in table["rows"]:
        printed.add_row(*(str(cell) for cell in row))
    return printed
