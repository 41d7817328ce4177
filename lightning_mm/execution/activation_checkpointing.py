"""Activation checkpointing above the gradient boundary, which is the lowest block that trains.

Data flow: plan -> ``blocks_in_graph`` -> blocks whose forward is recomputed in backward. transformers' own switch puts
input-gradient hooks on every nested embedding, so the frozen prefix enters the graph and partial tuning saves nothing;
here only blocks that are in the graph anyway are wrapped.
"""

from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import copy_context
from functools import partial, wraps
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_mm.models.handle import MultimodalModel
from lightning_mm.models.hooks import Forward, replace_forward
from lightning_mm.models.layout import Region
from lightning_mm.tuning.policy import TuningPlan


def blocks_in_graph(mm: MultimodalModel, plan: TuningPlan) -> tuple[str, ...]:
    """Names of the blocks that backward passes through: those from the lowest trainable one up, vision blocks first.

    Args:
        mm: The model, frozen and adapted as planned.
        plan: Which weights train.
    """
    decoder = mm.layout.layers[plan.lowest_layer :]
    if plan.modes[Region.VISION] == "frozen":
        return decoder
    trained = [any(p.requires_grad for p in mm.model.get_submodule(b).parameters()) for b in mm.layout.vision_blocks]
    lowest = trained.index(True) if any(trained) else len(trained)
    return (*mm.layout.vision_blocks[lowest:], *decoder)


def unchanged_slices(plan: TuningPlan) -> int:
    """Number of slices of hidden states that no training step can change; slice 0 is the input of the first block."""
    below = (Region.VISION, Region.CONNECTOR, Region.EMBEDDING)
    if any(plan.modes[region] != "frozen" for region in below):
        return 0
    return min(plan.layers, default=plan.num_layers) + 1


def checkpoint_blocks(model: nn.Module, names: tuple[str, ...], undo: ExitStack) -> None:
    """Recompute the activations of the named blocks in backward, until ``undo`` is closed.

    Args:
        model: The plain model.
        names: Module names of its blocks.
        undo: Gets the callbacks that restore the blocks' forward passes.
    """
    for name in names:
        replace_forward(undo, model.get_submodule(name), _with_recomputation)


@contextmanager
def without_recomputation(model: nn.Module, names: Collection[str]) -> Iterator[None]:
    """While active, the named blocks store their activations: hooks may be removed before backward recomputes them."""
    with ExitStack() as undo:
        for block in map(model.get_submodule, names):
            replace_forward(undo, block, lambda forward: getattr(forward, "recomputes", forward))
        yield


def _with_recomputation(forward: Forward) -> Forward:
    @wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        # The context variables of this run (real tokens of the batch) must be set in recomputation, too.
        again = copy_context().run
        return checkpoint(partial(again, partial(forward, **kwargs)), *args, use_reentrant=False)

    run.recomputes = forward  # type: ignore[attr-defined]
    return run
