"""Distance correlation of two representations: 0 only where the samples of one say nothing about those of the other.

As Palacios et al. 2026, arXiv:2606.03871, use it: Euclidean distances of rows of length 1, and the biased form, whose
value for unrelated data is far above 0; the null says how far.

Data flow: two ``Representations`` of the same samples -> doubly centered distance matrices, by their sums alone -> one
Estimate per layer.

Shapes: L layers, N samples, D features, P random pairings, B leave-out sets (the first leaves none out).
"""

import torch
from torch import Tensor

from lightning_mm.core.estimate import Estimate
from lightning_mm.geometry.knn_overlap import null_band
from lightning_mm.geometry.peak import with_left_out
from lightning_mm.geometry.representations import Representations, exact_distances, exact_products, pair_problems
from lightning_mm.geometry.resampling import (
    jackknife_interval,
    leave_out_masks,
    permutation_problem,
    permutations,
    without_null,
)

_DRAWS = 50
"""Random pairings of the null band: its half width is accurate to a tenth."""


def distance_correlation(
    a: Representations,
    b: Representations,
    unit_rows: bool = True,
    groups: Tensor | None = None,
    seed: int = 0,
) -> list[Estimate]:
    """Distance correlation (Szekely et al. 2007) layer by layer; the null is its mean over random pairings.

    Args:
        a: L layers of N samples.
        b: As many layers of the same samples; the features may differ.
        unit_rows: Normalize each row, mean included, to length 1 first.
        groups: (N,) int ids, equal for samples that share a picture; None: all are independent.
        seed: Seed of the random pairings.

    Example:
        >>> x = torch.randn(1, 40, 3, generator=torch.Generator().manual_seed(0))
        >>> round(distance_correlation(Representations.of(x), Representations.of(5 * x), unit_rows=False)[0].value, 6)
        1.0
    """
    n = a.num_samples
    order_PN = permutations(n, _DRAWS, seed, groups).to(a.centered.device)
    estimates = []
    with exact_products():
        for layer, problem in enumerate(pair_problems(a, b)):
            if problem:
                estimates.append(Estimate.undefined_because(problem, n))
                continue
            a_NN, b_NN = (_distances(reps, layer, unit_rows) for reps in (a, b))
            values_B = _correlation(a_NN, b_NN, leave_out_masks(a_NN, groups))
            if not bool(torch.isfinite(values_B[0])):
                estimates.append(Estimate.undefined_because("no correlation: all distances are equal", n))
                continue
            low, high = jackknife_interval(values_B, 0.0, 1.0)
            all_N1 = torch.ones(n, 1, dtype=a_NN.dtype, device=a_NN.device)
            drawn_P = torch.cat([_correlation(a_NN, b_NN[order][:, order], all_N1) for order in order_PN])
            band = null_band(drawn_P, None)
            found = Estimate.of(float(values_B[0]), n, low=float(low), high=float(high), **band)
            estimates.append(with_left_out(found, values_B[1:]))
    return without_null(estimates, permutation_problem(groups))


def _distances(reps: Representations, layer: int, unit_rows: bool) -> Tensor:
    """(N, N) float64 Euclidean distances."""
    x_ND = (reps.centered[layer] + reps.mean[layer]).double()
    x_ND = torch.nn.functional.normalize(x_ND, dim=1) if unit_rows else x_ND
    return exact_distances(x_ND).clamp_min(0).fill_diagonal_(0).sqrt()


def _correlation(a_NN: Tensor, b_NN: Tensor, kept_NB: Tensor) -> Tensor:
    """(B,) distance correlation of the samples that each set keeps; NaN where the distances of a side are all equal."""
    both, own_a, own_b = (_covariance(x, y, kept_NB) for x, y in ((a_NN, b_NN), (a_NN, a_NN), (b_NN, b_NN)))
    return (both.clamp_min(0) / (own_a * own_b).sqrt()).sqrt()


def _covariance(a_NN: Tensor, b_NN: Tensor, kept_NB: Tensor) -> Tensor:
    """(B,) sum over pairs of the product of both doubly centered matrices: S(ab) - 2/n sum_i a_i b_i + S(a)S(b)/n^2."""
    n_B = kept_NB.sum(0)
    products_B = (kept_NB * ((a_NN * b_NN) @ kept_NB)).sum(0)
    a_NB, b_NB = (kept_NB * (side @ kept_NB) for side in (a_NN, b_NN))
    return products_B - 2 / n_B * (a_NB * b_NB).sum(0) + a_NB.sum(0) * b_NB.sum(0) / n_B.square()
