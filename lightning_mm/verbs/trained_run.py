"""Loads the trained model of a run from its folder.

Data flow: ``runs/<name>`` (config.yaml, a checkpoint) -> module with the checkpoint's weights, and its data module.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace

from lightning_mm.core.decisions import log_decision
from lightning_mm.core.errors import UserError
from lightning_mm.core.run_directory import RunDirectory
from lightning_mm.data.datamodule import MMDataModule
from lightning_mm.training import checkpoint as state
from lightning_mm.training.checkpoint_file import read_checkpoint
from lightning_mm.training.module import MMModule
from lightning_mm.training.module_options import ModuleOptions
from lightning_mm.verbs.config_classes import explain_refusal, judged_names


def load_run(run: RunDirectory, checkpoint: Path, quantized: bool = True) -> tuple[MMModule, MMDataModule]:
    """The module of a run with a checkpoint's weights, in eval mode, and its data module.

    Args:
        run: The run's folder.
        checkpoint: A checkpoint file of the run.
        quantized: Whether frozen weights that were quantized in training stay so; False: they are loaded in full.

    Raises:
        UserError: The run has no usable config or checkpoint, or they do not belong together.
    """
    config = read_options(run.config)
    saved = read_checkpoint(checkpoint)
    module: MMModule = config.model
    module.resume_from(saved)
    module.processing.bound_pixels(config.data.bounds)
    if not quantized and module.backbone.quantization != "none":
        held = module.backbone.quantization
        module.backbone = replace(module.backbone, quantization="none")
        log_decision(
            "export", "frozen weights in full", f"trained over {held}; a folder holds the weights they came from"
        )
        module.configure_model()
        state.validate_checkpoint(saved, module.census, None, module.trainable)
    else:
        module.configure_model()
        state.validate_checkpoint(saved, module.census, module.base, module.trainable)
    module.load_state_dict(saved["state_dict"], strict=False)
    module.eval()
    return module, config.data


def read_options(config: Path) -> Namespace:
    """The module and the data module of a run's options; nothing is loaded.

    Args:
        config: The run's config.yaml, or another file with all options of a fit.

    Raises:
        UserError: There is no such file, or it cannot be read.
    """
    if not config.is_file():
        raise UserError(f"{config.parent} is no run.", "It holds no config.yaml.", "Name a folder that fit has made.")
    saved = _sections(config, ("model", "data"))
    with judged_names(file=str(config)):
        parser = ArgumentParser(exit_on_error=False)
        parser.add_class_arguments(ModuleOptions, "model")
        parser.add_class_arguments(MMDataModule, "data")
        data = {**saved["data"], "processor": saved["model"]["backbone"]["path"]}
        try:
            return parser.instantiate_classes(parser.parse_object({"model": saved["model"], "data": data}))
        except ArgumentError as error:
            lines = [line.strip(" -") for line in str(error).splitlines() if line.strip(" -")]
            if (refusal := explain_refusal(str(error), "")) is not None:
                fix = "With a policy of yours, give it: MMModule.load_from_checkpoint(path, tuning=...)."
                raise UserError(refusal.what, refusal.why, fix) from error
            fix = "Mend it there; another version may have written it."
            raise UserError(f"{config} cannot be read.", lines[-1], fix) from error


def _sections(path: Path, names: Sequence[str]) -> dict[str, Any]:
    """Some sections of a YAML file.

    Args:
        path: The file.
        names: Keys of its top level.

    Raises:
        UserError: The file cannot be read, or lacks a section.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read.", " ".join(str(error).split()), "Mend the YAML there.") from error
    missing = [name for name in names if not isinstance(content, dict) or name not in content]
    if missing:
        raise UserError(f"{path} is no config of a run.", f"It has no {', '.join(missing)}.", "Name a run of fit.")
    return {name: content[name] for name in names}
