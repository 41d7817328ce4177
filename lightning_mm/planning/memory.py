"""Memory of a training step by cause, and the bytes of a checkpoint and of a gradient exchange, without weights.

Data flow: skeleton under a plan + traced step (``MetaTrace``) + how it is run -> ``StepMemory`` in bytes.

The peak is where backward begins: weights, optimizer states, everything that was saved, and still the gradients of the
step before, which Lightning frees between forward and backward. A CUDA context (about half a GiB) and what an allocator
leaves unused are not in it.

Shapes: B rows, L tokens after padding, D hidden size, S supervised positions, V vocabulary.
"""

from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass, fields
from typing import Literal

from torch import nn

from lightning_mm.execution.activation_checkpointing import blocks_in_graph
from lightning_mm.models.handle import MultimodalModel
from lightning_mm.models.layout import ModelLayout, Region, plain_name
from lightning_mm.planning.meta_trace import MetaTrace
from lightning_mm.tuning.policy import TuningPlan

Quantization = Literal["none", "nf4", "int8"]
_NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Of one weight: four bits, a byte per block of 64, and a float32 per 256 such bytes (double quantization)."""
_AUTO_CHUNK_BYTES = 2**28
_SMALLEST_8BIT = 4096
"""Elements; bitsandbytes keeps the states of smaller tensors in float32."""


@dataclass(frozen=True)
class StepMemory:
    """Bytes at the peak of a step, by cause.

    Args:
        weights: In the type, or the quantization, that they are held in.
        gradients: Of what trains, in DDP's buckets too.
        optimizer: Its states.
        activations: Saved for backward, with the copies of weights in another type.
        logits: Saved for backward, and the tensors computed from them.
        working: The largest tensors that exist for a moment only.
    """

    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    working: float

    @property
    def total(self) -> float:
        return float(sum(getattr(self, f.name) for f in fields(self)))


def step_memory(
    skeleton: nn.Module,
    layout: ModelLayout,
    plan: TuningPlan,
    trace: MetaTrace,
    *,
    optimizer: str = "adamw",
    quantization: Quantization = "none",
    checkpointing: bool = False,
    checkpoint_every: int = 1,
    loss_chunk: int | str = "off",
    ranks: int = 1,
) -> StepMemory:
    """Peak of one step.

    Args:
        skeleton: The model on the meta device, under its plan, in the types of the run.
        layout: Of the plain model.
        plan: What trains.
        trace: The step, traced.
        optimizer: ``model.optimizer.name``.
        quantization: Of frozen linear weights.
        checkpointing: Whether blocks in the graph are recomputed.
        checkpoint_every: Every how many-th of them.
        loss_chunk: Positions whose logits are in memory at a time; 'auto' and 'off' as in ``model.compute``.
        ranks: Processes of DDP, which holds gradients a second time.
    """
    gradients = gradient_bytes(skeleton)
    again = blocks_in_graph(MultimodalModel(skeleton, layout), plan)[::checkpoint_every] if checkpointing else ()
    activations, recomputed = _activation_bytes(trace, layout, again)
    logits = float(sum(s.size for s in trace.saved if s.location.region is Region.HEAD and not s.is_weight))
    if loss_chunk != "off":
        vocabulary = len(skeleton.get_parameter(f"{layout.head}.weight"))
        logits = min(logits, _AUTO_CHUNK_BYTES if isinstance(loss_chunk, str) else loss_chunk * vocabulary * 4)
    largest = max((s.size for s in trace.saved if s.storage is not None and not s.is_weight), default=0)
    return StepMemory(
        weights=weight_bytes(skeleton, layout, plan, quantization),
        gradients=gradients * (2 if ranks > 1 else 1),
        optimizer=optimizer_bytes(skeleton, optimizer),
        activations=activations,
        # The logits themselves, and the gradients of both.
        logits=4 * logits,
        # A block is recomputed when the old gradients are gone and the new ones, or else the activations, are few.
        working=max(0.0, recomputed - min(activations, gradients)) + 2 * largest,
    )


def weight_bytes(
    skeleton: nn.Module, layout: ModelLayout, plan: TuningPlan, quantization: Quantization = "none"
) -> float:
    """Bytes of all weights."""
    trained = {name.rpartition(".")[0] for name in plan.full | layout.routers}
    quantized = {f"{module}.weight" for module in layout.linears - trained - {layout.head}}
    total = 0.0
    for name, parameter in skeleton.named_parameters():
        per_weight: float = parameter.element_size()
        if quantization != "none" and plain_name(name) in quantized:
            per_weight = _NF4_BYTES if quantization == "nf4" else 1 + 4 / parameter.shape[-1]
        total += parameter.numel() * per_weight
    return total


def gradient_bytes(skeleton: nn.Module) -> float:
    """Bytes of all gradients: what a step exchanges, and what a checkpoint holds of the weights."""
    return float(sum(p.numel() * p.element_size() for p in skeleton.parameters() if p.requires_grad))


def optimizer_bytes(skeleton: nn.Module, optimizer: str) -> float:
    """Bytes of AdamW's two moments."""
    total = 0.0
    for parameter in skeleton.parameters():
        if not parameter.requires_grad:
            continue
        eight_bits = optimizer == "adamw8bit"
        if eight_bits and parameter.numel() >= _SMALLEST_8BIT:
            total += 2 * parameter.numel() * (1 + 4 / 256)
        else:
            total += 2 * parameter.numel() * (4 if eight_bits else parameter.element_size())
    return total


def all_reduce_bytes(gradients: float, ranks: int) -> float:
    """Bytes that each rank sends in a step: a ring all-reduce passes everything around twice, less its own share.

    Example:
        >>> all_reduce_bytes(100.0, 1), all_reduce_bytes(100.0, 4)
        (0.0, 150.0)
    """
    return 2 * (ranks - 1) / ranks * gradients


def _activation_bytes(trace: MetaTrace, layout: ModelLayout, again: Collection[str]) -> tuple[float, float]:
    """Bytes of saved activations, and of the largest block that is recomputed.

    Args:
        trace: The step.
        layout: Of the plain model.
        again: Names of the blocks that are recomputed; of those, only the input is saved.
    """
    layers = {index for index, name in enumerate(layout.layers) if name in again}
    in_tower = sum(name in again for name in layout.vision_blocks)
    share = in_tower / max(1, len(layout.vision_blocks))
    total = float(sum(trace.block_input_bytes.get(name, 0) for name in again))
    blocks = defaultdict[int | None, float](float)
    for saved in trace.saved:
        region, layer = saved.location.region, saved.location.layer
        if region is Region.LAYERS and layer in layers:
            blocks[layer] += saved.size
        elif region is Region.VISION:
            total += saved.size * (1 - share)
            blocks[None] += saved.size * share / max(1, in_tower)
        elif region is not Region.HEAD or saved.is_weight:
            total += saved.size
    return total, max(blocks.values(), default=0.0)
