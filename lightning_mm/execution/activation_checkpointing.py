"""The gradient boundary: the lowest block that trains, and activation checkpointing that stays above it.

Data flow: plan -> ``blocks_in_graph`` -> blocks whose forward is recomputed in backward. transformers' own switch puts
input-gradient hooks on every nested embedding, so the frozen prefix enters the graph and partial tuning saves nothing;
here only blocks that are in the graph anyway are wrapped, and hooks that others have set are taken off.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import copy_context
from functools import partial, wraps
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_mm.models.handle import MultimodalModel
from lightning_mm.models.hooks import replace_forward
from lightning_mm.models.layout import Region
from lightning_mm.tuning.policy import TuningPlan


def blocks_in_graph(mm: MultimodalModel, plan: TuningPlan) -> tuple[str, ...]:
    """Names of the blocks that backward crosses: from the lowest trainable one up, in decoder and vision tower."""
    decoder = mm.layout.layers[plan.lowest_layer :]
    if plan.modes[Region.VISION] == "frozen":
        return decoder
    trained = [any(p.requires_grad for p in mm.model.get_submodule(b).parameters()) for b in mm.layout.vision_blocks]
    lowest = trained.index(True) if any(trained) else len(trained)
    return (*mm.layout.vision_blocks[lowest:], *decoder)


def unchanged_slices(plan: TuningPlan) -> int:
    """How many slices of hidden states, from what enters the first block up, no training step can change."""
    below = (Region.VISION, Region.CONNECTOR, Region.EMBEDDING)
    if any(plan.modes[region] != "frozen" for region in below):
        return 0
    return min(plan.layers, default=plan.num_layers) + 1


def checkpoint_blocks(model: nn.Module, names: tuple[str, ...], undo: ExitStack) -> None:
    """Recompute the named blocks in backward instead of keeping their activations, until ``undo`` is closed."""
    for name in names:
        replace_forward(undo, model.get_submodule(name), _recomputed)


@contextmanager
def activations_kept(model: nn.Module, names: Collection[str]) -> Iterator[None]:
    """While active, the named blocks are not recomputed in backward: hooks may be gone by then."""
    with ExitStack() as undo:
        for block in map(model.get_submodule, names):
            replace_forward(undo, block, lambda forward: getattr(forward, "recomputes", forward))
        yield


def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        # What surrounds this run (tokens that are no padding) must surround it when it is run again.
        again = copy_context().run
        return checkpoint(partial(again, partial(forward, **kwargs)), *args, use_reentrant=False)

    run.recomputes = forward  # type: ignore[attr-defined]
    return run
