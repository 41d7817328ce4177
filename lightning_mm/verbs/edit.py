"""Changes answers of a model by MultEdit, measures what else changed, compares with fine-tuning, and exports the model.

Data flow: model + edits -> ``EditStudy`` -> ``EditResult``, a folder with report.html, causal.json (tables) and
edits.json (all results) where one is wanted, and the edited model as a complete Hugging Face folder.
"""

from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from rich.table import Table

from lightning_mm.causal.editing.files import EditFile, read_edits
from lightning_mm.causal.editing.metrics import EditScorer
from lightning_mm.causal.editing.multedit import EditConfig
from lightning_mm.causal.editing.study import METHODS, Apply, EditOutcome, EditStudy, LayerScore
from lightning_mm.causal.editing.tables import details, tables
from lightning_mm.causal.editing.weight_edit import WeightEdit, apply_edits
from lightning_mm.causal.questions.question import QuestionEncoder
from lightning_mm.core.console import TABLE_WIDTH
from lightning_mm.core.decisions import Decision, log
from lightning_mm.core.errors import UserError
from lightning_mm.core.io import staged_folder, write_json
from lightning_mm.core.run_directory import RunDirectory
from lightning_mm.data.batch import Batch
from lightning_mm.data.datamodule import MMDataModule
from lightning_mm.data.rejected_samples import RejectedSamples
from lightning_mm.models.export.export import export_full, require_empty_output
from lightning_mm.models.export.model_card import Provenance
from lightning_mm.models.export.verify import ExportCheck, take_chat, take_reference, verify_export
from lightning_mm.models.handle import MultimodalModel
from lightning_mm.models.processor import load_processor
from lightning_mm.report.html import write_report
from lightning_mm.verbs.inspected_model import ReadingOptions, own_data
from lightning_mm.verbs.model_source import ModelLike, ModelSource, ProcessorLike, open_handle
from lightning_mm.verbs.result import PrintedResult, open_decisions
from lightning_mm.verbs.rows import PathLike, Rows, as_file


@dataclass(frozen=True, eq=False, repr=False)
class EditResult(PrintedResult):
    """What ``edit`` found; ``print`` shows its tables.

    Args:
        layer: The decoder block whose down projection was edited.
        scan: Scores of the layers that were tried; empty where the layer was named.
        outcomes: Scores, losses, answers and the edits themselves, one entry per method and way of applying.
        details: All results, as edits.json holds them.
        shown: The tables, as causal.json holds them.
        rejected: Edits and questions that were not used, with reasons.
        decisions: Automatic choices, with reasons.
        run: The folder that was written; None: none was wanted.
        exported: The folder of the edited model; None: none was wanted.
    """

    layer: int
    scan: tuple[LayerScore, ...]
    outcomes: tuple[EditOutcome, ...]
    details: dict[str, Any]
    shown: tuple[dict[str, Any], ...]
    rejected: RejectedSamples
    decisions: tuple[Decision, ...]
    run: RunDirectory | None = None
    exported: Path | None = None

    @property
    def report(self) -> Path | None:
        """The report; None where no folder was wanted."""
        return None if self.run is None else self.run.report

    @property
    def edits(self) -> list[WeightEdit]:
        """The changes of weights that MultEdit made, for ``apply_edits``: all in one where that was measured."""
        made = sorted((o for o in self.outcomes if o.method == "MultEdit"), key=lambda o: o.apply != "together")
        return made[0].edits

    def tables(self) -> list[Table | str]:
        """The tables of all results."""
        return [_rich_table(table) for table in self.shown]


def edit(
    model: ModelLike,
    edits: PathLike | Rows | EditFile,
    *,
    layer: int | Literal["auto"] = "auto",
    config: EditConfig = EditConfig(),  # noqa: B008  (frozen)
    apply: Literal["each", "together", "both"] = "both",
    control: bool = True,
    scan: int = 4,
    limit: int | None = None,
    data: PathLike | MMDataModule | None = None,
    conversations: int = 16,
    num_unrelated: int = 8,
    max_new_tokens: int = 8,
    prompt: str = "{question}",
    processor: ProcessorLike | None = None,
    image_root: PathLike | None = None,
    checkpoint: str = "last",
    out: PathLike | None = None,
    export_to: PathLike | None = None,
    verify: bool = True,
) -> EditResult:
    """Give questions new answers by a closed-form change of one weight, and measure what else changed.

    Args:
        model: Model folder, hub name, run or checkpoint by its path; or a loaded model, which is left as it was.
        edits: JSON or JSONL file of questions with new answers, such rows, or what ``read_edits`` returns.
        layer: Which block's down projection; 'auto': the best for the first edits (``scan`` of them).
        config: How values are found.
        apply: Measure each edit alone, all at once in one weight, or both.
        control: Whether to fine-tune the same weight too, to compare.
        scan: Edits that layers are tried with.
        limit: Only the first so many edits; None: all.
        data: Conversations for the general task's loss; None: it is not measured.
        conversations: Most of them.
        num_unrelated: Unrelated questions asked after each edit.
        max_new_tokens: Longest answer that must stay.
        prompt: How questions are worded; holds {question} once.
        processor: Of a loaded model; None: the one beside the weights that it was loaded from.
        image_root: Folder of the pictures; None: that of the file, or the current one for rows.
        checkpoint: Of a run: name in its checkpoints, 'last' by default.
        out: Folder to write, with report.html and JSON; None (default): nothing is written.
        export_to: Folder to export the model to with all edits; None (default): it is not exported.
        verify: Whether to compare the export's logits in a fresh process.

    Raises:
        UserError: There is no such model, no edit can be made, or the layer cannot be edited.
    """
    target = None if export_to is None else Path(export_to)
    if target is not None:
        require_empty_output(target, "Name another --out, or remove the folder.")
    if prompt.count("{question}") != 1:
        raise UserError("Nothing would be asked.", f"prompt is {prompt!r}.", "A prompt holds {question} once.")
    if apply not in ("each", "together", "both"):
        raise UserError(f"apply is {apply!r}.", "There are each, together and both.", "Name one of those.")
    with open_decisions() as decisions, ExitStack() as stack:
        source = ModelSource.of(model, checkpoint, processor)
        file = _edits(edits, image_root, limit, stack)
        talks = _conversations(data)
        opened = open_handle(source, stack, quantized=False)
        mm = opened.mm
        if mm.processor is None:
            assert opened.backbone is not None
            mm = replace(mm, processor=load_processor(opened.backbone.path, opened.backbone.revision))
        run = None if out is None else RunDirectory.create(Path(out).absolute().parent, Path(out).name)
        encoder = QuestionEncoder(mm.required_processor, prompt)
        scorer = EditScorer(mm, encoder, mm.device, max_new_tokens, num_unrelated)
        study = EditStudy(scorer, file, _batches(talks, mm, conversations))
        chosen, tried = _layer(study, layer, config, scan)
        methods = METHODS if control else METHODS[:1]
        ways = _ways(apply, target is not None, len(study.cases))
        outcomes = [study.run(method, way, chosen, config) for way in ways for method in methods]
        result = EditResult(
            chosen,
            tuple(tried),
            tuple(outcomes),
            details(study, outcomes, tried, chosen, config),
            tuple(tables(study, outcomes, tried, chosen, config)),
            _rejected(study),
            tuple(decisions),
            run,
        )
        if run is not None:
            _write(run, result, study)
        if target is not None:
            together = next(o for o in outcomes if o.apply == "together" and o.method == "MultEdit")
            _export(mm, together.edits[0], study, target, verify)
        result = replace(result, decisions=tuple(decisions), exported=target)
    if run is not None:
        write_json(run.decisions, [asdict(decision) for decision in result.decisions])
        write_report(run.path)
    return result


def _edits(
    given: PathLike | Rows | EditFile, image_root: PathLike | None, limit: int | None, stack: ExitStack
) -> EditFile:
    file = given if isinstance(given, EditFile) else read_edits(*as_file(given, image_root, "edits", stack))
    if limit is None:
        return file
    if limit < 1:
        raise UserError(f"limit is {limit}.", "At least one edit is made.", "Give --limit 1 or more.")
    return replace(file, requests=file.requests[:limit])


def _conversations(data: PathLike | MMDataModule | None) -> MMDataModule | None:
    """Conversations for the general task's loss, read before the model is loaded: mistakes in the file show early."""
    if data is None:
        return None
    talks = own_data(data if isinstance(data, MMDataModule) else None, ReadingOptions(data=data))
    talks.samples("train")
    return talks


def _batches(data: MMDataModule | None, mm: MultimodalModel, count: int) -> list[Batch]:
    if data is None:
        return []
    data.processor = mm.required_processor
    return data.sample_batches(count, 1)


def _layer(
    study: EditStudy, layer: int | Literal["auto"], config: EditConfig, scan: int
) -> tuple[int, list[LayerScore]]:
    """The layer to edit, and the scores of those that were tried."""
    if layer == "auto":
        return study.choose_layer(config, scan)
    number = int(layer) if isinstance(layer, str) and layer.isdecimal() else layer
    study.check_layer(number)
    return number, []


def _ways(apply: Literal["each", "together", "both"], exported: bool, num_edits: int) -> tuple[Apply, ...]:
    """How to apply the edits: ``each``, ``together`` or both; an export needs ``together``."""
    ways: tuple[Apply, ...] = ("each", "together") if apply == "both" else (apply,)
    if exported and "together" not in ways:
        ways = (*ways, "together")
    if num_edits == 1:
        ways = ("together",) if exported else ways[:1]
    return ways


def _rejected(study: EditStudy) -> RejectedSamples:
    ledger = RejectedSamples(1.0)
    ledger.num_rows["edit"] = study.file.num_rows
    ledger.add([*study.file.rejections, *study.scorer.rejected])
    if len(ledger):
        log.warning("not asked: %s", ", ".join(f"{count} x {reason}" for reason, count in ledger.counts().items()))
    return ledger


def _write(run: RunDirectory, result: EditResult, study: EditStudy) -> None:
    """Write edits.json, causal.json, inspection.json and the ledger of what was not asked."""
    right = [each["right_before"] for each in result.details["edits"]]
    title = f"{len(study.cases)} edits of layer {result.layer}"
    kind = type(study.mm.model).__name__
    write_json(run.path / "edits.json", result.details)
    causal = {"title": title, "model": kind, "n_questions": len(right), "n_right": sum(map(bool, right))}
    write_json(run.path / "causal.json", {**causal, "tables": list(result.shown)})
    write_json(run.inspection, {"title": title, "model": kind, "labels": {}})
    result.rejected.write(run.ledger)


def _export(mm: MultimodalModel, made: WeightEdit, study: EditStudy, out: Path, verify: bool) -> None:
    """Export the edited model, verified in a fresh process before the folder appears."""
    origin = Provenance(mm.source, facts={"Edited": f"MultEdit of {len(study.cases)} questions in {made.module}"})
    with apply_edits(mm.model, [made]), staged_folder(out) as staged:
        export_full(mm.model, mm.required_processor.processor, staged, origin)
        if verify:
            reference = take_reference(mm.model, study.cases[0].target.encoded.inputs)
            verify_export(ExportCheck(staged, reference, chat=take_chat(mm.model, mm.required_processor)))
    log.info("exported: %s", out)


def _rich_table(table: dict[str, Any]) -> Table:
    printed = Table(title=table["title"], caption=table["note"], min_width=min(len(table["note"]), TABLE_WIDTH))
    for column in table["columns"]:
        printed.add_column(column)
    for row in table["rows"]:
        printed.add_row(*(str(cell) for cell in row))
    return printed
