"""The shape of a training step: the sums over rows and pictures that its FLOPs are linear in.

Data flow: ``Batch`` -> ``StepShape``; shapes of several steps add up, and ``flops.StepCost`` turns them into FLOPs.

Shapes: B rows, L tokens after padding, N pictures.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from lightning_mm.data.batch import Batch, TokenRegion


@dataclass(frozen=True)
class StepShape:
    """Sums over the rows and pictures of one or more steps.

    Args:
        tokens: Tokens of all rows.
        pairs: Tokens of each row that are computed, times all of its tokens, summed: the size of self-attention.
        supervised: Positions whose next token is trained.
        pixels: Elements of the pictures' tensors.
        picture_pairs: Squared patches of each picture, summed, in families whose pictures keep their size; else 0.
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
            padded: Whether padding counts as tokens, and what rows share in each of them, as in the batch's tensors.
        """
        rows, length = batch.regions.shape
        pairs = rows * length**2 if padded else int(token_pairs(batch))
        tokens = batch.regions.numel() if padded else len(batch.real)
        share = 1.0 if padded else batch.picture_share
        pixels = share * count_pixels(batch.inputs)
        picture_pairs = share * sum(count**2 for count in patch_counts(batch.inputs))
        return cls(float(tokens), float(pairs), float(batch.num_supervised), pixels, picture_pairs)


def token_pairs(batch: Batch) -> Tensor:
    """() tokens that are computed times the tokens of their row, summed, without padding."""
    lengths_B = (batch.regions != TokenRegion.PAD).sum(1)
    shared_B = 0 if batch.shared is None else torch.tensor(batch.shared.length, device=lengths_B.device)
    return ((lengths_B - shared_B) * lengths_B).sum()


def count_pixels(inputs: Mapping[str, Tensor]) -> int:
    """Elements of the pictures' tensors among a model's inputs."""
    return sum(value.numel() for name, value in inputs.items() if name.startswith("pixel_values"))


def patches_per_picture(inputs: Mapping[str, Tensor]) -> list[Tensor]:
    """(N,) patches of each picture, one tensor per grid; empty in families whose pictures take one size."""
    return [value.prod(1) for name, value in inputs.items() if name.endswith("image_grid_thw")]


def patch_counts(inputs: Mapping[str, Tensor]) -> list[int]:
    """Patches of each picture, read from inputs on the CPU; empty in families whose pictures take one size."""
    return [int(count) for patches in patches_per_picture(inputs) for count in patches.tolist()]


def picture_pairs(inputs: Mapping[str, Tensor], zero: Tensor) -> Tensor:
    """() squared patches of each picture, summed on the inputs' device; ``zero`` () where there are no grids."""
    return sum((patches.square().sum() for patches in patches_per_picture(inputs)), zero)
