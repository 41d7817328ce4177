"""Intrinsic dimension of each layer from ratios of nearest-neighbor distances: TwoNN and GRIDE.

In a locally uniform cloud of dimension d the distances of neighbors n1 < n2 obey (r_n1 / r_n2)^d ~ Beta(n1, n2 - n1)
(Facco et al. 2017; Denti et al. 2022).

Data flow: ``Neighbors`` -> ln(r_n2 / r_n1) of each distinct sample -> ``TwoNN`` or ``Gride`` -> one Estimate per layer.
The null is the same estimator on isotropic noise with as many samples and features. Estimates above about 8 are too
low, the more so the fewer the samples: compare at equal N only, or use ``calibrated_dimension``, which inverts the
estimator's bias on Gaussian clouds of known dimension (computed once per process).

Shapes: L layers or clouds, N samples, K neighbors, D features. NaN marks a sample without a ratio.
"""

import math
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from lightning_mm.core.estimate import Estimate
from lightning_mm.geometry.neighbors import Neighbors
from lightning_mm.geometry.peak import ResampledEstimate, with_left_out
from lightning_mm.geometry.representations import Representations
from lightning_mm.geometry.resampling import group_left_out, half_width, jackknife_error

MIN_SAMPLES = 20
"""Distinct samples below which nothing is estimated."""

DEPENDENCE = 1.25
"""Factor on the standard error: near neighbors are often mutual, so that samples share distances. Over Gaussians, cubes
and spheres of 2 to 100 dimensions and 200 or 1000 samples the standard deviation was 0.95 to 1.8 times (median 1.2)
that of independent ratios."""

_BRACKET = (1e-3, 1e5)
"""Dimensions between which the likelihood equation is solved."""

_BISECTIONS = 40
"""Of the logarithm of the bracket: 2e-11 relative."""

_CURVE_DIMENSIONS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
_CURVE_CLOUDS = 2
"""Clouds whose estimates are averaged at each point of the calibration curve."""
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class TwoNN:
    """Second over first neighbor: ln(r2/r1) is exponential with rate d (Facco et al. 2017).

    Args:
        method: 'fit' is the line of Facco et al. through the empirical distribution; 'ml' the unbiased maximum
            likelihood estimate (N-1) / sum ln(r2/r1) (Denti et al. 2022).
        fraction: Share of the samples that the line is fitted to, smallest ratios first; the rest are outliers.
        n1: Always 1.
        n2: Always 2.
    """

    method: Literal["fit", "ml"] = "fit"
    fraction: float = 0.9
    n1: int = 1
    n2: int = 2

    def __call__(self, log_ratios: Tensor) -> Tensor:
        """(L,) dimensions of (L, N) log ratios; NaN or infinite where they do not determine one.

        Example:
            >>> ratios = torch.linspace(0.0005, 0.9995, 1000).log().neg()[None] / 3  # quantiles of the law for d = 3
            >>> round(float(TwoNN()(ratios)), 2), round(float(TwoNN("ml")(ratios)), 2)
            (3.0, 3.0)
        """
        known_LN = log_ratios.double().masked_fill(log_ratios.isnan(), math.inf).sort(1).values
        count_L1 = known_LN.isfinite().sum(1, keepdim=True)
        rank_N = torch.arange(1, known_LN.shape[1] + 1, device=known_LN.device)
        if self.method == "ml":
            return (count_L1[:, 0] - 1) / known_LN.masked_fill(rank_N > count_L1, 0).sum(1)
        used_LN = rank_N <= (count_L1 * self.fraction).long().clamp(max=count_L1 - 1)
        x_LN = known_LN.where(used_LN, 0)
        y_LN = -torch.log1p(-(rank_N / count_L1).where(used_LN, 0))
        return (x_LN * y_LN).sum(1) / x_LN.square().sum(1)


@dataclass(frozen=True)
class Gride:
    """Any two neighbors by maximum likelihood (Denti et al. 2022): a larger scale, less noise in the coordinates.

    Args:
        n1: The nearer neighbor.
        n2: The farther one.
    """

    n1: int = 16
    n2: int = 32

    def __call__(self, log_ratios: Tensor) -> Tensor:
        """(L,) dimensions of (L, N) log ratios: the root of the score, with N - 1 for N as in DADApy and ``TwoNN``.

        (N-1)/d + (n2-n1-1) sum ln(mu)/(1-mu^-d) - (n2-1) sum ln(mu) = 0; its second term falls with d, so that there
        is one root. NaN where it is outside 0.001 to 100000.
        """
        mu_LN = log_ratios.double().nan_to_num(0.0)
        used_LN, count_L = mu_LN > 0, (~log_ratios.isnan()).sum(1)
        low_L, high_L = (torch.full_like(mu_LN[:, 0], end) for end in _BRACKET)
        for _ in range(_BISECTIONS):
            middle_L = (low_L * high_L).sqrt()
            shares_LN = -torch.expm1(-middle_L[:, None] * mu_LN)  # 1 - mu^-d
            inner_LN = (mu_LN / shares_LN).where(used_LN, 1 / middle_L[:, None])  # its limit where the two tie
            score_L = (count_L - 1) / middle_L + (self.n2 - self.n1 - 1) * inner_LN.where(~log_ratios.isnan(), 0).sum(1)
            above_L = score_L < (self.n2 - 1) * mu_LN.sum(1)
            low_L, high_L = low_L.where(above_L, middle_L), middle_L.where(above_L, high_L)
        found_L = (low_L * high_L).sqrt()
        inside_L = (found_L > 1.01 * _BRACKET[0]) & (found_L < 0.99 * _BRACKET[1])
        return found_L.where(inside_L, math.nan)

    def fisher_error(self, log_ratios: Tensor, dimension: Tensor) -> Tensor:
        """(L,) standard error of ``dimension`` (L,) from the observed information, as if samples were independent."""
        mu_LN = log_ratios.double().nan_to_num(0.0)
        decay_LN = torch.exp(-dimension[:, None] * mu_LN)
        curvature_LN = ((mu_LN / (1 - decay_LN)).square() * decay_LN).where(mu_LN > 0, 1 / dimension[:, None].square())
        known_LN = ~log_ratios.isnan()
        information_L = known_LN.sum(1) / dimension.square()
        information_L += (self.n2 - self.n1 - 1) * curvature_LN.where(known_LN, 0).sum(1)
        return information_L.rsqrt()


RatioEstimator = TwoNN | Gride
"""Turns log ratios of the distances of neighbors ``n1`` and ``n2`` into a dimension per layer."""


def two_nn(
    neighbors: Neighbors,
    method: Literal["fit", "ml"] = "fit",
    fraction: float = 0.9,
    groups: Tensor | None = None,
) -> list[Estimate]:
    """Intrinsic dimension from the first two neighbors (Facco et al. 2017), layer by layer.

    Args:
        neighbors: L layers with at least 2 neighbors.
        method: 'fit' is DADApy's base and scikit-dimension's TwoNN, robust to outliers; 'ml' is DADApy's ml.
        fraction: Share of the ratios that 'fit' uses, smallest first.
        groups: (N,) int ids, equal for samples that depend on one another (same picture); None: all are independent.
    """
    return _dimensions(neighbors, TwoNN(method, fraction), groups)


def gride(neighbors: Neighbors, n1: int = 16, n2: int = 32, groups: Tensor | None = None) -> list[Estimate]:
    """Intrinsic dimension at the scale of neighbors n1 to n2 (Denti et al. 2022), layer by layer.

    Args:
        neighbors: L layers with at least n2 neighbors.
        n1: The nearer neighbor.
        n2: The farther one.
        groups: (N,) int ids, equal for samples that depend on one another; None: all are independent.
    """
    return _dimensions(neighbors, Gride(n1, n2), groups)


def _dimensions(neighbors: Neighbors, estimator: RatioEstimator, groups: Tensor | None) -> list[Estimate]:
    layers, n, width = neighbors.indices.shape
    if width < estimator.n2:
        few = f"too few: neighbour {estimator.n2} of {n} samples"
        return [Estimate.undefined_because(problem or few, n) for problem in neighbors.problems]
    ratios_LN = log_ratios(neighbors, estimator.n1, estimator.n2)
    value_L = estimator(ratios_LN)
    left_out_BL = group_left_out(lambda kept: estimator(ratios_LN[:, kept.to(ratios_LN.device)]), n, groups)
    width_L = half_width(jackknife_error(left_out_BL), len(left_out_BL) - 1) * DEPENDENCE
    apart_BL = value_L + DEPENDENCE * (left_out_BL - value_L)
    found = [
        _estimate(neighbors, layer, estimator, ratios_LN[layer], float(value_L[layer]), float(width_L[layer]))
        for layer in range(layers)
    ]
    return [with_left_out(*pair) for pair in zip(found, apart_BL.T, strict=True)]


def _estimate(
    neighbors: Neighbors, layer: int, estimator: RatioEstimator, ratios_N: Tensor, value: float, half: float
) -> Estimate:
    n, count = len(ratios_N), int((~ratios_N.isnan()).sum())
    if problem := neighbors.problems[layer]:
        return Estimate.undefined_because(problem, n)
    if count < MIN_SAMPLES:
        few = f"too few: {count} distinct samples with {estimator.n2} distinct neighbours"
        return Estimate.undefined_because(few, n)
    copies, ties = int(neighbors.duplicated[layer].sum()), int((ratios_N == 0).sum())
    if not math.isfinite(value):
        tied = f"ties: neighbours {estimator.n1} and {estimator.n2} are equally far for {ties} samples"
        return Estimate.undefined_because(tied, count)
    null = noise_dimension(count, neighbors.width, estimator, neighbors.indices.device)
    low, high = max(value - half, 0.0), value + half  # NaN stays NaN
    without = n - copies - count
    return Estimate.of(value, count, low=low, high=high, null=null, k=estimator.n2).noted(
        f"{copies} samples that coincide with an earlier one are left out" if copies else "",
        f"{without} samples have too few distinct neighbours" if without > 0 else "",
        f"neighbours {estimator.n1} and {estimator.n2} of {ties} samples are equally far" if ties else "",
    )


def log_ratios(neighbors: Neighbors, n1: int, n2: int) -> Tensor:
    """(L, N) ln(r_n2 / r_n1) among distinct samples; NaN for copies and where too few distinct neighbors are known."""
    index_LM = neighbors.indices.flatten(1).long()
    distinct_LNK = ~neighbors.duplicated.gather(1, index_LM).view_as(neighbors.indices)
    count_LNK = distinct_LNK.cumsum(2, dtype=torch.int32)
    near_LN, far_LN = (_nth_distance(neighbors.distances, count_LNK, nth) for nth in (n1, n2))
    return (far_LN / near_LN).log().masked_fill(neighbors.duplicated, math.nan)


def _nth_distance(distances_LNK: Tensor, count_LNK: Tensor, nth: int) -> Tensor:
    """(L, N) distance at which the count of distinct neighbors reaches ``nth``; NaN where it does not."""
    position_LN = (count_LNK < nth).sum(2)
    width = distances_LNK.shape[2]
    found_LN = distances_LNK.gather(2, position_LN.clamp(max=width - 1)[..., None])[..., 0]
    return found_LN.masked_fill(position_LN >= width, math.nan)


def calibrated_dimension(estimates: list[Estimate], estimator: RatioEstimator) -> list[Estimate]:
    """The dimension of the Gaussian cloud of as many samples that gets the same estimate.

    Args:
        estimates: From ``two_nn`` or ``gride``.
        estimator: The ``TwoNN(...)`` or ``Gride(...)`` that they come from.
    """
    return [_calibrated(estimate, estimator) for estimate in estimates]


def _calibrated(estimate: Estimate, estimator: RatioEstimator) -> Estimate:
    if estimate.value is None:
        return estimate
    assert estimate.n is not None, "the calibration curve depends on the number of samples"
    value, low, high, null = (
        None if number is None else invert_calibration(number, estimate.n, estimator)
        for number in (estimate.value, estimate.low, estimate.high, estimate.null)
    )
    if value is None:
        beyond = f"beyond the calibration curve: the estimate is {estimate.value:.3g}"
        return Estimate.undefined_because(beyond, estimate.n)
    plain = replace(estimate, value=value, low=low, high=high, null=null)
    if not isinstance(estimate, ResampledEstimate):
        return plain
    left_out = [invert_calibration(number, estimate.n, estimator) for number in estimate.left_out]
    return with_left_out(plain, torch.tensor([math.nan if number is None else number for number in left_out]))


def noise_dimension(n: int, dimension: int, estimator: RatioEstimator, device: torch.device = _CPU) -> float:
    """The estimate for isotropic noise of a known dimension, at ``n`` rounded to two significant digits.

    Args:
        n: Number of samples.
        dimension: D; the estimate grows with it without bound, so no smaller cloud can stand in for a larger one.
        estimator: Whose estimate.
        device: Where the cloud's N^2 D products are computed; it is drawn on the CPU, the same everywhere.
    """
    return _gaussian_estimate(_rounded(n), dimension, estimator, 1, device)


@cache
def _gaussian_estimate(n: int, dimension: int, estimator: RatioEstimator, clouds: int, device: torch.device) -> float:
    generator = torch.Generator().manual_seed(dimension)
    cloud = Representations.of(torch.randn(clouds, n, dimension, generator=generator).to(device))
    near = Neighbors.of(cloud, estimator.n2)
    ratios_LN = (near.distances[..., estimator.n2 - 1] / near.distances[..., estimator.n1 - 1]).log()
    return float(estimator(ratios_LN).mean())


@cache
def calibration_curve(n: int, estimator: RatioEstimator) -> tuple[tuple[float, float], ...]:
    """(true dimension, estimate) at ``n`` samples, from (0, 0) upwards in both."""
    points = [(0.0, 0.0)]
    for dimension in _CURVE_DIMENSIONS:
        estimate = _gaussian_estimate(n, dimension, estimator, _CURVE_CLOUDS, _CPU)
        if estimate > points[-1][1]:
            points.append((float(dimension), estimate))
    return tuple(points)


def invert_calibration(value: float, n: int, estimator: RatioEstimator) -> float | None:
    """The dimension of the Gaussian cloud that gets this estimate; None above the calibration curve.

    Args:
        value: An estimate.
        n: Its number of samples; the curve is that of ``n`` rounded to two significant digits.
        estimator: What computed it.
    """
    points = calibration_curve(_rounded(n), estimator)
    for (below, low), (above, high) in pairwise(points):
        if value <= high:
            return below + (above - below) * (value - low) / (high - low)
    return None


def _rounded(n: int) -> int:
    digits = 10 ** max(0, len(str(n)) - 2)
    return round(n / digits) * digits
