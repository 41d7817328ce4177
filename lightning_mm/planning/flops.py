"""What a training step must compute: the products of its forward pass, and the gradients that its policy asks for.

Data flow: model + plan + one Batch -> a rehearsal of the forward pass without weights -> every product with what it
belongs to -> ``StepCost``, linear in sums over rows -> ``StepFlops`` of any step's shape.

A product of two operands is counted once forward, once more for each operand that needs a gradient: weights that train,
and inputs above the lowest of them, if the loss depends on them. Sums, norms and activations are not counted.

Shapes: B rows, L tokens after padding, S supervised positions.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, fields

from lightning_mm.data.batch import Batch
from lightning_mm.models.handle import MultimodalModel
from lightning_mm.models.hooks import skip_blocks
from lightning_mm.models.layout import Region
from lightning_mm.planning.meta_modes import skeleton_of, without_weights
from lightning_mm.planning.meta_trace import Tally, tally, unread_parts
from lightning_mm.planning.step_shape import StepShape
from lightning_mm.tuning.apply import apply_plan
from lightning_mm.tuning.policy import TuningPlan


@dataclass(frozen=True)
class Products:
    """FLOPs (two per multiply-add) of one part of a model in one step."""

    forward: float = 0.0
    input_gradients: float = 0.0
    weight_gradients: float = 0.0

    @property
    def total(self) -> float:
        return self.forward + self.input_gradients + self.weight_gradients

    def __add__(self, other: "Products") -> "Products":
        return Products(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def scaled(self, factor: float) -> "Products":
        return Products(*(getattr(self, f.name) * factor for f in fields(self)))


@dataclass(frozen=True)
class StepFlops:
    """FLOPs of one step by place: a region, or one decoder block.

    Args:
        places: (region, index of the block or None) -> its products.
    """

    places: Mapping[tuple[Region, int | None], Products]

    @property
    def total(self) -> Products:
        return sum(self.places.values(), Products())

    @property
    def floor(self) -> float:
        """The least that a step of this shape under this policy can cost."""
        return self.total.total

    def layers(self, indices: Iterator[int] | range | tuple[int, ...]) -> Products:
        """Of some decoder blocks."""
        return sum((self.places.get((Region.LAYERS, i), Products()) for i in indices), Products())

    def region(self, region: Region) -> Products:
        """Of a whole region."""
        return sum((p for (place, _), p in self.places.items() if place is region), Products())

    def parts(self, plan: TuningPlan) -> dict[str, Products]:
        """Bottom to top: regions, and decoder blocks below, in and above the range that trains."""
        lowest, highest = min(plan.layers, default=plan.num_layers), max(plan.layers, default=plan.num_layers - 1)
        cut = {"layers below": range(lowest), "layers in range": range(lowest, highest + 1)}
        cut["layers above"] = range(highest + 1, plan.num_layers) if plan.layers else range(0)
        before = (Region.OTHER, Region.VISION, Region.CONNECTOR, Region.EMBEDDING)
        found = {region.value: self.region(region) for region in before}
        found |= {name: self.layers(indices) for name, indices in cut.items()}
        found |= {region.value: self.region(region) for region in (Region.NORM, Region.HEAD)}
        return {name: products for name, products in found.items() if products.total}


@dataclass(frozen=True)
class StepCost:
    """FLOPs per unit of each of a shape's sums, for one model and policy.

    Args:
        rates: Name of the sum ('tokens', 'pairs', ...) -> place -> products per unit.
    """

    rates: Mapping[str, Mapping[tuple[Region, int | None], Products]]

    @classmethod
    def of(cls, mm: MultimodalModel, plan: TuningPlan, batch: Batch) -> "StepCost":
        """Rehearse one forward pass.

        Args:
            mm: Loaded, adapted, on any device; it is only looked at.
            plan: What trains, less what is never read.
            batch: On the CPU, with a picture; it says how many numbers of a picture make a token.

        Raises:
            UserError: The model branches on values that only its weights could give.
        """
        skeleton = skeleton_of(mm.model)
        unread = unread_parts(skeleton, mm.layout, batch)
        skip_blocks(ExitStack(), [skeleton.get_submodule(name) for name in unread.blocks], unread.in_tuple)
        with without_weights():
            apply_plan(MultimodalModel(skeleton, mm.layout), plan)
        return cls.of_tally(tally(skeleton, mm.layout, batch))

    @classmethod
    def of_tally(cls, done: Tally) -> "StepCost":
        """The same of what was noted while a batch was rehearsed."""
        found: dict[str, dict[tuple[Region, int | None], Products]] = defaultdict(lambda: defaultdict(Products))
        for product in done.products:
            unit = product.flops / product.units
            key = (product.place.region, product.place.layer)
            found[product.grows_by][key] += Products(unit, unit * product.inputs, unit * product.weights)
        return cls({name: dict(rates) for name, rates in found.items()})

    def at(self, shape: StepShape) -> StepFlops:
        """FLOPs of a step, or of several whose shapes were added."""
        places: dict[tuple[Region, int | None], Products] = defaultdict(Products)
        for name, rates in self.rates.items():
            for place, rate in rates.items():
                places[place] += rate.scaled(getattr(shape, name))
        return StepFlops(dict(places))


def step_flops(mm: MultimodalModel, plan: TuningPlan, batch: Batch) -> StepFlops:
    """FLOPs of the step of one batch, without its padding. Raises UserError as ``StepCost.of``."""
    return StepCost.of(mm, plan, batch).at(StepShape.of(batch))
