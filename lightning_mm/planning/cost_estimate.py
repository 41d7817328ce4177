"""What one training step costs under a policy, estimated without weights: FLOPs, bytes and seconds.

Data flow: ``Backbone`` -> ``MetaModel`` (the model on the meta device, and what of it the loss never uses) -> per
policy: skeleton under the plan, one traced step -> ``CostEstimate``, with what a cache of the frozen part would save.
"""

import copy
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn

from lightning_mm.core.errors import UserError
from lightning_mm.data.batch import Batch, TokenRegion
from lightning_mm.execution.activation_checkpointing import blocks_in_graph
from lightning_mm.execution.cache.activation_cache import first_layer_above_prefix, is_trained
from lightning_mm.execution.frozen_dtype import castable_weights
from lightning_mm.execution.prepare import Compute
from lightning_mm.models.attention.cpu_kernels import attends_row_by_row, use_cpu_attention
from lightning_mm.models.attention.varlen import unpad_blocks
from lightning_mm.models.handle import MultimodalModel
from lightning_mm.models.hooks import skip_blocks
from lightning_mm.models.layout import ModelLayout, Region
from lightning_mm.models.loading import Backbone, load_skeleton
from lightning_mm.planning.devices import Device
from lightning_mm.planning.flops import Part, PassFlops, StepCost, StepFlops
from lightning_mm.planning.memory import StepMemory, all_reduce_bytes, gradient_bytes, optimizer_bytes, step_memory
from lightning_mm.planning.meta_modes import make_traceable, meta_weights
from lightning_mm.planning.meta_trace import MetaTrace, UnusedVision, find_read_blocks, find_unused_vision, trace_step
from lightning_mm.planning.step_shape import StepShape
from lightning_mm.tuning.apply import apply_plan
from lightning_mm.tuning.census import Census, take_census
from lightning_mm.tuning.policy import TuningPlan, TuningPolicy


@dataclass(frozen=True)
class CacheSavings:
    """What a step saves whose rows are all in the cache.

    Args:
        flops: FLOPs less; None where nothing can be cached.
        bytes_per_row: Bytes cached of a mean row, as float32.
        why_none: Why nothing can be cached; '' where something can.
    """

    flops: float | None
    bytes_per_row: float = 0.0
    why_none: str = ""


def cache_savings(
    plan: TuningPlan,
    layout: ModelLayout,
    spent: StepFlops,
    trace: MetaTrace,
    largest: Batch,
    mean: StepShape,
    read_blocks: Callable[[], Sequence[str]],
) -> CacheSavings:
    """Savings of caching what enters the lowest block that trains, or else the features of a frozen tower.

    Args:
        plan: What trains.
        layout: Of the model.
        spent: FLOPs of a mean step.
        trace: Of the largest step, in float32.
        largest: Its batch.
        mean: Shape of one mean row, without padding.
        read_blocks: Finds the vision blocks whose output is read by more than the next block.
    """
    try:
        first = first_layer_above_prefix(plan)
    except UserError as error:
        pixels = StepShape.of(largest).pixels
        read = () if is_trained(plan, Region.VISION) or not pixels else read_blocks()
        if not read:
            return CacheSavings(None, why_none=error.why)
        features = sum(trace.block_input_bytes[name] for name in read) * mean.pixels / pixels
        return CacheSavings(spent.region(Region.VISION).total, features)
    per_token = trace.block_input_bytes[layout.layers[0]] / largest.regions.numel()
    return CacheSavings(spent.below(first), mean.tokens * per_token)


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """How a run computes its steps.

    Args:
        compute: As configured.
        bf16: Whether the trainer's precision is bf16-mixed.
        checkpointing: Whether blocks are recomputed in backward.
        optimizer: ``model.optimizer.name``.
        ranks: Processes.
        accumulate: Micro-batches per optimizer step.
    """

    compute: Compute = Compute()  # noqa: RUF009  (frozen)
    bf16: bool = False
    checkpointing: bool = False
    optimizer: str = "adamw"
    ranks: int = 1
    accumulate: int = 1


@dataclass(frozen=True, kw_only=True)
class CostEstimate:
    """Cost of one policy's micro-batch on one rank: FLOPs of a mean one, memory of the largest.

    Args:
        census: Parameters by region.
        plan: What trains.
        flops: The floor: what the policy needs, without padding and without recomputation.
        run: FLOPs that the run will spend.
        cached: FLOPs that it will spend once everything cacheable is cached; None where nothing is.
        uncached_because: Why nothing is; '' where something is.
        memory: Bytes at the peak.
        checkpoint: Bytes of a checkpoint: what trains, and its optimizer states.
        traffic: Bytes that a rank sends per optimizer step.
        record: Bytes that the cache holds of a mean row, as float32 or, under bf16-mixed, bfloat16.
        seconds: Predicted.
        cached_seconds: Predicted with everything cached; None where nothing is.
    """

    census: Census
    plan: TuningPlan
    flops: StepFlops
    run: float
    cached: float | None
    uncached_because: str
    memory: StepMemory
    checkpoint: float
    traffic: float
    record: float
    seconds: float
    cached_seconds: float | None

    def to_dict(self) -> dict[str, Any]:
        """The estimate as ``plan --json`` writes it, in FLOPs, bytes and seconds."""
        parts = {name: asdict(products) for name, products in self.flops.parts(self.plan).items()}
        regions = {row.region: {"parameters": row.parameters, "trained": row.trainable} for row in self.census.rows}
        return {
            "policy": self.plan.policy,
            "parameters": self.census.total,
            "trained": self.census.trainable,
            "regions": regions,
            "flops": {"floor": self.flops.floor, "run": self.run, "cached": self.cached, "parts": parts},
            "memory": {**asdict(self.memory), "total": self.memory.total},
            "checkpoint": self.checkpoint,
            "traffic": self.traffic,
            "cache_per_sample": self.record,
            "not_cached_because": self.uncached_because,
            "seconds": self.seconds,
            "cached_seconds": self.cached_seconds,
        }


class MetaModel:
    """A model on the meta device, put under one policy after the other.

    Args:
        backbone: The model.
        batch: On the CPU, with a picture: what of the tower is unused shows only on one.
        packing: Whether blocks run without padding where they can.

    Raises:
        UserError: There is no such model, or its step cannot be traced.
    """

    def __init__(self, backbone: Backbone, batch: Batch, packing: bool = True) -> None:
        self.backbone, self.packing, self.packed = backbone, packing, False
        self.dtype = torch.bfloat16 if backbone.dtype == "bfloat16" else torch.float32
        with meta_weights():
            skeleton: Any = load_skeleton(backbone)
            _cast(skeleton, self.dtype)
            if backbone.attention == "eager":
                skeleton.set_attn_implementation("eager")
        self._plain = make_traceable(skeleton)
        self.layout = ModelLayout.of(self._plain)
        self._unused = UnusedVision()
        self._unadapted = self._copy()
        self._unused = find_unused_vision(self._unadapted, self.layout, batch)
        self._skip_unused(self._unadapted)
        self._batch = batch

    def apply_policy(self, policy: TuningPolicy, settings: RunSettings) -> tuple[nn.Module, TuningPlan]:
        """The skeleton under a policy, valid until the next call, and the plan without what the loss never uses."""
        plan, unused = policy.plan(self.layout), self._unused.names
        adapted = frozenset(name for name in plan.adapted if f"{name}.weight" not in unused)
        plan = replace(plan, full=plan.full - unused, adapted=adapted)
        skeleton = self._copy() if plan.adapted_weights else self._unadapted
        with meta_weights():
            _cast(skeleton, self.dtype)
            apply_plan(MultimodalModel(skeleton, self.layout), plan)
            if settings.bf16 and settings.compute.frozen_dtype != "float32":
                for parameter in castable_weights(skeleton, plan, self.layout.stacks):
                    parameter.data = parameter.data.bfloat16()
        return skeleton, plan

    @cached_property
    def read_blocks(self) -> tuple[str, ...]:
        """Names of the vision blocks whose output is read by more than the next block."""
        return find_read_blocks(self._copy(), self.layout, self._batch, self._unused.blocks)

    def _copy(self) -> nn.Module:
        with meta_weights():
            skeleton = copy.deepcopy(self._plain)
        self._skip_unused(skeleton)
        if self.packing:
            undo = ExitStack()  # never closed: the skeleton is only traced
            use_cpu_attention(skeleton, undo)
            self.packed = bool(unpad_blocks(MultimodalModel(skeleton, self.layout), undo))
        return skeleton

    def _skip_unused(self, skeleton: nn.Module) -> None:
        skip_blocks(ExitStack(), [skeleton.get_submodule(name) for name in self._unused.blocks], self._unused.in_tuple)


def _cast(skeleton: nn.Module, dtype: torch.dtype) -> None:
    """Cast what is of floating point, in place; ``Module.to`` would also make complex buffers real (Llama 4's)."""
    for tensor in (*skeleton.parameters(), *skeleton.buffers()):
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)


def estimate_cost(
    model: MetaModel, policy: TuningPolicy, batches: Sequence[Batch], settings: RunSettings, device: Device
) -> CostEstimate:
    """The cost of a step under a policy.

    Args:
        model: The model.
        policy: Which weights train.
        batches: Some micro-batches on the CPU, as the run will see them; the largest must have a picture.
        settings: How the run computes its steps.
        device: What the run trains on.

    Raises:
        UserError: The policy does not fit the model.
    """
    skeleton, plan = model.apply_policy(policy, settings)
    layout, compute = model.layout, settings.compute
    largest = max(batches, key=lambda batch: (batch.has_images, batch.regions.numel()))
    trace = trace_step(skeleton, layout, largest, bf16=settings.bf16, on_cpu=device.is_cpu)
    cost = StepCost.of_trace(trace)
    spent = executed_flops(cost, batches, model.packed, device.is_cpu)
    again = blocks_in_graph(MultimodalModel(skeleton, layout), plan)[:: compute.checkpoint_every]
    run = spent.floor + (_recomputed_flops(spent, layout, again) if settings.checkpointing else 0.0)
    rows = sum(len(batch) for batch in batches) / len(batches)
    mean = mean_shape(batches)
    savings = cache_savings(plan, layout, spent, trace, largest, mean.scaled(1 / rows), lambda: model.read_blocks)
    cached = None if savings.flops is None else run - savings.flops
    gradients = gradient_bytes(skeleton)
    memory = step_memory(
        skeleton,
        layout,
        plan,
        trace,
        optimizer=settings.optimizer,
        quantization=model.backbone.quantization,
        checkpointing=settings.checkpointing,
        checkpoint_every=compute.checkpoint_every,
        loss_chunk=compute.loss_chunk,
        ranks=settings.ranks,
    )

    def seconds(flops: float) -> float:
        bf16 = settings.bf16 or model.dtype == torch.bfloat16
        return device.step_seconds(flops, gradients / settings.accumulate, bf16)

    return CostEstimate(
        census=take_census(MultimodalModel(skeleton, layout), plan),
        plan=plan,
        flops=cost.at(mean),
        run=run,
        cached=cached,
        uncached_because=savings.why_none,
        memory=memory,
        checkpoint=gradients + optimizer_bytes(skeleton, settings.optimizer),
        traffic=all_reduce_bytes(gradients, settings.ranks),
        record=savings.bytes_per_row / (2 if settings.bf16 else 1),
        seconds=seconds(run),
        cached_seconds=None if cached is None else seconds(cached),
    )


def executed_flops(cost: StepCost, batches: Sequence[Batch], packed: bool, on_cpu: bool) -> StepFlops:
    """FLOPs of a mean micro-batch as it is run, padding included where it is computed.

    Args:
        cost: Of the policy.
        batches: Micro-batches on the CPU.
        packed: Whether blocks run without padding, which then only attention sees.
        on_cpu: Whether the run is on a CPU, where attention that needs gradients skips the padding too.
    """
    by_part: dict[Part, PassFlops] = defaultdict(PassFlops)
    for batch in batches:
        real, padded = StepShape.of(batch), StepShape.of(batch, padded=True)
        without_padding = cost.at(real).by_part
        apart = packed and on_cpu and attends_row_by_row((batch.regions != TokenRegion.PAD).sum(1).tolist())
        run = replace(padded, tokens=real.tokens, pixels=real.pixels, picture_pairs=real.picture_pairs)
        for part, flops in cost.at(run if packed else padded).by_part.items():
            spent = without_padding[part] if apart and flops.input_gradients else flops
            by_part[part] += spent.scaled(1 / len(batches))
    return StepFlops(dict(by_part))


def mean_shape(batches: Sequence[Batch]) -> StepShape:
    """Mean shape of the micro-batches, without padding."""
    return sum((StepShape.of(batch) for batch in batches), StepShape()).scaled(1 / len(batches))


def _recomputed_flops(spent: StepFlops, layout: ModelLayout, again: Sequence[str]) -> float:
    """FLOPs of the forward passes that activation checkpointing repeats in the named blocks."""
    layers = tuple(index for index, name in enumerate(layout.layers) if name in again)
    share = sum(name in again for name in layout.vision_blocks) / max(1, len(layout.vision_blocks))
    return spent.layers(layers).forward + share * spent.region(Region.VISION).forward
