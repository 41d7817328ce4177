"""Skip the vision blocks above the features that the model reads: the family's code computes them and drops them.

Data flow: an example batch -> autograd graph of its logits -> vision blocks outside it (``tuning.unused_parameters``)
-> skipped, if the logits stay the same. LLaVA reads the output of its tower's last block but one.
"""

from contextlib import ExitStack

import torch
from torch import Tensor

from lightning_mm.core.decisions import log_decision
from lightning_mm.data.batch import Batch
from lightning_mm.execution.cache.frozen_prefix import own_randomness
from lightning_mm.execution.loss import gathered_before
from lightning_mm.models.handle import MultimodalModel
from lightning_mm.models.hooks import skip_blocks
from lightning_mm.tuning.unused_parameters import (
    graph_leaves,
    no_saved_tensors,
    only_requires_grad,
    unused_vision_blocks,
)


def truncate_tower(mm: MultimodalModel, batch: Batch, undo: ExitStack) -> tuple[str, ...]:
    """Skip the vision blocks that the logits do not depend on; returns their names, top first.

    Args:
        mm: The plain model, on the batch's device.
        batch: With pictures; without any, nothing is skipped.
        undo: Takes what puts the blocks back.
    """
    if not batch.has_images or not mm.layout.vision_blocks:
        return ()

    def logits() -> Tensor:
        with own_randomness(batch.regions.device), gathered_before(mm.head, batch.supervised):
            output: Tensor = mm.model(**batch.inputs, use_cache=False).logits
            return output

    blocks = [mm.model.get_submodule(name) for name in mm.layout.vision_blocks]
    parameters = [p for block in blocks for p in block.parameters() if p.is_floating_point()]
    in_tuple: list[bool] = []
    hook = blocks[-1].register_forward_hook(lambda _, __, output: in_tuple.append(isinstance(output, tuple)))
    with only_requires_grad(mm.model, parameters), no_saved_tensors(), hook:
        unused = unused_vision_blocks(mm.model, mm.layout, graph_leaves(logits()))
    if not unused:
        return ()
    # A graph does not show what is read without a gradient, such as a choice of patches: the values decide.
    with torch.no_grad(), ExitStack() as attempt:
        expected = logits()  # again, as attention may run another kernel where gradients flow
        skip_blocks(attempt, blocks[-len(unused) :], any(in_tuple))
        if not torch.equal(logits(), expected):
            log_decision(
                "vision tower", "all blocks computed", "the logits change without those that the graph leaves out"
            )
            return ()
        undo.enter_context(attempt.pop_all())
    log_decision("vision tower", f"{len(unused)} of {len(blocks)} blocks left out", "nothing reads them")
    return tuple(reversed(unused))
