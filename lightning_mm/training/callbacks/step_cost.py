"""What this rank has computed since the last reading, counted batch by batch without waiting for the device.

Data flow: ``Batch`` on the device -> sums, on the host where their terms are known there, else on the device ->
``StepTotals``, read once per interval; ``planning.flops`` turns them into FLOPs.

Shapes: B samples, L tokens after padding.
"""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lightning_mm.data.batch import Batch, CachedFeatures, TokenRegion
from lightning_mm.planning.flops import StepCost
from lightning_mm.planning.step_shape import StepShape, count_pixels, picture_pairs, token_pairs
from lightning_mm.tuning.policy import TuningPlan


@dataclass
class StepTotals:
    """Sums over batches.

    Args:
        samples: Conversations.
        positions: B * L: tokens and padding.
        image_tokens: Tokens that stand for pictures.
        shape: Of all rows, and of the pictures that the vision tower saw.
        cached: Of the rows that began at the lowest trained block, with states from the cache.
    """

    samples: int = 0
    positions: int = 0
    image_tokens: int = 0
    shape: StepShape = field(default_factory=StepShape)
    cached: StepShape = field(default_factory=StepShape)

    def flops(self, cost: StepCost, plan: TuningPlan) -> float:
        """The least FLOPs that these batches can have cost under a policy, without what came from the cache."""
        first = min(plan.lowest_layer, plan.num_layers - 1)
        return cost.at(self.shape).floor - cost.at(self.cached).below(first)


class BatchCounter:
    """Adds up batches until the totals are taken."""

    def __init__(self) -> None:
        self._totals = StepTotals()
        self._on_device: Tensor | None = None

    def add(self, batch: Batch) -> None:
        """Count a batch; nothing is read back from the device."""
        pairs, zero = token_pairs(batch), batch.regions.new_zeros((), dtype=torch.long)
        cached_pairs = zero
        if isinstance(batch.cached, CachedFeatures):
            # The tower saw the new rows only; the connector, cheap beside it, is counted with it.
            seen = list(batch.cached.uncached)
        else:
            seen = [batch] if batch.cached is None else list(batch.cached.uncached)
            self._totals.cached += StepShape(len(batch.real) - sum(len(part.real) for part in seen))
            if batch.cached is not None:
                cached_pairs = pairs - sum((token_pairs(part) for part in seen), zero)
        pixels = sum(count_pixels(part.inputs) * part.picture_share for part in seen)
        self._totals.samples += len(batch)
        self._totals.positions += batch.regions.numel()
        self._totals.shape += StepShape(len(batch.real), 0, batch.num_supervised, pixels)
        images = (batch.regions == TokenRegion.IMAGE).sum()
        pictures = sum((picture_pairs(part.inputs, zero) * part.picture_share for part in seen), zero)
        counts = torch.stack([images, pairs, cached_pairs, pictures])
        self._on_device = counts if self._on_device is None else self._on_device + counts

    def take(self) -> StepTotals:
        """The totals since the last call; waits for the device."""
        counts = [0] * 4 if self._on_device is None else self._on_device.tolist()
        images, pairs, cached_pairs, pictures = counts
        totals = replace(
            self._totals,
            image_tokens=images,
            shape=self._totals.shape + StepShape(pairs=pairs, picture_pairs=pictures),
            cached=self._totals.cached + StepShape(pairs=cached_pairs),
        )
        self._totals, self._on_device = StepTotals(), None
        return totals
