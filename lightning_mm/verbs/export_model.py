"""Writes a trained model as a Hugging Face folder or a PEFT adapter, from a run's folder or from memory.

Data flow: run + checkpoint, or ``MMModule`` -> the trained model -> a folder that transformers or PEFT loads, verified
in a fresh process before it appears.
"""

import csv
from contextlib import ExitStack
from pathlib import Path
from typing import Literal

from lightning_mm.core.decisions import log, log_decision
from lightning_mm.core.errors import UserError
from lightning_mm.core.io import staged_folder
from lightning_mm.core.run_directory import RunDirectory, WritesToRun
from lightning_mm.data.datamodule import MMDataModule
from lightning_mm.models.export.export import Provenance, export_adapter, export_full, require_empty_output
from lightning_mm.models.export.verify import ExportCheck, take_reference, verify_export
from lightning_mm.training import checkpoint as state
from lightning_mm.training.module import MMModule
from lightning_mm.verbs.model_source import borrowed
from lightning_mm.verbs.result import open_decisions
from lightning_mm.verbs.rows import PathLike
from lightning_mm.verbs.trained_run import load_run

Format = Literal["model", "adapter", "merged"]


def export_model(
    run: PathLike | MMModule,
    out: PathLike | None = None,
    *,
    format: Format = "model",
    checkpoint: PathLike = "last",
    verify: bool = True,
) -> Path:
    """Write a trained run as a Hugging Face folder; returns the folder.

    Args:
        run: The run's folder, such as runs/IntermediateOnly; one of its checkpoints; or the module in memory, which is
            left as it was.
        out: Folder to make; None: ``export`` in the run's folder.
        format: 'model': a complete folder (adapters merged); 'merged': the same, of a LoRA run; 'adapter': a PEFT
            folder.
        checkpoint: Name in RUN/checkpoints, or a path; 'last' by default. Of a module in memory: no choice.
        verify: Whether to compare logits with a fresh process, which loads the folder without this package.

    Raises:
        UserError: There is no such run or checkpoint, the folder is taken, or the fresh process computes otherwise.
    """
    if format not in ("model", "adapter", "merged"):
        raise UserError(f"format is {format!r}.", "There are model, adapter and merged.", "Name one of those.")
    with open_decisions(), ExitStack() as stack:
        if isinstance(run, MMModule):
            target = _empty(out, _run_of(run))
            module, data = _trained(run), _data_of(run)
            stack.enter_context(borrowed(module.model))
        else:
            folder, file = _checkpoint(Path(run), checkpoint)
            target = _empty(out, folder)
            module, data = load_run(folder, file, quantized=format == "adapter")
            _say_step(folder, file)
        with staged_folder(target) as staged:
            _write(module, staged, format)
            if verify:
                _verify(module, data, staged, format)
        log.info("exported: %s", target)
    return target


def _checkpoint(run: Path, checkpoint: PathLike) -> tuple[RunDirectory, Path]:
    """The run's folder, and the file of the checkpoint."""
    if run.suffix == ".ckpt":
        return RunDirectory.open(run.absolute().parent.parent), run
    folder, named = RunDirectory.open(run), Path(checkpoint)
    return folder, named if named.suffix == ".ckpt" else folder.checkpoints / f"{checkpoint}.ckpt"


def _empty(out: PathLike | None, run: RunDirectory | None) -> Path:
    if out is not None:
        target = Path(out)
    elif run is not None:
        target = run.path / "export"
    else:
        raise UserError("out is not given.", "This module belongs to no run's folder.", "Name the folder to make: out=")
    require_empty_output(target, "Name another --out, or remove the folder.")
    return target


def _trained(module: MMModule) -> MMModule:
    if not hasattr(module, "mm"):
        raise UserError("This module has no model yet.", "It is loaded when a fit begins.", "Export it after a fit.")
    return module


def _data_of(module: MMModule) -> MMDataModule | None:
    data = None if module._trainer is None else getattr(module._trainer, "datamodule", None)
    return data if isinstance(data, MMDataModule) else None


def _run_of(module: MMModule) -> RunDirectory | None:
    """The folder that the module's fit wrote to."""
    callbacks = [] if module._trainer is None else getattr(module._trainer, "callbacks", [])
    runs = [callback.run for callback in callbacks if isinstance(callback, WritesToRun)]
    return next((run for run in runs if run is not None), None)


def _say_step(run: RunDirectory, checkpoint: Path) -> None:
    """Say which step is exported, and warn if the run went further."""
    step = int(state.read_checkpoint(checkpoint)["global_step"])
    log.info("exporting step %d of run %s (%s)", step, run.name, checkpoint.name)
    if (last := max(step, _last_step(run))) > step:
        log.warning("step %d of run %s is exported; the run went on to step %d", step, run.name, last)


def _last_step(run: RunDirectory) -> int:
    """The last step that the run's checkpoints or curves tell of; 0 where they tell of none."""
    saved = [int(state.read_checkpoint(file)["global_step"]) for file in run.checkpoints.glob("*.ckpt")]
    if run.metrics.is_file():
        with run.metrics.open(encoding="utf-8", newline="") as file:
            # The loss of a step is logged under the number of steps before it.
            saved += [int(row["step"]) + 1 for row in csv.DictReader(file) if row.get("train/loss") and row["step"]]
    return max(saved, default=0)


def _verify(module: MMModule, data: MMDataModule | None, folder: Path, form: Format) -> None:
    base = module.backbone.path if form == "adapter" else None
    if data is None:
        log_decision("export.verify", "not done", "this module was fitted without an MMDataModule to take a row from")
        return
    reference = take_reference(module.model, data.example_batch().inputs)
    verify_export(
        ExportCheck(folder=folder, reference=reference, base=base, revision=module.backbone.revision if base else None)
    )


def _write(module: MMModule, out: Path, form: Format) -> None:
    origin = Provenance(
        base=module.backbone.path,
        revision=module.backbone.revision,
        facts={"policy": module.census.policy, "layers": f"{list(module.census.layers)} of {module.census.num_layers}"},
    )
    if form == "adapter":
        export_adapter(module.model, out, origin, fully_trained=module.plan.full)
        return
    if form == "merged" and not module.plan.adapted:
        log_decision("export.format", "model", "this run has no adapters to merge")
    export_full(module.model, module.processor, out, origin)
