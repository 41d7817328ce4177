"""What a step's cost depends on: sums over its rows and pictures.

Data flow: Batch -> ``StepShape``; shapes of several steps add up, and ``flops`` turns them into operations.

Shapes: S supervised positions.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from lightning_mm.data.batch import Batch, TokenRegion


@dataclass(frozen=True)
class StepShape:
    """What a step's cost depends on: sums over its rows and pictures, so that shapes add.

    Args:
        tokens: Tokens of all rows.
        pairs: Squared tokens of each row.
        supervised: S.
        pixels: Numbers in the pictures' tensors.
        picture_pairs: Squared patches of each picture, in families whose pictures keep their size; else 0.
    """

    tokens: float = 0.0
    pairs: float = 0.0
    supervised: float = 0.0
    pixels: float = 0.0
    picture_pairs: float = 0.0

    def __add__(self, other: "StepShape") -> "StepShape":
        return StepShape(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def scaled(self, factor: float) -> "StepShape":
        return StepShape(*(getattr(self, f.name) * factor for f in fields(self)))

    @classmethod
    def of(cls, batch: Batch, padded: bool = False) -> "StepShape":
        """Shape of a batch on the CPU.

        Args:
            batch: As the collator makes it.
            padded: As its rows stand in the tensor; else without padding.
        """
        rows, length = batch.regions.shape
        lengths = (batch.regions != TokenRegion.PAD).sum(1).double()
        lengths = torch.full((rows,), float(length)).double() if padded else lengths
        pictures = picture_sizes(batch.inputs)
        return cls(float(lengths.sum()), float(lengths.square().sum()), float(batch.num_supervised), *pictures)


def picture_sizes(inputs: Mapping[str, Tensor]) -> tuple[float, float]:
    """``pixels`` and ``picture_pairs`` of what a model's forward takes."""
    pixels = sum(value.numel() for name, value in inputs.items() if name.startswith("pixel_values"))
    return float(pixels), float(sum(count**2 for count in patches(inputs)))


def patches(inputs: Mapping[str, Tensor]) -> list[int]:
    """Patches of each picture, in families whose pictures keep their size; inputs on the CPU."""
    grids = [value for name, value in inputs.items() if name.endswith("image_grid_thw")]
    return [int(count) for grid in grids for count in grid.prod(1).tolist()]
