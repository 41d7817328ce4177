"""What this rank does, counted batch by batch without waiting for the device.

Data flow: Batch (on the device) -> sums, on the host where it knows them and else on the device -> ``Done``, read once
per interval.

Shapes: B samples, L tokens after padding.
"""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lightning_mm.data.batch import Batch, CachedFeatures, TokenRegion
from lightning_mm.models.layout import Region
from lightning_mm.planning.flops import StepCost
from lightning_mm.planning.step_shape import StepShape
from lightning_mm.tuning.policy import TuningPlan

_BELOW = (Region.OTHER, Region.VISION, Region.CONNECTOR, Region.EMBEDDING)


@dataclass
class Done:
    """Sums over batches.

    Args:
        samples: Conversations.
        positions: B * L: tokens and padding.
        image_tokens: Tokens that stand for pictures.
        shape: Of all rows, and of the pictures that were seen.
        cached: Of rows that began at the lowest trainable block, with states that were computed earlier.
    """

    samples: int = 0
    positions: int = 0
    image_tokens: int = 0
    shape: StepShape = field(default_factory=StepShape)
    cached: StepShape = field(default_factory=StepShape)

    def flops(self, cost: StepCost, plan: TuningPlan) -> float:
        """The least that this can have cost under a policy, without what was taken from the cache."""
        saved, begin = cost.at(self.cached), min(plan.lowest_layer, plan.num_layers - 1)
        below = [*(saved.region(region) for region in _BELOW), saved.layers(range(begin))]
        return cost.at(self.shape).floor - sum(part.total for part in below)


class Work:
    """Counts until it is asked."""

    def __init__(self) -> None:
        self._done = Done()
        self._on_device: Tensor | None = None

    def add(self, batch: Batch) -> None:
        """Count a batch; nothing is read back from the device."""
        if isinstance(batch.cached, CachedFeatures):
            self._add_features(batch, batch.cached)
            return
        seen = batch if batch.cached is None else batch.cached.uncached
        self._done.samples += len(batch)
        self._done.positions += batch.regions.numel()
        self._done.shape += StepShape(len(batch.real), 0, batch.num_supervised, 0 if seen is None else _pixels(seen))
        self._done.cached += StepShape(len(batch.real) - (0 if seen is None else len(seen.real)))
        pairs, nothing = _pairs(batch), batch.regions.new_zeros((), dtype=torch.long)
        images = (batch.regions == TokenRegion.IMAGE).sum()
        seen_pairs = nothing if seen is None else pairs if seen is batch else _pairs(seen)
        counts = torch.stack([images, pairs, pairs - seen_pairs, nothing if seen is None else _picture_pairs(seen)])
        self._count(counts)

    def _add_features(self, batch: Batch, kept: CachedFeatures) -> None:
        """The tower saw the new rows only; the connector, cheap beside it, is counted with it."""
        self._done.samples += len(batch)
        self._done.positions += batch.regions.numel()
        pixels = sum(_pixels(fresh) for fresh in kept.uncached)
        self._done.shape += StepShape(len(batch.real), 0, batch.num_supervised, pixels)
        pairs, nothing = _pairs(batch), batch.regions.new_zeros((), dtype=torch.long)
        images = (batch.regions == TokenRegion.IMAGE).sum()
        pictures = sum((_picture_pairs(fresh) for fresh in kept.uncached), nothing)
        self._count(torch.stack([images, pairs, nothing, pictures]))

    def _count(self, counts: Tensor) -> None:
        self._on_device = counts if self._on_device is None else self._on_device + counts

    def take(self) -> Done:
        """What was done since the last call; waits for the device."""
        counts = [0] * 4 if self._on_device is None else self._on_device.tolist()
        images, pairs, cached_pairs, picture_pairs = counts
        done = replace(
            self._done,
            image_tokens=images,
            shape=self._done.shape + StepShape(pairs=pairs, picture_pairs=picture_pairs),
            cached=self._done.cached + StepShape(pairs=cached_pairs),
        )
        self._done, self._on_device = Done(), None
        return done


def _pairs(batch: Batch) -> Tensor:
    """() squared tokens of each row, summed."""
    return (batch.regions != TokenRegion.PAD).sum(1).square().sum()


def _pixels(batch: Batch) -> int:
    return sum(value.numel() for name, value in batch.inputs.items() if name.startswith("pixel_values"))


def _picture_pairs(batch: Batch) -> Tensor:
    """() squared patches of each picture, summed, in families whose pictures keep their size; else 0."""
    grids = [value for name, value in batch.inputs.items() if name.endswith("image_grid_thw")]
    squares = [grid.prod(1).square().sum() for grid in grids]
    return sum(squares, batch.regions.new_zeros((), dtype=torch.long))
