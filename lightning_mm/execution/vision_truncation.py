"""The vision tower cut at the features that are read: blocks above them are computed by the family's code, and dropped.

Data flow: an example batch -> logits where the tower's last block, the one below, ... puts out what is not a number ->
the blocks that do not show in them, passed by from then on (LLaVA reads the last but one).
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from lightning_mm.core.decisions import log_decision
from lightning_mm.data.batch import Batch
from lightning_mm.execution.cache.frozen_prefix import own_randomness
from lightning_mm.execution.loss import gathered_before
from lightning_mm.models.handle import MultimodalModel
from lightning_mm.models.hooks import Forward, replace_forward, skip_blocks


@torch.no_grad()
def truncate_tower(mm: MultimodalModel, batch: Batch, undo: ExitStack) -> tuple[str, ...]:
    """Skip the vision blocks whose output nothing reads; returns their names, top first.

    Args:
        mm: The plain model, on the batch's device.
        batch: With pictures; without any, nothing is cut.
        undo: Takes what puts the blocks back.
    """
    if not batch.has_images or not mm.layout.vision_blocks:
        return ()

    def reads() -> bool:
        """Whether what is not a number reaches the logits; where a closed gate is in between, it does too."""
        with gathered_before(mm.head, batch.supervised):
            return not bool(mm.model(**batch.inputs, use_cache=False).logits.isfinite().all())

    cut: list[str] = []
    in_tuple = False
    with own_randomness(batch.regions.device):
        for name in reversed(mm.layout.vision_blocks):
            with _spoilt(mm.model.get_submodule(name)) as outputs:
                if reads() or not outputs:
                    break
            in_tuple = isinstance(outputs[0], tuple)
            cut.append(name)
    if cut:
        skip_blocks(undo, [mm.model.get_submodule(name) for name in cut], in_tuple)
        log_decision(
            "vision tower", f"{len(cut)} of {len(mm.layout.vision_blocks)} blocks left out", "nothing reads them"
        )
    return tuple(cut)


@contextmanager
def _spoilt(block: nn.Module) -> Iterator[list[Any]]:
    """While active, what the block computes is listed, and what it returns is not a number. Its forward is replaced,
    since transformers' own hooks may already have taken the features when one of ours is asked."""
    outputs: list[Any] = []

    def spoilt(forward: Forward) -> Forward:
        def run(*args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            outputs.append(output)
            if isinstance(output, tuple):
                return (torch.full_like(output[0], float("nan")), *output[1:])
            return torch.full_like(output, float("nan"))

        return run

    with ExitStack() as undo:
        replace_forward(undo, block, spoilt)
        yield outputs
