"""Orthogonal Procrustes: similarity of two representations after the best rotation.

The rotation is fitted, so that unrelated data score far above 0; their expected score follows from the two spectra.

Data flow: two ``Representations`` of the same samples -> nuclear norm of X'Y -> one Estimate per layer.

Shapes: L layers, N samples, D features (E of the other side), K singular values, S quadrature points, P pairings.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor

from lightning_mm.core.estimate import Estimate
from lightning_mm.geometry.representations import Representations, exact_products, one_thread, pair_problems
from lightning_mm.geometry.resampling import (
    clustered_mean_interval,
    permutation_problem,
    permutations,
    t_quantile,
    without_null,
)

_MIN_SAMPLES = 3
"""Two centered samples are one direction: every pair of representations would match."""

_DRAWS = 8
"""Random pairings where samples share a picture and the closed form does not hold; each takes an SVD per layer."""

_POINTS, _BISECTIONS = 48, 32
"""Quadrature points and bisection steps of the expected nuclear norm: 1e-4 relative error."""


@one_thread()
def procrustes(a: Representations, b: Representations, groups: Tensor | None = None) -> list[Estimate]:
    """Similarity after the best rotation, ||X'Y||_* / (||X|| ||Y||): 1 for rotated, shifted, scaled copies.

    At unit norm the squared distance of the two is 2 - 2 times this (Schoenemann 1966; Williams et al. 2021). The null
    is the mean over random pairings from ``expected_nuclear_norm``; its band is an upper bound by the Gaussian Poincare
    inequality. The interval is that of a sum over samples with the rotation fixed, which is exact to first order.

    Args:
        a: L layers of N samples.
        b: As many layers of the same samples; the features may differ, as if padded with zeros.
        groups: (N,) int ids, equal for samples that depend on one another (same picture); None: all are independent.

    Example:
        >>> x = torch.randn(1, 50, 8, generator=torch.Generator().manual_seed(0))
        >>> round(procrustes(Representations.of(x), Representations.of(2 * x.flip(2) + 1))[0].value, 4)
        1.0
    """
    estimates = []
    with exact_products():
        for layer, problem in enumerate(pair_problems(a, b, _MIN_SAMPLES)):
            if problem:
                estimates.append(Estimate.undefined_because(problem, a.num_samples))
                continue
            x_ND, y_NE = (_compact(reps.centered[layer]) for reps in (a, b))
            left_DK, values_K, right_KE = torch.linalg.svd(x_ND.mT @ y_NE, full_matrices=False)
            value = float(values_K.double().sum())
            low, high = _interval(value, ((x_ND @ left_DK) * (y_NE @ right_KE.mT)).sum(1), x_ND, y_NE, groups)
            if groups is not None and len(torch.unique(groups)) < a.num_samples:
                band = _drawn_band(x_ND, y_NE, groups)
            else:
                band = _expected_band(a.principal[layer][0], b.principal[layer][0], a.num_samples)
            estimates.append(Estimate.of(min(value, 1.0), a.num_samples, low=low, high=high, **band))
    return without_null(estimates, permutation_problem(groups))


def procrustes_angle(a: Representations, b: Representations, groups: Tensor | None = None) -> list[Estimate]:
    """arccos of ``procrustes``, 0 to pi/2 radians: a metric, triangle inequality included (Williams et al. 2021)."""
    return [_angle(similarity) for similarity in procrustes(a, b, groups)]


def expected_nuclear_norm(first_K: Tensor, second_K: Tensor, dimensions: int) -> float:
    """Mean of ||A O B||_* over random rotations O: the expected nuclear norm of unrelated data with these spectra.

    The eigenvalues w of A O B^2 O' A follow the free multiplicative convolution of those of A^2 and B^2 (Voiculescu
    1987): T(s) = sum w/(w+s) = sum a/(a+x) = sum b/(b+y), with x y = s (1-t)/t and t = T/dimensions, is solved by
    bisection, and sum sqrt(w) = 1/pi int T(s) ds/sqrt(s). Accurate to 2 % from ten dimensions, 6 % too large for one.

    Args:
        first_K: Squared diagonal of A, at most ``dimensions`` entries; the others are zero.
        second_K: Squared diagonal of B.
        dimensions: Dimension of the space that O rotates: N-1 for N centered samples.

    Example:
        >>> round(expected_nuclear_norm(torch.ones(50), torch.ones(50), 50), 2)  # the nuclear norm of a rotation
        50.0
    """
    a_K, b_K = first_K.double(), second_K.double()
    scale = a_K.sum() * b_K.sum() / (dimensions * min(len(a_K), len(b_K)))
    points_S = torch.linspace(math.log(1e-7), math.log(1e5), _POINTS, dtype=torch.float64, device=a_K.device)
    s_S = points_S.exp() * scale
    low_S = torch.full_like(points_S, math.log(1e-12)) + a_K.max().log()
    high_S = low_S + 60
    for _ in range(_BISECTIONS):
        middle_S = (low_S + high_S) / 2
        total_S = (a_K / (a_K + middle_S.exp()[:, None])).sum(1)
        share_S = total_S / dimensions
        y_S = s_S * (1 - share_S) / (share_S * middle_S.exp())
        above_S = (b_K / (b_K + y_S[:, None])).sum(1) > total_S
        low_S, high_S = torch.where(above_S, low_S, middle_S), torch.where(above_S, middle_S, high_S)
    integrand_S = s_S.sqrt() * total_S / math.pi
    # Beyond either end the integrand falls as the square root of s.
    return float(torch.trapezoid(integrand_S, points_S) + 2 * (integrand_S[0] + integrand_S[-1]))


@one_thread()
def _compact(centered_ND: Tensor) -> Tensor:
    """(N, min(N, D)) samples at unit norm, equal up to a rotation of the features."""
    n, d = centered_ND.shape
    unit_ND = centered_ND / centered_ND.norm()
    return torch.linalg.qr(unit_ND.mT, mode="r")[1].mT if d > n else unit_ND


def _interval(value: float, match_N: Tensor, x_ND: Tensor, y_NE: Tensor, groups: Tensor | None) -> tuple[float, float]:
    """95 % interval from the influence function of each sample on the match and on both norms."""
    norms_N = (x_ND.square().sum(1) + y_NE.square().sum(1)).double() / 2
    influence_N = value + len(match_N) * (match_N.double() - value * norms_N)
    _, low, high = clustered_mean_interval(influence_N[None], groups)
    return float(low.clamp_min(0)), float(high.clamp_max(1))


def _expected_band(first_K: Tensor, second_K: Tensor, n: int) -> dict[str, float]:
    norm = math.sqrt(float(first_K.sum()) * float(second_K.sum()))
    k = min(len(first_K), len(second_K))
    bound = math.sqrt(float((first_K[:k].double() * second_K[:k].double()).sum()) / (n - 1)) / norm
    null = expected_nuclear_norm(first_K, second_K, n - 1) / norm
    return {"null": null, "null_low": max(null - 1.96 * bound, 0.0), "null_high": min(null + 1.96 * bound, 1.0)}


@one_thread()
def _drawn_band(x_ND: Tensor, y_NE: Tensor, groups: Tensor) -> dict[str, float]:
    orders = permutations(len(x_ND), _DRAWS, groups=groups).to(x_ND.device)
    drawn_P = torch.stack([torch.linalg.svdvals(x_ND.mT @ y_NE[order_N]).sum() for order_N in orders])
    null, width = float(drawn_P.mean()), t_quantile(_DRAWS - 1) * float(drawn_P.std()) * math.sqrt(1 + 1 / _DRAWS)
    return {"null": null, "null_low": max(null - width, 0.0), "null_high": min(null + width, 1.0)}


def _angle(similarity: Estimate) -> Estimate:
    def turn(value: float | None) -> float | None:
        return None if value is None else math.acos(max(-1.0, min(value, 1.0)))

    return replace(
        similarity,
        value=turn(similarity.value),
        low=turn(similarity.high),
        high=turn(similarity.low),
        null=turn(similarity.null),
        null_low=turn(similarity.null_high),
        null_high=turn(similarity.null_low),
    )
