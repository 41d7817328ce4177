"""What a run will cost, told before it: operations, bytes and seconds of one step under one policy.

Data flow: ``Backbone`` -> ``Blueprint`` (skeleton, what of it is read) -> per policy: skeleton under the plan, one
rehearsed step -> ``Forecast``.

What keeping the frozen part on disk would save, told without running anything.

Data flow: plan + FLOPs of a step + what enters the blocks of a rehearsed one -> ``Saving``.
"""

import copy
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn

from lightning_mm.core.errors import UserError
from lightning_mm.data.batch import Batch, TokenRegion
from lightning_mm.execution.activation_checkpointing import blocks_in_graph
from lightning_mm.execution.cache.activation_cache import boundary_of, moves
from lightning_mm.execution.frozen_dtype import castable
from lightning_mm.execution.prepare import Compute
from lightning_mm.models.attention.cpu_kernels import attended_apart, use_cpu_attention
from lightning_mm.models.attention.varlen import unpad_blocks
from lightning_mm.models.handle import MultimodalModel
from lightning_mm.models.hooks import skip_blocks
from lightning_mm.models.layout import ModelLayout, Region
from lightning_mm.models.loading import Backbone, load_skeleton
from lightning_mm.planning.devices import Device
from lightning_mm.planning.flops import Products, StepCost, StepFlops
from lightning_mm.planning.memory import Memory, gradient_bytes, optimizer_bytes, step_memory, traffic
from lightning_mm.planning.meta_modes import ready, without_weights
from lightning_mm.planning.meta_trace import Tally, Unread, tally, unread_parts
from lightning_mm.planning.step_shape import StepShape
from lightning_mm.tuning.apply import apply_plan
from lightning_mm.tuning.census import Census, take_census
from lightning_mm.tuning.policy import TuningPlan, TuningPolicy

_BELOW = (Region.OTHER, Region.VISION, Region.CONNECTOR, Region.EMBEDDING)


@dataclass(frozen=True)
class Saving:
    """Of a step whose rows are all known.

    Args:
        flops: Less; None where nothing can be kept.
        record: Bytes kept of a mean row, as float32.
        why: Nothing can be kept.
    """

    flops: float | None
    record: float = 0.0
    why: str = ""


def saving(
    plan: TuningPlan,
    layout: ModelLayout,
    spent: StepFlops,
    done: Tally,
    largest: Batch,
    mean: StepShape,
    unread: Sequence[str],
) -> Saving:
    """By what enters the lowest block that trains, or by the features of a frozen tower.

    Args:
        plan: What trains.
        layout: Of the model.
        spent: FLOPs of a mean step.
        done: The step that was rehearsed, in float32.
        largest: Its batch.
        mean: Shape of one mean row, without padding.
        unread: Vision blocks that are passed by anyway.
    """
    read = [name for name in layout.vision_blocks if name not in unread]
    try:
        first = boundary_of(plan)
    except UserError as error:
        pixels = StepShape.of(largest).pixels
        if moves(plan, Region.VISION) or not read or not pixels:
            return Saving(None, why=error.why)
        return Saving(spent.region(Region.VISION).total, done.entering[read[-1]] * mean.pixels / pixels)
    below = [*(spent.region(region) for region in _BELOW), spent.layers(range(first))]
    per_token = done.entering[layout.layers[0]] / largest.regions.numel()
    return Saving(sum(part.total for part in below), mean.tokens * per_token)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How steps are run.

    Args:
        compute: As configured.
        bf16: Whether the trainer's precision is bf16-mixed.
        checkpointing: Whether blocks are recomputed in backward.
        optimizer: Its name.
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
class Forecast:
    """One policy's step: one micro-batch on one rank, of mean shape; memory is that of the largest.

    Args:
        census: Parameters by region.
        plan: What trains.
        flops: The floor: what the policy needs, without padding and without anything computed twice.
        run: FLOPs that the run will spend.
        cached: The same once the frozen prefix, or the tower's features, are kept on disk; None where it cannot be.
        uncached_because: Why not.
        memory: Bytes at the peak.
        checkpoint: Bytes of a checkpoint: what trains, and its optimizer states.
        traffic: Bytes that a rank sends per optimizer step.
        record: Bytes that the cache keeps of a mean row, as float32 or, under bf16-mixed, bfloat16.
        seconds: Predicted.
        cached_seconds: Predicted with the cache.
    """

    census: Census
    plan: TuningPlan
    flops: StepFlops
    run: float
    cached: float | None
    uncached_because: str
    memory: Memory
    checkpoint: float
    traffic: float
    record: float
    seconds: float
    cached_seconds: float | None

    def to_dict(self) -> dict[str, Any]:
        """As written to JSON: FLOPs, bytes and seconds."""
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


class Blueprint:
    """A model without weights, to be put under one policy after the other.

    Args:
        backbone: The model.
        batch: On the CPU, with a picture: which parts of the tower are read shows only on one.
        packing: Whether blocks run without padding where they can.

    Raises:
        UserError: There is no such model, or its step cannot be rehearsed.
    """

    def __init__(self, backbone: Backbone, batch: Batch, packing: bool = True) -> None:
        self.backbone, self.packing, self.packed = backbone, packing, False
        self.dtype = torch.bfloat16 if backbone.dtype == "bfloat16" else torch.float32
        with without_weights():
            skeleton: Any = load_skeleton(backbone).to(self.dtype)
            if backbone.attention == "eager":
                skeleton.set_attn_implementation("eager")
        self._plain = ready(skeleton)
        self.layout = ModelLayout.of(self._plain)
        self._unread = Unread()
        self._unadapted = self._copied()
        self._unread = unread_parts(self._unadapted, self.layout, batch)
        self._pass_by(self._unadapted)

    def under(self, policy: TuningPolicy, setting: Setting) -> tuple[nn.Module, TuningPlan]:
        """A skeleton that obeys a policy, until the next one is asked for; and its plan, less what is never read."""
        plan, unread = policy.plan(self.layout), self._unread.names
        adapted = frozenset(name for name in plan.adapted if f"{name}.weight" not in unread)
        plan = replace(plan, full=plan.full - unread, adapted=adapted)
        skeleton = self._copied() if plan.adapted else self._unadapted
        with without_weights():
            skeleton.to(self.dtype)
            apply_plan(MultimodalModel(skeleton, self.layout), plan)
            if setting.bf16 and setting.compute.frozen_dtype != "float32":
                for parameter in castable(skeleton, plan):
                    parameter.data = parameter.data.bfloat16()
        return skeleton, plan

    @property
    def unread_blocks(self) -> tuple[str, ...]:
        """Vision blocks that nothing reads."""
        return tuple(self._unread.blocks)

    def _copied(self) -> nn.Module:
        with without_weights():
            skeleton = copy.deepcopy(self._plain)
        self._pass_by(skeleton)
        if self.packing:
            undo = ExitStack()  # never closed: the skeleton is ours
            use_cpu_attention(skeleton, undo)
            self.packed = bool(unpad_blocks(MultimodalModel(skeleton, self.layout), undo))
        return skeleton

    def _pass_by(self, skeleton: nn.Module) -> None:
        skip_blocks(ExitStack(), [skeleton.get_submodule(name) for name in self._unread.blocks], self._unread.in_tuple)


def forecast(
    blueprint: Blueprint, policy: TuningPolicy, batches: Sequence[Batch], setting: Setting, device: Device
) -> Forecast:
    """Tell what a policy costs.

    Args:
        blueprint: The model.
        policy: Who trains.
        batches: Some micro-batches on the CPU, as the run will see them; the largest must have a picture.
        setting: How steps are run.
        device: Where.

    Raises:
        UserError: The policy does not fit the model.
    """
    skeleton, plan = blueprint.under(policy, setting)
    layout = blueprint.layout
    largest = max(batches, key=lambda batch: (batch.has_images, batch.regions.numel()))
    done = tally(skeleton, layout, largest, bf16=setting.bf16, processor=device.processor)
    cost = StepCost.of_tally(done)
    again = blocks_in_graph(MultimodalModel(skeleton, layout), plan)[:: setting.compute.checkpoint_every]
    spent = as_run(cost, batches, blueprint.packed, device.processor)
    run = spent.floor + (_recomputed(spent, layout, again) if setting.checkpointing else 0.0)
    rows = sum(len(batch) for batch in batches) / len(batches)
    mean = mean_shape(batches, packed=True).scaled(1 / rows)
    kept = saving(plan, layout, spent, done, largest, mean, blueprint.unread_blocks)
    cached = None if kept.flops is None else run - kept.flops
    trained = gradient_bytes(skeleton)
    memory = step_memory(
        skeleton,
        layout,
        plan,
        done,
        optimizer=setting.optimizer,
        quantization=blueprint.backbone.quantization,
        checkpointing=setting.checkpointing,
        checkpoint_every=setting.compute.checkpoint_every,
        loss_chunk=setting.compute.loss_chunk,
        ranks=setting.ranks,
    )

    def seconds(flops: float) -> float:
        return device.seconds(flops, trained / setting.accumulate, setting.bf16 or blueprint.dtype == torch.bfloat16)

    return Forecast(
        census=take_census(MultimodalModel(skeleton, layout), plan),
        plan=plan,
        flops=cost.at(_unpadded(batches)),
        run=run,
        cached=cached,
        uncached_because=kept.why,
        memory=memory,
        checkpoint=trained + optimizer_bytes(skeleton, setting.optimizer),
        traffic=traffic(trained, setting.ranks),
        record=kept.record / (2 if setting.bf16 else 1),
        seconds=seconds(run),
        cached_seconds=None if cached is None else seconds(cached),
    )


def as_run(cost: StepCost, batches: Sequence[Batch], packed: bool, processor: bool) -> StepFlops:
    """FLOPs of a micro-batch as it is run. On a CPU, where gradients flow, attention need not see padding either."""
    places: dict[tuple[Region, int | None], Products] = defaultdict(Products)
    for batch in batches:
        real, rows = cost.at(StepShape.of(batch)).places, (batch.regions != TokenRegion.PAD).sum(1).tolist()
        alone = packed and processor and attended_apart(rows)
        for place, products in cost.at(mean_shape([batch], packed)).places.items():
            spent = real[place] if alone and products.input_gradients else products
            places[place] += spent.scaled(1 / len(batches))
    return StepFlops(dict(places))


def mean_shape(batches: Sequence[Batch], packed: bool) -> StepShape:
    """Of a micro-batch as it is run: without padding only outside of attention, which runs in rows."""
    real, padded = _unpadded(batches), _mean([StepShape.of(batch, padded=True) for batch in batches])
    return replace(padded, tokens=real.tokens) if packed else padded


def _unpadded(batches: Sequence[Batch]) -> StepShape:
    return _mean([StepShape.of(batch) for batch in batches])


def _mean(shapes: Sequence[StepShape]) -> StepShape:
    return sum(shapes, StepShape()).scaled(1 / len(shapes))


def _recomputed(spent: StepFlops, layout: ModelLayout, again: Sequence[str]) -> float:
    layers = tuple(index for index, name in enumerate(layout.layers) if name in again)
    share = sum(name in again for name in layout.vision_blocks) / max(1, len(layout.vision_blocks))
    return spent.layers(layers).forward + share * spent.region(Region.VISION).forward
