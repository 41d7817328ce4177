"""Information imbalance: whether one representation predicts the neighborhoods of another, and the reverse.

Ranks come from counting which distances are smaller, O(N^2), without a sort.

Data flow: two ``Representations`` of the same samples -> rank, in the second, of the nearest neighbors in the first ->
one Estimate per layer.

Shapes: L layers, N samples, K neighbors, P pairings.
"""

import math

import torch
from torch import Tensor

from lightning_mm.core.estimate import Estimate
from lightning_mm.geometry.knn_overlap import null_band
from lightning_mm.geometry.neighbors import Neighbors
from lightning_mm.geometry.peak import left_out_means, with_left_out
from lightning_mm.geometry.representations import Representations
from lightning_mm.geometry.resampling import (
    clustered_mean_interval,
    nontrivial_groups,
    permutation_problem,
    permutations,
    without_null,
)

_DEPENDENCE = 1.35
"""Factor on the standard error, as samples share nearest neighbors: the standard deviation was 1.1 to 1.5 times that of
independent ranks over Gaussians of 3 to 200 dimensions with 150 and 500 samples, related and unrelated."""

_DRAWS = 20
"""Random pairings of the null where samples share a picture; each takes as long as the value itself."""


def information_imbalance(
    a: Representations, b: Representations, k: int = 1, groups: Tensor | None = None
) -> list[Estimate]:
    """Delta(A -> B) = 2/N times the mean rank in B of the k nearest in A (Glielmo et al. 2022), layer by layer.

    Near (k+1)/N where A predicts B, 1 where it is uninformative; the two directions differ where one representation has
    more information. Equal distances in B share their mean rank. Where samples share a picture, the null re-pairs whole
    pictures: samples of one picture may be near one another in both.

    Args:
        a: L layers that predict.
        b: As many layers of the same samples, predicted.
        k: Number of neighbors in A.
        groups: (N,) int ids, equal for samples that depend on one another (same picture); None: all are independent.

    Example:
        >>> x = torch.randn(1, 200, 2, generator=torch.Generator().manual_seed(0))
        >>> scaled = Representations.of(3 * x)
        >>> round(information_imbalance(Representations.of(x), scaled)[0].value, 6)  # 2/N: same neighborhoods
        0.01
    """
    near, groups = Neighbors.of(a, k), nontrivial_groups(groups)
    n = a.num_samples
    order_PN = None if groups is None else permutations(n, _DRAWS, groups=groups).to(a.centered.device)
    estimates = [
        Estimate.undefined_because(problem, n)
        if (problem := near.problem(layer, k) or b.problems[layer])
        else _imbalance(near, b, layer, k, groups, order_PN)
        for layer in range(a.num_layers)
    ]
    return without_null(estimates, permutation_problem(groups))


def imbalance_gain(a: Representations, b: Representations, groups: Tensor | None = None) -> list[Estimate]:
    """How much better A predicts B, layer by layer, than at the first layer: Delta_0 - Delta_l; the null is 0.

    The terms of each sample are subtracted before they are averaged, so that the sampling error common to both layers
    cancels.

    Args:
        a: L layers that predict.
        b: As many layers of the same samples, predicted.
        groups: (N,) int ids, equal for samples that depend on one another (same picture); None: all are independent.

    Example:
        >>> x = torch.randn(1, 50, 2, generator=torch.Generator().manual_seed(0))
        >>> imbalance_gain(Representations.of(x), Representations.of(x))[0].value
        0.0
    """
    near, n = Neighbors.of(a, 1), a.num_samples
    problems = [near.problem(layer, 1) or b.problems[layer] for layer in range(a.num_layers)]
    if problems[0]:
        return [Estimate.undefined_because(problems[0], n) for _ in problems]
    first_N = _terms(near, b, 0, 1)

    def measure(layer: int) -> Estimate:
        mean, low, high = (
            float(x) for x in clustered_mean_interval((first_N - _terms(near, b, layer, 1))[None], groups)
        )
        low, high = mean - _DEPENDENCE * (mean - low), mean + _DEPENDENCE * (high - mean)
        return Estimate.of(mean, n, k=1, low=low, high=high, null=0.0)

    return [
        Estimate.undefined_because(problem, n) if problem else measure(layer) for layer, problem in enumerate(problems)
    ]


def _terms(near: Neighbors, b: Representations, layer: int, k: int) -> Tensor:
    """(N,) 2/N times the rank of each sample; their mean is the imbalance."""
    ranks_NK = conditional_ranks(near.indices[layer, :, :k].long(), b.squared_distances(layer))
    return 2 / b.num_samples * ranks_NK.mean(1)


def _imbalance(
    near: Neighbors, b: Representations, layer: int, k: int, groups: Tensor | None, order_PN: Tensor | None
) -> Estimate:
    n = b.num_samples
    terms_N = _terms(near, b, layer, k)
    mean, low, high = (float(end) for end in clustered_mean_interval(terms_N[None], groups))
    if order_PN is None:
        error = math.sqrt((n - 2) / (3 * k)) / n
        chance = {"null": 1.0, "null_low": 1 - 1.96 * error, "null_high": 1 + 1.96 * error}
    else:
        chance = null_band(_drawn(near.indices[layer, :, :k].long(), b.squared_distances(layer), order_PN), None)
    low, high = (
        max(mean - _DEPENDENCE * (mean - low), 0.0),
        mean + _DEPENDENCE * (high - mean),
    )  # in this order NaN stays
    found = Estimate.of(mean, n, k=k, low=low, high=high, notes=near.notes(layer, k), **chance)
    return with_left_out(found, left_out_means(terms_N, groups, _DEPENDENCE))


def _drawn(near_NK: Tensor, squared_NN: Tensor, order_PN: Tensor) -> Tensor:
    """(P,) the imbalance where each sample i of the second representation is replaced by order[i]."""
    n, k = near_NK.shape
    moved_PNK = order_PN[:, near_NK].scatter(1, order_PN[..., None].expand(-1, -1, k), order_PN[:, near_NK])
    ranks_NM = conditional_ranks(moved_PNK.transpose(0, 1).flatten(1), squared_NN)
    return 2 / n * ranks_NM.view(n, -1, k).mean((0, 2))


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
