"""The verbs export and report, on a finished run.

Data flow: ``runs/<name>`` -> the trained model -> a folder that transformers or PEFT loads, verified in a fresh
process; or -> ``report.html``, written again.
"""

import sys
from pathlib import Path
from typing import Literal

from jsonargparse import Namespace

from lightning_mm.cli.parser import Parser
from lightning_mm.core.decisions import log, log_decision
from lightning_mm.core.io import staged_folder
from lightning_mm.core.run_directory import RunDirectory
from lightning_mm.data.datamodule import MMDataModule
from lightning_mm.models.export.export import Provenance, export_adapter, export_full, require_empty_output
from lightning_mm.models.export.verify import ExportCheck, take_reference, verify_export
from lightning_mm.report.html import write_report
from lightning_mm.training.module import MMModule
from lightning_mm.verbs.trained_run import load_run

Format = Literal["model", "adapter", "merged"]


def export(arguments: list[str]) -> int:
    """Write a trained run as a Hugging Face folder."""
    parser = Parser(prog="lightning-mm export", description=export.__doc__)
    parser.add_argument("run", type=str, help="The run's folder, such as runs/IntermediateOnly.")
    parser.add_argument("--out", type=str | None, default=None, help="Folder to make; RUN/export if not given.")
    parser.add_argument(
        "--format",
        type=Format,
        default="model",
        help="model: a complete folder (adapters merged); merged: the same, of a LoRA run; adapter: a PEFT folder.",
    )
    parser.add_argument("--checkpoint", type=str, default="last", help="Name in RUN/checkpoints, or a path.")
    parser.add_argument("--prove", type=bool, default=True, help="Compare logits with a fresh process.")
    options = parser.parse_args(arguments[1:])
    run = RunDirectory.open(options.run)
    out = Path(options.out) if options.out else run.path / "export"
    require_empty_output(out, "Name another --out, or remove the folder.")
    named = Path(options.checkpoint)
    checkpoint = named if named.suffix == ".ckpt" else run.checkpoints / f"{options.checkpoint}.ckpt"
    module, data = load_run(run, checkpoint, quantized=options.format == "adapter")
    with staged_folder(out) as staged:
        _write(module, staged, options)
        if options.prove:
            _verify(module, data, staged, options.format)
    log.info("exported: %s", out)
    return 0


def report(arguments: list[str]) -> int:
    """Write report.html of a run anew."""
    parser = Parser(prog="lightning-mm report", description=report.__doc__)
    parser.add_argument("run", type=str, help="The run's folder.")
    run = RunDirectory.open(parser.parse_args(arguments[1:]).run)
    print(write_report(run.path), file=sys.stdout)
    return 0


def _verify(module: MMModule, data: MMDataModule, folder: Path, form: Format) -> None:
    base = module.backbone.path if form == "adapter" else None
    reference = take_reference(module.model, data.example_batch().inputs)
    verify_export(
        ExportCheck(folder=folder, reference=reference, base=base, revision=module.backbone.revision if base else None)
    )


def _write(module: MMModule, out: Path, options: Namespace) -> None:
    origin = Provenance(
        base=module.backbone.path,
        revision=module.backbone.revision,
        facts={"policy": module.census.policy, "layers": f"{list(module.census.layers)} of {module.census.num_layers}"},
    )
    if options.format == "adapter":
        export_adapter(module.model, out, origin, fully_trained=module.plan.full)
        return
    if options.format == "merged" and not module.plan.adapted:
        log_decision("export.format", "model", "this run has no adapters to merge")
    export_full(module.model, module.processor, out, origin)
