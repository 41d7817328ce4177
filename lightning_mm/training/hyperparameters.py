"""The configuration of a run as hyperparameters for loggers and model cards: what makes one run differ from another.

Data flow: module, trainer, data module -> ``hyperparameters`` -> every logger of the trainer, hyperparameters.json of
the run, and the table of a model card.
"""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn

from lightning_mm.training.eval_context import live
from lightning_mm.tuning.layers import describe_layers

Value = str | int | float | bool | None
_PACKAGES = ("lightning-mm", "torch", "lightning", "transformers", "peft")


def hyperparameters(trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Value]:
    """Settings of a run by dotted name, where there is one that of the command line's option.

    Args:
        trainer: The trainer, when its stage has started: the model is loaded and the policy applied.
        pl_module: Our module, or a wrapper around it.

    Returns:
        Policy, layers, optimizer, batch, seed, model, data, the step of the checkpoint that was loaded, and versions;
        only plain values, which every logger takes.
    """
    module = live(pl_module)
    census, backbone = module.census, module.backbone
    model: Any = module.mm.model
    data: Any = getattr(trainer, "datamodule", None)
    found: dict[str, Any] = {
        "policy": type(module.tuning).__name__,
        "policy_options": census.policy,
        "layers": census.expression,
        "layers_trained": describe_layers(census.layers),
        "num_layers_trained": len(census.layers),
        "num_layers": census.num_layers,
        "weights.trained": census.trainable,
        "weights.total": census.total,
        "model.name": str(backbone.path).rstrip("/").rpartition("/")[2],
        "model.class": type(model).__name__,
        "model.dtype": str(model.dtype).removeprefix("torch."),
        "model.backbone.path": str(backbone.path),
        "model.backbone.revision": backbone.revision,
        "model.backbone.quantization": backbone.quantization,
        "seed": int(seed) if (seed := os.environ.get("PL_GLOBAL_SEED", "")).isdecimal() else None,
        "trainer.precision": str(trainer.precision),
        "trainer.max_steps": trainer.max_steps,
        "trainer.max_epochs": trainer.max_epochs,
        "trainer.world_size": trainer.world_size,
        "trainer.strategy": type(trainer.strategy).__name__,
        "trainer.accelerator": type(trainer.accelerator).__name__,
        **(module.settings() if trainer.state.fn == TrainerFn.FITTING else {}),
        **({} if module.loaded_step is None else {"checkpoint.step": module.loaded_step}),
        **{f"data.{split}": path for split, path in getattr(data, "paths", {}).items() if path},
    }
    found |= {f"versions.{name}": number for name, number in _versions().items()}
    return {name: _plain(value) for name, value in found.items()}


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _plain(value: Any) -> Value:
    return value if isinstance(value, str | int | float | bool) or value is None else str(value)
