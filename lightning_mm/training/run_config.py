"""config.yaml of a run that Python started: the arguments of module and data module, as config files have them.

Data flow: module + data module -> plain values -> ``config.yaml``, which every verb reads; the ``model`` part goes into
checkpoints too, and ``read_policy`` makes the policy again from it.
"""

import re
from collections.abc import Mapping
from dataclasses import asdict, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import lightning as L
import yaml

from lightning_mm import tuning
from lightning_mm.core.decisions import log_decision
from lightning_mm.core.errors import UserError
from lightning_mm.core.io import write_atomically
from lightning_mm.core.run_directory import RunDirectory
from lightning_mm.data.readers.source import Source
from lightning_mm.training.eval_context import LiveModule, data_of, live
from lightning_mm.tuning.policy import TuningPolicy

_SOURCES, _PATHS = ("train", "val", "test", "predict"), ("image_root", "probes")


def write_config(run: RunDirectory, trainer: L.Trainer) -> None:
    """Write ``config.yaml`` of a run; where the command line has done so, only what ``auto`` has become."""
    data = data_of(trainer)
    if run.config.exists():
        written = run.config.read_text(encoding="utf-8")
        found = f"max_length: {'null' if data.max_length is None else data.max_length}"
        write_atomically(run.config, re.sub(r"(?<=^  )max_length: auto$", found, written, flags=re.MULTILINE))
        return
    module = live(trainer.lightning_module)
    if not module.backbone.path:
        why = "given loaded, from no folder or hub name; export_model(module, folder) exports it from memory"
        log_decision("model.backbone.path", "none", why)
    config = {
        "trainer": {"max_steps": trainer.max_steps, "max_epochs": trainer.max_epochs},
        "model": model_options(module),
        "data": data_options({**data.arguments, "max_length": data.max_length}),
    }
    config["trainer"] |= {
        "accumulate_grad_batches": trainer.accumulate_grad_batches,
        "precision": str(trainer.precision),
        "gradient_clip_val": trainer.gradient_clip_val,
    }
    write_atomically(run.config, yaml.safe_dump(config, sort_keys=False))


def model_options(module: LiveModule) -> dict[str, Any]:
    """The module's arguments as plain values, as ``model:`` of a config file has them."""
    policy = module.tuning
    init_args: dict[str, Any] = asdict(policy) if is_dataclass(policy) else {}
    options = {
        "backbone": module.backbone,
        "tuning": {"class_path": f"{type(policy).__module__}.{type(policy).__qualname__}", "init_args": init_args},
        "optimizer": module.optimizer,
        "activation_checkpointing": module.activation_checkpointing,
        "max_new_tokens": module.max_new_tokens,
        "auto": module.auto,
        "compute": module.compute,
        "cache": module.cache,
        "connector_init": module.connector_init,
        "skip_nonfinite": module.skip_nonfinite,
    }
    if module.own_optimizer:
        del options["optimizer"]
    written = {name: _plain(value) for name, value in options.items()}
    if Path(module.backbone.path).is_dir():
        written["backbone"]["path"] = str(Path(module.backbone.path).absolute())
    return written


def data_options(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The data module's arguments as plain values, with absolute paths; the processor is the model's."""
    kept = {name: value for name, value in arguments.items() if name not in ("processor", "revision")}
    for name in _PATHS:
        if kept.get(name) is not None:
            kept[name] = str(Path(kept[name]).absolute())
    kept |= {name: _absolute(kept[name]) for name in _SOURCES if name in kept}
    return {name: _plain(value) for name, value in kept.items()}


def _absolute(given: Any) -> Any:
    """Sources with absolute paths; what is no path here (a name on the hub) as it is."""
    if isinstance(given, (str, Path)):
        return str(Path(given).absolute()) if Path(given).exists() or "*" in str(given) else str(given)
    if isinstance(given, Mapping):
        paths = {key: _absolute(given[key]) for key in ("path", "image_root") if given.get(key) is not None}
        return {**given, **paths}
    if isinstance(given, Source):
        return _absolute({field.name: getattr(given, field.name) for field in fields(given)})
    return [_absolute(each) for each in given] if isinstance(given, (list, tuple)) else given


def read_policy(options: Mapping[str, Any]) -> TuningPolicy:
    """The policy that ``model_options`` has written.

    Raises:
        UserError: It is no policy of this package.
    """
    written = options["tuning"]
    name = str(written["class_path"]).rpartition(".")[2]
    policy = getattr(tuning, name, None) if name in tuning.__all__ else None
    if policy is None or not str(written["class_path"]).startswith("lightning_mm."):
        raise UserError(
            f"The policy {written['class_path']} cannot be made from a checkpoint.",
            "It is a class of yours.",
            "Give load_from_checkpoint(path, tuning=...) the policy.",
        )
    given = dict(written["init_args"])
    lora = tuning.LoRA(**given.pop("lora"))
    made: TuningPolicy = policy(**given, lora=lora)
    return made


def _plain(value: Any) -> Any:
    """The value in words, numbers, lists and mappings."""
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(each) for each in value]
    return str(value) if isinstance(value, Path) else value
