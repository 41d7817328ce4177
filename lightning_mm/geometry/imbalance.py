"""Whether one reading of the samples foretells the neighbourhoods of another, and the other way round.

Data flow: two ``Bank``s of the same samples -> rank, in the second, of the nearest neighbours in the first -> one
Estimate per layer. Ranks come from counting which distances are smaller, O(N^2), without a sort.

Shapes: L layers, N samples, K neighbours.
"""

import math

import torch
from torch import Tensor

from lightning_mm.estimate import Estimate, finite, undefined
from lightning_mm.geometry.gram import Bank
from lightning_mm.geometry.neighbours import Neighbours
from lightning_mm.geometry.resampling import mean_interval

_SHARED = 1.35
"""Samples share nearest neighbours: the standard deviation was 1.1 to 1.5 times that of independent ranks over
Gaussians of 3 to 200 dimensions with 150 and 500 samples, related and unrelated."""


def information_imbalance(a: Bank, b: Bank, k: int = 1, groups: Tensor | None = None) -> list[Estimate]:
    """Delta(A -> B) = 2/N times the mean rank in B of the k nearest in A (Glielmo et al. 2022), layer by layer.

    Near (k+1)/N where A foretells B, 1 where it says nothing; the two directions differ where one bank holds more.
    Equal distances in B share their mean rank.

    Args:
        a: L layers that foretell.
        b: As many layers of the same samples, foretold.
        k: Neighbours in A.
        groups: (N,) int ids of samples that depend on one another.

    Example:
        >>> x = torch.randn(1, 200, 2, generator=torch.Generator().manual_seed(0))
        >>> round(information_imbalance(Bank.of(x), Bank.of(3 * x))[0].value, 6)  # alike but for scale: 2/N
        0.01
    """
    near = Neighbours.of(a, k)
    n = a.num_samples
    return [
        undefined(problem, n)
        if (problem := near.problem(layer, k) or b.problems[layer])
        else _imbalance(near, b, layer, k, groups)
        for layer in range(a.num_layers)
    ]


def _imbalance(near: Neighbours, b: Bank, layer: int, k: int, groups: Tensor | None) -> Estimate:
    n = b.num_samples
    ranks_NK = conditional_ranks(near.indices[layer, :, :k].long(), b.squared_distances[layer])
    mean, low, high = (float(end) for end in mean_interval(2 / n * ranks_NK.mean(1)[None], groups))
    band = 1.96 * math.sqrt((n - 2) / (3 * k)) / n
    return finite(
        mean,
        n,
        k=k,
        low=max(0.0, mean - _SHARED * (mean - low)),
        high=mean + _SHARED * (high - mean),
        null=1.0,
        null_low=1 - band,
        null_high=1 + band,
        notes=near.notes(layer, k),
    )


def conditional_ranks(indices_NK: Tensor, squared_NN: Tensor) -> Tensor:
    """(N, K) ranks 1..N-1 of the given samples by distance from each sample; ties share their mean rank."""
    others_NN = squared_NN.clone().fill_diagonal_(math.inf)
    ranks = []
    for nearest_N in indices_NK.T:
        distance_N1 = others_NN.gather(1, nearest_N[:, None])
        smaller_N = (others_NN < distance_N1).sum(1)
        not_larger_N = (others_NN <= distance_N1).sum(1)
        ranks.append((smaller_N + not_larger_N + 1).double() / 2)
    return torch.stack(ranks, 1)
