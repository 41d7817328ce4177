"""How many dimensions the samples really spread over, from the distances of near neighbours.

Data flow: ``Neighbours`` -> ratios of distances, without samples that coincide with an earlier one -> ``ratios`` ->
one Estimate per layer, its null the estimate for isotropic noise with as many samples and features. Estimates above
about 8 are too low, the more so the fewer the samples: compare at equal N only, or read ``calibrated_dimension``.

Shapes: L layers, N samples, K neighbours.
"""

import math
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from lightning_mm.core.estimate import Estimate
from lightning_mm.geometry.calibration import invert, noise_dimension
from lightning_mm.geometry.gride import Gride, RatioEstimator, TwoNN
from lightning_mm.geometry.neighbors import Neighbours
from lightning_mm.geometry.resampling import group_jackknife, half_width

_LEAST = 20
"""Distinct samples below which nothing is estimated."""

_SHARED = 1.25
"""Near neighbours are often mutual, so that samples share distances. Over Gaussians, cubes and spheres of 2 to 100
dimensions and 200 or 1000 samples the standard deviation was 0.95 to 1.8 times (median 1.2) that of separate ones."""


def two_nn(
    neighbours: Neighbours,
    method: Literal["fit", "ml"] = "fit",
    fraction: float = 0.9,
    groups: Tensor | None = None,
) -> list[Estimate]:
    """Intrinsic dimension from the first two neighbours (Facco et al. 2017), layer by layer.

    Args:
        neighbours: L layers; at least 2 neighbours.
        method: 'fit' is DADApy's base and scikit-dimension's TwoNN, robust to outliers; 'ml' is DADApy's ml.
        fraction: Share of the ratios that 'fit' uses, smallest first.
        groups: (N,) int ids of samples that depend on one another.
    """
    return _dimensions(neighbours, TwoNN(method, fraction), groups)


def gride(neighbours: Neighbours, n1: int = 16, n2: int = 32, groups: Tensor | None = None) -> list[Estimate]:
    """Intrinsic dimension at the scale of neighbours n1 to n2 (Denti et al. 2022), layer by layer.

    Args:
        neighbours: L layers; at least n2 neighbours.
        n1: The nearer neighbour.
        n2: The farther one.
        groups: (N,) int ids of samples that depend on one another.
    """
    return _dimensions(neighbours, Gride(n1, n2), groups)


def calibrated_dimension(estimates: list[Estimate], estimator: RatioEstimator) -> list[Estimate]:
    """The dimension of the Gaussian cloud of as many samples that gets the same estimate.

    Args:
        estimates: From ``two_nn`` or ``gride``.
        estimator: ``TwoNN(...)`` or ``Gride(...)`` as they were made with.
    """
    return [_calibrated(estimate, estimator) for estimate in estimates]


def log_ratios(neighbours: Neighbours, n1: int, n2: int) -> Tensor:
    """(L, N) ln(r_n2 / r_n1) among distinct samples; NaN for copies and where too few distinct neighbours are known."""
    index_LM = neighbours.indices.flatten(1).long()
    distinct_LNK = ~neighbours.copies.gather(1, index_LM).view_as(neighbours.indices)
    count_LNK = distinct_LNK.cumsum(2, dtype=torch.int32)
    near_LN, far_LN = (_nth(neighbours.distances, count_LNK, nth) for nth in (n1, n2))
    return (far_LN / near_LN).log().masked_fill(neighbours.copies, math.nan)


def _nth(distances_LNK: Tensor, count_LNK: Tensor, nth: int) -> Tensor:
    """(L, N) distance at which the count of distinct neighbours reaches ``nth``; NaN where it does not."""
    position_LN = (count_LNK < nth).sum(2)
    width = distances_LNK.shape[2]
    found_LN = distances_LNK.gather(2, position_LN.clamp(max=width - 1)[..., None])[..., 0]
    return found_LN.masked_fill(position_LN >= width, math.nan)


def _dimensions(neighbours: Neighbours, estimator: RatioEstimator, groups: Tensor | None) -> list[Estimate]:
    layers, n, width = neighbours.indices.shape
    if width < estimator.n2:
        return [
            Estimate.undefined_because(p or f"too few: neighbour {estimator.n2} of {n} samples", n)
            for p in neighbours.problems
        ]
    ratios_LN = log_ratios(neighbours, estimator.n1, estimator.n2)
    value_L = estimator(ratios_LN)
    error_L, dof = group_jackknife(lambda kept: estimator(ratios_LN[:, kept.to(ratios_LN.device)]), n, groups)
    width_L = half_width(error_L, dof) * _SHARED
    return [
        _estimate(neighbours, layer, estimator, ratios_LN[layer], float(value_L[layer]), float(width_L[layer]))
        for layer in range(layers)
    ]


def _estimate(
    neighbours: Neighbours, layer: int, estimator: RatioEstimator, ratios_N: Tensor, value: float, half: float
) -> Estimate:
    count = int((~ratios_N.isnan()).sum())
    if problem := neighbours.problems[layer]:
        return Estimate.undefined_because(problem, len(ratios_N))
    if count < _LEAST:
        return Estimate.undefined_because(
            f"too few: {count} distinct samples with {estimator.n2} distinct neighbours", len(ratios_N)
        )
    copies, ties = int(neighbours.copies[layer].sum()), int((ratios_N == 0).sum())
    if not math.isfinite(value):
        return Estimate.undefined_because(
            f"ties: neighbours {estimator.n1} and {estimator.n2} are equally far for {ties} samples", count
        )
    null = noise_dimension(count, neighbours.width, estimator, neighbours.indices.device)
    low, high = max(value - half, 0.0), value + half  # NaN stays NaN
    estimate = Estimate.of(value, count, low=low, high=high, null=null, k=estimator.n2)
    return estimate.noted(
        f"{copies} samples that coincide with an earlier one are left out" if copies else "",
        f"{len(ratios_N) - copies - count} samples have too few distinct neighbours"
        if copies + count < len(ratios_N)
        else "",
        f"neighbours {estimator.n1} and {estimator.n2} of {ties} samples are equally far" if ties else "",
    )


def _calibrated(estimate: Estimate, estimator: RatioEstimator) -> Estimate:
    if estimate.value is None:
        return estimate
    assert estimate.n is not None, "the calibration curve depends on the number of samples"
    value, low, high, null = (
        None if number is None else invert(number, estimate.n, estimator)
        for number in (estimate.value, estimate.low, estimate.high, estimate.null)
    )
    if value is None:
        return Estimate.undefined_because(
            f"beyond the calibration curve: the estimate is {estimate.value:.3g}", estimate.n
        )
    return replace(estimate, value=value, low=low, high=high, null=null)
