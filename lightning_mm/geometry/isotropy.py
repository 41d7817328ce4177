"""Isotropy: whether the samples of one layer point in all directions or into a cone.

Data flow: ``Representations`` -> unit rows, mean included -> one Estimate per layer: ``anisotropy``, ``median_cosine``,
``uniformity``.

Shapes: L layers, N samples, D features, M pairs.
"""

import math

import torch
from torch import Tensor

from lightning_mm.core.estimate import Estimate
from lightning_mm.geometry.representations import Representations, exact_products
from lightning_mm.geometry.resampling import clustered_mean_interval

_TERMS = 200
"""Terms of the series of 0F1 beyond 3t; the largest is at t or before, then they decrease factorially."""


def unit_rows(reps: Representations, layer: int) -> Tensor:
    """(N, D) features of one layer, mean included, each of length 1; a zero vector stays zero."""
    return torch.nn.functional.normalize(reps.centered[layer] + reps.mean[layer], dim=1)


def direction_problem(reps: Representations, layer: int) -> str:
    """Why the directions (unit rows) of a layer are undefined; empty where they are defined."""
    if reps.problems[layer]:
        return reps.problems[layer]
    zeros = int(((reps.centered[layer] + reps.mean[layer]) == 0).all(1).sum())
    return f"no direction: {zeros} of {reps.num_samples} samples are zero" if zeros else ""


def anisotropy(reps: Representations, groups: Tensor | None = None) -> list[Estimate]:
    """Mean cosine of two different samples (Ethayarajh 2019), layer by layer; 0 for isotropic directions.

    (||sum of unit rows||^2 - N) / (N (N-1)); its null band is that of isotropic directions.

    Args:
        reps: L layers.
        groups: (N,) int ids, equal for samples that depend on one another (same picture); None: all are independent.
    """
    n, width = reps.centered.shape[1:]

    def measure(layer: int) -> Estimate:
        if problem := direction_problem(reps, layer):
            return Estimate.undefined_because(problem, n)
        unit_ND = unit_rows(reps, layer)
        with exact_products():
            terms_N = (unit_ND @ unit_ND.sum(0) - 1) / (n - 1)
        mean, low, high = pairwise_mean_interval(terms_N, groups)
        band = 1.96 * math.sqrt(2 / (n * (n - 1) * width))
        return Estimate.of(mean, n, low=low, high=high, null=0.0, null_low=-band, null_high=band)

    return [measure(layer) for layer in range(reps.num_layers)]


def median_cosine(reps: Representations, groups: Tensor | None = None) -> list[Estimate]:
    """Median cosine of two different samples, layer by layer: ``anisotropy`` without the influence of a few outliers.

    The interval inverts that of the share of cosines below the median (Woodruff 1952).

    Args:
        reps: L layers.
        groups: (N,) int ids, equal for samples that depend on one another (same picture); None: all are independent.
    """
    n, width = reps.centered.shape[1:]
    upper = torch.triu_indices(n, n, 1, device=reps.centered.device)

    def measure(layer: int) -> Estimate:
        if problem := direction_problem(reps, layer):
            return Estimate.undefined_because(problem, n)
        cosine_NN = cosines(reps, layer)
        upper_M = cosine_NN[upper[0], upper[1]].sort().values
        median = upper_M[len(upper_M) // 2] if len(upper_M) % 2 else upper_M[len(upper_M) // 2 - 1 :][:2].mean()
        below_N = (cosine_NN.fill_diagonal_(math.inf) <= median).sum(1).double() / (n - 1)
        share, low, high = pairwise_mean_interval(below_N, groups)
        low, high = (_at(upper_M, 0.5 + end - share) for end in (low, high))
        band = 1.96 * math.sqrt(math.pi / (n * (n - 1) * width))
        return Estimate.of(float(median), n, low=low, high=high, null=0.0, null_low=-band, null_high=band)

    return [measure(layer) for layer in range(reps.num_layers)]


def uniformity(reps: Representations, t: float = 2.0, groups: Tensor | None = None) -> list[Estimate]:
    """ln mean exp(-t ||x_i - x_j||^2) over pairs of unit rows (Wang and Isola 2020); lower is more uniform.

    Args:
        reps: L layers.
        t: Inverse squared width of the kernel; the smallest possible value approaches -2t as D grows.
        groups: (N,) int ids, equal for samples that depend on one another (same picture); None: all are independent.

    Returns:
        Estimates with the value of the uniform distribution on the sphere as null.
    """
    n, width = reps.centered.shape[1:]
    null = sphere_uniformity(width, t)

    def measure(layer: int) -> Estimate:
        if problem := direction_problem(reps, layer):
            return Estimate.undefined_because(problem, n)
        log_near_NN = 2 * t * (cosines(reps, layer).double() - 1).fill_diagonal_(-math.inf)
        nearest = float(log_near_NN.max())  # subtracted, as the exponentials of a large t all underflow
        mean, low, high = pairwise_mean_interval((log_near_NN - nearest).exp_().sum(1) / (n - 1), groups)
        value, below, above = nearest + math.log(mean), (low - mean) / mean, (high - mean) / mean
        return Estimate.of(value, n, low=value + below, high=value + above, null=null)

    return [measure(layer) for layer in range(reps.num_layers)]


def sphere_uniformity(width: int, t: float = 2.0) -> float:
    """Uniformity of the uniform distribution on the unit sphere of R^D: -2t + ln 0F1(; D/2; t^2).

    Example:
        >>> [round(sphere_uniformity(d), 4) for d in (2, 3, 16, 128)]
        [-1.575, -2.0798, -3.513, -3.9375]
    """
    k = torch.arange(_TERMS + int(3 * t)).double()
    half = torch.tensor(width / 2, dtype=torch.float64)
    logs = 2 * k * math.log(t) - torch.lgamma(k + 1) - torch.lgamma(half + k) + torch.lgamma(half)
    return -2 * t + float(torch.logsumexp(logs, 0))


def cosines(reps: Representations, layer: int) -> Tensor:
    """(N, N) cosines of the samples of one layer, mean included."""
    unit_ND = unit_rows(reps, layer)
    with exact_products():
        return unit_ND @ unit_ND.T


def pairwise_mean_interval(terms_N: Tensor, groups: Tensor | None) -> tuple[float, float, float]:
    """Mean over all pairs of samples with its 95 % interval.

    A sample takes both places in its pairs, so that the error is twice that of the mean of the terms (Hoeffding 1948).

    Args:
        terms_N: Each sample's mean over its partners.
        groups: (N,) int ids, equal for samples that depend on one another; None: all are independent.

    Returns:
        Mean, low and high; low and high are NaN with fewer than 3 groups.
    """
    mean, low, high = (float(end) for end in clustered_mean_interval(terms_N[None].double(), groups))
    return mean, mean - 2 * (mean - low), mean + 2 * (high - mean)


def _at(sorted_M: Tensor, level: float) -> float:
    return float(sorted_M[round(min(max(level, 0.0), 1.0) * (len(sorted_M) - 1))]) if math.isfinite(level) else math.nan
