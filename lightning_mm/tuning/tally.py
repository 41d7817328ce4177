"""What a forward pass computes and keeps for backward, noted while it is rehearsed.

Data flow: skeleton under a plan + Batch -> ``tally`` -> ``Tally``: products and kept tensors, each with its place.
Blocks that are alike (same class, shapes, flags and inputs) are rehearsed once and counted as often as they stand.

Shapes: B rows, L tokens after padding.
"""

from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_mm.data.batch import Batch
from lightning_mm.models.anatomy import Anatomy, Region
from lightning_mm.models.processors import attend_on_processors
from lightning_mm.models.short_rows import rehearsed
from lightning_mm.models.unpadding import RealTokens, unpadded
from lightning_mm.objective import supervised_nll
from lightning_mm.tuning.fused import Bfloat16, OneKernel, ShortRows
from lightning_mm.tuning.rehearsal import Rehearsal, refused
from lightning_mm.tuning.watch import Kept, Product, Watch, reached_from

_PICTURES = (Region.VISION, Region.CONNECTOR)


@dataclass
class Tally:
    """One rehearsed forward pass.

    Args:
        loss: () its summed NLL, without a value.
        products: With no gradients counted where the loss does not depend on them.
        kept: Tensors that backward needs, weights left out.
        read: Weights that need a gradient and on which the loss depends.
        entering: Bytes of what enters each block, by the block's name.
    """

    loss: Tensor
    products: list[Product]
    kept: list[Kept]
    read: set[Tensor]
    entering: dict[str, int]


def tally(
    skeleton: nn.Module,
    anatomy: Anatomy,
    batch: Batch,
    bf16: bool = False,
    once: bool = True,
    processor: bool = False,
) -> Tally:
    """Rehearse the training objective of one batch.

    Args:
        skeleton: Under its plan.
        anatomy: Of the plain model.
        batch: On the CPU.
        bf16: As under autocast to bfloat16.
        once: Rehearse blocks that are alike once.
        processor: As on a CPU, where short rows' attention is written out (``models.processors``).

    Raises:
        UserError: The model branches on values that only its weights could give.
    """
    watch = Watch(skeleton, anatomy, batch)
    try:
        with ExitStack() as stack:
            stack.enter_context(watch.attached(anatomy, once))
            stack.enter_context(torch.enable_grad())
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(watch.keep, lambda tensor: tensor))
            stack.enter_context(OneKernel(watch.see))
            if processor:
                attend_on_processors()
                stack.enter_context(rehearsed(ShortRows(watch.see, (*batch.regions.shape,), bf16)))
            if bf16:
                stack.enter_context(Bfloat16(watch.copied))
            stack.enter_context(Rehearsal(watch.see))
            stack.enter_context(unpadded(RealTokens(batch.real, *batch.regions.shape)))
            loss = supervised_nll(skeleton, skeleton.get_submodule(anatomy.head), batch).nll
    except (RuntimeError, NotImplementedError, KeyError, AttributeError, TypeError, ValueError, IndexError) as error:
        if once:  # blocks may hand things to one another past their outputs
            return tally(skeleton, anatomy, batch, bf16, once=False, processor=processor)
        raise refused(skeleton, error) from error
    reached = reached_from(loss.grad_fn)
    read = {node.variable for node in reached if hasattr(node, "variable")}
    return Tally(loss, list(watch.needed(reached)), watch.kept, read, watch.entering)


@dataclass(frozen=True)
class Unread:
    """What of the way from picture to text the loss does not depend on (LLaVA reads its tower below the top).

    Args:
        names: Parameters of the tower and the connector.
        blocks: Vision blocks, by name; a fit passes them by.
        in_tuple: Whether such blocks return tuples.
    """

    names: frozenset[str] = frozenset()
    blocks: tuple[str, ...] = ()
    in_tuple: bool = False


def unread_parts(skeleton: nn.Module, anatomy: Anatomy, batch: Batch) -> Unread:
    """Ask one rehearsed step; nothing is unread where the batch has no picture. Changes what needs a gradient."""
    if not any(name.startswith("pixel_values") for name in batch.inputs):
        return Unread()
    asked = {n: p for n, p in skeleton.named_parameters() if anatomy.place_of(n).region in _PICTURES}
    for parameter in skeleton.parameters():
        parameter.requires_grad_(False)
    for parameter in asked.values():
        parameter.requires_grad_(True)
    in_tuple: list[bool] = []
    top = skeleton.get_submodule(anatomy.vision_blocks[-1] if anatomy.vision_blocks else anatomy.head)
    with top.register_forward_hook(lambda _, __, output: in_tuple.append(isinstance(output, tuple))):
        read = tally(skeleton, anatomy, batch).read
    unread = [n for n in anatomy.vision_blocks if read.isdisjoint(skeleton.get_submodule(n).parameters())]
    names = frozenset(name for name, parameter in asked.items() if parameter not in read)
    return Unread(names, tuple(unread), any(in_tuple))
