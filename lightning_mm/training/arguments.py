"""What Python code may pass to ``MMModule`` and ``MMDataModule``, and what is said of anything else.

Data flow: arguments as a user writes them -> ``Backbone``, policy, optimizer, or one ``UserError`` that names the right
argument.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast, get_args

import torch
from torch import nn

from lightning_mm.core.decisions import log_decision
from lightning_mm.core.errors import UserError
from lightning_mm.execution.connector_init import ConnectorInit
from lightning_mm.models.loaded import describe_loaded
from lightning_mm.models.loading import Backbone
from lightning_mm.tuning import IntermediateOnly, TuningPolicy
from lightning_mm.tuning.optimizer import OptimizerSettings

MakesOptimizer = Callable[[list[dict[str, Any]]], Any]
"""From named groups of the parameters that train to an optimizer, or to what ``configure_optimizers`` may return."""

ELSEWHERE = {
    "model": "It is the first argument: MMModule(model, ...).",
    "model_name": 'It is the first argument: MMModule("org/name", ...).',
    "policy": "It is the second argument: MMModule(model, IntermediateOnly()).",
    "layers": 'Give MMModule(model, IntermediateOnly("25%-50%")).',
    "lora": "Give MMModule(model, LoRAOnMiddle(lora=LoRA(r=8))).",
    "learning_rate": "Give MMModule(model, ..., lr=1e-5).",
    "gradient_checkpointing": "Give MMModule(model, ..., activation_checkpointing=True).",
    "tokenizer": "Give MMModule(model, ..., processor=processor), which holds the tokenizer.",
    "batch_size": "Give MMDataModule(..., batch_size=4).",
    "num_workers": "Give MMDataModule(..., num_workers=2).",
    "max_length": "Give MMDataModule(..., max_length=2048).",
    **dict.fromkeys(
        ("weight_decay", "betas", "eps", "schedule", "warmup", "scheduler"),
        "Give MMModule(model, ..., optimizer=OptimizerSettings(lr=1e-5, weight_decay=0.01, schedule='linear')).",
    ),
    **dict.fromkeys(
        ("dtype", "torch_dtype", "revision", "attention", "attn_implementation", "quantization", "load_in_4bit"),
        'Give MMModule(Backbone("org/name", dtype="bfloat16", quantization="nf4"), ...).',
    ),
    **dict.fromkeys(
        ("max_steps", "max_epochs", "epochs", "precision", "devices", "accelerator", "gradient_clip_val"),
        "Give L.Trainer(max_steps=100, precision='bf16-mixed', ...).",
    ),
}
"""Where an argument belongs that a user tries to give to ``MMModule``."""


def backbone_of(given: object) -> tuple[Backbone, nn.Module | None]:
    """The backbone that the first argument names, and the model, if it is one that the user has loaded.

    Args:
        given: A folder or hub name, a model of transformers, or a ``Backbone``.

    Raises:
        UserError: It is none of these, or a model that cannot be tuned in place.
    """
    if isinstance(given, Backbone):
        return given, None
    if isinstance(given, (str, Path)):
        return Backbone(str(given)), None
    if isinstance(given, nn.Module):
        return describe_loaded(given), given
    raise UserError(
        f"MMModule cannot tune {_shown(given)}.",
        "Its first argument is a folder or hub name, a loaded model of transformers, or a Backbone.",
        'Give MMModule("org/name", ...).',
    )


def policy_of(given: object) -> TuningPolicy:
    """The policy of the second argument; IntermediateOnly, said, where there is none."""
    if isinstance(given, TuningPolicy):
        return given
    if given is not None:
        raise UserError(
            f"{_shown(given)} is no tuning policy.",
            "A policy is an object.",
            'Give one, such as IntermediateOnly("25%-50%") or Full().',
        )
    policy = IntermediateOnly()
    log_decision("model.tuning", policy.describe(), "none was named; the middle is where vision meets language")
    return policy


def optimizer_of(given: object, lr: float | None) -> tuple[OptimizerSettings, MakesOptimizer | None]:
    """The settings of AdamW, and the function that makes another optimizer, if one is given.

    Args:
        given: Settings, or a function from parameter groups to an optimizer.
        lr: Learning rate in place of that of the settings; None: theirs.

    Raises:
        UserError: It is neither, or ``lr`` comes beside a function, which would not see it.
    """
    if isinstance(given, OptimizerSettings):
        return (given if lr is None else replace(given, lr=lr)), None
    if isinstance(given, torch.optim.Optimizer) or not callable(given):
        raise UserError(
            f"optimizer: {_shown(given)} cannot be used.",
            "The parameters that train are known once the policy is applied to the model.",
            "Give optimizer=lambda params: torch.optim.SGD(params, lr=1e-3), or OptimizerSettings(lr=1e-5).",
        )
    if lr is not None:
        raise UserError(f"lr: {lr} has no effect.", "The optimizer is yours.", "Set its rate in the function.")
    return OptimizerSettings(), given


def connector_init_of(given: object) -> ConnectorInit:
    """The choice of ``connector_init``; raises a ``UserError`` if it is none."""
    for choice in get_args(ConnectorInit):
        if given == choice:
            return cast(ConnectorInit, choice)
    choices = ", ".join(get_args(ConnectorInit))
    raise UserError(f"model.connector_init: {given!r} is no choice.", f"Choices are {choices}.", "Choose one of them.")


def skip_nonfinite_of(given: int) -> int:
    """The number of steps that may be passed over; raises a ``UserError`` if it is none."""
    if given < 0:
        raise UserError(f"model.skip_nonfinite: {given} is negative.", "It counts optimizer steps.", "Give 0 or more.")
    return given


def _shown(given: object) -> str:
    if isinstance(given, type):
        return f"the class {given.__name__}"
    text = repr(given)
    return text if len(text) <= 60 else f"a {type(given).__name__}"
