"""Faster ways to compute the same: compiled blocks, and Liger's fused kernels.

Data flow: model, before anything is wrapped around its blocks -> the same model, whose modules compute otherwise.
"""

from collections.abc import Collection
from contextlib import ExitStack
from functools import wraps
from typing import Any

import torch
from torch import nn

from lightning_mm.core.decisions import log_decision
from lightning_mm.core.errors import UserError
from lightning_mm.models.hooks import Forward, replace_forward


def compile_blocks(model: nn.Module, names: Collection[str], undo: ExitStack) -> None:
    """Compile the forward pass of the named blocks, for inputs of any length; ``undo`` puts their own back.

    Hooks on a block, padding and recomputation stay outside and run as ever. Under
    ``torch.compiler.set_stance("force_eager")`` the blocks run uncompiled.

    Raises:
        UserError: At the first step, where the compiler fails.
    """
    for name in names:
        replace_forward(undo, model.get_submodule(name), _compiled)
    log_decision("model.compute.compile", f"{len(names)} blocks", "asked for; the first steps wait for the compiler")


def _compiled(forward: Forward) -> Forward:
    compiled = torch.compile(forward, dynamic=True)

    @wraps(compiled)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return compiled(*args, **kwargs)
        except torch._dynamo.exc.TorchDynamoException as error:
            raise UserError(
                "A block could not be compiled.",
                f"{type(error).__name__}: {next((line for line in str(error).splitlines() if line.strip()), '')}",
                "Set model.compute.compile off.",
            ) from error

    return run


def apply_liger(model: Any) -> None:
    """Liger's kernels for norms, rotary positions and gated MLPs, in place; the loss stays ours.

    Raises:
        UserError: No CUDA device, no liger_kernel, or none of its kernels fits the model.
    """
    option = "model.compute.liger: true"
    if not torch.cuda.is_available():
        raise UserError(f"{option} needs a CUDA device.", "Its kernels are written in Triton.", "Leave it out.")
    try:
        from liger_kernel.transformers import _apply_liger_kernel_to_instance
    except ImportError as error:
        raise UserError(f"{option} needs liger_kernel.", str(error), "pip install liger-kernel") from error
    # Only answers are supervised, and the head gets nothing else: Liger's own loss would see every token.
    _apply_liger_kernel_to_instance(model, cross_entropy=False, fused_linear_cross_entropy=False)
    changed = sum(_is_ligers(module) for module in model.modules())
    if not changed:
        raise UserError(
            f"{option} does not know models of type {model.config.model_type}.",
            "No module of this model was taken over.",
            "Leave it out.",
        )
    log_decision("model.compute.liger", f"{changed} modules", "asked for; norms and gated MLPs run as one kernel each")


def _is_ligers(module: nn.Module) -> bool:
    """Whether its forward pass was replaced by one of Liger's."""
    own: Any = module.__dict__.get("forward")
    return own is not None and getattr(own, "__module__", "").startswith("liger_kernel")
