"""Writes a trained model as a Hugging Face folder or a PEFT adapter, from a run's folder or from memory.

Data flow: run + checkpoint, or ``MMModule`` -> the trained model -> a folder that transformers or PEFT loads, verified
in a fresh process before it appears -> the Hugging Face hub, if asked.
"""

import csv
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from lightning_mm.core.decisions import log, log_decision
from lightning_mm.core.errors import UserError
from lightning_mm.core.io import read_json, staged_folder
from lightning_mm.core.run_directory import RunDirectory, WritesToRun
from lightning_mm.data.datamodule import MMDataModule
from lightning_mm.models.export.export import export_adapter, export_full, require_empty_output
from lightning_mm.models.export.model_card import Provenance
from lightning_mm.models.export.push import HubRepo
from lightning_mm.models.export.verify import ExportCheck, take_chat, take_reference, verify_export
from lightning_mm.models.export.weight_dtype import WrittenDtype
from lightning_mm.training.checkpoint_file import read_checkpoint
from lightning_mm.training.module import MMModule
from lightning_mm.tuning.layers import describe_layers
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
    dtype: WrittenDtype = "auto",
    verify: bool = True,
    push_to_hub: str | None = None,
    private: bool = True,
) -> Path:
    """Write a trained run as a Hugging Face folder; returns the folder.

    Args:
        run: The run's folder, such as runs/IntermediateOnly; one of its checkpoints; or the module in memory, which is
            left as it was.
        out: Folder to make; None: ``export`` in the run's folder.
        format: 'model': a complete folder (adapters merged); 'merged': the same, of a LoRA run; 'adapter': a PEFT
            folder.
        checkpoint: Name in RUN/checkpoints, or a path; 'last' by default. Of a module in memory: no choice.
        dtype: Dtype of a complete folder's weights: 'auto' (default) is the base model's, which weights that trained
            in float32 are rounded to; or float32, bfloat16, float16. An adapter keeps the dtype it trained in.
        verify: Whether a fresh process, without this package, loads processor and model from the folder, and comes to
            the same logits and to the same answer to a question about a picture.
        push_to_hub: Repository on the Hugging Face hub to upload the folder to, such as me/my-model; None (default):
            it stays here. The token is that of HF_TOKEN or of ``hf auth login``.
        private: Whether a repository that the upload makes is private.

    Raises:
        UserError: There is no such run or checkpoint, the folder is taken, the fresh process computes otherwise, or
            the hub refuses the folder, which then stays here.
    """
    if format not in ("model", "adapter", "merged"):
        raise UserError(f"format is {format!r}.", "There are model, adapter and merged.", "Name one of those.")
    with open_decisions(), ExitStack() as stack:
        repo = None if push_to_hub is None else HubRepo.open(push_to_hub, private)
        if isinstance(run, MMModule):
            folder = _run_of(run)
            target = _empty(out, folder)
            module, data = _trained(run), _data_of(run)
            step = int(module.trainer.global_step) if module._trainer is not None else None
            stack.enter_context(borrowed(module.model))
        else:
            folder, file = _checkpoint(Path(run), checkpoint)
            target = _empty(out, folder)
            module, data = load_run(folder, file, quantized=format == "adapter")
            step = _say_step(folder, file)
        origin = replace(_provenance(module, folder, step), repo=push_to_hub)
        with staged_folder(target) as staged:
            _write(module, staged, format, origin, dtype)
            if verify:
                _verify(module, data, staged, format)
        log.info("exported: %s", target)
        if repo is not None:
            log.info("uploaded: %s", repo.upload(target))
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


def _say_step(run: RunDirectory, checkpoint: Path) -> int:
    """The step that is exported, which is said, with a warning if the run went further."""
    step = int(read_checkpoint(checkpoint)["global_step"])
    log.info("exporting step %d of run %s (%s)", step, run.name, checkpoint.name)
    if (last := max(step, _last_step(run))) > step:
        log.warning("step %d of run %s is exported; the run went on to step %d", step, run.name, last)
    return step


def _last_step(run: RunDirectory) -> int:
    """The last step that the run's checkpoints or curves tell of; 0 where they tell of none."""
    saved = [int(read_checkpoint(file)["global_step"]) for file in run.checkpoints.glob("*.ckpt")]
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
    chat = take_chat(module.model, module.processing)
    revision = module.backbone.revision if base else None
    verify_export(ExportCheck(folder=folder, reference=reference, base=base, revision=revision, chat=chat))


def _provenance(module: MMModule, run: RunDirectory | None, step: int | None) -> Provenance:
    """Origin of the model: from the module, and from the files that its run wrote."""
    census = module.census
    share = f"{census.trainable:,} of {census.total:,} weights ({census.trainable / census.total:.1%})"
    settings = _read(run.hyperparameters if run else None, {})
    evaluated = _read(run.evaluation if run else None, {})
    if evaluated and run is not None and step is not None and step < _last_step(run):
        log_decision("export.card", "without accuracies", f"they were measured later than step {step}")
        evaluated = {}
    measured_on = settings.get(f"data.{evaluated.get('split')}")
    facts = {
        "Policy": census.policy,
        "Layers trained": f"{describe_layers(census.layers)} of {census.num_layers}",
        "Trained": share,
        **({"Step": str(step)} if step is not None else {}),
        **({"Data": settings["data.train"]} if settings.get("data.train") else {}),
    }
    return Provenance(
        base=module.backbone.path,
        revision=module.backbone.revision,
        facts={name: str(value) for name, value in facts.items()},
        hyperparameters={key: value for key, value in settings.items() if not key.startswith("versions.")},
        accuracy=evaluated.get("rows", ()),
        data=Path(str(measured_on)).name if measured_on else "",
    )


def _read(path: Path | None, default: dict[str, Any]) -> dict[str, Any]:
    content = read_json(path) if path is not None and path.is_file() else default
    return content if isinstance(content, dict) else default


def _write(module: MMModule, out: Path, form: Format, origin: Provenance, dtype: WrittenDtype) -> None:
    if form == "adapter":
        if dtype != "auto":
            log_decision("export.dtype", "as trained", "an adapter is added to its base, whatever dtype that has")
        export_adapter(module.model, out, origin, fully_trained=module.plan.full, processor=module.processor)
        return
    if form == "merged" and not module.plan.adapted_weights:
        log_decision("export.format", "model", "this run has no adapters to merge")
    export_full(module.model, module.processor, out, origin, dtype)
