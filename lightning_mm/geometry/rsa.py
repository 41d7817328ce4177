"""Representational similarity analysis (RSA): do two representations rank the pairs of samples alike by distance?

The N(N-1)/2 pairs are far from independent: interval and null are computed over samples.

Data flow: two ``Representations`` of the same samples -> ranks of all pairwise distances -> Spearman correlation -> one
Estimate per layer.

Shapes: L layers, M samples used, P pairs, R runs of equal values, B leave-out sets (the first leaves none out).
"""

from typing import Literal

import torch
from torch import Tensor

from lightning_mm.core.estimate import Estimate
from lightning_mm.geometry.hsic import MIN_SAMPLES
from lightning_mm.geometry.null_models import MantelTerms, permutation_band
from lightning_mm.geometry.peak import with_left_out
from lightning_mm.geometry.representations import Representations, exact_distances, exact_products, pair_problems
from lightning_mm.geometry.resampling import jackknife_interval, leave_out_masks, permutation_problem, without_null

_ROUNDING = 128
"""Squared distances are rounded to this many machine epsilons before ranking, so that rounding errors order no ties."""

_TIES = 0.01
"""Probability of two equal distances above which a note says so."""


Distance = Literal["euclidean", "correlation"]


def rsa(
    a: Representations,
    b: Representations,
    most: int = 500,
    groups: Tensor | None = None,
    distance: Distance = "euclidean",
) -> list[Estimate]:
    """Spearman correlation, ties averaged, of the distances of all pairs (Kriegeskorte et al. 2008).

    Args:
        a: L layers of N samples.
        b: As many layers of the same samples; the features may differ.
        most: Largest number of samples; of more, this many are drawn once with a fixed seed, and a note says so.
        groups: (N,) int ids, equal for samples that depend on one another (same picture); None: all are independent.
        distance: 'euclidean', or 'correlation': 1 minus the correlation of two samples' uncentered features, which
            neither a sample's norm nor a shift of all its features changes.

    Returns:
        Per layer the correlation with a delete-group jackknife interval (for fixed ranks), and the band of random
        pairings of the samples (Mantel 1967), in closed form unless samples share a picture.

    Example:
        >>> x = torch.randn(1, 50, 8, generator=torch.Generator().manual_seed(0))
        >>> round(rsa(Representations.of(x), Representations.of(2 * x.flip(2) + 1))[0].value, 4)
        1.0
    """
    n = a.num_samples
    used_M = torch.randperm(n, generator=torch.Generator().manual_seed(0))[:most].sort().values
    group_M = None if groups is None else groups.cpu()[used_M]
    drawn = f"{most} of {n} samples" if most < n else ""
    estimates = []
    with exact_products():
        for layer, problem in enumerate(pair_problems(a, b, MIN_SAMPLES)):
            if problem:
                estimates.append(Estimate.undefined_because(problem, n))
                continue
            distances = [_distances(reps, layer, used_M.to(reps.centered.device), distance) for reps in (a, b)]
            if flat := sum(int(squared_MM.isnan().all(1).sum()) for squared_MM in distances):
                estimates.append(Estimate.undefined_because(f"no correlation: {flat} samples have equal features", n))
                continue
            (a_MM, a_ties), (b_MM, b_ties) = map(_rank_matrix, distances)
            tied = (
                f"ties: two distances are equal with probability {max(a_ties, b_ties):.1%}"
                if max(a_ties, b_ties) > _TIES
                else ""
            )
            estimates.append(_correlation(a_MM, b_MM, group_M).noted(drawn, tied))
    return without_null(estimates, permutation_problem(group_M))


def average_ranks(values_P: Tensor) -> tuple[Tensor, float]:
    """Ranks (P,) float64 from 1 with ties averaged, and the probability that two random values are tied.

    Example:
        >>> average_ranks(torch.tensor([5.0, 7.0, 5.0]))[0].tolist()
        [1.5, 3.0, 1.5]
    """
    ordered_P, order_P = values_P.sort()
    _, run_P, count_R = torch.unique_consecutive(ordered_P, return_inverse=True, return_counts=True)
    mean_R = count_R.cumsum(0).double() - (count_R - 1) / 2
    ranks_P = torch.empty_like(ordered_P, dtype=torch.float64)
    ranks_P[order_P] = mean_R[run_P]
    return ranks_P, float((count_R.double() * (count_R - 1)).sum()) / max(len(values_P) * (len(values_P) - 1), 1)


def _distances(reps: Representations, layer: int, used_M: Tensor, distance: Distance) -> Tensor:
    """(M, M) squared distances, or an increasing function of them; NaN for a sample of equal features."""
    if distance == "euclidean":
        return reps.squared_distances(layer)[used_M][:, used_M]
    rows_MD = reps.centered[layer, used_M] + reps.mean[layer]
    rows_MD = rows_MD - rows_MD.mean(1, keepdim=True)
    return exact_distances(rows_MD / rows_MD.norm(dim=1, keepdim=True))


def _rank_matrix(squared_MM: Tensor) -> tuple[Tensor, float]:
    """(M, M) symmetric centered ranks of the distances, RMS 1, diagonal zero; and the probability of a tie."""
    rows_P, columns_P = torch.triu_indices(len(squared_MM), len(squared_MM), 1)
    values_P = squared_MM[rows_P, columns_P]
    step = _ROUNDING * torch.finfo(values_P.dtype).eps
    ranks_P, tied = average_ranks((values_P.double().log() / step).round_())
    ranks_P -= ranks_P.mean()
    ranks_P /= ranks_P.square().mean().sqrt()
    matrix_MM = torch.zeros_like(squared_MM)
    matrix_MM[rows_P, columns_P] = ranks_P.to(matrix_MM)
    return matrix_MM + matrix_MM.mT, tied


def _correlation(a_MM: Tensor, b_MM: Tensor, group_M: Tensor | None) -> Estimate:
    m = len(a_MM)
    if not (torch.isfinite(a_MM).all() and torch.isfinite(b_MM).all()):
        return Estimate.undefined_because("no order: all distances are equal", m)
    kept_MB = leave_out_masks(a_MM, group_M)
    count_B = kept_MB.double().sum(0)
    pairs_B = count_B * (count_B - 1)

    def total(of_MM: Tensor) -> Tensor:
        return (kept_MB * (of_MM @ kept_MB)).double().sum(0) / pairs_B

    mean_a_B, mean_b_B = total(a_MM), total(b_MM)
    spread_a_B, spread_b_B = total(a_MM.square()) - mean_a_B.square(), total(b_MM.square()) - mean_b_B.square()
    correlation_B = (total(a_MM * b_MM) - mean_a_B * mean_b_B) / (spread_a_B.sqrt() * spread_b_B.sqrt())
    low, high = jackknife_interval(correlation_B, -1.0, 1.0)
    band = permutation_band(MantelTerms.of_distances(a_MM), MantelTerms.of_distances(b_MM), group_M)
    found = Estimate.of(float(correlation_B[0]), m, low=float(low), high=float(high), **band)
    return with_left_out(found, correlation_B[1:])
