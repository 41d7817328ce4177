"""One training step traced on the meta device: its matrix products, its saved tensors, and what it never uses.

Data flow: skeleton under a plan + ``Batch`` -> the training loss under the modes of ``meta_modes`` and ``meta_kernels``
-> ``OpRecorder`` -> ``MetaTrace``, for ``flops`` and ``memory``; its graph -> ``UnusedVision``.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_mm.data.batch import Batch
from lightning_mm.execution.loss import supervised_nll
from lightning_mm.models.attention.cpu_kernels import meta_attention_kernel, use_cpu_attention
from lightning_mm.models.attention.varlen import RealTokens, unpadded
from lightning_mm.models.layout import ModelLayout
from lightning_mm.models.lora import adapt_shapes
from lightning_mm.planning.meta_kernels import FusedKernelsMode, MetaAutocast, MetaCpuAttention
from lightning_mm.planning.meta_modes import MetaWeightsMode, untraceable
from lightning_mm.planning.op_recorder import MatmulRecord, OpRecorder, SavedTensor
from lightning_mm.planning.step_shape import count_pixels
from lightning_mm.tuning.unused_parameters import (
    blocks_read_directly,
    graph_leaves,
    graph_nodes,
    only_requires_grad,
    picture_parameters,
    unused_vision_blocks,
)


@dataclass
class MetaTrace:
    """One traced forward pass.

    Args:
        loss: () summed NLL, on the meta device.
        products: Matrix products; without gradients where the loss does not depend on them.
        saved: Tensors that backward needs, weights left out.
        block_input_bytes: Bytes of what enters each block, by the block's name.
    """

    loss: Tensor
    products: list[MatmulRecord]
    saved: list[SavedTensor]
    block_input_bytes: dict[str, int]


def trace_step(
    skeleton: nn.Module,
    layout: ModelLayout,
    batch: Batch,
    bf16: bool = False,
    equal_once: bool = True,
    on_cpu: bool = False,
) -> MetaTrace:
    """Trace the training loss of one batch.

    Args:
        skeleton: The model on the meta device, under its plan.
        layout: Of the plain model.
        batch: On the CPU.
        bf16: Whether it runs as under autocast to bfloat16.
        equal_once: Whether equal blocks run once; where that fails, all are run.
        on_cpu: Whether it runs as on a CPU, where ``models.attention.cpu_kernels`` computes short rows' attention.

    Raises:
        UserError: The model branches on values that only its weights could give.
    """
    recorder = OpRecorder(skeleton, layout, batch)
    try:
        with ExitStack() as stack:
            stack.enter_context(recorder.attached(equal_once))
            stack.enter_context(torch.enable_grad())
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(recorder.record_saved, lambda tensor: tensor))
            adapt_shapes(stack, skeleton)
            stack.enter_context(FusedKernelsMode(recorder.record_op))
            if on_cpu:
                use_cpu_attention(skeleton, stack)
                stack.enter_context(
                    meta_attention_kernel(MetaCpuAttention(recorder.record_op, (*batch.regions.shape,), bf16))
                )
            if bf16:
                stack.enter_context(MetaAutocast(recorder.record_weight_copy))
            stack.enter_context(MetaWeightsMode(recorder.record_op))
            stack.enter_context(unpadded(RealTokens(batch.real, len(batch), batch.regions.shape[1], batch.shared)))
            loss = supervised_nll(skeleton, skeleton.get_submodule(layout.head), batch).nll
    except (RuntimeError, NotImplementedError, KeyError, AttributeError, TypeError, ValueError, IndexError) as error:
        if equal_once:  # blocks may pass tensors to one another beside their outputs
            return trace_step(skeleton, layout, batch, bf16, equal_once=False, on_cpu=on_cpu)
        raise untraceable(skeleton, error) from error
    return MetaTrace(loss, recorder.products(graph_nodes(loss)), recorder.saved, recorder.block_input_bytes)


@dataclass(frozen=True)
class UnusedVision:
    """What of the vision tower and the connector the loss never uses; see ``tuning.unused_parameters``.

    Args:
        names: Parameters of the tower and the connector.
        blocks: Vision blocks, by name; a fit skips them.
        in_tuple: Whether vision blocks return tuples.
    """

    names: frozenset[str] = frozenset()
    blocks: tuple[str, ...] = ()
    in_tuple: bool = False


def find_unused_vision(skeleton: nn.Module, layout: ModelLayout, batch: Batch) -> UnusedVision:
    """What the traced loss of a batch never uses; nothing where the batch has no picture."""
    if not count_pixels(batch.inputs):
        return UnusedVision()
    parameters = picture_parameters(skeleton, layout)
    in_tuple: list[bool] = []
    top = skeleton.get_submodule(layout.vision_blocks[-1] if layout.vision_blocks else layout.head)
    hook = top.register_forward_hook(lambda _, __, output: in_tuple.append(isinstance(output, tuple)))
    with only_requires_grad(skeleton, parameters.values()), hook:
        used = graph_leaves(trace_step(skeleton, layout, batch).loss)
    names = frozenset(name for name, parameter in parameters.items() if parameter not in used)
    return UnusedVision(names, unused_vision_blocks(skeleton, layout, used), any(in_tuple))


def find_read_blocks(skeleton: nn.Module, layout: ModelLayout, batch: Batch, unused: Sequence[str]) -> tuple[str, ...]:
    """Names of the vision blocks whose output is read by more than the next block; none without a picture.

    Args:
        skeleton: The model on the meta device.
        layout: Of the plain model.
        batch: On the CPU.
        unused: Vision blocks that are skipped.
    """
    computed = [name for name in layout.vision_blocks if name not in unused]
    if not computed or not count_pixels(batch.inputs):
        return ()
    return blocks_read_directly(skeleton, computed, lambda: trace_step(skeleton, layout, batch, equal_once=False).loss)
