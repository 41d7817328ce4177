"""SVCCA and PWCCA: similarity of two representations after the best linear match of one with the other.

Canonical correlations of unrelated data are far from zero, and all 1 with as many directions as samples: at most N/10
directions of a side are used, and every value comes with its mean over random pairings as null.

Data flow: two ``Representations`` of the same samples -> principal directions -> canonical correlations -> one Estimate
per layer.

Shapes: L layers, N samples, D features, R directions (S of the other side), P pairings, B leave-out sets.
"""

import math

import torch
from torch import Tensor

from lightning_mm.core.estimate import Estimate
from lightning_mm.geometry.knn_overlap import null_band
from lightning_mm.geometry.peak import with_left_out
from lightning_mm.geometry.representations import Representations, exact_products, one_thread, pair_problems
from lightning_mm.geometry.resampling import (
    jackknife_blocks,
    jackknife_interval,
    permutation_problem,
    permutations,
    without_null,
)

_SAMPLES_PER_DIRECTION = 10
"""With fewer samples per direction, chance correlations dominate."""

_ROUNDING = 8
"""Squared singular values below this many machine epsilons of the largest are rounding."""

_SPANNED = 64
"""A direction of which a deletion leaves less than this many machine epsilons belonged to the deleted block alone."""

_DRAWS = 6
"""Random pairings; the values, means over directions, hardly vary between pairings."""


def svcca(
    a: Representations, b: Representations, variance: float = 0.99, groups: Tensor | None = None
) -> list[Estimate]:
    """Mean canonical correlation of the directions that hold most of the variance (Raghu et al. 2017).

    Args:
        a: L layers of N samples.
        b: As many layers of the same samples; the features may differ.
        variance: Share of each side's variance that its directions explain, if there are 10 samples for each.
        groups: (N,) int ids, equal for samples that share a picture; None: all are independent.

    Returns:
        Per layer the mean correlation, with k = the correlations averaged; the interval holds the directions fixed.
        The null is the mean over random pairings; there, mean rho^2 = max(R, S)/(N-1). Use
        ``null_models.adjust_for_chance`` to compare layers with different k.

    Example:
        >>> x = torch.randn(1, 60, 2, generator=torch.Generator().manual_seed(0))
        >>> sheared = x @ torch.tensor([[2.0, 1.0], [0.0, 1.0]])
        >>> round(svcca(Representations.of(x), Representations.of(sheared), variance=1.0)[0].value, 4)
        1.0
    """
    return _layerwise(a, b, variance, False, groups)


def pwcca(a: Representations, b: Representations, groups: Tensor | None = None) -> list[Estimate]:
    """Canonical correlations weighted by how much of ``a`` each accounts for (Morcos et al. 2018); not symmetric.

    The weight of a canonical variate h of ``a`` is sum_j |<h, x_j>| over the features x_j of ``a``: the value depends
    on the axes of ``a``; rotating ``b`` changes nothing. All directions for which there are samples are used.

    Args:
        a: L layers of N samples.
        b: As many layers of the same samples; the features may differ.
        groups: (N,) int ids, equal for samples that share a picture; None: all are independent.
    """
    return _layerwise(a, b, 1.0, True, groups)


def _layerwise(
    a: Representations, b: Representations, variance: float, weighted: bool, groups: Tensor | None
) -> list[Estimate]:
    n = a.num_samples
    order_PN = permutations(n, _DRAWS, groups=groups).to(a.centered.device)
    deleted = [block.to(a.centered.device) for block in jackknife_blocks(n, groups)]
    estimates = []
    with exact_products():
        for layer, problem in enumerate(pair_problems(a, b, _SAMPLES_PER_DIRECTION)):
            if problem:
                estimates.append(Estimate.undefined_because(problem, n))
                continue
            (a_NR, a_note), (b_NS, b_note) = (_directions(reps, layer, variance) for reps in (a, b))
            found = _matched(a_NR, b_NS, a.centered[layer] if weighted else None, order_PN, deleted)
            estimates.append(found.noted(*dict.fromkeys((a_note, b_note))))
    return without_null(estimates, permutation_problem(groups))


def _matched(a_NR: Tensor, b_NS: Tensor, weigh_ND: Tensor | None, order_PN: Tensor, deleted: list[Tensor]) -> Estimate:
    cross_RS, loadings_DR = a_NR.mT @ b_NS, None if weigh_ND is None else weigh_ND.mT @ a_NR
    whole = _mean_correlation(cross_RS, loadings_DR)
    left_out = [_mean_correlation(*_without(a_NR, b_NS, cross_RS, weigh_ND, loadings_DR, block)) for block in deleted]
    values_B = torch.stack([whole, *left_out])
    low, high = jackknife_interval(values_B, 0.0, 1.0)
    drawn_P = torch.stack([_mean_correlation(a_NR.mT @ b_NS[order_N], loadings_DR) for order_N in order_PN])
    band = null_band(drawn_P, None)
    k = min(cross_RS.shape)
    found = Estimate.of(float(whole), len(a_NR), low=float(low), high=float(high), k=k, **band)
    return with_left_out(found, values_B[1:])


def _directions(reps: Representations, layer: int, variance: float) -> tuple[Tensor, str]:
    """Orthonormal scores (N, R) of the leading directions, and a note if there are too few samples for all of them."""
    values_K, scores_NR = reps.principal[layer]
    share_K = values_K.double().cumsum(0) / values_K.double().sum()
    sound = int((values_K > _ROUNDING * torch.finfo(values_K.dtype).eps * values_K[0]).sum())
    wanted = min(int((share_K < variance).sum()) + 1, sound)
    kept = min(wanted, scores_NR.shape[1])
    if kept == wanted:
        return scores_NR[:, :kept], ""
    held = f"{kept} of {wanted} directions, {float(share_K[kept - 1]):.1%} of the variance"
    return scores_NR[:, :kept], f"{held}: {_SAMPLES_PER_DIRECTION} samples for each"


@one_thread()
def _mean_correlation(cross_RS: Tensor, loadings_DR: Tensor | None) -> Tensor:
    """() float64 mean of the canonical correlations, plain or weighted by explained share; NaN if not finite."""
    if not torch.isfinite(cross_RS).all():
        return torch.tensor(math.nan, dtype=torch.float64, device=cross_RS.device)
    if loadings_DR is None:
        return torch.linalg.svdvals(cross_RS).clamp_max(1).double().mean()
    variates_RK, rho_K, _ = torch.linalg.svd(cross_RS, full_matrices=False)
    weights_K = (loadings_DR @ variates_RK).abs().double().sum(0)
    return (weights_K / weights_K.sum() * rho_K.clamp_max(1)).sum()


@one_thread()
def _without(
    a_NR: Tensor,
    b_NS: Tensor,
    cross_RS: Tensor,
    weigh_ND: Tensor | None,
    loadings_DR: Tensor | None,
    block: Tensor,
) -> tuple[Tensor, Tensor | None]:
    """Cross products (R, S) and loadings (D, R) without the samples of a block: its share removed, whitened again."""
    gone_a, gone_b, kept = a_NR[block], b_NS[block], len(a_NR) - len(block)
    sum_a, sum_b = gone_a.sum(0), gone_b.sum(0)
    own_RR = torch.eye(len(sum_a)).to(a_NR) - gone_a.mT @ gone_a - sum_a.outer(sum_a) / kept
    own_SS = torch.eye(len(sum_b)).to(b_NS) - gone_b.mT @ gone_b - sum_b.outer(sum_b) / kept
    left_RS = cross_RS - gone_a.mT @ gone_b - sum_a.outer(sum_b) / kept
    (root_RR, fail_a), (root_SS, fail_b) = torch.linalg.cholesky_ex(own_RR), torch.linalg.cholesky_ex(own_SS)
    least = min(float(root.diagonal().min()) for root in (root_RR, root_SS))
    if fail_a or fail_b or least**2 < _SPANNED * torch.finfo(root_RR.dtype).eps:
        return torch.full_like(cross_RS, math.nan), None
    if weigh_ND is not None and loadings_DR is not None:
        gone_DR = weigh_ND[block].mT @ gone_a + weigh_ND[block].sum(0).outer(sum_a) / kept
        loadings_DR = torch.linalg.solve_triangular(root_RR, (loadings_DR - gone_DR).mT, upper=False).mT
    half_RS = torch.linalg.solve_triangular(root_RR, left_RS, upper=False)
    return torch.linalg.solve_triangular(root_SS, half_RS.mT, upper=False).mT, loadings_DR
