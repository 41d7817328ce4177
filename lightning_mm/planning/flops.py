"""FLOPs of a training step: matrix products of the forward pass, and of the gradients that its policy asks for.

Data flow: model + plan + one ``Batch`` -> forward pass on meta tensors (``meta_trace``) -> every matrix product with
the part of the model it belongs to -> ``StepCost``, linear in sums over rows -> ``StepFlops`` of a step of any shape.

This is the package's one cost model: ``plan`` prints it, ``throughput`` divides by the clock (MFU), and the layer range
search weighs its compute with ``relative_decoder_cost``, the same rule for a decoder of equal blocks.

The rule: a product of two operands is counted once in the forward pass and once more for each operand that needs a
gradient: trained weights, and inputs above the lowest of them, if the loss depends on them. Sums, norms and activations
are not counted.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, fields

from lightning_mm.data.batch import Batch
from lightning_mm.models.handle import MultimodalModel
from lightning_mm.models.hooks import skip_blocks
from lightning_mm.models.layout import Region
from lightning_mm.planning.meta_modes import meta_weights, skeleton_of
from lightning_mm.planning.meta_trace import MetaTrace, find_unused_vision, trace_step
from lightning_mm.planning.step_shape import StepShape
from lightning_mm.tuning.apply import apply_plan
from lightning_mm.tuning.policy import TuningPlan

Part = tuple[Region, int | None]
"""A region, or one decoder block by its index."""

_BEFORE_DECODER = (Region.OTHER, Region.VISION, Region.CONNECTOR, Region.EMBEDDING)
_AFTER_DECODER = (Region.NORM, Region.HEAD)


@dataclass(frozen=True)
class PassFlops:
    """FLOPs (two per multiply-add) of one part of a model in one step, by the pass they are spent in."""

    forward: float = 0.0
    input_gradients: float = 0.0
    weight_gradients: float = 0.0

    @property
    def total(self) -> float:
        return self.forward + self.input_gradients + self.weight_gradients

    def __add__(self, other: "PassFlops") -> "PassFlops":
        return PassFlops(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def scaled(self, factor: float) -> "PassFlops":
        return PassFlops(*(getattr(self, f.name) * factor for f in fields(self)))


def relative_decoder_cost(first: int, last: int, num_layers: int, connector_trains: bool = False) -> float:
    """FLOPs of a step in a decoder of equal blocks that trains blocks first to last; 1.0 is full tuning.

    Every block runs forward, those from the lowest trained one up need the gradient of their input, and the trained
    ones that of their weights; the three cost the same.

    Args:
        first: Lowest block that trains.
        last: Highest block that trains, included.
        num_layers: Blocks of the decoder.
        connector_trains: Whether gradients must reach the connector, below all blocks.

    Example:
        >>> round(relative_decoder_cost(6, 16, 32), 3), round(relative_decoder_cost(6, 16, 32, True), 3)
        (0.719, 0.781)
    """
    crossed = num_layers if connector_trains else num_layers - first
    return PassFlops(num_layers, crossed, last - first + 1).total / (3 * num_layers)


@dataclass(frozen=True)
class StepFlops:
    """FLOPs of one step by part of the model.

    Args:
        by_part: Region, or decoder block -> its FLOPs.
    """

    by_part: Mapping[Part, PassFlops]

    @property
    def floor(self) -> float:
        """The least that a step of this shape can cost under this policy."""
        return sum(self.by_part.values(), PassFlops()).total

    def layers(self, indices: Iterable[int]) -> PassFlops:
        """FLOPs of some decoder blocks."""
        return sum((self.by_part.get((Region.LAYERS, i), PassFlops()) for i in indices), PassFlops())

    def region(self, region: Region) -> PassFlops:
        """FLOPs of a whole region."""
        return sum((p for (name, _), p in self.by_part.items() if name is region), PassFlops())

    def below(self, first: int) -> float:
        """FLOPs of everything below a decoder block: what a cache of that block's input saves."""
        parts = [*(self.region(region) for region in _BEFORE_DECODER), self.layers(range(first))]
        return sum(part.total for part in parts)

    def parts(self, plan: TuningPlan) -> dict[str, PassFlops]:
        """Regions bottom to top, the decoder split into blocks below, in and above the range that trains."""
        lowest, highest = min(plan.layers, default=plan.num_layers), max(plan.layers, default=plan.num_layers - 1)
        ranges = {"layers below": range(lowest), "layers in range": range(lowest, highest + 1)}
        ranges["layers above"] = range(highest + 1, plan.num_layers) if plan.layers else range(0)
        found = {region.value: self.region(region) for region in _BEFORE_DECODER}
        found |= {name: self.layers(indices) for name, indices in ranges.items()}
        found |= {region.value: self.region(region) for region in _AFTER_DECODER}
        return {name: flops for name, flops in found.items() if flops.total}


@dataclass(frozen=True)
class StepCost:
    """FLOPs per unit of each sum of a step's shape, for one model and policy.

    Args:
        rates: Field of ``StepShape`` ('tokens', 'pairs', ...) -> part of the model -> FLOPs per unit.
    """

    rates: Mapping[str, Mapping[Part, PassFlops]]

    @classmethod
    def of(cls, mm: MultimodalModel, plan: TuningPlan, batch: Batch) -> "StepCost":
        """Trace one forward pass of a loaded model's meta copy.

        Args:
            mm: Loaded and adapted, on any device; it is not run.
            plan: What trains, without what the loss never uses.
            batch: On the CPU, with a picture: its patches per image token set the vision tower's share.

        Raises:
            UserError: The model branches on values that only its weights could give.
        """
        skeleton = skeleton_of(mm.model)
        unused = find_unused_vision(skeleton, mm.layout, batch)
        skip_blocks(ExitStack(), [skeleton.get_submodule(name) for name in unused.blocks], unused.in_tuple)
        with meta_weights():
            apply_plan(MultimodalModel(skeleton, mm.layout), plan)
        return cls.of_trace(trace_step(skeleton, mm.layout, batch))

    @classmethod
    def of_trace(cls, trace: MetaTrace) -> "StepCost":
        """The cost per unit, from the matrix products of a traced step."""
        rates: dict[str, dict[Part, PassFlops]] = defaultdict(lambda: defaultdict(PassFlops))
        for product in trace.products:
            unit = product.flops / product.units
            part = (product.location.region, product.location.layer)
            rates[product.grows_by][part] += PassFlops(unit, unit * product.inputs, unit * product.weights)
        return cls({name: dict(by_part) for name, by_part in rates.items()})

    def at(self, shape: StepShape) -> StepFlops:
        """FLOPs of a step, or of several whose shapes were added."""
        by_part: dict[Part, PassFlops] = defaultdict(PassFlops)
        for name, rates in self.rates.items():
            for part, rate in rates.items():
                by_part[part] += rate.scaled(getattr(shape, name))
        return StepFlops(dict(by_part))


def step_flops(mm: MultimodalModel, plan: TuningPlan, batch: Batch) -> StepFlops:
    """FLOPs of one batch's step without its padding; raises UserError as ``StepCost.of`` does."""
    return StepCost.of(mm, plan, batch).at(StepShape.of(batch))
