"""export and report: what a finished run is turned into.

Data flow: ``runs/<name>`` (config.yaml, a checkpoint) -> the trained model -> a folder that transformers or PEFT loads,
proved equal in a fresh process; or ``report.html`` anew.
"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import yaml
from jsonargparse import ArgumentParser, Namespace

from lightning_mm.cli.parser import explained, refuse_foreign_classes
from lightning_mm.core.decisions import decide, log
from lightning_mm.core.errors import UserError
from lightning_mm.core.io import staged_folder
from lightning_mm.core.run_directory import RunDirectory
from lightning_mm.data.datamodule import MMDataModule
from lightning_mm.models.export.export import Origin, export_adapter, export_full, refuse_taken
from lightning_mm.models.export.verify import Claim, prove, take_reference
from lightning_mm.report.html import write_report
from lightning_mm.training import checkpoint as state
from lightning_mm.training.module import MMModule

Format = Literal["model", "adapter", "merged"]


class Parser(ArgumentParser):
    """A parser of one verb whose errors a person can read."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # An abbreviated option would be taken for another one without a word.
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> Any:
        raise explained(message, [name for action in self._actions for name in action.option_strings])


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
    refuse_taken(out, "Name another --out, or remove the folder.")
    module, data = restored(run, _checkpoint(run, options.checkpoint), quantized=options.format == "adapter")
    with staged_folder(out) as staged:
        _write(module, staged, options)
        if options.prove:
            _prove(module, data, staged, options.format)
    log.info("exported: %s", out)
    return 0


def report(arguments: list[str]) -> int:
    """Write report.html of a run anew."""
    parser = Parser(prog="lightning-mm report", description=report.__doc__)
    parser.add_argument("run", type=str, help="The run's folder.")
    run = RunDirectory.open(parser.parse_args(arguments[1:]).run)
    print(write_report(run.path), file=sys.stdout)
    return 0


def restored(run: RunDirectory, checkpoint: Path, quantized: bool = True) -> tuple[MMModule, MMDataModule]:
    """The module of a run with a checkpoint's weights, in eval mode, and its data.

    Args:
        run: Its folder.
        checkpoint: One of the run's.
        quantized: Whether a model whose frozen weights were quantised is loaded so, or in full.

    Raises:
        UserError: The run has no usable config or checkpoint, or they do not belong together.
    """
    config = _config(run)
    saved = state.read_checkpoint(checkpoint)
    module: MMModule = config.model
    module.resume_from(saved)
    if not quantized and module.backbone.quantization != "none":
        held = module.backbone.quantization
        module.backbone = replace(module.backbone, quantization="none")
        decide("export", "frozen weights in full", f"trained over {held}; a folder holds the weights they came from")
        module.configure_model()
        state.check(saved, module.census, None, set(module.trainable))
    else:
        module.configure_model()
        state.check(saved, module.census, module.base, set(module.trainable))
    module.load_state_dict(saved["state_dict"], strict=False)
    module.eval()
    return module, config.data


def _prove(module: MMModule, data: MMDataModule, folder: Path, form: Format) -> None:
    base = module.backbone.path if form == "adapter" else None
    reference = take_reference(module.model, data.example_batch().inputs)
    prove(Claim(folder=folder, reference=reference, base=base, revision=module.backbone.revision if base else None))


def _config(run: RunDirectory) -> Namespace:
    if not run.config.is_file():
        raise UserError(f"{run.path} is no run.", "It holds no config.yaml.", "Name a folder that fit has made.")
    refuse_foreign_classes([str(run.config)])
    saved = yaml.safe_load(run.config.read_text(encoding="utf-8"))
    parser = Parser(exit_on_error=True)
    parser.add_class_arguments(MMModule, "model")
    parser.add_class_arguments(MMDataModule, "data")
    data = {**saved["data"], "processor": saved["model"]["backbone"]["path"]}
    return parser.instantiate_classes(parser.parse_object({"model": saved["model"], "data": data}))


def _checkpoint(run: RunDirectory, name: str) -> Path:
    path = Path(name)
    return path if path.suffix == ".ckpt" else run.checkpoints / f"{name}.ckpt"


def _write(module: MMModule, out: Path, options: Namespace) -> None:
    origin = Origin(
        base=module.backbone.path,
        revision=module.backbone.revision,
        facts={"policy": module.census.policy, "layers": f"{list(module.census.layers)} of {module.census.num_layers}"},
    )
    if options.format == "adapter":
        export_adapter(module.model, out, origin, fully_trained=module.plan.full)
        return
    if options.format == "merged" and not module.plan.adapted:
        decide("export.format", "model", "this run has no adapters to merge")
    export_full(module.model, module.processor, out, origin)
