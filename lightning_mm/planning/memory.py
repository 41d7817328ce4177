"""Memory of a training step by cause, and what a checkpoint and a gradient exchange weigh, before there is a weight.

Data flow: skeleton under a plan + a rehearsed step (``Tally``) + how it is run -> ``Memory`` in bytes.

The peak is where backward begins: weights, optimizer states, everything that was kept, and still the gradients of the
step before, which Lightning frees between forward and backward. What a CUDA context takes (about half a GiB) and what
an allocator leaves unused are not in it.

Shapes: B rows, L tokens after padding, D hidden size, S supervised positions, V vocabulary.
"""

from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass, fields
from typing import Literal

from torch import nn

from lightning_mm.execution.activation_checkpointing import blocks_in_graph
from lightning_mm.models.handle import MultimodalModel
from lightning_mm.models.layout import ModelLayout, Region
from lightning_mm.planning.meta_trace import Tally
from lightning_mm.tuning.policy import TuningPlan

Quantization = Literal["none", "nf4", "int8"]
_NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Bytes of a weight: four bits, a byte per block of 64, and a float32 per 256 such bytes (double quantisation)."""
_AUTO_CHUNK = 2**28
_SMALLEST_8BIT = 4096
"""bitsandbytes keeps the states of smaller tensors in float32."""


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak of a step, by cause.

    Args:
        weights: As they are held: their type, their quantisation.
        gradients: Of what trains; the buckets of DDP too.
        optimizer: Its states.
        activations: Kept for backward, copies of weights in another type included.
        logits: Kept for backward, and worked on.
        working: The largest that is only there for a moment.
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
    done: Tally,
    *,
    optimizer: str = "adamw",
    quantization: Quantization = "none",
    checkpointing: bool = False,
    checkpoint_every: int = 1,
    loss_chunk: int | str = "off",
    ranks: int = 1,
) -> Memory:
    """Peak of one step.

    Args:
        skeleton: Under its plan, in the types that the run has.
        layout: Of the plain model.
        plan: What trains.
        done: The step, rehearsed.
        optimizer: Its name in ``model.optimizer``.
        quantization: Of frozen linear weights.
        checkpointing: Whether blocks in the graph are recomputed.
        checkpoint_every: Of those, every so many-th one.
        loss_chunk: Positions whose logits are in memory at a time; 'auto' and 'off' as in ``model.compute``.
        ranks: Processes of DDP, which holds gradients a second time.
    """
    trained = gradient_bytes(skeleton)
    again = blocks_in_graph(MultimodalModel(skeleton, layout), plan)[::checkpoint_every] if checkpointing else ()
    kept, recomputed = _kept(done, layout, again)
    logits = float(sum(k.size for k in done.kept if k.place.region is Region.HEAD and not k.weight))
    if loss_chunk != "off":
        vocabulary = len(skeleton.get_parameter(f"{layout.head}.weight"))
        logits = min(logits, _AUTO_CHUNK if isinstance(loss_chunk, str) else loss_chunk * vocabulary * 4)
    largest = max((k.size for k in done.kept if k.storage and not k.weight), default=0)
    return Memory(
        weights=weight_bytes(skeleton, layout, plan, quantization),
        gradients=trained * (2 if ranks > 1 else 1),
        optimizer=optimizer_bytes(skeleton, optimizer),
        activations=kept,
        # The logits themselves, and the gradients of both.
        logits=4 * logits,
        # A block is recomputed when the old gradients are gone and the new ones, or else the activations, are few.
        working=max(0.0, recomputed - min(kept, trained)) + 2 * largest,
    )


def weight_bytes(
    skeleton: nn.Module, layout: ModelLayout, plan: TuningPlan, quantization: Quantization = "none"
) -> float:
    """Bytes of all weights."""
    quantized = set() if quantization == "none" else _quantized(layout, plan)
    total = 0.0
    for name, parameter in skeleton.named_parameters():
        per_weight: float = parameter.element_size()
        if name.replace(".base_layer.", ".") in quantized:
            per_weight = _NF4 if quantization == "nf4" else 1 + 4 / parameter.shape[-1]
        total += parameter.numel() * per_weight
    return total


def gradient_bytes(skeleton: nn.Module) -> float:
    """Bytes of all gradients: what a step sends around, and what a checkpoint keeps of the weights."""
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


def traffic(trained: float, ranks: int) -> float:
    """Bytes that each rank sends in a step: a ring passes everything around twice, less its own share.

    Example:
        >>> traffic(100.0, 1), traffic(100.0, 4)
        (0.0, 150.0)
    """
    return 2 * (ranks - 1) / ranks * trained


def _quantized(layout: ModelLayout, plan: TuningPlan) -> set[str]:
    full = {name.rpartition(".")[0] for name in plan.full}
    return {f"{module}.weight" for module in layout.linears - full - {layout.head}}


def _kept(done: Tally, layout: ModelLayout, again: Collection[str]) -> tuple[float, float]:
    """Bytes of activations, and of the block that is recomputed at a time: of such blocks, what enters them is kept."""
    layers = {index for index, name in enumerate(layout.layers) if name in again}
    in_tower = sum(name in again for name in layout.vision_blocks)
    share = in_tower / max(1, len(layout.vision_blocks))
    total, blocks = float(sum(done.entering.get(name, 0) for name in again)), defaultdict[int | None, float](float)
    for kept in done.kept:
        region, layer = kept.place.region, kept.place.layer
        if region is Region.LAYERS and layer in layers:
            blocks[layer] += kept.size
        elif region is Region.VISION:
            total += kept.size * (1 - share)
            blocks[None] += kept.size * share / max(1, in_tower)
        elif region is not Region.HEAD or kept.weight:
            total += kept.size
    return total, max(blocks.values(), default=0.0)
