"""How much each block changes what passes through it, and how much training changes each layer.

Data flow: uncentred hidden states of consecutive slices (T, N, D) -> one estimate per block.

Shapes: T slices (embeddings and the output of each block), N samples, D features.
"""

import math

import torch
from torch import Tensor

from lightning_mm.estimate import Estimate, finite, undefined
from lightning_mm.geometry.gram import exact_products
from lightning_mm.geometry.resampling import mean_interval


def block_influence(features: Tensor, groups: Tensor | None = None) -> list[Estimate]:
    """BI = 1 - E cos(h_l, h_{l+1}) (ShortGPT, 2403.03853): 0 for a block that changes no direction.

    Args:
        features: (T, N, D) as they are, mean included.
        groups: (N,) picture of each sample; intervals are clustered by it.

    Returns:
        One estimate per slice: the first, which no block has made, is undefined.
    """
    return [undefined("embeddings: no block has made them", features.shape[1]), *_means(1 - _cosines(features), groups)]


def angular_distance(features: Tensor, groups: Tensor | None = None) -> list[Estimate]:
    """arccos(cos(h_l, h_{l+1})) / pi (2403.17887), 0 to 1; arguments and order as ``block_influence``."""
    angles = torch.arccos(_cosines(features).clamp(-1, 1)) / math.pi
    return [undefined("embeddings: no block has made them", features.shape[1]), *_means(angles, groups)]


def row_cosine(before: Tensor, after: Tensor, groups: Tensor | None = None) -> list[Estimate]:
    """Mean cosine of each sample with itself at another time; exactly 1 where nothing has moved.

    Args:
        before: (T, N, D) as they are, mean included.
        after: (T, N, D) of the same samples.
        groups: (N,) picture of each sample.
    """
    a_TND, b_TND = before.double(), after.double()
    size_TN = ((a_TND * a_TND).sum(-1) * (b_TND * b_TND).sum(-1)).sqrt()
    return _means((a_TND * b_TND).sum(-1) / size_TN, groups)


def _cosines(features: Tensor) -> Tensor:
    """(T - 1, N) cosines of what enters and what leaves each block."""
    with exact_products():
        unit_TND = torch.nn.functional.normalize(features.float(), dim=-1)
        return (unit_TND[:-1] * unit_TND[1:]).sum(-1)


def _means(values_TN: Tensor, groups: Tensor | None) -> list[Estimate]:
    mean, low, high = mean_interval(values_TN, groups)
    n = values_TN.shape[1]
    return [finite(float(m), n, low=float(a), high=float(b)) for m, a, b in zip(mean, low, high, strict=True)]
